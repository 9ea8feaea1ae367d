"""`katana replay`: other settings on recorded rollouts."""
