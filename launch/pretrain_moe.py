"""Pre-train a dense or Mixture-of-Experts decoder.

    torchrun --nproc_per_node 8 launch/pretrain_moe.py --ep 2 --dp 4
    python launch/pretrain_moe.py --steps 20                                 one process
    torchrun --nproc_per_node 8 launch/pretrain_moe.py --config configs/runs/mixtral-8x7b-pretrain.yaml --data corpus

On CPU the ranks talk over gloo, on GPUs over nccl. Without --data it reads the Python standard library's own sources.
Exit codes: 0 done, 65 data, 70 internal, 74 disk, 75 told to stop and saved, 78 configuration.
"""

import ctypes
import errno
import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.ranks import exit_code, hang
from moe_engine.config import Domain, Run
from moe_engine.config_cli import Loaded, build_parser, load, print_config
from moe_engine.errors import ConfigError, StorageError
from moe_engine.host.console import run_program
from moe_engine.host.signals import Requests
from moe_engine.log import Logger, printable

PRINTS = {"-h", "--help", "--print-config", "--dry-run"}  # flags that print and train nothing


def main(argv: list[str]) -> int:
    """Run on this rank; returns the exit code."""
    # nothing is compiled, but DeepSpeed would load the compiler all the same
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_the_launcher()
    rank, world = int(os.environ.get("RANK", 0)), os.environ.get("WORLD_SIZE")
    return exit_code(partial(start, argv, rank, int(world) if world else None), rank)


def start(argv: list[str], rank: int, world: int | None) -> None:
    """What the command line asks for. world: ranks of the launch, None without a launcher."""
    loaded = load(argv, world or (None if PRINTS & set(argv) else 1), build_parser("pretrain_moe.py", __doc__))
    if loaded.print_config:
        print(print_config(loaded), end="") if rank == 0 else None
    elif loaded.dry_run:
        from moe_engine.plan.dry_run import describe

        print("\n".join(map(printable, describe(loaded)))) if rank == 0 else None
    else:
        pretrain(loaded, rank)


def pretrain(loaded: Loaded, rank: int) -> None:
    """The run itself: folders and data by rank 0, then every rank trains."""
    from moe_engine.plan.open_files import allow_needed_files

    allow_needed_files(loaded.run)
    from moe_engine.host.lock import lock
    from moe_engine.plan.dry_run import batch_lines, parameter_lines
    from moe_engine.plan.start import start_of

    run = loaded.run
    out = Path(run.train.out)
    held, warnings = None, list(loaded.warnings)
    if rank == 0:
        make_writable(out)
        held = lock(out)
        warnings += start_of(run).warnings
    log = Logger(out, rank == 0, run.train.steps, log_every=run.train.log_every)
    with log:
        log.info(*loaded.derived, *batch_lines(run), *parameter_lines(run))
        log.warn(*warnings)
        if rank == 0 and held is None:
            log.warn(f"the file system of --out {out} has no locks: see to it that no other run writes there")
        store, world = meet()
        from moe_engine.host.watch import Watch

        with Watch(store.clone(), rank, world, run.train.step_timeout, out, say=hang) as watch:
            try:
                train(run, rank, world, store, log, watch.beat)
            except Exception as error:
                error.add_note(f"on rank {rank}, at step {watch.at[0]}, {watch.at[1]}")
                raise
        if rank == 0:
            from moe_engine.train.summary import write_summary

            log.info(*write_summary(out))
            if run.train.export_hf:
                log.info(f"exporting to {run.train.export_hf}")
                log.info(export(run))
    stop_ranks()
    if held:
        held.close()


def export(run: Run) -> str:
    """The newest checkpoint of the run as a Hugging Face folder; the one that it resumed, if nothing was left to do."""
    from moe_engine.checkpoint.folders import folder_of, steps_in
    from moe_engine.checkpoint.hf.export import Wishes, export_checkpoint

    root, folder = Path(run.train.out) / "checkpoints", Path(run.train.export_hf or "")
    steps = steps_in(root)
    newest = folder_of(root, steps[-1]) if steps else Path(run.train.resume or "")
    target, written = export_checkpoint(newest, folder, Wishes(version=run.train.hf_version), verify=False)
    return (
        f"exported {newest} as {target.family}: {len(written.tensors)} tensors, {written.bytes / 1e9:.3f} GB, {folder}"
    )


def train(run: Run, rank: int, world: int, store: Any, log: Logger, beat: Callable[[int, str], None]) -> None:
    """Mesh, text and model of this rank, then the loop; every rank of the launch calls it."""
    device, mesh = start_ranks(run, rank, world, store)
    requests = Requests().listen()  # until here a signal ends a rank at once: it waits for others, and has done nothing
    from moe_engine.data.corpus import open_corpus
    from moe_engine.parallel.collectives import barrier
    from moe_engine.prepare.default import NAME, prepare_default_corpus
    from moe_engine.train.loop import build, fit

    if not run.data.domains:
        folder = Path(run.train.out) / "data"
        if rank == 0:
            prepare_default_corpus(folder, run)
        barrier(mesh.world)
        run = run.model_copy(
            update={"data": run.data.model_copy(update={"domains": (Domain(name=NAME, path=str(folder)),)})}
        )
    fit(build(run, mesh, device, *open_corpus(run), log, requests, beat))


def make_writable(out: Path) -> None:
    """ConfigError when nothing can be written to --out."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        kind = StorageError if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO) else ConfigError
        raise kind(f"--out {out}: {error.strerror}; choose a folder that you can write to") from error


def die_with_the_launcher() -> None:
    """Linux ends this process when torchrun ends, also when it is killed: no rank is left behind."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def meet() -> tuple[Any, int]:
    """The store that the ranks of this launch share, and how many they are."""
    import torch.distributed as dist

    if "RANK" not in os.environ:
        return dist.HashStore(), 1
    store, _, world = next(dist.rendezvous("env://"))
    return store, world


def start_ranks(run: Run, rank: int, world: int, store: Any):
    """This rank's device and mesh; every rank of the launch calls it."""
    import torch
    import torch.distributed as dist

    from moe_engine.parallel.mesh import build_mesh

    local = int(os.environ.setdefault("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    # the watch has the first word: the backend gives up after it, or never
    timeout = timedelta(seconds=2 * run.train.step_timeout + 120) if run.train.step_timeout else timedelta(days=365)
    named = dist.PrefixStore("ranks", store)
    dist.init_process_group(backend, store=named, rank=rank, world_size=world, timeout=timeout)
    return device, build_mesh(run.parallel.dp, run.parallel.ep, run.parallel.tp, timeout)


def stop_ranks() -> None:
    import torch.distributed as dist

    dist.destroy_process_group()


if __name__ == "__main__":
    run_program(lambda: main(sys.argv[1:]), prints=bool(PRINTS & set(sys.argv)))
