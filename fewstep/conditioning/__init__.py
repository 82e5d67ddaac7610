"""What a network is told besides sample and time: a tree of tensors per prompt or label, and batches of them."""
