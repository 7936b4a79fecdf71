"""Where a run would start: afresh, with the weights of a folder, or from a checkpoint; and whether that can work.

Nothing is written, and no tensor is read: headers and manifests say enough. The checksums of files are compared when
the run starts.
"""

from pathlib import Path
from typing import Any

from moe_engine.checkpoint.compare import differences
from moe_engine.checkpoint.folders import folder_of, steps_in
from moe_engine.checkpoint.manifest import read_manifest
from moe_engine.checkpoint.reader import check_present, check_resume
from moe_engine.config import Run
from moe_engine.errors import ConfigError, DataError
from moe_engine.host.files import obstacle

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def start_lines(run: Run, checkpoint: tuple[Path, dict[str, Any]] | None) -> list[str]:
    """Start and end of a run, with its warnings. Raises ConfigError or DataError where the run itself would."""
    if checkpoint:
        lines = resume_lines(run, *checkpoint)
    else:
        warnings, start = weight_warnings(run), run.train.init_from
        first = f"with the weights of {start}" if start else "afresh, with random weights"
        lines = [f"start       {first}", *(f"warning: {line}" for line in warnings)]
    if run.train.export_hf:
        from moe_engine.checkpoint.hf.export import check_exportable

        came_from = Path(run.train.init_from) if run.train.init_from else None
        check_exportable(run.model, Path(run.train.export_hf), came_from)
        lines.append(f"export      {run.train.export_hf}, when the run ends")
    return lines


def checkpoint_of(run: Run) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that the run would go on from, and its manifest; None if it would not."""
    root, resume = Path(run.train.out) / "checkpoints", run.train.resume
    if there := obstacle(root):
        raise ConfigError(f"--out {run.train.out}: {there} cannot be written to; choose a folder that you can write to")
    steps = steps_in(root)
    check_resume(run, steps)
    if resume == "auto":
        return newest(root, steps) if steps else None
    if not resume:
        return None
    check_present(Path(resume))
    return Path(resume), read_manifest(Path(resume))


def newest(root: Path, steps: list[int]) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint whose manifest is whole."""
    damaged = []
    for step in reversed(steps):
        try:
            return folder_of(root, step), read_manifest(folder_of(root, step))
        except DataError as error:
            damaged.append(str(error))
    raise DataError(f"no checkpoint under {root} is whole: {'; '.join(damaged)}")


def resume_lines(run: Run, folder: Path, manifest: dict[str, Any]) -> list[str]:
    """What goes on, and what is no more as it was; the loader judges the data."""
    if "hf" in manifest:
        raise ConfigError(f"{folder} holds weights without a training state: start from them with --init-from")
    now = run.model_dump(mode="json")
    if not run.data.domains:  # of the default corpus, which the run prepares itself
        now["data"].pop("domains")
    changes = differences(manifest["run"], now)
    return [f"start       from {folder}, {manifest['step']:,} steps done", *(f"warning: {line}" for line in changes)]


def weight_warnings(run: Run) -> list[str]:
    """What is to be said of the weights that a run which resumes nothing starts with. ConfigError or DataError when
    they cannot be its weights."""
    if not run.train.init_from:
        return []
    from moe_engine.checkpoint.hf.first import changes_of, check_shapes, open_weights
    from moe_engine.weights import weight_shapes

    folder = Path(run.train.init_from)
    source = open_weights(folder)
    check_shapes(source, weight_shapes(run.model))
    lines = changes_of(source, run.model)
    if not run.data.domains and not run.data.tokenizer and any((folder / name).exists() for name in TOKENIZERS):
        lines.append(f"no --data is given: the run reads Python's sources as bytes, which are other tokens in {folder}")
    return lines
