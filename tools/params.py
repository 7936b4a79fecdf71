"""How big is a model? `python tools/params.py --model mixtral-8x7b --dp 4 --ep 2`

Prints the parameters of each component: in all, visited by one token, on one rank of the layout, and trainable; then
bytes in bf16 (GB = 1e9, GiB = 2^30), what one rank keeps under ZeRO, and the line that PEFT prints. Arithmetic only:
any model is counted in an instant. Where LoRA's adapters lie is in moe_engine/plan/params.py.

    --lora-rank 64                                      adapters on all seven projections, the base frozen
    --lora-rank 64 --freeze attention --train router    attention's adapters frozen too, routers trained
    --train router                                      no adapters, only the routers train
    --config FILE --set SECTION.KEY=VALUE               the model and layout of a run, with changes

Exit code 78 when something that was asked for does not exist.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moe_engine.host.console import failed, run_program

if TYPE_CHECKING:
    from moe_engine.config import Run
    from moe_engine.config.command_line import Loaded
    from moe_engine.plan.params import Census, Part

TITLES = ("parameters", "active", "on one rank", "trainable")


def main(arguments: list[str] | None = None) -> int:
    from moe_engine.config.command_line import Parser
    from moe_engine.errors import EngineError
    from moe_engine.text import printable

    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    try:
        options = parser.parse_args(arguments)
        loaded = load_run(options)
        census = census_of(loaded.run, options)
    except EngineError as error:
        return failed(error)
    for line in loaded.warnings:
        print(f"warning: {printable(line)}", file=sys.stderr)
    if options.json:
        print(json.dumps(as_json(census), indent=2))
    else:
        print("\n".join(map(printable, report(options.model or options.config, census))))
    return 0


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this tool; those of the layout mean what they mean to a run."""
    parser.add_argument("--model", metavar="NAME|PATH", help="preset, YAML file, or config.json of HF or its folder")
    parser.add_argument("--config", metavar="FILE", help="YAML file of a run")
    parser.add_argument("--set", metavar="SECTION.KEY=VALUE", action="append", default=[], help="any setting of a run")
    for axis, text in (("dp", "replicas of each expert"), ("ep", "ranks that share the experts"), ("tp", "tensor")):
        parser.add_argument(f"--{axis}", type=int, metavar="N", help=text)
    parser.add_argument("--zero", type=int, metavar="0|1|2|3", help="ZeRO stage (default: 2)")
    parser.add_argument("--lora-rank", type=int, metavar="R", help="rank of LoRA's adapters")
    parser.add_argument("--lora-targets", metavar="A,B,..", help="some of q,k,v,o,gate,up,down (default: all)")
    parser.add_argument("--freeze", metavar="PART", action="append", default=[], help="component that does not train")
    parser.add_argument("--train", metavar="PART", action="append", default=[], help="component that trains")
    parser.add_argument("--json", action="store_true", help="print JSON")


def load_run(options: argparse.Namespace) -> "Loaded":
    """The run whose model and layout are counted, checked as a launch would check it."""
    from moe_engine.config.command_line import load
    from moe_engine.errors import ConfigError

    if not options.model and not options.config:
        raise ConfigError("found no model to count, expected --model NAME|PATH or --config FILE")
    given = [name for name in ("model", "config", "dp", "ep", "tp", "zero") if getattr(options, name) is not None]
    words = [word for name in given for word in (f"--{name}", str(getattr(options, name)))]
    words += [word for assignment in options.set for word in ("--set", assignment)]
    if not options.config:  # a batch that every model and tp can cut
        words += ["--seq-length", "2", "--micro-batch", str(max(options.tp or 1, 1))]
    return load(words, None)


def census_of(run: "Run", options: argparse.Namespace) -> "Census":
    """What the flags ask to count."""
    from moe_engine.errors import ConfigError
    from moe_engine.plan.params import TARGETS, Lora, count

    if options.lora_targets is not None and options.lora_rank is None:
        raise ConfigError("--lora-targets: given without a rank, expected --lora-rank R beside it")
    targets = TARGETS if options.lora_targets is None else tuple(options.lora_targets.split(","))
    lora = None if options.lora_rank is None else Lora(options.lora_rank, targets)
    freeze, train = ([name for word in words for name in word.split(",")] for words in (options.freeze, options.train))
    return count(run.model, run.parallel, lora, freeze, train)


def report(name: str, census: "Census") -> list[str]:
    """The table and what follows from it."""
    base = [part for part in census.parts if not part.adapter]
    adapters = [part for part in census.parts if part.adapter]
    rows = [(part.name, numbers([part])) for part in base] + [("model", numbers(base))]
    if adapters:
        rows += [(part.name, numbers([part])) for part in adapters] + [("all", numbers(census.parts))]
    parallel = census.parallel
    layout = f"dp {parallel.dp} x ep {parallel.ep} x tp {parallel.tp}, ZeRO {parallel.zero}"
    return [
        f"{name} on {layout}",
        "",
        f"{'component':16}" + "".join(f"{title:>18}" for title in TITLES),
        *(f"{name:16}" + "".join(f"{number:18,}" for number in row) for name, row in rows),
        "",
        f"bf16      {size(census.total)} in all, {size(census.held)} on one rank",
        f"one rank  holds {census.held:,} parameters, and the optimizer states of {census.optimized:,}",
        "",
        census.peft_line(),
    ]


def numbers(parts: "tuple[Part, ...] | list[Part]") -> tuple[int, int, int, int]:
    """Parameters, active, on one rank, trainable: summed over parts."""
    return (
        sum(part.parameters for part in parts),
        sum(part.active for part in parts),
        sum(part.rank for part in parts),
        sum(part.parameters for part in parts if part.trains),
    )


def size(parameters: int) -> str:
    """Bytes in bf16."""
    return f"{2 * parameters / 1e9:.2f} GB ({2 * parameters / 2**30:.2f} GiB)"


def as_json(census: "Census") -> dict[str, object]:
    """The same as numbers."""
    keys = [title.replace(" ", "_") for title in TITLES]
    parallel = census.parallel
    return {
        "layout": {key: getattr(parallel, key) for key in ("dp", "ep", "tp", "zero")},
        "components": {part.name: dict(zip(keys, numbers([part]))) for part in census.parts},
        "all": dict(zip(keys, numbers(census.parts))),
        "bf16_bytes": 2 * census.total,
        "one_rank": {"held": census.held, "bf16_bytes": 2 * census.held, "optimized": census.optimized},
    }


if __name__ == "__main__":
    run_program(main)
