"""What a run reads: prompts and labels, real images, noise-sample pairs; cached, and complete or absent."""
