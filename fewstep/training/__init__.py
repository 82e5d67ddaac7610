"""The contract of a method, and the loop: updates, processes, checkpoints, log and previews."""
