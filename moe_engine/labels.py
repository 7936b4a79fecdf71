"""Labels of tokens, and the weights that labels train."""

IGNORE = -100  # of a token that is not counted: Hugging Face's and PyTorch's convention
LABEL_EMBEDDING = "label_embedding"  # of supervised routing: trained and saved with a model, never exported


def beside_the_model(weight: str) -> bool:
    """Whether a weight is trained with a model and is no part of it."""
    return weight.startswith(LABEL_EMBEDDING)
