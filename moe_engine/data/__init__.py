"""Disk to Batch: documents are read, tokenised, kept as memory-mapped shards, cut into windows and mixed.

    formats.py    files and folders -> pieces -> documents, or bad rows with file:line and reason
    tokenizer.py  text -> token ids (bytes, SentencePiece, Hugging Face, tiktoken)
    shards.py     token files with their index and manifest: written atomically, opened memory-mapped
    prepare.py    formats + tokenizer -> shards, in parallel worker processes
    order.py      a seeded order of documents and windows, reshuffled every epoch
    mixture.py    which domain the next sample comes from
    loader.py     windows -> Batch for this data rank; evaluation batches

Nothing is imported here: preparing data needs no torch.
"""
