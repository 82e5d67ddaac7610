"""One file per method. Each holds a configuration, one class, and a whole training step in its paper's order."""
