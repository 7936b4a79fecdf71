"""Writing a checkpoint: complete or not at all, and while training goes on if the run wants that.

    begin     all ranks    agree that there is space; rank 0 makes step-N.tmp/; each rank takes its shard
    write     each rank    rank-00003.safetensors, synced, with its digests           in the background, or at once
    complete  all ranks    exchange digests, and the word of every rank that all is well
              rank 0       manifest.json -> sync -> rename to step-N/ -> `latest` -> remove what is too old

The ranks talk to each other in `begin` and `complete` alone, on the main thread; the thread that writes never does. A
new save first completes the one before it, so there is never more than one half-written folder.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_engine.checkpoint.folders import folder_of, prune, publish_step, tidy
from moe_engine.checkpoint.manifest import write_manifest
from moe_engine.checkpoint.pieces import Piece
from moe_engine.checkpoint.shard import Digest, rank_file, size_of, write_shard
from moe_engine.errors import DataError, EngineError, StorageError
from moe_engine.host import disk
from moe_engine.parallel.agree import act_together
from moe_engine.parallel.collectives import gather_bytes, sum_
from moe_engine.parallel.mesh import Axis

MANIFEST_BYTES = 1 << 20  # more than the manifest and the rest will need


class Shard(NamedTuple):
    """What one rank owns: pieces of weights, each with flat tensors by kind, and small tensors of its own."""

    pieces: list[tuple[Piece, Mapping[str, Tensor]]]
    extra: Mapping[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor under its key in the file."""
        out = {f"extra/{name}": tensor for name, tensor in self.extra.items()}
        for i, (piece, kinds) in enumerate(self.pieces):
            out |= {f"{kind}/{i}/{piece.name}": tensor for kind, tensor in kinds.items()}
        return out


class PendingSave(NamedTuple):
    """A save under way: its folder, what its manifest will say, and the thread that writes this rank's file."""

    temporary: Path
    manifest: dict[str, Any]
    thread: threading.Thread
    outcome: list[Digest | Exception]


class Saver:
    """The checkpoints of one run. Every method is collective over all ranks, and raises on all of them or on none.

    keep_last: checkpoints to keep, 0 for all; those of a step that keep_every divides stay too. background: write in a
    thread, from a copy in host memory. heartbeat: called as long as a file that is waited for grows.
    """

    def __init__(
        self,
        root: Path,
        world: Axis,
        *,
        keep_last: int = 0,
        keep_every: int = 0,
        background: bool = False,
        heartbeat: Callable[[], None] = lambda: None,
    ) -> None:
        self.root, self.world, self.background, self.heartbeat = root, world, background, heartbeat
        self.keep_last, self.keep_every = keep_last, keep_every
        self.pending: PendingSave | None = None
        self.stalled = 0.0  # seconds that training has waited for this object
        self.notes: list[str] = []  # what went wrong without harm: old checkpoints that could not be removed
        act_together(lambda: tidy(root), world, everywhere=False)
        self._is_shared()

    def save(self, step: int, shard: Shard, manifest: dict[str, Any]) -> Path | None:
        """Start the checkpoint of `step`, and end it unless `background`; returns the folder that was completed.

        manifest: rank 0's, with "weights": {name: whole shape}. StorageError: what was saved before is there. When it
        is about the save before, this one is under way.
        """
        before, failed = None, None
        try:
            before = self.finish()
        except StorageError as error:
            failed = error
        with self._waiting():
            self._begin(step, shard, manifest)
        if not self.background:
            before = self.finish()
        if failed:
            raise failed
        return before

    def _begin(self, step: int, shard: Shard, manifest: dict[str, Any]) -> None:
        whole = {name: torch.Size(shape).numel() for name, shape in manifest["weights"].items()}
        assert self._count_elements(shard, list(whole)) == list(whole.values()), "the pieces do not make up the weights"
        temporary = folder_of(self.root, step).with_suffix(".tmp")
        tensors, metadata = shard.tensors(), {"pieces": json.dumps([piece for piece, _ in shard.pieces])}
        needed = int(sum_(torch.tensor(size_of(tensors, metadata)), self.world))
        needed += MANIFEST_BYTES + 1024 * self.world.size
        act_together(lambda: self._prepare(temporary, needed), self.world, everywhere=False)
        if self.background:
            tensors = {key: tensor.detach().to("cpu", copy=True) for key, tensor in tensors.items()}
        path, outcome = temporary / rank_file(self.world.rank), []

        def write() -> None:
            """Leaves the digest or the exception in `outcome`, where `_land` takes it."""
            try:
                outcome.append(write_shard(path, tensors, metadata))
            except Exception as error:  # raised where the thread is waited for
                outcome.append(error)

        thread = threading.Thread(target=write, name=f"save step {step}", daemon=True)
        self.pending = PendingSave(temporary, {"step": step} | manifest, thread, outcome)
        thread.start()

    def poll(self) -> Path | None:
        """Complete the save under way if every rank has written; returns its folder if so. Cheap when there is none."""
        if self.pending is None:
            return None
        with self._waiting():
            writing = int(sum_(torch.tensor(int(self.pending.thread.is_alive())), self.world))
        return None if writing else self.finish()

    def finish(self) -> Path | None:
        """Wait for the save under way and complete it; returns its folder, None when there is none."""
        if self.pending is None:
            return None
        pending, self.pending = self.pending, None
        with self._waiting():
            return self._complete_pending(pending)

    def _complete_pending(self, pending: PendingSave) -> Path:
        path, size = pending.temporary / rank_file(self.world.rank), 0
        while pending.thread.is_alive():
            pending.thread.join(timeout=1)
            if path.is_file() and path.stat().st_size > size:
                size = path.stat().st_size
                self.heartbeat()
        (mine,) = pending.outcome
        try:
            act_together(lambda: _raise(mine), self.world)
            digests = [json.loads(text) for text in gather_bytes(json.dumps(mine).encode(), self.world)]
            final = pending.temporary.with_suffix("")
            act_together(lambda: self._complete(pending, final, digests), self.world, everywhere=False)
        except EngineError:
            if self.world.rank == 0:
                _forget(pending.temporary)
            raise
        if self.world.rank == 0:
            try:
                prune(self.root, self.keep_last, self.keep_every)
            except StorageError as error:
                self.notes.append(f"an old checkpoint could not be removed: {error}")
        return final

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.stalled += time.perf_counter() - began

    def _prepare(self, temporary: Path, needed: int) -> None:
        disk.remove(temporary)
        disk.make_folder(self.root)
        disk.require_space(self.root, needed)
        disk.make_folder(temporary)

    def _complete(self, pending: PendingSave, final: Path, digests: list[list[Any]]) -> None:
        files = {rank_file(rank): digest for rank, digest in enumerate(digests)}
        write_manifest(pending.temporary, pending.manifest | {"files": files})
        publish_step(pending.temporary, final)

    def _count_elements(self, shard: Shard, names: list[str]) -> list[int]:
        """Elements of each weight over all ranks."""
        mine = dict.fromkeys(names, 0)
        for piece, _ in shard.pieces:
            mine[piece.name] += piece.length
        return sum_(torch.tensor([mine[name] for name in names], dtype=torch.int64), self.world).tolist()

    def _is_shared(self) -> None:
        """DataError unless every rank sees what rank 0 writes: found out now, and not at the first save."""
        token = gather_bytes(os.urandom(8).hex().encode(), self.world)[0]
        probe = self.root.with_name(f".{self.root.name}-shared")

        def write() -> None:
            disk.make_folder(probe.parent)
            disk.write_file(probe, [token])

        def read() -> None:
            """DataError where rank 0's file is not there or holds something else."""
            if not probe.is_file() or probe.read_bytes() != token:
                raise DataError(f"{probe.parent} is not the folder that rank 0 sees: --out must be shared by all nodes")

        act_together(write, self.world, everywhere=False)
        act_together(read, self.world)
        act_together(lambda: disk.remove(probe), self.world, everywhere=False)


def _raise(outcome: Digest | Exception) -> None:
    if isinstance(outcome, Exception):
        raise outcome


def _forget(temporary: Path) -> None:
    """A folder that could not be completed; what cannot be removed now is removed by the next run."""
    try:
        disk.remove(temporary)
    except StorageError:
        return
