"""Text to token ids and back, behind one small value: `load_tokenizer(spec)` in load.py.

load.py            which kind lies at a path, told by its content; the bytes
tokenizer.py       the value
hugging_face.py    tokenizer.json, or vocab.json and merges.txt, as transformers reads their folder
sentence_piece.py  a SentencePiece .model
tiktoken.py        Llama 3's tokenizer.model
special.py         which ids end and begin a text: what the files of a folder say, and whether they agree
identity.py        the fingerprint, by which data and weights are known to have the same tokens
convert.py         a tokenizer.json of a tokenizer.model
byte_files.py      the bytes tokenizer as files that transformers loads
"""
