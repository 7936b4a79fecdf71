"""Looks into checkpoints without loading them: `python tools/inspect_checkpoint.py runs/demo`

    FOLDER                 a run's --out or its checkpoints/: one line a checkpoint, with the loss at its step
    FOLDER/step-00000100   layout, versions, data position, files, weights, the loss up to its step
    A B                    what differs: settings, layout, weights; with --values also how far each weight moved

Sizes and the manifest's own checksum are always compared; --verify reads the files and compares theirs as well. Exit
code 65 when something is damaged, 1 when two checkpoints differ.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moe_engine.host.console import failed, run_program

DAMAGED, DIFFERENT = 65, 1


def main(arguments: list[str] | None = None) -> int:
    from moe_engine.config.command_line import Parser
    from moe_engine.errors import EngineError
    from moe_engine.text import printable

    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="FOLDER", help="a run, or one or two checkpoints")
    parser.add_argument("--verify", action="store_true", help="read every file and compare its checksum")
    parser.add_argument("--values", action="store_true", help="of two checkpoints, compare the weights' values too")
    parser.add_argument("--weights", action="store_true", help="list every weight")
    try:
        options = parser.parse_args(arguments)
        if len(options.paths) > 2:
            parser.error(f"found {len(options.paths)} folders, expected one or two")
        lines, code = report(options)
    except EngineError as error:
        return failed(error)
    print("\n".join(printable(line) for line in lines))
    return code


def report(options: argparse.Namespace) -> tuple[list[str], int]:
    """The lines to print and the exit code."""
    from moe_engine.checkpoint.folders import steps_in
    from moe_engine.checkpoint.manifest import NAME
    from moe_engine.errors import ConfigError

    first, *more = options.paths
    if more:
        return compare(first, more[0], options.values)
    if (first / NAME).is_file():
        return one(first, options.verify, options.weights)
    root = first if steps_in(first) or not (first / "checkpoints").is_dir() else first / "checkpoints"
    if not steps_in(root):
        raise ConfigError(f"{first}: no checkpoint there; give a run's --out, or a folder step-N")
    return overview(root, options.verify)


def overview(root: Path, verify: bool) -> tuple[list[str], int]:
    """A line for each checkpoint of a run, and what else lies beside them."""
    from moe_engine.checkpoint.folders import folder_of, steps_in

    lines, code = [f"{'checkpoint':16} {'GB':>9} {'dp ep tp zero':>14} {'tokens':>15} {'loss':>8}  files"], 0
    losses = losses_of(root.parent)
    for step in steps_in(root):
        manifest, problems = look(folder_of(root, step), verify)
        code = DAMAGED if problems else code
        state = "; ".join(problems) or ("verified" if verify else "complete")
        if manifest is None:
            lines.append(f"step-{step:08d}    {state}")
            continue
        loss = f"{losses[step]:8.4f}" if step in losses else " " * 8
        layout = " ".join(f"{manifest['layout'][key]:2}" for key in ("dp", "ep", "tp", "zero"))
        lines.append(
            f"step-{step:08d}    {size_of(manifest):9.3f} {layout:>14} {manifest['tokens']:15,} {loss}  {state}"
        )
    aside = sorted(path.name for path in root.iterdir() if path.suffix in (".aside", ".tmp", ".old"))
    return lines + [f"beside them: {', '.join(aside)}"] * bool(aside), code


def one(folder: Path, verify: bool, weights: bool) -> tuple[list[str], int]:
    """Everything that one checkpoint says about itself."""
    manifest, problems = look(folder, verify)
    if manifest is None:
        return problems, DAMAGED
    numel = {name: math.prod(shape) for name, shape in manifest["weights"].items()}
    holds = "every checksum holds" if verify else "sizes hold (--verify reads all)"
    lines = [
        *(weights_lines(folder, manifest, not problems) if "hf" in manifest else training_lines(manifest)),
        f"written by   {', '.join(f'{name} {version}' for name, version in manifest['versions'].items())}",
        f"integrity    {'; '.join(problems) or holds}",
    ]
    losses = {step: loss for step, loss in losses_of(folder.parent.parent).items() if step <= manifest["step"]}
    if losses:
        lines += ["", "loss         " + "  ".join(f"{step}: {losses[step]:.4f}" for step in spread(sorted(losses), 8))]
    if weights:
        width = max(map(len, numel))
        lines += ["", *(f"{name:{width}}  {count:15,}  {manifest['weights'][name]}" for name, count in numel.items())]
    return lines, DAMAGED if problems else 0


def training_lines(manifest: dict[str, Any]) -> list[str]:
    """Of a checkpoint that a run goes on from."""
    numel = [math.prod(shape) for shape in manifest["weights"].values()]
    layout = ", ".join(f"{key} {value}" for key, value in manifest["layout"].items())
    data = manifest["data"]
    return [
        f"step         {manifest['step']} ({manifest['tokens']:,} tokens; {manifest['adam_steps']} optimizer steps)",
        f"layout       {layout}: {len(manifest['files'])} files, {size_of(manifest):.3f} GB",
        f"weights      {len(numel)}, {sum(numel):,} parameters, each with its master and two moments in fp32",
        f"data         {', '.join(data['domains'])}: step {data['step']}, seed {data['seed']}, "
        f"length {data['seq_length']}",
        f"settings     sha256 {manifest['run_sha256'][:16]}, precision {manifest['run']['train']['precision']}",
    ]


def weights_lines(folder: Path, manifest: dict[str, Any], whole: bool) -> list[str]:
    """Of a checkpoint of weights alone, imported or upcycled; the dtypes are in its files, if those are whole."""
    from moe_engine.checkpoint.open import Checkpoint

    numel = [math.prod(shape) for shape in manifest["weights"].values()]
    dtypes = ", ".join(Checkpoint(folder, keep_open=1).elements_by_dtype()) if whole else "the dtypes that they came in"
    came = ", ".join(manifest["hf"].values())
    strange = "; ".join(f"{name}: {said}" for name, said in manifest.get("nonfinite", {}).items())
    return [
        "step         0, weights alone: a run starts from it with --init-from",
        f"layout       {len(manifest['files'])} files, {size_of(manifest):.3f} GB",
        f"weights      {len(numel)}, {sum(numel):,} parameters in {dtypes}",
        *([f"came as      {came}"] if came else []),
        *([f"not finite   {strange}"] if strange else []),
    ]


def compare(a: Path, b: Path, values: bool) -> tuple[list[str], int]:
    """What differs between two checkpoints, one line each."""
    from moe_engine.checkpoint.manifest import read_manifest

    first, second = read_manifest(a), read_manifest(b)
    lines = [
        f"{key}: {first.get(key)} -> {second.get(key)}"
        for key in ("step", "tokens", "adam_steps", "layout", "versions", "data", "hf")
        if first.get(key) != second.get(key)
    ]
    for section in sorted(first["run"].keys() | second["run"].keys()):
        was, now = (manifest["run"].get(section, {}) for manifest in (first, second))
        for key in sorted(was.keys() | now.keys()):
            if was.get(key) != now.get(key):
                lines.append(f"{section}.{key}: {was.get(key)} -> {now.get(key)}")
    one, other = first["weights"], second["weights"]
    lines += [f"{name}: only in {a}" for name in one.keys() - other.keys()]
    lines += [f"{name}: only in {b}" for name in other.keys() - one.keys()]
    both = [name for name in one if name in other]
    lines += [f"{name}: shape {one[name]} -> {other[name]}" for name in both if one[name] != other[name]]
    if values:
        lines += moved(a, b, [name for name in both if one[name] == other[name]])
    if lines:
        return lines, DIFFERENT
    same = first["files"] == second["files"]
    return ["the same, byte for byte" if same else "the same values" if values else "the same, but for the numbers"], 0


def moved(a: Path, b: Path, names: Sequence[str]) -> list[str]:
    """For each weight and kind |b - a| / |a|, and expert biases that differ; one weight at a time is in memory. Where
    one holds weights alone, there are no moments to compare."""
    from moe_engine.checkpoint.open import Checkpoint

    first, second = Checkpoint(a), Checkpoint(b)
    alone = "hf" in first.manifest or "hf" in second.manifest
    lines = []
    for name in names:
        cells = []
        for kind in ("master",) if alone else ("master", "exp_avg", "exp_avg_sq"):
            was, now = first.whole(name, kind), second.whole(name, kind)
            if not bool(((was == now) | (was.isnan() & now.isnan())).all()):
                cells.append(f"{kind} {distance(was, now)}")
        lines += [f"{name}: " + ", ".join(cells)] if cells else []
    was, now = first.extra(0), second.extra(0)
    biases = sorted(name for name in was.keys() & now.keys() if name.startswith("expert_bias"))
    return lines + [f"{name} differs" for name in biases if not bool((was[name] == now[name]).all())]


def distance(was: "Tensor", now: "Tensor") -> str:
    """|now - was| / |was|, over the elements that are finite in both, and how many are not."""
    finite = was.isfinite() & now.isfinite()
    was, now = was.where(finite, 0).double(), now.where(finite, 0).double()
    strange = int((~finite).sum())
    rest = f" and {strange} NaN or infinite" if strange else ""
    return f"{float((now - was).norm() / was.norm().clamp(min=1e-30)):.3e}{rest}"


def look(folder: Path, verify: bool) -> tuple[dict[str, Any] | None, list[str]]:
    """The manifest, None if it is damaged, and what is wrong."""
    from moe_engine.checkpoint.manifest import problems_of, read_manifest
    from moe_engine.errors import DataError
    from moe_engine.host.files import size_in

    try:
        manifest = read_manifest(folder)
    except DataError as error:
        return None, [str(error)]
    if verify:
        return manifest, problems_of(folder, manifest)
    problems = []
    for name, (count, *_) in manifest["files"].items():
        size = size_in(folder, folder / name)
        if size != count:
            problems.append(f"{name}: {'missing' if size is None else f'{size} bytes'}, written with {count}")
    return manifest, problems


def losses_of(out: Path) -> dict[int, float]:
    """Language-model loss by step, from the run's metrics."""
    from moe_engine.log.rows import read_rows

    path = out / "metrics.jsonl"
    rows = read_rows(path) if path.is_file() else []
    return {row["step"]: row["lm_loss"] for row in rows if row.get("lm_loss") is not None}


def size_of(manifest: dict[str, Any]) -> float:
    """GB of all files."""
    return sum(count for count, *_ in manifest["files"].values()) / 1e9


def spread(values: Sequence[int], count: int) -> list[int]:
    """`count` of the values, evenly, with the first and the last."""
    if len(values) <= count:
        return list(values)
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


if __name__ == "__main__":
    run_program(main)
