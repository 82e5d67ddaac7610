"""Finding and loading a teacher: a folder, a hub id or an embedded one, with a LoRA, in fewer bits, and its licence."""
