"""Finding and loading a teacher: from a folder, the hub or the package, with a LoRA, in fewer bits; its licence."""
