"""What a user starts from Python: distil, make pairs, cache conditions, plan a run."""
