"""The shapes of the kernel benchmark: experts of one layer, and how many tokens pass through them.

    mixtral-8x7b, llama-3.2-3b-8x, e64-k8, qwen3-30b-a3b     measured on GPUs
    coarse, fine                                             measured on CPU: 1,024 routed rows of width 512

FLOPs of a layer with R = T * top_k routed rows: three matrix products of 2 R D F each forward, twice that backward. The
router, the sort and the activation are not counted, though their time is.
"""

from typing import NamedTuple


class Shape(NamedTuple):
    """Experts of one layer; `tokens` are the sizes measured by default, `vocab` is for cross_entropy alone."""

    name: str
    experts: int
    top_k: int
    hidden: int
    ffn: int
    tokens: tuple[int, ...]
    vocab: int


GPU_SHAPES = (
    Shape("mixtral-8x7b", 8, 2, 4096, 14336, (8192, 16384), 32000),
    Shape("llama-3.2-3b-8x", 8, 2, 3072, 8192, (8192, 16384), 128256),
    Shape("e64-k8", 64, 8, 2048, 1024, (8192, 16384), 50304),
    Shape("qwen3-30b-a3b", 128, 8, 2048, 768, (8192, 16384, 32768), 151936),
)
CPU_SHAPES = (
    Shape("coarse", 8, 2, 512, 1408, (512,), 8192),
    Shape("fine", 64, 8, 512, 256, (128,), 8192),
)
NAMED = {shape.name: shape for shape in (*GPU_SHAPES, *CPU_SHAPES)}


def shape_of(text: str) -> Shape:
    """A name of the table, or `E,K,D,F`. Raises ValueError for anything else."""
    if text in NAMED:
        return NAMED[text]
    try:
        experts, top_k, hidden, ffn = map(int, text.split(","))
    except ValueError:
        raise ValueError(f"found shape {text!r}, expected E,K,D,F or one of {', '.join(NAMED)}") from None
    if not 1 <= top_k <= experts <= hidden:
        raise ValueError(f"found shape {text!r}, expected 1 <= K <= E <= D: a router's rows are orthogonal here")
    return Shape(text, experts, top_k, hidden, ffn, (1024,), 8192)


def layer_flops(shape: Shape, tokens: int) -> dict[str, float]:
    """FLOPs of the matrix products of a layer's experts, of both passes that are measured."""
    forward = 6.0 * tokens * shape.top_k * shape.hidden * shape.ffn
    return {"forward": forward, "forward+backward": 3 * forward}
