"""Networks that turn images into features: one family a file, their weights from files that are checked."""
