"""Running a pipeline's own call under observation: what its networks get and give, and what its scheduler is told."""
