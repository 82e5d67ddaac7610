"""One file per method: its settings, one class, and a whole training step in its paper's order."""
