"""Stock networks as student, teacher or critic: x0, guidance, features and derivatives; full copies and adapters."""
