"""A run's folder: a class for each record, one reader of lines, the folder as a whole."""
