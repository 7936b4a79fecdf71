"""The files that go along with weights, from the folder that they came in to the last that is made of them.

An imported checkpoint has them among its own files; a run that starts from such a folder keeps them in OUT/hf.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_engine.checkpoint.hf.contents import CONFIG, SideFiles, contents_of, is_weights
from moe_engine.checkpoint.hf.folder import HfFolder
from moe_engine.checkpoint.hf.tokenizer_files import with_tokenizer
from moe_engine.checkpoint.manifest import NAME, file_in, read_manifest
from moe_engine.checkpoint.open import Checkpoint
from moe_engine.checkpoint.shard import SUFFIX
from moe_engine.config.hf.spelling import dtype_of
from moe_engine.config.messages import shown
from moe_engine.errors import ConfigError, DataError
from moe_engine.host import disk

OF_A_RUN = "hf"  # the folder of a run that holds them


def of_checkpoint(folder: Path) -> SideFiles:
    """The side files of a checkpoint: its own, or those that its run keeps; none for a run that began from nothing. Of
    a Hugging Face folder, its own; of one that is gone, none."""
    if not (folder / NAME).is_file():
        return contents_of(folder).side if folder.is_dir() else SideFiles({})
    own = {name: file_in(folder, name) for name in read_manifest(folder)["files"] if not name.endswith(SUFFIX)}
    kept = folder.resolve().parent.parent / OF_A_RUN
    return SideFiles(own) if own or not kept.is_dir() else contents_of(kept).side


def carried_config(side: Mapping[str, bytes]) -> dict[str, Any]:
    """The config.json among the files that go along; empty without one. DataError when it cannot be read."""
    try:
        carried = json.loads(side.get(CONFIG, b"{}"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"the config.json that came with the weights is no JSON ({error})") from None
    if not isinstance(carried, dict):
        raise DataError(f"the config.json that came with the weights holds {shown(carried)}, expected a mapping")
    return carried


def keep_for_run(source: HfFolder | Checkpoint | None, out: Path, tokenizer: Path, instead: bool = False) -> None:
    """Copy them to OUT/hf, so that every checkpoint of the run can be exported with them; None: there are none.

    tokenizer: the folder of the data's; its files go along where the source has none, or `instead` of its own.
    Where config.json is silent on it, the dtype of the weights is added: the masters of a run are fp32.
    """
    kept, made = out / OF_A_RUN, out / f"{OF_A_RUN}.new"
    if source is not None and source.folder.resolve() == kept.resolve():
        return
    if any(is_weights(path.name) for path in kept.rglob("*")):
        raise ConfigError(f"{kept} holds weights, and a run keeps other files there: move it, or choose another --out")
    side = with_tokenizer(side_of(source) if source else {}, tokenizer, instead)
    disk.remove(made)
    for name in side:
        path = made / name
        disk.make_folder(path.parent)
        disk.write_file(path, [with_dtype(source, side) if name == CONFIG else side[name]])
    disk.remove(kept)  # of an earlier start
    if side:
        disk.rename(made, kept)


def side_of(source: HfFolder | Checkpoint) -> SideFiles:
    """Those of an opened source."""
    return source.side if isinstance(source, HfFolder) else of_checkpoint(source.folder)


def with_dtype(source: HfFolder | Checkpoint | None, side: Mapping[str, bytes]) -> bytes:
    """config.json with the dtype of most of the weights, where it gave none and the source is not of a run."""
    config = carried_config(side)
    if source is None or dtype_of(config) or (isinstance(source, Checkpoint) and "hf" not in source.manifest):
        return side[CONFIG]
    config.pop("dtype", None)
    config["torch_dtype"] = next(iter(source.elements_by_dtype()))  # the key that transformers 4 and 5 both read
    return (json.dumps(config, indent=2) + "\n").encode()
