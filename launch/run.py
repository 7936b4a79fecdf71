"""What surrounds the training of every entry point: output folder, lock, log, ranks and watch before it, summary and
export after it.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from launch.ranks import hang, meet, start_ranks
from moe_engine.config import Run
from moe_engine.config.command_line import Loaded, print_config
from moe_engine.host.files import make_writable
from moe_engine.host.signals import Requests
from moe_engine.log.logger import Logger
from moe_engine.text import printable

if TYPE_CHECKING:
    import torch

    from moe_engine.parallel.mesh import Mesh

PRINTS = {"-h", "--help", "--print-config", "--dry-run"}  # flags that print and train nothing


class Launched(NamedTuple):
    """What a run is built with on this rank."""

    run: Run
    mesh: "Mesh"
    device: "torch.device"
    log: Logger
    requests: Requests
    heartbeat: Callable[[int, str], None]


def only_printed(loaded: Loaded, rank: int) -> bool:
    """Whether the command line asks for the configuration or the plan alone, which rank 0 has then printed."""
    if loaded.print_config:
        print(print_config(loaded), end="") if rank == 0 else None
    elif loaded.dry_run:
        from moe_engine.plan.dry_run import describe

        print("\n".join(map(printable, describe(loaded)))) if rank == 0 else None
    return loaded.print_config or loaded.dry_run


@contextmanager
def running(loaded: Loaded, rank: int) -> Iterator[Launched]:
    """Around the training: every rank enters it, and leaves it when the last step is saved."""
    from moe_engine.plan.open_files import allow_needed_files

    run = loaded.run
    allow_needed_files(run)
    with ExitStack() as stack:
        log = _open_log(loaded, rank, stack)
        store, world = meet()
        from moe_engine.host.watch import Watch

        with Watch(store.clone(), rank, world, run.train.step_timeout, Path(run.train.out), say=hang) as watch:
            try:
                device, mesh = start_ranks(run, rank, world, store)
                # until here a signal ends a rank at once: it waits for others, and has done nothing
                yield Launched(run, mesh, device, log, Requests().listen(), watch.heartbeat)
            except Exception as error:
                error.add_note(f"on rank {rank}, at step {watch.at[0]}, {watch.at[1]}")
                raise
        if rank == 0:
            _summarise(run, log)
        import torch.distributed as dist

        dist.destroy_process_group()


def _open_log(loaded: Loaded, rank: int, stack: ExitStack) -> Logger:
    """The run's folder, locked and written to by rank 0 alone, and its log with what is known before training."""
    from moe_engine.host.lock import lock
    from moe_engine.plan.dry_run import batch_lines, parameter_lines
    from moe_engine.plan.start import start_of

    run, warnings = loaded.run, list(loaded.warnings)
    out = Path(run.train.out)
    if rank == 0:
        make_writable(out)
        held = lock(out)
        if held is None:
            warnings.append(f"the file system of --out {out} has no locks: see to it that no other run writes there")
        else:
            stack.enter_context(held)
        warnings += start_of(run).warnings
    log = stack.enter_context(Logger(out, rank == 0, run.train.steps, log_every=run.train.log_every))
    log.info(*loaded.derived, *batch_lines(run), *parameter_lines(run))
    log.warn(*warnings)
    return log


def _summarise(run: Run, log: Logger) -> None:
    """The closing lines, and the export that the run was asked for."""
    from moe_engine.checkpoint.hf.export import export_run
    from moe_engine.report.summary import write_summary

    log.info(*write_summary(Path(run.train.out)))
    if run.train.export_hf:
        log.info(f"exporting to {run.train.export_hf}")
        log.info(export_run(run))
