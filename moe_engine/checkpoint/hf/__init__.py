"""Hugging Face folders: a checkpoint whose pieces are named by a table of its family, read and written as any other."""
