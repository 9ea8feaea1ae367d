"""`katana bench`: speed, measured."""
