"""Hugging Face folders to checkpoints of the engine and back, tensor by tensor.

    python tools/convert_hf.py import --hf Mixtral-8x7B-v0.1 --out runs/mixtral
    python tools/convert_hf.py export --checkpoint runs/mine/checkpoints/step-00001000 --out mine-hf
    python tools/convert_hf.py verify --hf Mixtral-8x7B-v0.1 --checkpoint runs/mixtral

Families: docs/huggingface.md. One tensor is in memory at a time; an interrupted conversion goes on where it stopped.
`import` keeps every dtype and every file that is no weight; `export` of it gives the same bits. A checkpoint of a run
is exported in the dtype of the folder that it began from, or of the run; --dtype sets another. Exit codes: 0 done, 1
verify found a difference, 65 data, 74 disk, 78 configuration.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

DIFFERENT = 1
OWN_CODE = "; it needs LLaMA-MoE-v2's own modelling code: transformers' Mixtral would load it and be wrong"


def main(arguments: list[str] | None = None) -> int:
    from moe_engine.config_report import BULLET
    from moe_engine.errors import EngineError
    from moe_engine.log import printable

    try:
        options = parser().parse_args(arguments)
        return options.run(options)
    except EngineError as error:
        print(f"error: {BULLET.join(map(printable, str(error).split(BULLET)))}", file=sys.stderr)
        return error.exit_code


def parser() -> argparse.ArgumentParser:
    """The three commands."""
    from moe_engine.config_cli import Parser

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
    write.add_argument("--hf-version", type=int, choices=(4, 5), help="spelling of config.json (default: as it came)")
    write.add_argument("--expert-layout", choices=("per-expert", "fused"), help="default: as it came, or per-expert")
    write.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as it came")
    write.add_argument("--shard-gb", type=float, default=5.0, metavar="GB", help="largest file (default 5)")
    write.set_defaults(run=export)
    check = commands.add_parser("verify", help="every tensor of a folder against a checkpoint, bit by bit")
    check.add_argument("--hf", type=Path, required=True, metavar="DIR")
    check.add_argument("--checkpoint", type=Path, required=True, metavar="CKPT")
    check.set_defaults(run=verify)
    top.epilog = "".join(command.format_usage() for command in (read, write, check))
    return top


def import_(options: argparse.Namespace) -> int:
    """Folder -> checkpoint."""
    from moe_engine.checkpoint.hf.folder import HfFolder
    from moe_engine.checkpoint.hf.read import read_hf
    from moe_engine.checkpoint.hf.resize import Resized

    folder = HfFolder(options.hf)
    resized = None if options.resize_vocab is None else Resized(folder, options.resize_vocab)
    total = sum(entry.nbytes for entry in folder.entries.values())
    with bar(total, "import") as beat:
        written = read_hf(folder, options.out, beat, resized)
    if resized:
        std = resized.model.initializer_range
        print(f"vocabulary {folder.model.vocab_size} -> {options.resize_vocab}: {resized.added} rows drawn, std {std}")
    print(f"{folder.family}, {folder.layout}: {summary(written)}")
    print(f"hash of all tensors {written.digest()}")
    print(f"wrote {options.out}; start from it with --init-from {options.out}")
    return 0


def export(options: argparse.Namespace) -> int:
    """Checkpoint -> folder."""
    from moe_engine.checkpoint.hf.export import Wishes, export_checkpoint

    wishes = Wishes(options.family, options.expert_layout, options.dtype, options.hf_version, options.shard_gb)
    with bar(None, "export") as beat:
        target, written = export_checkpoint(options.checkpoint, options.out, wishes, beat)
    print(f"{target.family}, {target.layout}: {summary(written)}")
    print(f"hash of all tensors {written.digest()}")
    print(f"wrote {options.out}{OWN_CODE if target.family == 'llama_moe_v2' else ''}")
    return 0


def verify(options: argparse.Namespace) -> int:
    """Compare bit by bit; prints what differs."""
    import torch

    from moe_engine.checkpoint.hf.carried import of_checkpoint, side_files
    from moe_engine.checkpoint.hf.export import open_checkpoint
    from moe_engine.checkpoint.hf.folder import HfFolder
    from moe_engine.config_hf import differences

    folder = HfFolder(options.hf)
    reader, model = open_checkpoint(options.checkpoint)
    different: list[str] = []
    for name in sorted(reader.shapes.keys() | folder.shapes.keys()):
        here, there = reader.shapes.get(name), folder.shapes.get(name)
        if here != there:
            different.append(f"{name}: {there} in the folder, {here} in the checkpoint")
    for key, (here, there) in differences(model, folder.model).items():
        different.append(f"model.{key}: {there} in the folder, {here} in the checkpoint")
    for name, content in side_files(folder.folder).items():
        if name != "config.json" and of_checkpoint(options.checkpoint).get(name) != content:
            different.append(f"{name}: another than in the checkpoint")
    with bar(sum(entry.nbytes for entry in folder.entries.values()), "verify") as beat:
        for name, place in folder.places.items() if not different else ():
            ours = reader.part(place.weight, place.box)
            theirs = folder.part(place.weight, place.box)
            beat(theirs.nbytes)
            if ours.dtype != theirs.dtype:
                different.append(f"{name}: {theirs.dtype} in the folder, {ours.dtype} there")
            elif not torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)):
                far = (ours.double() - theirs.double()).abs().max().item()
                different.append(f"{name}: differs by up to {far:.3g}")
    print("\n".join(different) or f"{len(folder.places)} tensors, all bits equal")
    return DIFFERENT if different else 0


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
    sys.exit(main())
