"""Training state to disk and back, onto the same layout or another.

find.py says which checkpoint `--resume` means, open.py reads it, save.py writes one; hf/ has Hugging Face folders.
"""
