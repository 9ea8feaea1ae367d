"""`katana trace`: what each process of a run did when."""
