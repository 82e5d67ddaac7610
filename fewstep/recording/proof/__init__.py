"""The proof of a recording: own calls of the network against what the pipeline hands to its scheduler."""
