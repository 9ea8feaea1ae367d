"""`katana compare` and `katana match`: policies × seeds under one budget."""
