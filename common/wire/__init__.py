"""What Python's side knows of the wire: the scripts, a function each, and the fields of a rollout's record."""
