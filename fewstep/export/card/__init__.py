"""The model card: what a person needs to sample the student with stock diffusers, and to trust it."""
