"""A folder written file by file under the name OUT.partial, and given its own name when it is complete.

An interrupted run goes on with the files that it finished: progress.json says which, what they have to be, and what
they were made from. Made from something else, they are written again.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_engine.checkpoint.shard import Digest, digest_of
from moe_engine.errors import ConfigError
from moe_engine.host import disk

PROGRESS = "progress.json"


class Partial:
    """identity: JSON of all that decides what is written. files: those that are complete, with what `write` said.

    ConfigError when there is something at `out`: nothing is overwritten.
    """

    def __init__(self, out: Path, identity: Any):
        if out.exists() or out.is_symlink():
            raise ConfigError(f"--out {out} exists; remove it or choose another name")
        self.out, self.folder = out, out.with_name(out.name + ".partial")
        self.identity = json.loads(json.dumps(identity))
        self.files: dict[str, dict[str, Any]] = {}
        if not self._continues():
            disk.remove(self.folder)
            disk.make_folder(self.folder)

    def _continues(self) -> bool:
        try:
            progress = json.loads((self.folder / PROGRESS).read_bytes())
            same = progress["identity"] == self.identity
            files = dict(progress["files"]) if same else {}
            for name, record in files.items():
                count, fast, _ = record["digest"]
                if digest_of(self.folder / name) != (count, fast):
                    return False
        except (OSError, ValueError, KeyError, TypeError):
            return False
        self.files = files
        return same

    def write(self, name: str, make: Callable[[Path], tuple[Digest, dict[str, str]]]) -> bool:
        """Have `make` write the file unless it is complete; it returns the digest and, by tensor, their hashes.

        Returns whether it was written now.
        """
        if name in self.files:
            return False
        path = self.folder / name
        if path.parent != self.folder:
            disk.make_folder(path.parent)
        digest, tensors = make(path)
        self.files[name] = {"digest": list(digest), "tensors": tensors}
        text = json.dumps({"identity": self.identity, "files": self.files}).encode()
        temporary = self.folder / f"{PROGRESS}.new"
        disk.write_file(temporary, [text])
        disk.rename(temporary, self.folder / PROGRESS)
        return True

    def bytes(self) -> int:
        """Of the files that are complete."""
        return sum(record["digest"][0] for record in self.files.values())

    def tensors(self) -> dict[str, str]:
        """The hash of every tensor that was written."""
        return {name: value for record in self.files.values() for name, value in record["tensors"].items()}

    def discard(self) -> None:
        """Remove what was written: it is not to be gone on with."""
        disk.remove(self.folder)

    def publish(self) -> None:
        """Give the complete folder its name."""
        disk.remove(self.folder / PROGRESS)
        for folder in {self.folder, *(above for name in self.files for above in (self.folder / name).parents)}:
            if self.folder.parent in folder.parents:
                disk.sync_folder(folder)
        disk.publish(self.folder, self.out)
