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
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moe_engine.config import Domain, Run
from moe_engine.config_cli import Loaded, build_parser, load, print_config
from moe_engine.config_report import BULLET
from moe_engine.errors import ConfigError, EngineError, Preempted, StorageError
from moe_engine.host.signals import Requests
from moe_engine.log import Logger, printable


def main(argv: list[str]) -> int:
    """Run on this rank; returns the exit code."""
    # nothing is compiled, but DeepSpeed would load the compiler all the same
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    rank, world = int(os.environ.get("RANK", 0)), os.environ.get("WORLD_SIZE")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_the_launcher()
    try:
        parser = build_parser("pretrain_moe.py", __doc__)
        dry = "--dry-run" in argv or "--print-config" in argv
        loaded = load(argv, int(world) if world else None if dry else 1, parser)
        if loaded.print_config:
            print(print_config(loaded), end="") if rank == 0 else None
            return 0
        if loaded.dry_run:
            from moe_engine.plan.dry_run import describe

            print("\n".join(map(printable, describe(loaded)))) if rank == 0 else None
            return 0
        pretrain(loaded, rank)
    except Preempted as stop:
        print(stop, flush=True) if rank == 0 else None
        return stop.exit_code
    except EngineError as error:
        if rank > 0:  # rank 0 speaks for all; the launcher then ends this one, unless the trouble is here alone
            time.sleep(3)
        if rank == 0 or not isinstance(error, ConfigError):
            print(f"error: {on_lines(error)}", file=sys.stderr, flush=True)
        return error.exit_code
    except Exception as error:  # ours, or another rank is gone
        traceback.print_exc()
        print(
            f"error: rank {rank} ends: {type(error).__name__}. If another rank ended first, it says why; --resume auto "
            "goes on from the newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        return EngineError.exit_code
    return 0


def on_lines(error: EngineError) -> str:
    """An error's text as it is printed: problems of a list on lines of their own, all else escaped."""
    return BULLET.join(map(printable, str(error).split(BULLET)))


def pretrain(loaded: Loaded, rank: int) -> None:
    """The run itself: folders and data by rank 0, then every rank trains."""
    from moe_engine.host.lock import lock
    from moe_engine.plan.dry_run import batch_lines, parameter_lines
    from moe_engine.plan.start import checkpoint_of, weight_warnings
    from moe_engine.plan.tokenizers import check_tokenizers

    run = loaded.run
    out = Path(run.train.out)
    held, warnings = None, list(loaded.warnings)
    if rank == 0:
        make_writable(out)
        held = lock(out)
        if (checkpoint := checkpoint_of(run)) is None:
            warnings += weight_warnings(run)  # weights of another model are refused before one is built
        check_tokenizers(run, checkpoint)
        if run.train.export_hf:
            from moe_engine.checkpoint.hf.export import check_exportable

            came_from = Path(run.train.init_from) if run.train.init_from else None
            check_exportable(run.model, Path(run.train.export_hf), came_from)
    log = Logger(out, rank == 0, run.train.steps, log_every=run.train.log_every)
    with log:
        log.info(*loaded.derived, *batch_lines(run), *parameter_lines(run))
        log.warn(*warnings)
        if rank == 0 and held is None:
            log.warn(f"the file system of --out {out} has no locks: see to it that no other run writes there")
        store, world = meet()
        from moe_engine.host.watch import Watch

        with Watch(store.clone(), rank, world, run.train.step_timeout, out) as watch:
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
                log.info(export(out, Path(run.train.export_hf)))
    stop_ranks()
    if held:
        held.close()


def export(out: Path, folder: Path) -> str:
    """The newest checkpoint of the run as a Hugging Face folder."""
    from moe_engine.checkpoint.folders import folder_of, steps_in
    from moe_engine.checkpoint.hf.export import Wishes, export_checkpoint

    newest = folder_of(out / "checkpoints", steps_in(out / "checkpoints")[-1])
    target, written = export_checkpoint(newest, folder, Wishes(), verify=False)
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
    sys.exit(main(sys.argv[1:]))
