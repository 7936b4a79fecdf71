"""More rows for tokens: those that were there keep their bits, those added start as a new model's do."""

from pathlib import Path

import pytest
import torch

from moe_engine.checkpoint.hf.folder import HfFolder
from moe_engine.checkpoint.hf.resize import Resized
from moe_engine.checkpoint.open import Checkpoint
from tests.checkpoint.hf.small import save, tensors_of, theirs, transformers
from tools.convert_hf import main as convert


@pytest.mark.parametrize("tied", [False, True])
def test_case_19_rows_are_added_for_tokens_past_the_vocabulary(
    tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = theirs("mixtral", tie_word_embeddings=tied, initializer_range=0.05).to(torch.bfloat16)
    save(model, tmp_path / "hf", side=False)
    arguments = ["import", "--hf", str(tmp_path / "hf"), "--out", str(tmp_path / "ckpt"), "--resize-vocab", "1096"]
    assert convert(arguments) == 0
    assert f"vocabulary 96 -> 1096: {1000 * (2 - tied)} rows drawn, std 0.05" in capsys.readouterr().out
    reader, before = Checkpoint(tmp_path / "ckpt"), HfFolder(tmp_path / "hf")
    for name, shape in before.shapes.items():
        old, new = before.whole(name, dtype=None), reader.whole(name, dtype=None)
        assert new.dtype == torch.bfloat16 and torch.equal(new[: shape[0]], old), name
        assert new.shape == ((1096, *shape[1:]) if name in ("embedding.weight", "head.weight") else shape), name
    new = reader.whole("embedding.weight")[96:]
    assert abs(float(new.std()) / 0.05 - 1) < 0.02 and abs(float(new.mean())) < 0.002
    if not tied:
        assert not torch.equal(reader.whole("head.weight")[96:], new)
    assert convert(["export", "--checkpoint", str(tmp_path / "ckpt"), "--out", str(tmp_path / "out")]) == 0
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert loaded.config.vocab_size == 1096 and not info["missing_keys"] and not info["mismatched_keys"]
    there, here = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "hf")
    assert there.keys() == here.keys()
    assert all(torch.equal(there[name][: len(tensor)], tensor) for name, tensor in here.items())


def test_case_19_rows_are_not_cut_and_any_part_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(theirs("llama"), tmp_path / "hf", side=False)
    out = ["--out", str(tmp_path / "ckpt")]
    assert convert(["import", "--hf", str(tmp_path / "hf"), *out, "--resize-vocab", "95"]) == 78
    assert "--resize-vocab 95: " in capsys.readouterr().err and not (tmp_path / "ckpt").exists()
    resized = Resized(HfFolder(tmp_path / "hf"), 100)
    whole = resized.part("head.weight", ((0, 100), (0, 32)))
    for box in (((90, 99), (0, 32)), ((97, 100), (3, 9)), ((0, 50), (0, 1)), ((96, 96), (0, 32))):
        (a, b), (c, d) = box
        assert torch.equal(resized.part("head.weight", box), whole[a:b, c:d]), box
