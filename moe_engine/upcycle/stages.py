"""How far an upcycling is, on standard error: a bar on a terminal, and a line when a stage is done.

routers     30 layers, 3.1 s                          each with k-means of what enters it
reading     211 weights, 0.4 s                        of the parent
importance  32 sequences of 256 tokens, 31.2 s
making      0.271 GB, 2.1 s                           neurons shared out, layer by layer, and written
comparing   60 layers, 3.0 s                          of parent and child, for the receipt
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stage(name: str, total: float, unit: str) -> Iterator[Callable[[float], Any]]:
    """Gives the function that is told how much more of `total` is done; a stage that fails has no last line."""
    from tqdm import tqdm

    start = time.monotonic()
    with tqdm(total=total, desc=name, unit=f" {unit}", unit_scale=True, disable=None, leave=False) as shown:
        yield shown.update
    seconds = time.monotonic() - start
    print(f"{name:<11} {total:,.6g} {unit}, {seconds:.1f} s", file=sys.stderr, flush=True)
