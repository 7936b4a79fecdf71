"""One safetensors file: written tensor by tensor with its digests, opened only after its header was looked at.

    8 bytes, little endian: length of the header | header: JSON {name: {dtype, shape, data_offsets}} | the tensors

The digests are of the bytes in memory, so that what the disk makes of them is part of what they prove. No more than one
chunk of a tensor is copied to the host at a time.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_engine.errors import DataError
from moe_engine.host.disk import write_file

CHUNK = 1 << 24  # bytes
SUFFIX = ".safetensors"
MAX_HEADER = 1 << 24  # bytes; safetensors itself would read 100 MB
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TORCH_OF = {name: dtype for dtype, name in DTYPES.items()}


def rank_file(rank: int) -> str:
    """The file of one rank in a checkpoint's folder."""
    return f"rank-{rank:05d}{SUFFIX}"


class Digest(NamedTuple):
    """What a file has to be. Loading compares the size and xxh3 (128 bits); SHA-256 is for the record."""

    bytes: int
    xxh3: str
    sha256: str


class Hasher:
    """Takes the parts of a file in order."""

    def __init__(self) -> None:
        self.count, self.fast, self.strong = 0, xxhash.xxh3_128(), hashlib.sha256()

    def update(self, part: bytes | memoryview) -> None:
        """Count and hash the bytes that come next."""
        self.count += len(part)
        self.fast.update(part)
        self.strong.update(part)

    def digest(self) -> Digest:
        """Of the parts so far; more may follow."""
        return Digest(self.count, self.fast.hexdigest(), self.strong.hexdigest())


class Entry(NamedTuple):
    """A tensor to come."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of it."""
        return self.dtype.itemsize * math.prod(self.shape)


def encode_header(entries: Mapping[str, Entry], metadata: dict[str, str]) -> tuple[bytes, list[str]]:
    """The header of a file and the order of its tensors: large elements first, so that all are aligned."""
    names = sorted(entries, key=lambda name: -entries[name].dtype.itemsize)
    table: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in names:
        entry = entries[name]
        start, end = end, end + entry.nbytes
        table[name] = {"dtype": DTYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, names


def entries_of(tensors: Mapping[str, Tensor]) -> dict[str, Entry]:
    """Tensors at hand as entries."""
    return {name: Entry(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def size_of(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> int:
    """Bytes that write_shard will write."""
    entries = entries_of(tensors)
    return len(encode_header(entries, metadata)[0]) + sum(entry.nbytes for entry in entries.values())


def write_shard(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> Digest:
    """Write and sync the file; StorageError where the disk refuses."""
    return stream_shard(path, entries_of(tensors), tensors.__getitem__, metadata)


def stream_shard(
    path: Path, entries: Mapping[str, Entry], tensor_of: Callable[[str], Tensor], metadata: dict[str, str]
) -> Digest:
    """write_shard of tensors that are made when it is their turn, and of which one is held at a time."""
    header, names = encode_header(entries, metadata)
    hasher = Hasher()

    def parts() -> Iterator[bytes | memoryview]:
        """Header, then each tensor in chunks; AssertionError for one that is not of its entry's dtype and shape."""
        yield header
        for name in names:
            tensor = tensor_of(name)
            assert (tensor.dtype, tuple(tensor.shape)) == entries[name], f"{name} is not what was announced"
            yield from _chunks(tensor)

    def hashed() -> Iterator[bytes | memoryview]:
        """The parts, each hashed before it goes to the disk."""
        for part in parts():
            hasher.update(part)
            yield part

    write_file(path, hashed())
    return hasher.digest()


def _chunks(tensor: Tensor) -> Iterator[memoryview]:
    flat = tensor.detach().reshape(-1)
    step = CHUNK // tensor.element_size()
    for start in range(0, len(flat), step):
        yield memoryview(flat[start : start + step].cpu().contiguous().view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]


def digest_of(path: Path, heartbeat: Callable[[], None] = lambda: None) -> tuple[int, str]:
    """Size and xxh3 of a file as it lies on disk; `heartbeat` is called as it goes on."""
    hasher, count = xxhash.xxh3_128(), 0
    with path.open("rb", buffering=0) as file:
        while part := file.read(CHUNK):
            hasher.update(part)
            count += len(part)
            heartbeat()
    return count, hasher.hexdigest()


def open_shard(path: Path) -> Any:
    """The file by safetensors, mapped and not read. DataError for a header that is too long or does not fit."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(MAX_HEADER, size - 8):
        raise DataError(f"{path}: a header of {length} bytes in a file of {size}; this is no safetensors file of ours")
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise DataError(f"{path}: not a safetensors file ({error})") from error
