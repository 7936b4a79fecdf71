"""The kernels against their peers: `python tools/bench_kernels.py`, on a GPU if there is one, else on CPU

The MoE layer of one rank (router, sort, experts), or one op after the other, on the shapes of tools/kernels/shapes.py
with balanced, zipf and one-hot routing, forward and forward+backward, against every peer that is installed: torch,
transformers, MegaBlocks, ScatterMoE, Liger, SonicMoE. Outputs and gradients are compared first; a contender that
differs is named, left out, and makes the exit code 1. The table holds medians, the share of a ceiling measured in the
same rounds, memory, and the fastest peer's time / this time. docs/benchmarks/README.md says what the columns mean.
"""

import argparse
import datetime
import itertools
import json
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from moe_engine.host.console import run_program  # noqa: E402
from tools.kernels.shapes import CPU_SHAPES, GPU_SHAPES, NAMED, Shape, layer_flops, shape_of  # noqa: E402

if TYPE_CHECKING:
    import torch

    from tools.kernels.contenders import Peer

FOLDER = ROOT / "docs" / "benchmarks"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    from moe_engine.config import short_dtype

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", metavar="SHAPE", help=f"{', '.join(NAMED)}, or E,K,D,F (default: those of the device)"
    )
    parser.add_argument("--tokens", nargs="+", type=int, help="instead of the tokens that belong to a shape")
    parser.add_argument("--routing", default="all", choices=["balanced", "zipf", "one-hot", "all"])
    parser.add_argument("--ops", default="layer", help="layer (default), all, or the name of one op")
    parser.add_argument(
        "--dtype", type=short_dtype, choices=["fp32", "bf16", "both"], help="default: bf16 on a GPU, both on CPU"
    )
    parser.add_argument("--peers", nargs="+", default=["all"], metavar="PEER", help="all (default), none, or names")
    parser.add_argument("--repeats", type=int, default=10, help="timed rounds, after two that warm up")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--json", metavar="PATH", help="or none; default: a new docs/benchmarks/DEVICE-DATE.json")
    parser.add_argument("--plot", action="store_true", help="also draw the layers as a PNG beside the JSON")
    options = parser.parse_args(arguments)
    if options.plot and options.json == "none":
        parser.error("--plot draws beside the JSON: give --json a path")
    try:
        options.shapes = [shape_of(text) for text in options.shapes or []]
        check_names(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def check_names(options: argparse.Namespace) -> None:
    """Raises ValueError with the names that there are, and for a device or a folder that is not."""
    import torch

    from tools.kernels.contenders import PEERS
    from tools.kernels.single_ops import OPS

    ops = ["layer", *OPS]
    if options.ops not in ("all", *ops):
        raise ValueError(f"found op {options.ops!r}, expected all or one of {', '.join(ops)}")
    options.ops = ops if options.ops == "all" else [options.ops]
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"found --device cuda, but torch {torch.__version__} has no GPU here; leave it out")
    if options.json not in (None, "none") and not Path(options.json).absolute().parent.is_dir():
        raise ValueError(f"found --json {options.json}, expected a path in a folder that exists")
    names = [peer.name for peer in PEERS]
    wanted = {"all": names, "none": []}.get(options.peers[0], options.peers)
    if unknown := [name for name in wanted if name not in names]:
        raise ValueError(f"found peer {unknown[0]!r}, expected all, none, or some of {', '.join(names)}")
    options.peers = [peer for peer in PEERS if peer.name in wanted]


def device_name(device: "torch.device") -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*:\s*(.+)$", cpus.read_text() if cpus.is_file() else "", re.MULTILINE)
    return models[0] if models else platform.machine()


def cases(options: argparse.Namespace, device: "torch.device") -> Iterator[tuple[Shape, int, str, str]]:
    """Every (shape, tokens, dtype, routing) that is asked for."""
    from tools.kernels.inputs import ROUTINGS

    dtype = options.dtype or ("bf16" if device.type == "cuda" else "both")
    for shape in options.shapes or (GPU_SHAPES if device.type == "cuda" else CPU_SHAPES):
        for tokens in options.tokens or shape.tokens:
            for precision in ("fp32", "bf16") if dtype == "both" else (dtype,):
                for routing in ROUTINGS if options.routing == "all" else (options.routing,):
                    yield shape, tokens, precision, routing


def bench(
    case: tuple[Shape, int, str, str], ops: list[str], peers: list["Peer"], repeats: int, device: "torch.device"
) -> Iterator[dict[str, Any]]:
    """One group of results for each op: what was measured, the ceilings, a row for each contender and pass, and who is
    left out and why."""
    import torch

    from tools.kernels.contenders import our_layer
    from tools.kernels.inputs import make_inputs
    from tools.kernels.measure import agreeing, measure, reason, tolerance
    from tools.kernels.single_ops import OPS, Work

    shape, tokens, precision, routing = case
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    inputs = make_inputs(shape, tokens, routing, dtype, device)
    for name in ops:
        group: dict[str, Any] = {
            "op": name, "shape": shape._asdict() | {"tokens": tokens}, "routing": routing, "dtype": precision,
            "counts": inputs.counts.tolist(),
        }  # fmt: skip
        if name == "layer":
            work = Work("flops", layer_flops(shape, tokens))
            layers = {"moe_engine": our_layer} | {
                n: b for peer in peers if peer.installed for n, b in peer.builders.items()
            }
            builders = {n: lambda build=build: build(inputs) for n, build in layers.items()}
        else:
            try:
                work, contenders = OPS[name](inputs, shape)
            except Exception as error:  # an op that cannot even be set up: the others still count
                yield group | {"ceilings": {}, "rows": [], "left_out": {"moe_engine": reason(error)}, "differs": False}
                continue
            builders = {c.name: lambda c=c: c for c in contenders}
        found, left_out, differs = agreeing(builders, tolerance(dtype, device))
        ceilings, rows = measure(found, *work, repeats, dtype, device)
        yield group | {
            "unit": work.unit, "work": work.amount, "ceilings": ceilings, "rows": [row._asdict() for row in rows],
            "left_out": left_out, "differs": differs,
        }  # fmt: skip


def unused(path: Path) -> Path:
    """`path`, or with -2, -3, ... at the end of its name: no run writes over what another has measured."""
    names = (path.with_stem(f"{path.stem}-{i}") for i in itertools.count(2))
    return path if not path.exists() else next(name for name in names if not name.exists())


def print_group(group: dict[str, Any]) -> None:
    shape, counts = group["shape"], group["counts"]
    busiest = max(counts) * len(counts) / sum(counts)
    print(
        f"\n{group['op']}: {shape['name']} (E {shape['experts']}, K {shape['top_k']}, D {shape['hidden']}, "
        f"F {shape['ffn']}), {shape['tokens']} tokens, {group['dtype']}, {group['routing']} (the busiest expert has "
        f"{busiest:.2f} x the mean)"
    )
    if group["rows"]:
        flops, copied = group["ceilings"]["flops"] / 1e12, group["ceilings"]["bytes"] / 1e9
        print(f"ceilings: matrix product {flops:.3f} TFLOP/s, copy {copied:.1f} GB/s")
        rate = {"flops": "TFLOP/s", "bytes": "GB/s"}[group["unit"]]
        print(
            f"  {'contender':24} {'pass':16} {'ms':>9} {rate:>8} {'% ceiling':>9} {'peak MiB':>9} {'saved MiB':>9} "
            f"{'peer/this':>9} {'error':>8}"
        )
    for row in group["rows"]:
        rate = f"{row['per_second'] / 1e12:.4f}" if group["unit"] == "flops" else f"{row['per_second'] / 1e9:.2f}"
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f}"
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
        print(
            f"  {row['contender']:24} {row['direction']:16} {1e3 * row['seconds']:9.3f} "
            f"{rate:>8} {100 * row['share']:9.1f} {peak:>9} {row['saved_bytes'] / 2**20:9.2f} "
            f"{ratio:>9} {row['error']:8.1e}"
        )
    for name, why in group["left_out"].items():
        print(f"  {name:24} left out: {why}")
    sys.stdout.flush()


def plot(result: dict[str, Any], path: Path) -> None:
    """Share of the ceiling of every layer, forward+backward, a bar for each contender."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = [group for group in result["groups"] if group["op"] == "layer"]
    names = list(dict.fromkeys(row["contender"] for group in groups for row in group["rows"]))
    figure, axes = pyplot.subplots(figsize=(10, 1 + 0.2 * len(groups) * (len(names) + 1)))
    for place, name in enumerate(names):
        shares = {
            at + place / (len(names) + 1): 100 * row["share"]
            for at, group in enumerate(groups)
            for row in group["rows"]
            if row["contender"] == name and row["direction"] == "forward+backward"
        }
        axes.barh(list(shares), list(shares.values()), 1 / (len(names) + 1), label=name)
    labels = [f"{g['shape']['name']}, {g['shape']['tokens']} tokens\n{g['dtype']}, {g['routing']}" for g in groups]
    axes.set_yticks(range(len(groups)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("forward+backward, % of the measured matrix product")
    axes.set_title(result["machine"]["device"])
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    import torch

    from moe_engine.host.memory import keep_freed_memory
    from tools.kernels.contenders import PEERS, versions

    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    keep_freed_memory()  # as a run on CPU does; the peers have it too
    torch.set_num_threads(options.threads)
    machine = {
        "device": device_name(device), "platform": f"{platform.system()} {platform.machine()}",
        "threads": options.threads, "date": datetime.date.today().isoformat(), "repeats": options.repeats,
        "versions": versions(),
    }  # fmt: skip
    absent = {peer.name: peer.install for peer in PEERS if not peer.installed}
    print(f"{machine['device']}, torch {torch.__version__}, {options.threads} threads")
    for name, install in absent.items():
        print(f"absent: {name} ({install})")
    result: dict[str, Any] = {"machine": machine, "absent": absent, "groups": []}
    slug = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    path = None if options.json == "none" else Path(options.json or unused(FOLDER / f"{slug}-{machine['date']}.json"))
    for case in cases(options, device):
        for group in bench(case, options.ops, options.peers, options.repeats, device):
            print_group(group)
            result["groups"].append(group)
            if path:  # at once, so that a long run that is stopped keeps what it has measured
                path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if path:
        print(f"\nwritten: {path}")
        if options.plot:
            plot(result, path.with_suffix(".png"))
    return int(any(group["differs"] for group in result["groups"]))


if __name__ == "__main__":
    run_program(main)
