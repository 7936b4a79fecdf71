"""Documents to token shards, before any training: no rank, no model, no torch.

formats.py      files and folders -> pieces -> documents, or bad rows with file:line and reason
json_array.py   the values of one large JSON array, without reading it whole
pipeline.py     formats + tokenizer -> shards, in parallel worker processes
default.py      the corpus of a run that names none
progress.py     how far it is
"""
