"""What belongs to one item: what its pictures change of a network's arguments, and of its sample between steps."""
