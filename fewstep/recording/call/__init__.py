"""A pipeline's call: its arguments, which of them carry prompts, labels or items, and what no pipeline can mean."""
