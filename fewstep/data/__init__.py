"""What a run reads, and its batches: prompts, labels, real images, noise-sample pairs, in files that are checked."""
