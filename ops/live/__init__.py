"""`katana top` and `katana watch`: a run as it goes."""
