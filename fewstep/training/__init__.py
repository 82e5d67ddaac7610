"""The contract between a method and the training loop, and the loop: updates, processes, checkpoints, log, previews."""
