"""Weights out to a Hugging Face folder: shard by shard, one tensor in memory at a time, complete or not there at all.

    source, under the engine's names -> the family's table -> model-00001-of-0000N.safetensors, index, config.json

A factor on the routed output (`routed_scaling_factor`), which these families do not know, is multiplied into the
experts' down projections; of powers of two that is exact.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_engine.checkpoint.finite import nonfinite
from moe_engine.checkpoint.hf.contents import CONFIG, INDEX, SINGLE
from moe_engine.checkpoint.hf.places import Place, places
from moe_engine.checkpoint.hf.side_files import carried_config
from moe_engine.checkpoint.partial import Partial
from moe_engine.checkpoint.shard import Digest, Entry, stream_shard
from moe_engine.checkpoint.weights_only import (
    Progress,
    Weights,
    Written,
    digests_of,
    hash_of,
    nonfinite_in,
    write_bytes,
)
from moe_engine.config import Model
from moe_engine.config.hf import FAMILIES, both_readers_agree, came_as, model_from_hf, model_to_hf
from moe_engine.config.hf.spelling import dtype_of
from moe_engine.errors import ConfigError, DataError
from moe_engine.host import disk
from moe_engine.labels import beside_the_model

SHARD_BYTES = 5 * 10**9  # as transformers


class Target(NamedTuple):
    """What is written. family: a model_type. layout: of its experts. dtype: None keeps each tensor's own.
    version: transformers' spelling of config.json, 4 or 5; None: both. side: other files, by name. untouched: the
    weights are those that `side` came with, and so is its config.json."""

    family: str
    layout: str
    dtype: torch.dtype | None = None
    version: int | None = None
    side: Mapping[str, bytes] = {}
    untouched: bool = False
    shard_bytes: int = SHARD_BYTES


def write_hf(
    source: Weights,
    model: Model,
    target: Target,
    out: Path,
    identity: Any,
    progress: Progress = lambda n: None,
    allow_nonfinite: bool = False,
) -> Written:
    """Write `out`, which must not exist. identity: JSON of what `source` is, by which an interrupted run goes on.

    progress: told of the bytes of each tensor. ConfigError for a model that the family cannot hold, before anything is
    written; DataError for NaN and infinities unless they are allowed; StorageError when the disk refuses.
    """
    table = FAMILIES[target.family].tensors
    if target.layout not in table:
        raise ConfigError(f"--expert-layout {target.layout}: {target.family} is written as {', '.join(table)}")
    refuse_biases(model)
    model_to_hf(model, target.family, None, target.version, {})  # refuses what the family cannot hold
    if target.version == 4 and target.layout == "fused":
        raise ConfigError("--expert-layout fused: transformers 4 reads experts one by one only; leave --hf-version out")
    shapes = {name: shape for name, shape in source.shapes.items() if not beside_the_model(name)}
    where = places(table[target.layout], shapes)
    entries = {
        name: Entry(target.dtype or source.dtype(place.weight, place.box), place.shape) for name, place in where.items()
    }
    config = config_text(model, target, entries)
    shards = cut(entries, target.shard_bytes)
    total = sum(entry.nbytes for entry in entries.values())
    options = [target.family, target.layout, str(target.dtype), target.version, target.shard_bytes, config.decode()]
    partial = Partial(out, [identity, options, digests_of(target.side)])
    disk.require_space(partial.folder, total - partial.bytes())
    scale = 1.0 if "scale_factor" in FAMILIES[target.family].more else model.routed_scaling_factor

    def make(names: list[str]) -> Callable[[Path], tuple[Digest, dict[str, str]]]:
        """What Partial.write calls for the shard of these tensors: digest and hashes of what it wrote."""

        def write(path: Path) -> tuple[Digest, dict[str, str]]:
            hashes: dict[str, str] = {}

            def tensor_of(name: str) -> Tensor:
                tensor = read(source, where[name], entries[name], scale)
                hashes[name] = hash_of(tensor)
                progress(tensor.nbytes)
                return tensor

            shard = {name: entries[name] for name in names}
            return stream_shard(path, shard, tensor_of, {"format": "pt"}), hashes

        return write

    for file, names in shards.items():
        if not partial.write(file, make(names)):
            progress(sum(entries[name].nbytes for name in names))
    nonfinite_in(partial, source, allow_nonfinite)
    made = {CONFIG: config} | ({INDEX: index_text(shards, total)} if len(shards) > 1 else {})
    for name in {**made, **dict.fromkeys(target.side)}:
        partial.write(name, lambda path, name=name: (write_bytes(path, made.get(name) or target.side[name]), {}))
    partial.publish()
    return Written(partial.tensors(), total)


def read(source: Weights, place: Place, entry: Entry, scale: float) -> Tensor:
    """One tensor as it will lie on disk. DataError where a finite number becomes an infinite one."""
    if scale != 1.0 and place.weight.endswith("experts.w_down"):
        tensor = (source.part(place.weight, place.box, torch.float32) * scale).to(entry.dtype)
    else:
        tensor = source.part(place.weight, place.box, entry.dtype)
    if (found := nonfinite(tensor)) and found != nonfinite(source.part(place.weight, place.box)):
        name, largest = str(entry.dtype).removeprefix("torch."), torch.finfo(entry.dtype).max
        wider = "bfloat16" if name == "float16" else "float32"
        raise DataError(f"{place.weight}: holds numbers past {name}'s largest, {largest:.6g}; use --dtype {wider}")
    return tensor.view(entry.shape)


def refuse_biases(model: Model) -> None:
    """ConfigError for a model whose choice of experts depends on more than its weights."""
    if model.num_moe_layers and model.expert_bias_update_rate:
        raise ConfigError(
            f"model.expert_bias_update_rate {model.expert_bias_update_rate}: the expert biases that steer this model's "
            "routing have no place in a Hugging Face folder; it would choose other experts there"
        )


def config_text(model: Model, target: Target, entries: Mapping[str, Entry]) -> bytes:
    """config.json: the one that came along, byte for byte, where it says all; else written anew.

    Beside weights that are not those it came with it has to say all to both versions of transformers.
    """
    old, carried = target.side.get(CONFIG), carried_config(target.side)
    count: dict[torch.dtype, int] = {}
    for entry in entries.values():
        count[entry.dtype] = count.get(entry.dtype, 0) + entry.nbytes
    dtype = str(max(count, key=lambda kind: count[kind])).removeprefix("torch.")
    config = model_to_hf(model, target.family, dtype, target.version, carried)
    if old and target.version is None and came_as(carried) == target.family:
        said = model_to_hf(model_from_hf(carried), target.family, dtype_of(carried) or dtype, None, carried)
        if config == said and (target.untouched or both_readers_agree(carried)):
            return old
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def index_text(shards: Mapping[str, list[str]], total: int) -> bytes:
    """model.safetensors.index.json: the file of each tensor."""
    weight_map = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()


def cut(entries: Mapping[str, Entry], shard_bytes: int) -> dict[str, list[str]]:
    """The tensors of each file, in order; a file grows to `shard_bytes` unless one tensor alone is larger."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, entry in entries.items():
        if shards[-1] and size + entry.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += entry.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}
