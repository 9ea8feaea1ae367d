"""Processes of a run, and the commands that start, check and clean it."""
