"""Dense parents as transformers saves them, a text and prompts, and tools/upcycle.py on them, in this process."""

from pathlib import Path

import torch
from torch import nn

from tests.checkpoint.hf.small import LLAMA3, save, theirs
from tools.upcycle import main

SIZES = {"vocab_size": 300, "num_key_value_heads": 2, "rope_parameters": LLAMA3}


def make_home(folder: Path) -> Path:
    """Dense parents (fp32, bf16, others for mix) of 3 layers and 40 neurons, a text and prompts."""
    save(theirs("llama", **SIZES), folder / "dense", side=False)
    save(theirs("llama", **SIZES).to(torch.bfloat16), folder / "bf16", side=False)
    for name in ("math", "code"):
        model = theirs("llama", **SIZES)
        torch.manual_seed(len(name) + ord(name[0]))
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
        save(model, folder / name, side=False)
    (folder / "text.txt").write_text("".join(f"{i} times {i + 1} is {i * i + i}; " for i in range(400)))
    experts = [
        f"{{positive_prompts: [{word} a, {word}], negative_prompts: [{word}]}}" for word in "sum poem code".split()
    ]
    (folder / "prompts.yaml").write_text("experts:\n" + "".join(f"- {expert}\n" for expert in experts))
    return folder


def run(home: Path, method: str, out: Path, *more: object, hf: str = "dense") -> int:
    """The tool on a parent of `home`; out of 4 experts unless `more` says so."""
    given = ["--hf", home / hf, "--method", method, "--out", out, "--tokenizer", "bytes", "--text", home / "text.txt"]
    given += ["--seq-length", 32, "--text-tokens", 2048, "--receipt-tokens", 64]
    return main([str(word) for word in (*given, *(() if method == "mix" else ("--experts", 4)), *more)])
