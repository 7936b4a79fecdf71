"""Token shards to Batch: memory-mapped, cut into windows and mixed. `moe_engine.prepare` makes the shards.

    tokenizer.py  text -> token ids (bytes, SentencePiece, Hugging Face, tiktoken)
    shards.py     token files with their index and manifest: written atomically, opened memory-mapped
    order.py      a seeded order of documents and windows, reshuffled every epoch
    mixture.py    which domain the next sample comes from
    loader.py     windows -> Batch for this data rank; evaluation batches
    corpus.py     the domains of a run, opened for training and evaluation

Nothing is imported here: tokenizers and shards need no torch.
"""
