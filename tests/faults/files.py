"""Files of a checkpoint that were changed, cut, swapped or never written: found before anything is read from them."""

import ctypes
import errno
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from moe_engine.checkpoint import shard
from moe_engine.checkpoint.find import find_checkpoint, verify
from moe_engine.checkpoint.folders import folder_of, steps_in
from moe_engine.checkpoint.pieces import Piece
from moe_engine.checkpoint.save import MANIFEST_BYTES, Saver, Shard
from moe_engine.errors import EngineError, StorageError
from moe_engine.host import disk
from moe_engine.parallel.mesh import Axis
from tests.faults.arena import Arena, Fault, Injections
from tests.faults.ranks import run_of, train_to_the_end

ALONE = Axis("world")
SHARD_BYTES = 4 << 20
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000


def checkpoints(arena: Arena) -> Path:
    """A trained run's checkpoints 3, 6, 9 and 12, of two ranks."""
    out = arena.folder("whole")
    if found := train_to_the_end(run_of(arena.corpus(), out, (1, 2, 1))):
        raise EngineError(f"an untouched run failed: {found}")
    return out / "checkpoints"


def noticed(root: Path, what: str, touched: Path) -> str | None:
    """The damage is named, and --resume auto takes the checkpoint before."""
    folder = folder_of(root, 12)
    problems = verify(folder, ALONE)
    if not problems:
        return f"{what}: not noticed"
    if not any(touched.name in problem or folder.name in problem for problem in problems):
        return f"{what}: {problems[0]} does not name {touched.name}"
    said: list[str] = []
    chosen = find_checkpoint("auto", root, ALONE, said.append)
    if chosen != folder_of(root, 9) or len(said) != 1 or "step 9" not in said[0]:
        return f"{what}: {chosen} was chosen, and said: {said}"
    return None


def bits_flip(arena: Arena, count: int) -> Injections:
    """C1: one bit, anywhere in any file, each byte as likely as another but small files not left out."""
    root = checkpoints(arena)
    files = sorted(folder_of(root, 12).iterdir())
    for i in range(count):
        path = files[i % len(files)]
        whole = path.read_bytes()
        bit = arena.draw.randrange(8 * len(whole))
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(content))
        yield noticed(root, f"bit {bit} of {path.name}", path)
        path.write_bytes(whole)


def pages_are_lost(arena: Arena, count: int) -> Injections:
    """C2: files cut anywhere, a page of zeros, no file, an empty one, one too many."""
    root = checkpoints(arena)
    files = sorted(folder_of(root, 12).iterdir())
    kinds: list[tuple[str, Callable[[Path, bytes], object]]] = [
        ("cut", lambda path, whole: path.write_bytes(whole[: arena.draw.randrange(len(whole))])),
        ("a page of zeros", lambda path, whole: path.write_bytes(zeroed(whole, arena.draw.randrange(len(whole))))),
        ("missing", lambda path, whole: path.unlink()),
        ("empty", lambda path, whole: path.write_bytes(b"")),
        ("a file too many", lambda path, whole: path.with_name("rank-00099.safetensors").write_bytes(whole)),
        ("longer", lambda path, whole: path.write_bytes(whole + bytes(arena.draw.randrange(1, 5000)))),
    ]
    for i in range(count):
        what, damage = kinds[i % len(kinds)] if i < 60 else kinds[i % 2]
        path = files[i // len(kinds) % len(files)]
        more, whole = path.with_name("rank-00099.safetensors"), path.read_bytes()
        damage(path, whole)
        changed = more.is_file() or not path.is_file() or path.read_bytes() != whole
        yield noticed(root, f"{what}: {path.name}", more if more.is_file() else path) if changed else None
        path.write_bytes(whole)
        more.unlink(missing_ok=True)


def zeroed(whole: bytes, place: int) -> bytes:
    """A 4 KiB page, aligned, as zeros: what a torn write leaves."""
    start = place // 4096 * 4096
    page = whole[start : start + 4096]
    return whole[:start] + bytes(len(page)) + whole[start + 4096 :]


def files_are_swapped(arena: Arena, count: int) -> Injections:
    """C3: a rank's file of another rank, of another step, or the whole folder under another name."""
    root = checkpoints(arena)
    newest = folder_of(root, 12)
    names = sorted(path.name for path in newest.iterdir())
    sources = [folder_of(root, step) / name for step in (3, 6, 9, 12) for name in names]
    pairs = [(source, newest / name) for source in sources for name in names if source != newest / name]
    arena.draw.shuffle(pairs)
    for source, target in (pairs * (count // len(pairs) + 1))[:count]:
        whole = target.read_bytes()
        shutil.copyfile(source, target)
        yield noticed(root, f"{source.parent.name}/{source.name} as {target.name}", target)
        target.write_bytes(whole)


def the_disk_fills(arena: Arena, count: int) -> Injections:
    """C4: a real file system, too small by any number of bytes; what was saved stays, and a save that fits works.

    Every second time the space goes after it was looked at, so that a write fails half way.
    """
    if (refused := in_a_small_file_system(1 << 20, lambda root: None)) is not None:
        raise EngineError(f"C4 needs a tmpfs in a user namespace of its own: {refused}")
    for i in range(count):
        more, late = int(SHARD_BYTES * (0.02 + 0.9 * i / max(count - 1, 1))), i % 2 == 1
        room = SHARD_BYTES + (1 << 16) + (0 if late else MANIFEST_BYTES) + more // 4096 * 4096
        yield in_a_small_file_system(room, lambda root, late=late: _save_until_full(root, late))


def _save_until_full(root: Path, late: bool) -> str | None:
    saver, big = Saver(root, ALONE), torch.arange(float(SHARD_BYTES // 4))
    whole = {"weights": {"w": [len(big)]}}
    real = disk.require_space
    if late:
        disk.require_space = lambda folder, needed: None
    saver.save(1, _holding(big), whole)
    try:
        saver.save(2, _holding(big + 1), whole)
        return "the second checkpoint fitted"
    except StorageError as error:
        said = str(error)
    disk.require_space = real
    wanted = "No space left on device; free some space" if late else "needs 0.00"
    if wanted not in said:
        return f"said: {said}"
    if steps_in(root) != [1] or verify(folder_of(root, 1), ALONE) or list(root.glob("*.tmp")):
        return f"{sorted(path.name for path in root.iterdir())} is left"
    small = torch.zeros(10)
    disk.require_space = lambda folder, needed: None
    saver.save(3, _holding(small), {"weights": {"w": [10]}})
    return None if steps_in(root) == [1, 3] and not verify(folder_of(root, 3), ALONE) else "the next save failed"


def _holding(values: torch.Tensor) -> Shard:
    return Shard([(Piece("w", ((0, len(values)),), 0, len(values)), {"master": values})], {})


def in_a_small_file_system(size: int, act: Callable[[Path], str | None]) -> str | None:
    """act(folder) in a process that alone sees a tmpfs of `size` bytes there; what it returns, or why it could not."""
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        process = multiprocessing.get_context("fork").Process(target=_apart, args=(size, folder, act, sender))
        process.start()
        sender.close()
        try:
            return receiver.recv_bytes().decode() or None
        except EOFError:
            return "the process died"
        finally:
            process.join()


def _apart(size: int, folder: str, act: Callable[[Path], str | None], sender: Connection) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    said: str | None = None
    try:
        if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        for name, line in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path(f"/proc/self/{name}").write_text(line)
        if libc.mount(b"tmpfs", folder.encode(), b"tmpfs", 0, f"size={size}".encode()):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        said = act(Path(folder))
    except BaseException as error:  # whatever it was, the parent reports it
        said = f"{type(error).__name__}: {error}"
    sender.send_bytes((said or "").encode())
    os._exit(0)


def the_disk_says_no(arena: Arena, count: int) -> Injections:
    """C5: an error of the system at any operation, of any kind: one clear line, the older checkpoint whole."""
    numbers = [errno.EIO, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.ENAMETOOLONG, errno.ESTALE]
    places = [(name, number) for name in ("write_file", "sync_folder", "rename", "make_folder") for number in numbers]
    for name, number in (places * (count // len(places) + 1))[:count]:
        root, real = arena.folder("no"), getattr(disk, name)
        saver, small = Saver(root, ALONE), torch.zeros(10)
        saver.save(1, _holding(small), {"weights": {"w": [10]}})
        setattr(disk, name, _refusal(number))
        shard_writer, shard.write_file = shard.write_file, disk.write_file
        try:
            saver.save(2, _holding(small), {"weights": {"w": [10]}})
            yield f"{name} failed with {errno.errorcode[number]}, and nobody noticed"
            continue
        except StorageError as error:
            said = str(error)
        finally:
            setattr(disk, name, real)
            shard.write_file = shard_writer
        whole = steps_in(root)[:1] == [1] and not verify(folder_of(root, 1), ALONE)
        yield None if whole and os.strerror(number) in said and "; " in said else f"{name}: {said}"
        shutil.rmtree(root)


def _refusal(number: int) -> Callable[..., None]:
    def refuse(path: Path, *rest: object) -> None:
        with disk.storage(path):
            raise OSError(number, os.strerror(number))

    return refuse


FILES = {
    "C1": Fault("one bit of a checkpoint flips", bits_flip, 60, 300),
    "C2": Fault("files cut, zeroed, missing, too many", pages_are_lost, 30, 260),
    "C3": Fault("files of other ranks, steps, folders", files_are_swapped, 20, 60),
    "C4": Fault("the disk fills after any number of bytes", the_disk_fills, 8, 25),
    "C5": Fault("the disk says no, for any reason", the_disk_says_no, 24, 24),
}
