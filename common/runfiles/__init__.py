"""What stands in a run's folder: a class a record, one reader of lines, the folder as a whole."""
