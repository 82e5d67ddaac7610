"""The Triton forms, one file for each operation; imported only where one is about to run."""
