"""Where a run begins: at a checkpoint of its own or of another run, with the weights of a folder, or from nothing."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

from moe_engine.checkpoint.find import agreed_steps, find_checkpoint, verify
from moe_engine.checkpoint.folders import folder_of, set_aside
from moe_engine.checkpoint.hf.first_weights import check_finite, open_weights
from moe_engine.checkpoint.hf.folder import HfFolder
from moe_engine.checkpoint.hf.side_files import keep_for_run
from moe_engine.checkpoint.manifest import NAME, read_manifest
from moe_engine.checkpoint.open import Checkpoint
from moe_engine.checkpoint.resume_checks import check_resume, setting_changes
from moe_engine.config import Run
from moe_engine.data.loader import Loader
from moe_engine.data.shards import TOKENIZER
from moe_engine.errors import ConfigError, DataError
from moe_engine.host.watch import Heartbeat
from moe_engine.log.logger import Logger
from moe_engine.parallel.agree import act_together
from moe_engine.parallel.collectives import gather_bytes
from moe_engine.parallel.mesh import Axis, Mesh
from moe_engine.train.engine import Engine
from moe_engine.train.state import load_state, load_weights


class Beginning(NamedTuple):
    """What was done before: steps, and tokens seen."""

    step: int = 0
    tokens: int = 0


def begin(run: Run, mesh: Mesh, engine: Engine, loader: Loader, log: Logger, heartbeat: Heartbeat) -> Beginning:
    """Bring engine and loader to where the run begins; collective over all ranks.

    ConfigError or DataError when it cannot begin there; the checkpoints that exist are then as they were.
    """
    root, world = Path(run.train.out) / "checkpoints", mesh.world
    there = agreed_steps(root, world)
    check_resume(run, there)
    reading = partial(heartbeat, 0, "reading a checkpoint")
    folder = find_checkpoint(run.train.resume, root, world, log.warn, reading) if run.train.resume else None
    if folder is None:
        source = load_first_weights(run, engine, world, heartbeat) if run.train.init_from else None
        act_together(lambda: keep_side_files(run, loader, source), world, everywhere=False)
        if source is not None:
            log.info(f"started with the weights of {source}")
        return Beginning()
    manifest = read_manifest(folder)
    if "hf" in manifest:
        raise ConfigError(f"{folder} holds weights without a training state: start from them with --init-from")
    log.warn(*setting_changes(manifest["run"], run.model_dump(mode="json")))
    loader.load_state(manifest["data"])
    load_state(engine, mesh, folder, reading)
    if folder.parent.resolve() != root.resolve():  # of another run, whose files go along
        act_together(lambda: keep_side_files(run, loader, Checkpoint(folder)), world, everywhere=False)
    log.info(f"resumed from {folder}: {manifest['step']} steps done")
    later = [step for step in there if step > manifest["step"]]  # damaged, or of a past that the run leaves now
    act_together(lambda: set_steps_aside(root, later, log), world, everywhere=False)
    return Beginning(int(manifest["step"]), int(manifest["tokens"]))


def load_first_weights(run: Run, engine: Engine, world: Axis, heartbeat: Heartbeat) -> HfFolder | Checkpoint:
    """The engine takes the weights of the Hugging Face folder or checkpoint of --init-from; collective."""
    path, reading = Path(run.train.init_from or ""), partial(heartbeat, 0, "reading the first weights")
    ours = bytes([(path / NAME).is_file()])
    if len(set(gather_bytes(ours, world))) > 1:
        raise DataError(f"--init-from {path}: the ranks do not see the same; it must be shared by all nodes")
    if ours[0] and (problems := verify(path, world, reading)):
        raise DataError("; ".join(problems))
    opened: list[HfFolder | Checkpoint] = []
    act_together(lambda: opened.append(open_weights(path)), world)
    found: list[str] = []
    act_together(lambda: found.extend(load_weights(engine, opened[0], reading)), world)
    check_finite(opened[0], found, world)
    engine.weights_from_masters()
    return opened[0]


def keep_side_files(run: Run, loader: Loader, source: HfFolder | Checkpoint | None) -> None:
    """What an export of this run will need beside weights: of the folder that they came from, and of the data."""
    tokenizer = loader.orders[0].dataset.folder / TOKENIZER
    keep_for_run(source, Path(run.train.out), tokenizer, run.data.allow_other_tokenizer)


def set_steps_aside(root: Path, steps: list[int], log: Logger) -> None:
    """Put checkpoints out of the way, the latest first, so that what is left is always one history."""
    for step in reversed(steps):
        aside = set_aside(folder_of(root, step))
        log.warn(f"what was step {step} is kept as {aside.name}, and not read again")
