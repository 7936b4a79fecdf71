"""Weights with more rows for tokens than they came with: the embedding, and the head where it is a weight of its own.

A row added is drawn as the rows of a new model are, and depends on its place alone; the rows that were there keep
their bits.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from moe_engine.checkpoint.hf.folder import HfFolder
from moe_engine.checkpoint.pieces import Box
from moe_engine.errors import ConfigError
from moe_engine.parallel.weight import WeightNote, draw_normal_, key_of

PER_TOKEN = ("embedding.weight", "head.weight")  # [V, D]


class Resized:
    """The weights of a folder with `vocab_size` rows for tokens. ConfigError when the folder has more.

    added: rows drawn, of all weights together.
    """

    def __init__(self, folder: HfFolder, vocab_size: int):
        self.folder, self.rows, old = folder, vocab_size, folder.model.vocab_size
        if vocab_size < old:
            raise ConfigError(f"--resize-vocab {vocab_size}: {folder.folder} has {old} tokens; rows are added, not cut")
        self.model = folder.model.model_copy(update={"vocab_size": vocab_size})
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: (vocab_size, *shape[1:]) if name in PER_TOKEN else shape for name, shape in folder.shapes.items()
        }
        self.added = (vocab_size - old) * sum(name in folder.shapes for name in PER_TOKEN)

    def part(self, name: str, box: Box, dtype: torch.dtype | None = None) -> Tensor:
        """The elements of a box of one weight."""
        if name not in PER_TOKEN:
            return self.folder.part(name, box, dtype)
        (start, stop), columns = box
        old = min(stop, self.folder.model.vocab_size)
        kept = self.folder.part(name, ((start, max(start, old)), columns), dtype or self.dtype(name, box))
        new = torch.empty(self.shapes[name])
        draw_normal_(new, WeightNote(self.shapes[name]), key_of(0, name))
        new = new[max(start, old) : stop, slice(*columns)] * self.model.initializer_range
        return torch.cat([kept, new.to(kept.dtype)])

    def dtype(self, name: str, box: Box) -> torch.dtype:
        """That of the rows that were there."""
        return self.folder.dtype(name, whole(self.folder.shapes[name]) if name in PER_TOKEN else box)


def whole(shape: tuple[int, ...]) -> Box:
    """The box of a whole weight."""
    return tuple((0, side) for side in shape)
