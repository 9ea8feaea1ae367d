"""Faults of every kind, injected into the real processes, and the checker that counts what they cost."""
