"""The page that a job ends in: one file that opens without a network, and its plots as pictures."""
