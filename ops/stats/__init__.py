"""Statistics: intervals, saving, endings."""
