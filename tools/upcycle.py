"""Makes a Mixture-of-Experts of a dense Llama, and says how far it is from its parent.

    python tools/upcycle.py --hf Llama-3.2-1B --method copy --experts 8 --top-k 2 --out llama-moe
    python tools/upcycle.py --hf Llama-2-7b --method clustering --experts 8 --top-k 2 --out llama-moe
    python tools/upcycle.py --hf base --method mix --models math code --top-k 2 --out btx

Methods: copy half drop virtual mix (copies of the whole layer), random clustering gradient llama_moe_v2 (the neurons
shared out), sharing_inner sharing_inter residual (neurons by importance). --attention-experts splits attention too.
docs/upcycling.md says what each is for. The result is a Hugging Face folder or a checkpoint to start from. The receipt
compares it with the dense parent on real text, a layer at a time, in fp32; --receipt-tokens 0 does without. Exit
codes: 0 done, 1 theory gives a bound and it does not hold, 65 data, 74 disk, 78 configuration.
"""

import argparse
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moe_engine.host.console import failed, run_program
from moe_engine.upcycle.flags import add_options, child_of, idle, options_of, parents_of


def main(arguments: list[str] | None = None) -> int:
    from moe_engine.errors import EngineError

    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        try:
            return upcycle(parser().parse_args(arguments))
        except EngineError as error:
            return failed(error)


def parser() -> argparse.ArgumentParser:
    """The flags."""
    from moe_engine.config.command_line import Parser

    out = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--hf", type=Path, required=True, metavar="DIR", help="the dense parent")
    out.add_argument("--method", required=True, metavar="NAME")
    out.add_argument("--out", type=Path, required=True, metavar="PATH", help="what to write")
    out.add_argument("--family", choices=("mixtral", "llama_moe_v2"), help="of the folder (default: mixtral)")
    out.add_argument("--format", choices=("hf", "checkpoint"), default="hf", help="a folder (default) or a checkpoint")
    out.add_argument("--hf-version", type=int, choices=(4, 5), help="spelling of config.json (default: both)")
    out.add_argument("--shard-gb", type=float, default=5.0, metavar="GB", help="largest file (default 5)")
    out.add_argument("--models", type=Path, nargs="+", default=[], metavar="DIR", help="mix: the other dense models")
    add_options(out)
    out.add_argument("--router-init", default="normal", metavar="NAME", help="first rows of routers (default normal)")
    out.add_argument("--router-std", type=float, default=0.02, metavar="X", help="of normal rows (default 0.02)")
    out.add_argument("--prompts", type=Path, metavar="FILE.yaml", help="experts: [{positive_prompts: [..]}, ..]")
    kinds = ("feature_change", "total", "feature_grad")
    out.add_argument(
        "--importance", choices=kinds, default=kinds[0], help="how neurons are weighed (default the first)"
    )
    out.add_argument("--text", nargs="+", default=[], metavar="FILE", help="text to look at (default: Python's own)")
    out.add_argument("--text-tokens", type=int, default=8192, metavar="N", help="of it, for importance and routers")
    out.add_argument("--seq-length", type=int, default=256, metavar="N", help="tokens of one sequence of it")
    out.add_argument("--tokenizer", metavar="SPEC", help="default: the parent's")
    out.add_argument("--allow-nonfinite", action="store_true", help="take weights that are NaN or infinite")
    out.add_argument("--receipt-tokens", type=int, default=1024, metavar="N", help="compared; 0: no receipt")
    return out


def upcycle(given: argparse.Namespace) -> int:
    """Make it, write it, compare it. What can be said against it comes before any work."""
    from tools.convert_hf import summary, warn

    options = options_of(given)
    warn(list(idle(given)))
    parents = parents_of(given)
    warn([line for parent in parents for line in parent.notes])
    child = child_of(given.method, parents[0].model, options)

    from moe_engine.upcycle.observe import observe, rows_of
    from moe_engine.upcycle.result import compare, hf_target, preservation_of, write
    from moe_engine.upcycle.source import Upcycled
    from moe_engine.upcycle.text import read_text

    target = hf_target(given, child, parents[0]) if given.format == "hf" else None
    text = read_text(given, rows_of(options, given.method), child.vocab_size)
    source = Upcycled(parents, child, given.method, options, *observe(given, options, parents[0], text))
    written = write(given, source, child, target, text, parents)
    print(f"{given.method}: {summary(written)}")
    for parent in parents:
        print(f"parent {parent}")
    print(f"wrote {given.out}; start from it with --init-from {given.out}")
    if text.receipt_BS is None:
        return 0
    return compare(given, parents[0], text.receipt_BS, preservation_of(given.method, options, parents[0]))


if __name__ == "__main__":
    run_program(main)
