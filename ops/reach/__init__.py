"""The way to a run from outside: its Redis, its id, its config. `run.py` is the front; see there."""
