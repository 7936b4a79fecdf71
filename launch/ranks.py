"""A rank from its launch to its end: rendezvous, device and mesh, what it says and leaves for torchrun, its exit code.

    Preempted          a line on standard output                      75
    EngineError        one line `error: ...`, rank 0 for all          its own: 65, 70, 74, 78
    another exception  traceback, and a line that says what to do     70

torchrun's report quotes, for each rank that failed, the file that TORCHELASTIC_ERROR_FILE names, in the form of
torch.distributed.elastic.multiprocessing.errors; without it the report would hide the message above it.
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_engine.config import Run
from moe_engine.errors import ConfigError, EngineError, Preempted
from moe_engine.host.console import on_lines, print_error

if TYPE_CHECKING:
    import torch

    from moe_engine.parallel.mesh import Mesh

PATIENCE = 3.0  # seconds that a rank waits before it ends, when another is to end first


def launched() -> tuple[int, int | None]:
    """This process's rank, and the ranks of its launch: None without a launcher, whose end it does not outlive."""
    # nothing is compiled, but DeepSpeed would load the compiler all the same
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        PR_SET_PDEATHSIG = 1  # torchrun ends, also when it is killed, and so does this process: no rank is left behind
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    world = os.environ.get("WORLD_SIZE")
    return int(os.environ.get("RANK", 0)), int(world) if world else None


class Ending:
    """How this rank ends: its exit code."""

    code = 0


@contextlib.contextmanager
def ending(rank: int) -> Iterator[Ending]:
    """Around the work of this rank: what it raises is said, and becomes the code."""
    end = Ending()
    try:
        yield end
    except Preempted as stop:
        leave_for_launcher(f"Preempted: {on_lines(stop)}")
        print(on_lines(stop), flush=True) if rank == 0 else None
        end.code = stop.exit_code
    except EngineError as error:
        if rank > 0:  # rank 0 speaks for all; the launcher then ends this one, unless the trouble is here alone
            time.sleep(PATIENCE)
        leave_for_launcher(f"{type(error).__name__}: {on_lines(error)}")
        if rank == 0 or not isinstance(error, ConfigError):
            print_error(on_lines(error))
        end.code = error.exit_code
    except Exception as error:  # ours, or another rank is gone
        said = (
            f"rank {rank} ends: {type(error).__name__}. If another rank ended first, it says why; --resume auto "
            "goes on from the newest checkpoint"
        )
        stack = traceback.format_exc()
        sys.stderr.write(stack)
        print_error(said)
        if raised_by_torch_distributed(error):  # the launcher reports who ends first: let it be the one that knows why
            time.sleep(PATIENCE)
        leave_for_launcher(said, stack)
        end.code = EngineError.exit_code


def hang(text: str) -> None:
    """What the watch has to say of a run that stands still; it ends this rank then."""
    leave_for_launcher(text)
    print_error(text)


def leave_for_launcher(message: str, stack: str = "") -> None:
    """Write what torchrun is to report of this rank; without torchrun nothing happens."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    extra = {"timestamp": str(int(time.time()))} | ({"py_callstack": f"{stack}{message}"} if stack else {})
    with contextlib.suppress(OSError):  # half a file would be the end of torchrun itself
        Path(f"{path}.tmp").write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
        os.replace(f"{path}.tmp", path)


def raised_by_torch_distributed(error: Exception) -> bool:
    """Whether a collective raised it, which is what the end of another rank looks like from here."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return "torch/distributed" in Path(last.filename).as_posix()


def meet() -> tuple[Any, int]:
    """The store that the ranks of this launch share, and how many they are."""
    import torch.distributed as dist

    if "RANK" not in os.environ:
        return dist.HashStore(), 1
    store, _, world = next(dist.rendezvous("env://"))
    return store, world


def start_ranks(run: Run, rank: int, world: int, store: Any) -> "tuple[torch.device, Mesh]":
    """This rank's device and mesh; every rank of the launch calls it. gloo on CPU, nccl on GPUs."""
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
