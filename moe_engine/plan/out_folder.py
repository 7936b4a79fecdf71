"""What a run writes in --out and --export-hf, and whether something is in the way: looked at before it starts.

metrics.jsonl  eval.jsonl  loss.png  lock      files
checkpoints/  tensorboard/  hf/  data/         folders; hf/ and data/ are written anew by a run that starts here
"""

import os
from collections.abc import Iterator
from pathlib import Path

from moe_engine.checkpoint.hf.contents import is_weights
from moe_engine.config import Run
from moe_engine.config.messages import refuse
from moe_engine.data.shards import MANIFEST, read_data_manifest
from moe_engine.host.files import obstacle
from moe_engine.prepare.default import NAME

FILES = ("metrics.jsonl", "eval.jsonl", "loss.png", "lock")
FOLDERS = ("checkpoints", "tensorboard", "hf", "data")


def check_out_folder(run: Run, goes_on: bool) -> None:
    """ConfigError that names each thing in the way of what the run will write. goes_on: from a checkpoint in --out."""
    out = Path(run.train.out)
    problems = [*in_the_way(out), *([] if goes_on else would_be_lost(run, out)), *export_in_the_way(run, out)]
    if problems:
        refuse(problems)


def in_the_way(out: Path) -> Iterator[str]:
    """Names that the run writes to and that are something else, or may not be written to."""
    remedy = "move it away, or choose another --out"
    for name in FILES:
        path = out / name
        if path.exists() and not path.is_file():
            yield f"{path} is no regular file, and the run writes one there; {remedy}"
        elif path.exists() and not os.access(path, os.R_OK | os.W_OK):
            yield f"{path} cannot be written to; {remedy}"
        elif path.is_symlink() and not os.path.isdir(os.path.dirname(os.path.realpath(path))):
            yield f"{path} is a link that leads nowhere; {remedy}"
    for name in FOLDERS:
        if os.path.lexists(out / name) and obstacle(out / name):
            yield f"{out / name} is no folder that can be written to, and the run writes one there; {remedy}"


def would_be_lost(run: Run, out: Path) -> Iterator[str]:
    """Folders that a run which starts in `out` writes anew, and that hold what it did not make."""
    kept = out / "hf"
    if kept.is_dir() and (strange := [path.name for path in kept.rglob("*") if is_weights(path.name)]):
        yield f"{kept} holds {min(strange)}, and the run writes that folder anew; move it away, or choose another --out"
    data = out / "data"
    if run.data.domains or not data.is_dir() or not any(data.iterdir()):
        return
    if not (data / MANIFEST).is_file():
        yield f"{data} exists and is not prepared data; give --data, or choose another --out"
        return
    held = read_data_manifest(data)["domains"]
    if run.samples.given and all(entry.get("samples") for entry in held.values()):
        return  # the samples of this run, or of one before it in the same place: made anew from the files
    if (names := list(held)) != [NAME]:
        yield f"{data} holds {', '.join(names)}: give --data {data} to train on it, or choose another --out"


def export_in_the_way(run: Run, out: Path) -> Iterator[str]:
    """An export that would meet what the run itself writes, when it ends."""
    if not run.train.export_hf:
        return
    said, remedy = f"--export-hf {run.train.export_hf}", "choose another folder"
    export, here = (Path(os.path.realpath(path)) for path in (run.train.export_hf, out))
    if here.is_relative_to(export):
        yield f"{said} is, or holds, --out {out}; {remedy}"
    elif export.is_relative_to(here) and (name := export.relative_to(here).parts[0]) in (*FILES, *FOLDERS):
        yield f"{said} is where the run itself writes {name}; {remedy}"
