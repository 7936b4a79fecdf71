"""Hugging Face folders to checkpoints of the engine and back, tensor by tensor.

    python tools/convert_hf.py import --hf Mixtral-8x7B-v0.1 --out runs/mixtral
    python tools/convert_hf.py export --checkpoint runs/mine/checkpoints/step-00001000 --out mine-hf
    python tools/convert_hf.py verify --hf Mixtral-8x7B-v0.1 --checkpoint runs/mixtral

Families: docs/huggingface.md. One tensor is in memory at a time; an interrupted conversion goes on where it stopped.
`import` keeps every dtype and every file that is no weight; `export` of it gives the same bits. NaN and infinities are
refused unless --allow-nonfinite is given. A checkpoint of a run is exported in the dtype of the folder that it began
from, or of the run; --dtype sets another. Exit codes: 0 done, 1 verify found a difference, 65 data, 74 disk, 78
configuration.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moe_engine.host.console import failed, run_program

DIFFERENT = 1
OWN_CODE = "; it needs LLaMA-MoE-v2's own modelling code: transformers' Mixtral would load it and be wrong"


def main(arguments: list[str] | None = None) -> int:
    from moe_engine.errors import EngineError

    try:
        options = parser().parse_args(arguments)
        return options.run(options)
    except EngineError as error:
        return failed(error)


def parser() -> argparse.ArgumentParser:
    """The three commands."""
    from moe_engine.config import DTYPES, short_dtype
    from moe_engine.config.command_line import Parser

    top = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(required=True, metavar="import|export|verify")
    read = commands.add_parser("import", help="folder -> checkpoint")
    read.add_argument("--hf", type=Path, required=True, metavar="DIR", help="config.json and safetensors files")
    read.add_argument("--out", type=Path, required=True, metavar="CKPT", help="the checkpoint to write")
    read.add_argument(
        "--resize-vocab", type=int, metavar="N", help="rows for N tokens; those added are drawn at random"
    )
    read.set_defaults(run=import_)
    write = commands.add_parser("export", help="checkpoint -> folder")
    write.add_argument("--checkpoint", type=Path, required=True, metavar="CKPT", help="imported, or step-N of a run")
    write.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    write.add_argument("--family", metavar="NAME", help="model_type to write (default: the one that holds the model)")
    write.add_argument("--hf-version", type=int, choices=(4, 5), help="spelling of config.json (default: both)")
    write.add_argument("--expert-layout", choices=("per-expert", "fused"), help="default: as it came, or per-expert")
    write.add_argument("--dtype", type=short_dtype, choices=list(DTYPES), help="or torch's word (default: as it came)")
    write.add_argument("--shard-gb", type=float, default=5.0, metavar="GB", help="largest file (default 5)")
    write.set_defaults(run=export)
    check = commands.add_parser("verify", help="every tensor of a folder against a checkpoint, bit by bit")
    check.add_argument("--hf", type=Path, required=True, metavar="DIR")
    check.add_argument("--checkpoint", type=Path, required=True, metavar="CKPT")
    check.set_defaults(run=verify)
    for command in (read, write, check):
        command.add_argument("--allow-nonfinite", action="store_true", help="take weights that are NaN or infinite")
    top.epilog = "".join(command.format_usage() for command in (read, write, check))
    return top


def import_(options: argparse.Namespace) -> int:
    """Folder -> checkpoint."""
    from moe_engine.checkpoint.hf.folder import HfFolder
    from moe_engine.checkpoint.hf.resize import Resized
    from moe_engine.checkpoint.hf.to_checkpoint import import_folder

    folder = HfFolder(options.hf)
    warn(folder.notes)
    resized = None if options.resize_vocab is None else Resized(folder, options.resize_vocab)
    total = sum(entry.nbytes for entry in folder.entries.values())
    with bar(total, "import") as progress:
        written = import_folder(folder, options.out, progress, resized, options.allow_nonfinite)
    print(f"weights of {folder}")
    if resized:
        std = resized.model.initializer_range
        print(f"vocabulary {folder.model.vocab_size} -> {options.resize_vocab}: {resized.added} rows drawn, std {std}")
    print(f"{folder.family}, {folder.layout}: {summary(written)}")
    print(*nonfinite_lines(written.nonfinite()), f"hash of all tensors {written.digest()}", sep="\n")
    print(f"wrote {options.out}; start from it with --init-from {options.out}")
    return 0


def export(options: argparse.Namespace) -> int:
    """Checkpoint -> folder."""
    from moe_engine.checkpoint.hf.export import ExportOptions, export_checkpoint

    how = ExportOptions(
        options.family, options.expert_layout, options.dtype, options.hf_version, options.shard_gb,
        options.allow_nonfinite,
    )  # fmt: skip
    with bar(None, "export") as progress:
        target, written = export_checkpoint(options.checkpoint, options.out, how, progress)
    print(f"{target.family}, {target.layout}: {summary(written)}")
    print(*nonfinite_lines(written.nonfinite()), f"hash of all tensors {written.digest()}", sep="\n")
    print(f"wrote {options.out}{OWN_CODE if target.family == 'llama_moe_v2' else ''}")
    return 0


def verify(options: argparse.Namespace) -> int:
    """Compare bit by bit; prints what differs."""
    import torch

    from moe_engine.checkpoint.finite import nonfinite, refusal
    from moe_engine.checkpoint.hf.folder import HfFolder
    from moe_engine.checkpoint.hf.side_files import of_checkpoint
    from moe_engine.checkpoint.hf.tokenizer_files import as_trained
    from moe_engine.checkpoint.open import open_checkpoint
    from moe_engine.checkpoint.weights_only import WHOLE_COPY
    from moe_engine.config.hf import differences

    folder = HfFolder(options.hf)
    warn(folder.notes)
    checkpoint = open_checkpoint(options.checkpoint)
    different: list[str] = []
    strange: dict[str, str] = {}
    for name in sorted(checkpoint.shapes.keys() | folder.shapes.keys()):
        here, there = checkpoint.shapes.get(name), folder.shapes.get(name)
        if here != there:
            different.append(f"{name}: {there} in the folder, {here} in the checkpoint")
    for key, (here, there) in differences(checkpoint.model, folder.model).items():
        different.append(f"model.{key}: {there} in the folder, {here} in the checkpoint")
    side = as_trained(
        of_checkpoint(options.checkpoint), checkpoint.manifest.get("tokenizer"), checkpoint.model.vocab_size
    )
    different += side_differences(folder.side, side)
    with bar(sum(entry.nbytes for entry in folder.entries.values()), "verify") as progress:
        for name, place in folder.places.items() if not different else ():
            ours = checkpoint.part(place.weight, place.box)
            theirs = folder.part(place.weight, place.box)
            if said := nonfinite(theirs) or nonfinite(ours):
                strange[name] = said
            progress(theirs.nbytes)
            if ours.dtype != theirs.dtype:
                different.append(f"{name}: {theirs.dtype} in the folder, {ours.dtype} there")
            elif not torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)):
                far = (ours.double() - theirs.double()).abs()
                finite = far.isfinite()
                rest = "" if bool(finite.all()) else f", in {int((~finite).sum())} elements by no finite number"
                different.append(f"{name}: differs by up to {far.where(finite, 0).max().item():.3g}{rest}")
    print(f"weights of {folder}")
    print("\n".join(different) or f"{len(folder.places)} tensors, all bits equal")
    if strange and not different and not options.allow_nonfinite:
        raise refusal(folder, strange, WHOLE_COPY)
    for line in nonfinite_lines(strange):
        print(line)
    return DIFFERENT if different else 0


def side_differences(there: Mapping[str, bytes], here: Mapping[str, bytes]) -> Iterator[str]:
    """A line for each file beside the weights that is another; of config.json the token ids, its function is compared
    as a model."""
    from moe_engine.checkpoint.hf.side_files import carried_config

    for name in sorted(there.keys() | here.keys()):
        if name not in there or name not in here:
            yield f"{name}: only in the {'folder' if name in there else 'checkpoint'}"
        elif name != "config.json" and there[name] != here[name]:
            yield f"{name}: another than in the checkpoint"
    theirs, ours = carried_config(there), carried_config(here)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if "config.json" in here and theirs.get(key) != ours.get(key):
            yield f"config.json: {key}: {theirs.get(key)} in the folder, {ours.get(key)} in the checkpoint"


def nonfinite_lines(found: Mapping[str, str]) -> list[str]:
    """A line for each tensor with NaN or infinities."""
    return [f"{name}: {said}" for name, said in found.items()]


def warn(lines: list[str]) -> None:
    """On standard error, one line each."""
    from moe_engine.text import printable

    for line in lines:
        print(f"warning: {printable(line)}", file=sys.stderr)


def summary(written: Any) -> str:
    """Tensors and bytes of a conversion."""
    return f"{len(written.tensors):,} tensors, {written.bytes / 1e9:.3f} GB"


@contextmanager
def bar(total: int | None, what: str) -> Iterator[Callable[[int], Any]]:
    """Shows how far it is, on standard error; gives the function that is told of bytes."""
    from tqdm import tqdm

    with tqdm(total=total, desc=what, unit="B", unit_scale=True, mininterval=0.5, disable=None) as shown:
        yield shown.update


if __name__ == "__main__":
    run_program(main)
