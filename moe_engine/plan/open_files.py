"""How many files one rank has open at once, sockets included, on gloo.

    24               interpreter, libraries, logs, lock, store, a checkpoint being written
    3 + k            each group of k ranks: the k - 1 others, a listener, what waits for them
    1                each shard of data, which stays mapped, and each file of a checkpoint that is read

Counted on /proc/PID/fd: 20 on one rank, 46 with --ep 2 on 2 ranks (54 here), 66 with --ep 2 --tp 2 on 8 (80 here).
"""

from pathlib import Path

from moe_engine.checkpoint.folders import folder_of, steps_in
from moe_engine.config import Run
from moe_engine.host.files import allow_open_files

ALONE, DEFAULT_CORPUS = 24, 2


def allow_needed_files(run: Run) -> None:
    """Raise this rank's own limit as far as it needs; ConfigError where the system allows less."""
    talk, read = group_files(run), read_files(run)
    parts = [f"{ALONE} for itself", f"{talk} to talk to other ranks", f"{read} for data and checkpoints that it reads"]
    allow_open_files(ALONE + talk + read, f"a rank of this run has {', '.join(parts)}")


def group_files(run: Run) -> int:
    """Of the groups of a rank: two of all ranks, two of those that read different data, and the axes, ep twice."""
    layout = run.parallel
    sizes = (*[run.world_size] * 2, *[run.data_ranks] * 2, layout.dp, layout.ep, layout.ep, layout.tp)
    return sum(3 + size for size in sizes if size > 1)


def read_files(run: Run) -> int:
    """Shards of the data, and files of the checkpoint that the run starts from."""
    shards = sum(1 for domain in run.data.domains for _ in Path(domain.path).glob("*.bin"))
    root, source = Path(run.train.out) / "checkpoints", run.train.resume or run.train.init_from
    if source == "auto":
        steps = steps_in(root)
        source = str(folder_of(root, steps[-1])) if steps else run.train.init_from
    weights = sum(1 for _ in Path(source).glob("rank-*.safetensors")) if source else 0
    return (shards if run.data.domains else DEFAULT_CORPUS) + weights
