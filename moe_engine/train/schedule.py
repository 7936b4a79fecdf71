"""The learning rate: linear from 0 over the warm-up, then half a cosine towards min_lr, which step `steps` would have.

    lr(step) = lr * step / warmup                                                        step < warmup
             = min_lr + (lr - min_lr) * (1 + cos(pi * (step - warmup) / (steps - warmup))) / 2

`step` counts optimizer steps from 0, so the first one has lr 0, as in transformers' get_cosine_schedule_with_warmup.
"""

import math

from moe_engine.config import Optimizer


def learning_rate(step: int, steps: int, optimizer: Optimizer) -> float:
    """The learning rate of optimizer step `step` (0 .. steps-1) of a run of `steps`."""
    warmup = optimizer.warmup_steps or 0
    if step < warmup:
        return optimizer.lr * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return optimizer.min_lr + (optimizer.lr - optimizer.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
