"""When a run saves, what beside the engine's state goes into a checkpoint, and what a disk that refuses means."""

from pathlib import Path

from moe_engine.checkpoint.save import Saver
from moe_engine.config import Run
from moe_engine.data.loader import Loader
from moe_engine.errors import StorageError
from moe_engine.log.logger import Logger
from moe_engine.parallel.mesh import Mesh
from moe_engine.train.engine import Engine
from moe_engine.train.signals import Asked
from moe_engine.train.state import save_state


class Saving:
    """Saves one run; collective over all ranks."""

    def __init__(self, run: Run, mesh: Mesh, engine: Engine, loader: Loader, saver: Saver, log: Logger):
        self.run, self.mesh, self.engine, self.loader, self.saver, self.log = run, mesh, engine, loader, saver, log

    def after_step(self, step: int, tokens_seen: int, asked: Asked, last: bool) -> None:
        """Save `step` if it is time or asked for, and complete what the background has written.

        A disk that refuses ends the run, or is warned about, on all ranks alike.
        """
        completed: list[Path | None] = []
        every, train = self.run.train.save_every, self.run.train
        try:
            if last or asked.stop or asked.save or (every and step % every == 0):
                completed.append(self._save(step, tokens_seen))
            completed.append(self.saver.finish() if last or asked.stop else self.saver.poll())
        except StorageError as error:
            if train.on_save_error == "stop" or asked.stop or last:
                raise
            self.log.warn(f"no checkpoint: {error}")
        self.log.warn(*self.saver.notes)
        self.saver.notes.clear()
        self.log.info(*(f"saved {folder}" for folder in completed if folder))

    def _save(self, step: int, tokens_seen: int) -> Path | None:
        tokenizer = self.loader.orders[0].dataset.tokenizer
        manifest = {
            "tokens": tokens_seen,
            "data": self.loader.state(),
            "run": self.run.model_dump(mode="json"),
            "tokenizer": {key: value for key, value in tokenizer.items() if key not in ("files", "notes")},
        }
        return save_state(self.engine, self.mesh, self.saver, step, manifest)
