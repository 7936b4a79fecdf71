"""How a rank ends: what it says, what it leaves for torchrun, and its exit code. The same for every entry point.

    Preempted          a line on standard output                      75
    EngineError        one line `error: ...`, rank 0 for all          its own: 65, 70, 74, 78
    another exception  traceback, and a line that says what to do     70

torchrun's report quotes, for each rank that failed, the file that TORCHELASTIC_ERROR_FILE names, in the form of
torch.distributed.elastic.multiprocessing.errors; without it the report would hide the message above it.
"""

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from moe_engine.config_report import BULLET
from moe_engine.errors import ConfigError, EngineError, Preempted
from moe_engine.host.console import print_error
from moe_engine.log import printable

PATIENCE = 3.0  # seconds that a rank waits before it ends, when another is to end first


def exit_code(work: Callable[[], object], rank: int) -> int:
    """Do the work of this rank; 0, or the code that belongs to what it raised, once that is said."""
    try:
        work()
    except Preempted as stop:
        leave_for_launcher(f"Preempted: {on_lines(stop)}")
        print(on_lines(stop), flush=True) if rank == 0 else None
        return stop.exit_code
    except EngineError as error:
        if rank > 0:  # rank 0 speaks for all; the launcher then ends this one, unless the trouble is here alone
            time.sleep(PATIENCE)
        leave_for_launcher(f"{type(error).__name__}: {on_lines(error)}")
        if rank == 0 or not isinstance(error, ConfigError):
            print_error(on_lines(error))
        return error.exit_code
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
        return EngineError.exit_code
    return 0


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


def on_lines(error: EngineError) -> str:
    """An error's text as it is printed: problems of a list on lines of their own, all else escaped."""
    return BULLET.join(map(printable, str(error).split(BULLET)))
