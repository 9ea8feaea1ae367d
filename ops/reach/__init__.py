"""The one way to a run from outside."""
