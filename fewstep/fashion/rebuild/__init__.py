"""What python -m fewstep.fashion.build does, one idea a file."""
