"""A pipeline's loop: where it starts, which of its networks a step asks, and what it tells them."""
