"""Labels of tokens."""

IGNORE = -100  # of a token that is not counted: Hugging Face's and PyTorch's convention
