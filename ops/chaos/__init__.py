"""`katana chaos` and `katana soak`: a run under faults, and the checker of what must hold."""
