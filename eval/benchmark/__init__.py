"""The table of all methods on the embedded teachers, in cells that are resumed and bound to their recipes."""
