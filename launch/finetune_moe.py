"""Fine-tune a dense or Mixture-of-Experts decoder on instructions and conversations.

    torchrun --nproc_per_node 8 launch/finetune_moe.py --init-from FOLDER --files alpaca.json --ep 2 --epochs 2
    python launch/finetune_moe.py --init-from FOLDER --mixture configs/data/mixture.yaml --mode validation
    python launch/finetune_moe.py --init-from FOLDER --data PREPARED                 what tools/prepare_data.py made

The rows become tokens by the chat template of the tokenizer beside the weights, and only the assistant's turns are
trained (docs/finetuning.md). Exit codes are those of pretrain_moe.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.data import with_data
from launch.ranks import ending, launched
from launch.run import PRINTS, only_printed, running
from moe_engine.config.command_line import build_parser, load
from moe_engine.errors import ConfigError
from moe_engine.host.console import run_program

ALIASES = {
    "--data-file": "--files",
    "--model-id": "--init-from",
    "--output-dir": "--out",
    "--batch-size": "--micro-batch",
    "--per-device-batch-size": "--micro-batch",
    "--learning-rate": "--lr",
    "--max-seq-length": "--seq-length",
    "--max-target-length": "--max-response",
    "--routing-loss-weight": "--routing-weight",
}  # names that other trainers have (S1.13 to S1.17); --grad-accum becomes --set train.accumulation
SWITCHES = {"--disable-routing": ["--routing-weight", "0"]}
SETTINGS = {"--grad-accum": "train.accumulation", "--gradient-accumulation-steps": "train.accumulation"}


def main(argv: list[str]) -> int:
    """Run on this rank; returns the exit code."""
    rank, world = launched()
    with ending(rank) as end:
        argv = own_flags(argv)
        loaded = load(argv, world or (None if PRINTS & set(argv) else 1), build_parser("finetune_moe.py", __doc__))
        run = loaded.run
        if not run.samples.given and not run.data.domains:
            raise ConfigError("nothing to train on: give --files, --mixture or --data")
        if not run.train.init_from and not run.train.resume:
            raise ConfigError("--init-from: not given, expected the Hugging Face folder or checkpoint to fine-tune")
        if not only_printed(loaded, rank):
            with running(loaded, rank) as here:
                from moe_engine.data.corpus import open_corpus
                from moe_engine.train.loop import fit
                from moe_engine.train.session import build

                run = with_data(here)
                text = open_corpus(run)
                fit(build(run, here.mesh, here.device, *text, here.log, here.requests, here.heartbeat))
    return end.code


def own_flags(argv: list[str]) -> list[str]:
    """The command line with our names for flags that other trainers have."""
    ours: list[str] = []
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-") if flag.startswith("--") else flag
        if flag in SETTINGS:
            ours += ["--set", f"{SETTINGS[flag]}={value if equals else next(words, '')}"]
        elif flag in SWITCHES:
            ours += SWITCHES[flag]
        elif flag in ALIASES:
            ours += [f"{ALIASES[flag]}{equals}{value}"]
        else:
            ours.append(word)
    return ours


if __name__ == "__main__":
    run_program(lambda: main(sys.argv[1:]), prints=bool(PRINTS & set(sys.argv)))
