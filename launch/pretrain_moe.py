"""Pre-train a dense or Mixture-of-Experts decoder.

    torchrun --nproc_per_node 8 launch/pretrain_moe.py --ep 2 --dp 4
    python launch/pretrain_moe.py --steps 20                                 one process
    torchrun --nproc_per_node 8 launch/pretrain_moe.py --config configs/runs/mixtral-8x7b-pretrain.yaml --data corpus

On CPU the ranks talk over gloo, on GPUs over nccl. Without --data it reads the Python standard library's own sources.
Exit codes: 0 done, 65 data, 70 internal, 74 disk, 75 told to stop and saved, 78 configuration.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.data import with_data
from launch.ranks import ending, launched
from launch.run import PRINTS, only_printed, running
from moe_engine.config.command_line import build_parser, load
from moe_engine.host.console import run_program


def main(argv: list[str]) -> int:
    """Run on this rank; returns the exit code."""
    rank, world = launched()
    with ending(rank) as end:
        loaded = load(argv, world or (None if PRINTS & set(argv) else 1), build_parser("pretrain_moe.py", __doc__))
        if not only_printed(loaded, rank):
            with running(loaded, rank) as here:
                from moe_engine.data.corpus import open_corpus
                from moe_engine.train.loop import fit
                from moe_engine.train.session import build

                run = with_data(here)
                text = open_corpus(run)
                fit(build(run, here.mesh, here.device, *text, here.log, here.requests, here.heartbeat))
    return end.code


if __name__ == "__main__":
    run_program(lambda: main(sys.argv[1:]), prints=bool(PRINTS & set(sys.argv)))
