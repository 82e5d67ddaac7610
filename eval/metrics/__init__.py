"""One metric a file, and one row each in the table of all."""
