"""What comes out: a Hugging Face folder or a checkpoint, and the receipt that compares it with the dense parent."""

import argparse
import hashlib
import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from moe_engine.checkpoint.hf.folder import HfFolder
from moe_engine.checkpoint.hf.to_checkpoint import identity_of
from moe_engine.checkpoint.hf.write import Target, cut, write_hf
from moe_engine.checkpoint.open import open_checkpoint
from moe_engine.checkpoint.pieces import Box, Piece, volume
from moe_engine.checkpoint.shard import Entry
from moe_engine.checkpoint.weights_only import Written, write_weights
from moe_engine.config import Model
from moe_engine.config.hf import family_of, model_to_hf
from moe_engine.config.hf.families import FAMILIES
from moe_engine.config.messages import problem_lines
from moe_engine.errors import ConfigError
from moe_engine.upcycle import attention
from moe_engine.upcycle.decoder import streamed
from moe_engine.upcycle.methods import METHODS
from moe_engine.upcycle.options import Options
from moe_engine.upcycle.preservation import Preservation
from moe_engine.upcycle.receipt import receipt
from moe_engine.upcycle.source import Upcycled
from moe_engine.upcycle.stages import stage
from moe_engine.upcycle.text import Text

BROKEN_PROMISE = 1


def hf_target(given: argparse.Namespace, child: Model, parent: HfFolder) -> Target:
    """What the folder will be; ConfigError, before anything is computed, when no family holds the child."""
    try:
        family = given.family or family_of(child)
        model_to_hf(child, family, None, None, {})
    except ConfigError as error:
        why = "; ".join(problem_lines(error))
        raise ConfigError(
            f"--format hf: {why}; --format checkpoint holds every model, --family llama_moe_v2 some that are no Mixtral"
        ) from None
    layout = next(iter(FAMILIES[family].tensors))
    return Target(family, layout, version=given.hf_version, side=parent.side, shard_bytes=shard_bytes(given))


def shard_bytes(given: argparse.Namespace) -> int:
    """Of the largest file."""
    return int(given.shard_gb * 1e9)


def write(
    given: argparse.Namespace, source: Upcycled, child: Model, target: Target | None, text: Text, parents: Any
) -> Written:
    """The folder, or without a target the checkpoint; one that was interrupted goes on."""
    flags = {name: str(value) for name, value in sorted(vars(given).items()) if name != "receipt_tokens"}
    identity = [[identity_of(parent) for parent in parents], flags, read_so_far(text)]
    size = sum(source.dtype(name, box).itemsize * volume(box) for name, box in boxes_of(source).items())
    with stage("making", size / 1e9, "GB") as shown:
        progress = lambda n: shown(n / 1e9)  # noqa: E731
        if target is not None:
            return write_hf(source, child, target, given.out, identity, progress, given.allow_nonfinite)
        return write_weights(
            source, child, files_of(source, shard_bytes(given)), parents[0].side, {}, given.out, identity,
            progress, given.allow_nonfinite,
        )  # fmt: skip


def files_of(source: Upcycled, size: int) -> list[dict[str, Piece]]:
    """The weights of each file of a checkpoint."""
    boxes = boxes_of(source)
    entries = {name: Entry(source.dtype(name, box), source.shapes[name]) for name, box in boxes.items()}
    return [
        {name: Piece(name, boxes[name], 0, volume(boxes[name])) for name in names}
        for names in cut(entries, size).values()
    ]


def boxes_of(source: Upcycled) -> dict[str, Box]:
    """The box that is the whole of each weight."""
    return {name: tuple((0, side) for side in shape) for name, shape in source.shapes.items()}


def read_so_far(text: Text) -> str:
    """A digest of the tokens that routers and importance come from: a text that has changed is another model."""
    digest = hashlib.sha256(repr(text.prompts).encode())
    if text.sample_BS is not None:
        digest.update(text.sample_BS.numpy().tobytes())
    return digest.hexdigest()


def preservation_of(method: str, options: Options, parent: HfFolder) -> Preservation:
    """What theory says, of weights in the parent's dtype."""
    if options.attention_experts:
        return attention.preserves(options)
    found = METHODS[method].preserves(options)
    kinds, factor = list(parent.elements_by_dtype()), options.granularity
    if method == "virtual" and found.bound is not None and kinds != ["float32"] and factor & (factor - 1):
        return Preservation(f"exact but for w_down times {factor}, rounded to {kinds[0]}")
    return found


def compare(given: argparse.Namespace, parent: HfFolder, tokens_BS: Tensor, expected: Preservation) -> int:
    """The receipt, from what was written; the exit code."""
    if given.format == "hf":
        source = HfFolder(given.out)
        child = source, source.model
    else:
        checkpoint = open_checkpoint(given.out)
        child = checkpoint, checkpoint.model
    layers = 2 * parent.model.num_hidden_layers
    with stage("comparing", layers, "layers") as progress:
        found = receipt(streamed(parent, parent.model, progress), streamed(*child, progress), tokens_BS, expected)
    print(*lines_of(found), sep="\n")
    if not found.holds:
        print(
            f"error: {given.out} differs from {given.hf} by {found.max / found.largest:.3g} of the largest logit, "
            f"theory allows {found.bound}: this is a bug, do not use it",
            file=sys.stderr,
        )
        return BROKEN_PROMISE
    return 0


def lines_of(found: Any) -> Sequence[str]:
    """A receipt for people."""
    return (
        f"receipt     logits differ by {found.max:.3g} at most, {found.mean:.3g} on average "
        f"(largest {found.largest:.3g})",
        f"            the most likely next token is the same for {100 * found.argmax_agreement:.1f} % of the tokens",
        f"theory      {found.expected}",
    )
