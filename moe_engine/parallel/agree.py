"""One rank's trouble is everybody's: an error of any rank is raised on all, so that none waits for ranks that left."""

import json
from collections.abc import Callable

from moe_engine.errors import ConfigError, DataError, EngineError, StorageError
from moe_engine.parallel.collectives import gather_bytes
from moe_engine.parallel.mesh import Axis

KINDS: dict[str, type[EngineError]] = {kind.__name__: kind for kind in (ConfigError, DataError, StorageError)}


def act_together(act: Callable[[], None], world: Axis, everywhere: bool = True) -> None:
    """Run `act` on every rank, or on rank 0 alone; the error of the first rank that has one is raised on all.

    What the system refuses becomes a StorageError, any other exception an EngineError. Collective.
    """
    said = None
    if everywhere or world.rank == 0:
        try:
            act()
        except OSError as error:
            said = "StorageError", f"{error.filename or 'the disk'}: {error.strerror or error}"
        except EngineError as error:
            said = type(error).__name__, str(error)
        except Exception as error:
            said = "EngineError", f"{type(error).__name__}: {error}"
    answers = [json.loads(text) for text in gather_bytes(json.dumps(said).encode(), world)]
    for rank, answer in enumerate(answers):
        if answer:
            kind, text = answer
            raise KINDS.get(kind, EngineError)(text if world.size == 1 else f"rank {rank}: {text}")
