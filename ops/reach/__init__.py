"""The way to a run from outside: its Redis, its id, its plane, its config. The front is `run.py`."""
