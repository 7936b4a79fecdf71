"""The bytes tokenizer as files that transformers loads: the same ids, 0 to 255 the bytes of UTF-8 and 256 the end."""

import json

from moe_engine.prepare.tokenizer.identity import BYTES

END = 256  # ends a document
END_TEXT = "<|endoftext|>"


def files() -> dict[str, bytes]:
    """tokenizer.json, a byte-level BPE without merges, and tokenizer_config.json."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    end = {"id": END, "content": END_TEXT, "special": True, "normalized": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": {character: i for i, character in enumerate(BYTES)}, "merges": []},
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_TEXT,
        "bos_token": None,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    return {
        name: (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
        for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config))
    }
