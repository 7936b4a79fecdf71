"""Chat templates and masks, against transformers' own masks and those that TRL makes (goldens)."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from moe_engine.errors import ConfigError, DataError
from moe_engine.prepare.fitting import Limits, fitted
from moe_engine.prepare.sample_formats import Sample
from moe_engine.prepare.template import Template
from moe_engine.prepare.tokenizer.load import load_tokenizer

CHATML = (
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}<|im_start|>system\nBe kind."
    "<|im_end|>\n{% endif %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message.role == 'user' %}"
    "[INST] {{ message.content }} [/INST]{% else %} {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}\n{% else %}{{ message.content }}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NOTHING_ENDS = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
SPECIAL = [
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
]  # fmt: skip


def folder(tmp_path: Path, template: str, eos: str = "<|im_end|>") -> str:
    """A byte-level tokenizer with the special tokens of several families."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("h", "e"), ("Ċ", "Ċ")]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    path = tmp_path / "tokenizer"
    path.mkdir(exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": eos}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "chat_template.jinja").write_text(template)
    return str(path)


def made(tmp_path: Path, template: str, **options: Any) -> Template:
    return Template(load_tokenizer(folder(tmp_path, template, **options)))


def runs(template: Template, messages: list[dict[str, Any]], **options: Any) -> list[str]:
    """The texts that are trained."""
    rendered, out = template.render(messages, **options), [[]]
    for i, on in zip(rendered.ids.tolist(), rendered.trained):
        if on:
            out[-1].append(i)
        elif out[-1]:
            out.append([])
    return [template.tokenizer.decode(ids) for ids in out if ids]


def chat(*turns: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


CHAT = chat("the question?", "the answer", "and\n\nthen", " more\n\n ü😀")
ENDS = [
    (CHATML, "<|im_end|>", ["the answer<|im_end|>\n", " more\n\n ü😀<|im_end|>\n"]),
    (LLAMA3, "<|eot_id|>", ["the answer<|eot_id|>", "more\n\n ü😀<|eot_id|>"]),
    (MISTRAL, "</s>", [" the answer</s>", "  more\n\n ü😀</s>"]),
    (MARKED, "<|im_end|>", ["the answer<|im_end|>", " more\n\n ü😀<|im_end|>"]),
]


@pytest.mark.parametrize(("template", "eos", "wanted"), ENDS, ids=["chatml", "llama3", "mistral", "marked"])
def test_what_each_template_trains(tmp_path: Path, template: str, eos: str, wanted: list[str]) -> None:
    """The end of a turn is trained, the begin of text is there once at most, and the text is transformers' own."""
    ours = made(tmp_path, template, eos=eos)
    assert runs(ours, CHAT) == wanted and runs(ours, CHAT, train_on="last-response") == wanted[-1:]
    theirs = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    rendered = ours.render(CHAT)
    assert rendered.ids.tolist() == theirs.apply_chat_template(CHAT, return_dict=False)
    assert rendered.ids.tolist().count(theirs.bos_token_id) == template.count("bos_token")
    assert ours.render(CHAT, train_on="all").trained.all()
    if template is MARKED:
        found = theirs.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
        assert rendered.trained.astype(int).tolist() == found["assistant_masks"]


def test_trls_rows(tmp_path: Path) -> None:
    """Ids and labels of TRL 1.16 with assistant_only_loss (measured; word wN has id N)."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, 64)}
    backend = Backend(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<pad>", "<s>", "</s>", "<unk>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m['role']=='assistant' %}w60 {% generation %}{{ m['content'] }} </s>"
        "{% endgeneration %} w63 {% else %}{{ 'w61' if m['role']=='user' else 'w62' }} {{ m['content'] }} w63 "
        "{% endif %}{% endfor %}"
    )
    template = Template(load_tokenizer(str(tmp_path)))
    messages = [{"role": "system", "content": "w10 w11"}, *chat("w12 w13 w14", "w15 w16", "w17", "w18 w19 w20")]
    rendered = template.render(messages)
    assert rendered.ids.tolist() == [
        62, 10, 11, 63, 61, 12, 13, 14, 63, 60, 15, 16, 2, 63, 61, 17, 63, 60, 18, 19, 20, 2, 63,
    ]  # fmt: skip
    assert [int(i) for i, on in zip(rendered.ids, rendered.trained) if on] == [15, 16, 2, 18, 19, 20, 2]
    long = Sample(chat("w40 w41 w42 w43", "w44 w45 w46 w47 w48"))
    (cut,) = fitted(template, long, "responses", Limits(length=8))
    # TRL keeps the first 8 ids; here the prompt may fill 6 of them, so that two tokens of the answer are left
    assert cut.ids.tolist() == [61, 40, 41, 42, 63, 60, 44, 45] and cut.trained.tolist() == [False] * 6 + [True] * 2


def test_special_tokens_in_messages_stay_text(tmp_path: Path) -> None:
    template = made(tmp_path, CHATML)
    theirs = template.model.token_to_id
    messages = chat("say <|im_end|> and <s>", "it is </s><|im_start|>!")
    ids = template.render(messages).ids.tolist()
    plain = template.render(chat("say it", "it is")).ids.tolist()
    for token in SPECIAL:
        assert ids.count(theirs(token)) == plain.count(theirs(token)), token
    assert template.tokenizer.decode(ids).count("<|im_end|>") == 4
    assert runs(template, messages) == ["it is </s><|im_start|>!<|im_end|>\n"]


def test_a_response_that_nothing_ends_gets_the_end_of_text(tmp_path: Path) -> None:
    template = made(tmp_path, NOTHING_ENDS)
    rendered = template.render(chat("q", "a"))
    assert rendered.ids[-1] == template.tokenizer.eos_id and rendered.trained[-1]
    assert template.render(chat("q", "a"), train_on="last-response").trained.sum() < len(rendered.ids)


def test_templates_that_cannot_be_used(tmp_path: Path) -> None:
    forgets = CHATML.replace(
        "{{ message.content }}", "{{ message.content if loop.last or message.role == 'user' else '...' }}"
    )
    template = made(tmp_path, forgets)
    template.render(chat("q", "a"))
    with pytest.raises(DataError, match=r"turn 2 of 4 \(assistant\): the template is not prefix-consistent"):
        template.render(CHAT)
    with pytest.raises(DataError, match="the template refuses the conversation: roles must alternate"):
        made(tmp_path, MISTRAL).render([*chat("q"), *chat("q", "a")])
    with pytest.raises(ConfigError, match="--template auto: the template refuses"):
        made(tmp_path, "{% for message in messages %}{{ message.content")
    (tmp_path / "tokenizer" / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="has no chat template; choose one with --template: instruction, or a file"):
        Template(load_tokenizer(str(tmp_path / "tokenizer")))
    with pytest.raises(ConfigError, match=r"--template nowhere\.jinja: cannot be read"):
        Template(load_tokenizer("bytes"), "nowhere.jinja")


def test_the_instruction_template(tmp_path: Path) -> None:
    """S0's: also for a tokenizer without a template, here of bytes."""
    template = Template(load_tokenizer("bytes"), "instruction")
    rendered = template.render(chat("Say it.", "It."))
    text = "### Instruction:\nSay it.\n\n### Response:\nIt."
    assert rendered.ids.tolist() == [*text.encode(), 256]
    assert rendered.trained.tolist() == [False] * (len(text) - 3) + [True] * 4


def test_tool_calls_where_the_template_knows_none(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "look"}}]}
    answer = [*chat("q"), call, {"role": "tool", "content": "found"}, {"role": "assistant", "content": "a"}]
    assert runs(made(tmp_path, CHATML), answer) == ['{"name": "look"}<|im_end|>\n', "a<|im_end|>\n"]


@pytest.mark.parametrize("prompt", [10, 200, 2000])
@pytest.mark.parametrize("response", [3, 100, 3000])
def test_the_prompt_gives_way_first(prompt: int, response: int) -> None:
    """S0.9: at most 75 % for the instruction, the response fills the rest."""
    template = Template(load_tokenizer("bytes"), "instruction")
    sample = Sample(chat("p" * prompt, "r" * response))
    (whole,) = fitted(template, sample, "responses", Limits())
    (cut,) = fitted(template, sample, "responses", Limits(length=256))
    if len(whole.ids) <= 256:
        assert cut.ids.tolist() == whole.ids.tolist()
        return
    assert cut.prompt == min(whole.prompt, 192) and len(cut.ids) == min(cut.prompt + response + 1, 256)
    assert template.tokenizer.decode(cut.ids).partition("### Response:\n")[1]


def test_limits_of_prompt_and_response() -> None:
    """S1.8: prompt <= 64, answer <= 32."""
    template = Template(load_tokenizer("bytes"), "instruction")
    (cut,) = fitted(template, Sample(chat("p" * 100, "r" * 100)), "responses", Limits(96, 64, 32))
    assert cut.prompt == 64 and len(cut.ids) == 96 and cut.trained.sum() == 32


def test_both_halves_of_a_pair_have_one_prompt() -> None:
    template = Template(load_tokenizer("bytes"), "instruction")
    turns = [*chat("a", "b"), {"role": "user", "content": "p" * 100}]
    long, short = ({"role": "assistant", "content": text} for text in ("r" * 300, "s"))
    chosen, rejected = fitted(template, Sample([*turns, long], rejected=[short], shared=3), "responses", Limits(200))
    assert chosen.prompt == rejected.prompt == 150 and chosen.ids[:150].tolist() == rejected.ids[:150].tolist()
    assert chosen.trained.sum() == 50 and rejected.trained.sum() == 2  # the turn before is not trained
