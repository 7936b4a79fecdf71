"""A SentencePiece .model (Llama 2, Mistral, Mixtral), and the tokens that the files beside it add to its pieces."""

from moe_engine.errors import ConfigError
from moe_engine.prepare.tokenizer.convert import ANY_CLASS, tokenizer_json
from moe_engine.prepare.tokenizer.identity import fingerprint
from moe_engine.prepare.tokenizer.special import Settings, added_tokens, special_of
from moe_engine.prepare.tokenizer.tokenizer import CONFIG, JSON, KINDS, MODEL, Files, Tokenizer, kept_of


def sentence_piece(spec: str, files: Files, settings: Settings) -> Tokenizer:
    """The tokenizer of files that hold a model; its own end of text, unless a file beside it names another."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise ConfigError(f"tokenizer {spec}: needs sentencepiece; pip install sentencepiece") from None
    try:
        model = SentencePieceProcessor(model_proto=files[MODEL])
    except (RuntimeError, OSError):
        raise ConfigError(
            f"tokenizer {spec}: neither SentencePiece, tokenizer.json nor tiktoken ranks; expected {KINDS}"
        ) from None
    pieces = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    added = added_tokens(spec, settings)
    known = pieces | added
    usual = {
        "eos_token": model.id_to_piece(model.eos_id()) if model.eos_id() >= 0 else None,
        "bos_token": model.id_to_piece(model.bos_id()) if model.bos_id() >= 0 else None,
        "pad_token": model.id_to_piece(model.pad_id()) if model.pad_id() >= 0 else None,
    }
    if moved := next((text for text, i in added.items() if pieces.get(text, i) != i), None):
        raise ConfigError(
            f"tokenizer {spec}: {moved} has id {pieces[moved]} in the vocabulary and {added[moved]} in {CONFIG}; take "
            "both files from the same release"
        )
    size, texts = max(known.values()) + 1, {i: text for text, i in known.items()}
    special = special_of(spec, settings, known.get, lambda i: texts.get(i, str(i)), size, usual)

    def decode(ids: list[int]) -> str:
        """Without the added tokens, whose ids are past the model's pieces."""
        return model.decode([i for i in ids if i < len(pieces)])

    def kept() -> dict[str, bytes]:
        """The files, with a tokenizer.json made of the model where one splits text alike."""
        content = tokenizer_json(files[MODEL], added, model.encode)
        whole = files if content is None else {**files, JSON: content}
        return kept_of(whole, settings, special, texts, tokenizer_class=ANY_CLASS if content else None)

    name = fingerprint(pieces, model.encode, special.eos_id)
    return Tokenizer(
        "sentencepiece",
        spec,
        size,
        special,
        name,
        model.encode,
        decode,
        kept,
    )
