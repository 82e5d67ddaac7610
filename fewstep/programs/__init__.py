"""What a user starts from Python: distil a teacher, make its pairs, cache its conditions, plan a run."""
