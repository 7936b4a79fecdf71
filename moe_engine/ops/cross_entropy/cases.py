"""Cases of cross_entropy: odd vocabularies, a shard in the middle, labels elsewhere or not counted, large logits."""

import torch

from moe_engine.ops import cross_entropy_grad, cross_entropy_stats
from moe_engine.ops.parity_case import Case, seeded, wide

# relative to the largest value of the fp64 result
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float64: 1e-12}

# tokens, columns of this shard, first_id, ids of the whole vocabulary, scale of the logits
SIZES = [(0, 8, 0, 8, 1.0), (1, 1, 0, 1, 1.0), (9, 33, 0, 33, 1.0), (20, 256, 256, 1024, 3.0), (5, 5000, 0, 5000, 50.0)]


def _cases(tokens: int, columns: int, first_id: int, ids: int, scale: float) -> list[Case]:
    name = f"T{tokens} V{columns} first {first_id} of {ids} scale {scale:g}"

    def stats_inputs(dtype: torch.dtype) -> tuple:
        generator = seeded(name)
        logits = torch.randn(tokens, columns, generator=generator) * scale
        label = torch.randint(ids, (tokens,), generator=generator)
        label[::3] = -100
        return logits.to(dtype), label, first_id

    def grad_inputs(dtype: torch.dtype) -> tuple:
        logits, label, first = stats_inputs(dtype)
        lse = logits.to(wide(dtype)).logsumexp(-1) + 0.1  # as if other shards held a tenth
        return logits, label, first, lse, torch.randn(tokens, generator=seeded(name)).to(wide(dtype))

    return [
        Case("stats " + name, cross_entropy_stats, stats_inputs),
        Case("grad " + name, cross_entropy_grad, grad_inputs),
    ]


def _masked(dtype: torch.dtype) -> tuple:
    """The first 4,200 columns, more than a kernel reads at a time, are masked out."""
    logits = torch.randn(3, 4300, generator=seeded("masked"))
    return logits.index_fill_(1, torch.arange(4200), float("-inf")).to(dtype), torch.tensor([4299, -100, 4250]), 0


CASES = [case for size in SIZES for case in _cases(*size)]
CASES.append(Case("stats masked", cross_entropy_stats, _masked))
