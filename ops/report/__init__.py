"""`katana report`: a run's folder as plots and a page."""
