"""Fine-tuning as a user starts it, on rows of a file."""

import json
from pathlib import Path

import pytest

from launch.finetune_moe import own_flags
from moe_engine.log.rows import read_rows
from moe_engine.prepare.tokenizer.byte_files import files
from tests.checkpoint.hf.small import save, tensors_of, theirs
from tests.launch.test_pretrain_moe import Done, refused
from tests.launch.test_pretrain_moe import run as run_script


def finetune(*arguments: str | Path, ranks: int = 0) -> Done:
    return run_script(*arguments, ranks=ranks, script="launch/finetune_moe.py")


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral of 4 experts that knows bytes."""
    folder = save(
        theirs("mixtral", vocab_size=264, eos_token_id=256, bos_token_id=None),
        tmp_path_factory.mktemp("hf") / "hf",
        side=False,
    )
    for name, content in files().items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [{"instruction": f"Count to {i}.", "output": ", ".join(map(str, range(i)))} for i in range(1, 41)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_flags_of_other_trainers() -> None:
    """S1.13 to S1.17."""
    given = "--model_id m --data-file d --batch-size 2 --grad-accum 8 --max_target_length=32 --lr 1e-5 --resume auto"
    assert own_flags(given.split()) == [
        "--init-from", "m", "--files", "d", "--micro-batch", "2", "--set", "train.accumulation=8", "--max-response=32",
        "--lr", "1e-5", "--resume", "auto",
    ]  # fmt: skip


def test_two_epochs_on_two_ranks(hf: Path, rows: Path, tmp_path: Path) -> None:
    arguments = ("--model-id", hf, "--data-file", rows, "--template", "instruction", "--epochs", "2", "--ep", "2")
    sizes = ("--batch-size", "2", "--grad-accum", "2", "--seq-length", "128", "--output-dir", tmp_path / "run")
    done = finetune(*arguments, *sizes, "--lr", "3e-3", ranks=2)
    assert done.code == 0, done.err + done.out
    assert "Loading samples (alpaca format, all samples)..." in done.out
    assert "Final mixed dataset: 40 samples" in done.out and "Train samples: 38, eval samples: 2" in done.out
    assert "packing     samples: 38 samples in " in done.out and " sequences of 128, " in done.out
    found = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert f"Step {len(found)}/{len(found)} |" in done.out and len(found) % 2 == 0
    labels = [row["labelled_tokens"] for row in found]
    assert sum(labels[: len(labels) // 2]) == sum(labels[len(labels) // 2 :])  # each epoch holds every sample
    assert found[-1]["lm_loss"] < found[0]["lm_loss"]
    (evaluated,) = read_rows(tmp_path / "run" / "eval.jsonl")
    assert evaluated["step"] == len(found)


def test_a_dry_run_tries_the_sources(hf: Path, rows: Path, tmp_path: Path) -> None:
    done = finetune(
        *("--init-from", hf, "--files", rows, "--template", "instruction", "--seq-length", "64", "--dry-run"),
        *("--max-samples", "9", "--out", tmp_path / "run"),
    )
    assert done.code == 0, done.err
    assert "samples     samples: alpaca format, weight 1, 9 samples at most; prepared when the run starts" in done.out
    assert done.out.endswith("ok\n") and not (tmp_path / "run").exists()


def test_taught_routers_resume_and_export(hf: Path, tmp_path: Path) -> None:
    """The label embedding goes along with checkpoints, onto another layout too, and not into exports."""
    rows, out = tmp_path / "rows.jsonl", tmp_path / "run"
    lines = [{"question": f"q{i}", "answer": f"a{i}", "expert_label": ("maths", "code")[i % 2]} for i in range(60)]
    rows.write_text("\n".join(map(json.dumps, lines)))
    common = ("--init-from", hf, "--data-file", rows, "--template", "instruction", "--seq-length", "64", "--out", out)
    settings = ("--routing-weight", "0.5", "--set", "train.save_every=2", "--set", "train.eval_every=0", "--lr", "1e-2")
    first = finetune(*common, *settings, "--steps", "2", "--global-batch", "2", "--ep", "2", ranks=2)
    assert first.code == 0, first.err
    again = (*common, *settings, "--steps", "4", "--global-batch", "2", "--resume", "auto")
    second = finetune(*again, "--export-hf", tmp_path / "exported")
    assert second.code == 0, second.err
    assert "what each label prefers: expert share, the first ones" in second.out and "  code: " in second.out
    found = read_rows(out / "metrics.jsonl")
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    assert all(row["label_accuracy"].keys() <= {"code", "maths"} and len(row["routing_accuracy"]) == 3 for row in found)
    names = tensors_of(tmp_path / "exported").keys()
    assert names == tensors_of(hf).keys()


def test_what_cannot_be_trained_on(hf: Path, rows: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "run", "--seq-length", "128")
    refused(finetune("--init-from", hf, *out), 78, "nothing to train on: give --files, --mixture or --data")
    refused(finetune("--files", rows, *out), 78, "--init-from: not given, expected the Hugging Face folder")
    refused(finetune("--init-from", hf, "--files", rows, *out), 78, "has no chat template; choose one with --template")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"instruction": "a", "output": "b"}\n{"instruction": 1, "output": "b"}\n')
    template = ("--template", "instruction")
    done = finetune("--init-from", hf, "--files", broken, *template, *out)
    refused(done, 65, r"broken\.jsonl:2: field 'instruction' is int; expected a string")
