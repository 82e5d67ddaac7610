"""A student under the other pipelines of its family: which there are, walked on stand-ins, and what is said of them."""
