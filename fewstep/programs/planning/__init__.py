"""What a run would take, worked out on a teacher without weights."""
