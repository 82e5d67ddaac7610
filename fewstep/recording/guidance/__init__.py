"""How a pipeline guides: the value that switches it off, the answers that it asks for, and its sum of them."""
