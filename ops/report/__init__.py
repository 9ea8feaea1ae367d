"""`katana report`: plots and a page of a run's folder."""
