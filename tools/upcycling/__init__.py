"""Parts of tools/upcycle.py: the text it looks at, and the upcycled model as a source of weights."""
