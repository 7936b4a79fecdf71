"""A checkpoint, imported or of a run, to a Hugging Face folder: what is written when nobody says otherwise."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moe_engine.checkpoint.folders import folder_of, steps_in
from moe_engine.checkpoint.hf.side_files import carried_config, of_checkpoint
from moe_engine.checkpoint.hf.tokenizer_files import as_trained
from moe_engine.checkpoint.hf.write import Target, refuse_biases, write_hf
from moe_engine.checkpoint.open import open_checkpoint
from moe_engine.checkpoint.weights_only import Progress, Written
from moe_engine.config import Model, Run, torch_dtype
from moe_engine.config.hf import FAMILIES, came_as, differences, family_of, model_from_hf
from moe_engine.config.hf.spelling import dtype_of
from moe_engine.errors import ConfigError
from moe_engine.host.files import obstacle


class ExportOptions(NamedTuple):
    """None: as the weights came, or for a run that began from nothing the usual. dtype: "bf16" or "bfloat16"."""

    family: str | None = None
    layout: str | None = None
    dtype: str | None = None
    version: int | None = None
    shard_gb: float = 5.0
    allow_nonfinite: bool = False


def check_exportable(run: Run, came_from: Path | None) -> None:
    """ConfigError when the weights of a run could not be exported to its export_hf; before it starts.

    came_from: the checkpoint or folder that it starts from, if any.
    """
    out = Path(run.train.export_hf or "")
    refuse_biases(run.model)
    usual_family(run.model, of_checkpoint(came_from) if came_from else {})
    if os.path.lexists(out):
        raise ConfigError(f"--export-hf {out} exists; remove it or choose another name")
    if above := obstacle(out.with_name(f"{out.name}.partial")):  # what it is called until it is whole
        raise ConfigError(f"--export-hf {out}: {above} cannot be written to; choose another folder")


def usual_family(model: Model, side: Mapping[str, bytes]) -> str:
    """The family that a model came in, if it still is of it, or the first that holds it."""
    carried = carried_config(side)
    if came_as(carried) == "llama_moe_v2" and not differences(model, model_from_hf(carried)):
        return "llama_moe_v2"
    return family_of(model)


def export_checkpoint(
    folder: Path, out: Path, options: ExportOptions, progress: Progress = lambda n: None, verify: bool = True
) -> tuple[Target, Written]:
    """Write `out` from a checkpoint; see write_hf. verify: False for one that was written a moment ago."""
    checkpoint = open_checkpoint(folder, verify)
    model = checkpoint.model
    side = as_trained(of_checkpoint(folder), checkpoint.manifest.get("tokenizer"), model.vocab_size)
    target = target_of(checkpoint.manifest, model, side, options)
    return target, write_hf(
        checkpoint, model, target, out, checkpoint.manifest["files"], progress, options.allow_nonfinite
    )


def export_run(run: Run) -> str:
    """The newest checkpoint of a run, or the one that it resumed if nothing was left to do, to its export_hf; a line
    that says so."""
    root, folder = Path(run.train.out) / "checkpoints", Path(run.train.export_hf or "")
    steps = steps_in(root)
    newest = folder_of(root, steps[-1]) if steps else Path(run.train.resume or "")
    options = ExportOptions(version=run.train.hf_version)
    target, written = export_checkpoint(newest, folder, options, verify=False)
    size = f"{len(written.tensors)} tensors, {written.bytes / 1e9:.3f} GB"
    return f"exported {newest} as {target.family}: {size}, {folder}"


def target_of(manifest: dict[str, Any], model: Model, side: Mapping[str, bytes], options: ExportOptions) -> Target:
    """Family, layout and dtype: wished for, or as the weights came, or the usual."""
    came = manifest.get("hf", {})
    family = options.family or came.get("family") or usual_family(model, side)
    if family not in FAMILIES:
        raise ConfigError(f"--family {family}: expected {', '.join(FAMILIES)}")
    layouts = list(FAMILIES[family].tensors)
    layout = options.layout or (came.get("layout") if came.get("layout") in layouts else layouts[0])
    dtype = options.dtype
    if dtype is None and "hf" not in manifest:  # masters are fp32, whatever the run computed in
        dtype = dtype_of(carried_config(side)) or manifest["run"]["train"]["precision"]
    if not 0 < options.shard_gb < math.inf:
        raise ConfigError(f"--shard-gb {options.shard_gb}: expected a number of GB above 0")
    kind = getattr(torch, torch_dtype(dtype)) if dtype else None
    return Target(family, layout, kind, options.version, side, bool(came), int(options.shard_gb * 1e9))
