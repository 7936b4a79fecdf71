"""A tokenizer.json of a tokenizer.model, for readers that know no other; transformers makes it."""

import json
import tempfile
from pathlib import Path
from typing import Any

from moe_engine.prepare.tokenizer.identity import Encode, difference
from moe_engine.prepare.tokenizer.tokenizer import CONFIG, MODEL

ANY_CLASS = "PreTrainedTokenizerFast"  # of which tokenizer.json alone decides, in all versions of transformers


def tokenizer_json(model: bytes, added: dict[str, int], encode: Encode) -> bytes | None:
    """The file, with the `added` tokens; None where it would split text otherwise than `encode`."""
    from transformers import AutoTokenizer

    listed = {str(i): {"content": text, "special": True, "normalized": False} for text, i in added.items()}
    config: dict[str, Any] = {"tokenizer_class": ANY_CLASS, "added_tokens_decoder": listed}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, MODEL).write_bytes(model)
        Path(folder, CONFIG).write_text(json.dumps(config))
        made = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False).backend_tokenizer
    made.encode_special_tokens = True
    same = difference(encode, lambda text: made.encode(text, add_special_tokens=False).ids) is None
    return made.to_str().encode() if same and all(made.token_to_id(text) == i for text, i in added.items()) else None
