"""What is read back from the files of a run; no torch."""
