"""What training takes in memory, measured and beside its plan."""
