"""Training state to disk and back, onto the same layout or another."""
