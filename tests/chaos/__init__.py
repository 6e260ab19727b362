"""Deaths of every kind at every moment, and proof that each job survives them and ends once. See `__main__`."""
