"""An exported model says the same in transformers' generate() as here, token by token."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_engine.checkpoint.hf.export import ExportOptions, export_checkpoint
from moe_engine.checkpoint.hf.folder import HfFolder
from moe_engine.checkpoint.hf.to_checkpoint import import_folder
from moe_engine.checkpoint.open import Checkpoint
from moe_engine.config import Model
from moe_engine.model.transformer import Transformer
from moe_engine.parallel.mesh import Mesh
from tests.checkpoint.hf.small import LLAMA3, ours, save, theirs, transformers

NEW = 24


def greedy(decoder: Transformer, prompt_BS: Tensor) -> Tensor:
    """The most likely next token, NEW times, from the logits of the whole sequence each time."""
    tokens_BS = prompt_BS
    for _ in range(NEW):
        count, length = tokens_BS.shape
        logits = decoder.logits(tokens_BS, torch.arange(length).expand_as(tokens_BS))
        next_B = logits.view(count, length, -1)[:, -1].argmax(dim=1)
        tokens_BS = torch.cat([tokens_BS, next_B[:, None]], dim=1)
    return tokens_BS


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", ExportOptions()),
        ("llama", ExportOptions(version=4)),
        ("mixtral", ExportOptions()),
        ("mixtral", ExportOptions(layout="fused")),
        ("mixtral", ExportOptions(version=4, shard_gb=3e-5)),
        ("mixtral", ExportOptions(layout="fused", version=5)),
    ],
    ids=str,
)
def test_generates_the_same_tokens(family: str, options: ExportOptions, tmp_path: Path) -> None:
    original = theirs(family, rope_parameters=LLAMA3)
    import_folder(HfFolder(save(original, tmp_path / "hf", side=False)), tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out", options)
    reader = Checkpoint(tmp_path / "checkpoint")
    model = Model.model_validate(reader.manifest["run"]["model"])
    prompt = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(5))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        wanted = loaded.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NEW, eos_token_id=None
        )
        found = greedy(ours(reader, model, Mesh()), prompt)
    assert wanted.shape == (2, 7 + NEW) and torch.equal(found, wanted)
    assert len(set(wanted[:, 7:].flatten().tolist())) > 5, "no loop of a few tokens, in which mistakes would hide"
