"""What the outside asks of a run: SIGTERM and SIGINT to save and end, SIGUSR1 to save and go on.

A handler notes the request and returns; the loop asks for it between two steps, where all ranks act on what any of them
was told. A second signal changes nothing, so none can interrupt a save.
"""

import signal
from typing import Any


class Requests:
    """The requests that have arrived. `stop` stays; `save` is for one save."""

    def __init__(self) -> None:
        self.stop = self.save = False

    def listen(self) -> "Requests":
        """Catch the signals of this process from now on; call it on the main thread."""
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        signal.signal(signal.SIGUSR1, self._save)
        return self

    def _stop(self, number: int, frame: Any) -> None:
        self.stop = True

    def _save(self, number: int, frame: Any) -> None:
        self.save = True
