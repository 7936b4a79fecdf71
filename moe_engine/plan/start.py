"""Where a run would start: afresh, with the weights of a folder, or from a checkpoint; and whether that can work.

Nothing is written, and no tensor is read: headers and manifests say enough. The checksums of files are compared when
the run starts.
"""

from pathlib import Path
from typing import Any, NamedTuple

from moe_engine.checkpoint.folders import folder_of, steps_in
from moe_engine.checkpoint.manifest import read_manifest
from moe_engine.checkpoint.resume_checks import check_present, check_resume, setting_changes
from moe_engine.config import Run
from moe_engine.errors import ConfigError, DataError
from moe_engine.host.files import obstacle
from moe_engine.plan.out_folder import check_out_folder
from moe_engine.plan.tokenizers import check_tokenizers


class Start(NamedTuple):
    """Where a run starts: a checkpoint and its manifest, or first weights and what is to be said of them."""

    checkpoint: tuple[Path, dict[str, Any]] | None
    warnings: list[str]


def start_of(run: Run) -> Start:
    """Where the run starts, once it is sure that it can, and that it can write what it ends with. Reads headers only.

    ConfigError or DataError otherwise.
    """
    checkpoint = checkpoint_of(run)
    check_out_folder(run, checkpoint is not None and checkpoint[0].resolve().parent == checkpoints_of(run).resolve())
    warnings = [] if checkpoint else weight_warnings(run)  # weights of another model are refused before one is built
    check_tokenizers(run, checkpoint)
    if run.train.export_hf:
        from moe_engine.checkpoint.hf.export import check_exportable

        first = Path(run.train.init_from) if run.train.init_from else None
        check_exportable(run, checkpoint[0] if checkpoint else first)
    return Start(checkpoint, warnings)


def start_lines(run: Run, start: Start) -> list[str]:
    """Start and end of a run, with its warnings. ConfigError where the run itself would refuse to resume."""
    if start.checkpoint:
        lines = resume_lines(run, *start.checkpoint)
    else:
        first = run.train.init_from
        lines = [f"start       {f'with the weights of {first}' if first else 'afresh, with random weights'}"]
    lines += [f"warning: {line}" for line in start.warnings]
    return lines + [f"export      {run.train.export_hf}, when the run ends"] * bool(run.train.export_hf)


def checkpoints_of(run: Run) -> Path:
    """The folder of a run's checkpoints."""
    return Path(run.train.out) / "checkpoints"


def checkpoint_of(run: Run) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that the run would go on from, and its manifest; None if it would not."""
    root, resume = checkpoints_of(run), run.train.resume
    if there := obstacle(root.parent):
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
    changes = setting_changes(manifest["run"], now)
    first = f"start       from {folder}, {manifest['step']:,} steps done"
    if manifest["step"] >= run.train.steps:
        first += f"; train.steps is {run.train.steps:,}: nothing is left to train"
    return [first, *(f"warning: {line}" for line in changes)]


def weight_warnings(run: Run) -> list[str]:
    """What is to be said of the weights that a run which resumes nothing starts with. ConfigError or DataError when
    they cannot be its weights."""
    if not run.train.init_from:
        return []
    from moe_engine.checkpoint.hf.first_weights import changes_of, check_shapes, let_in, open_weights
    from moe_engine.checkpoint.hf.folder import HfFolder
    from moe_engine.config.weights import weight_shapes

    folder = Path(run.train.init_from)
    source = open_weights(folder)
    check_shapes(source, weight_shapes(run.model))
    lines = changes_of(source, run.model)
    if found := let_in(source):
        lines.append(f"{folder} holds NaN or infinite numbers: {'; '.join(f'{k}: {v}' for k, v in found.items())}")
    if isinstance(source, HfFolder) and source.unread:
        lines.append(f"there is more than one set of weights in {source}")
    return lines
