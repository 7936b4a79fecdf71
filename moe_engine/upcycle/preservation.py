"""What theory says of an upcycled model against its dense parent, for the receipt to print and check."""

from typing import NamedTuple

from moe_engine.upcycle.options import Options


class Preservation(NamedTuple):
    """bound: the most by which a logit may differ, relative to the parent's largest; None: it cannot be said."""

    text: str
    bound: float | None = None


def exact(why: str) -> Preservation:
    """The same function up to fp32 rounding: the order of sums differs in every layer."""
    return Preservation(f"exact: {why}", 1e-5)


def copies(options: Options) -> Preservation:
    """Of experts that are all the whole dense layer."""
    if options.norm_topk_prob:
        return exact("every expert is the dense layer and the weights of the chosen sum to 1, whatever the router")
    return Preservation("scaled: every routed output is the dense one times the top-k mass, about k/E at the start")


def partition(s: float, experts: int) -> Preservation:
    """Of experts that share out the neurons, their outputs scaled by s."""
    return Preservation(
        f"not preserved: with equal weights the mean over all choices of experts is s/E = {s / experts:.3g} of the "
        "dense output; it is the dense one only where all experts are chosen, with equal weights and s = E"
    )
