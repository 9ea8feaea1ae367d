"""The files in a run's folder: a class per record, one reader of lines, the folder as a whole."""
