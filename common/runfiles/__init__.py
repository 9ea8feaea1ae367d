"""What is in a run's folder: `records` says what its lines mean, `lines` reads and writes them."""
