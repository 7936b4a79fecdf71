"""Recompute: backward computes a layer again from its input, except what the first pass kept.

    full         keeps the routing, so that no token changes its expert
    selective    keeps matrix products, attention and the experts' outputs too; their gate and up products, most of a
                 layer's activations, and all that is cheap are computed again

The second pass takes the kept results of each operator in the order in which the first pass made them. All other
operators just run, in either pass: ZeRO 3 gathers a weight where it is not gathered yet, and that depends on what ran
before, so its collectives may occur in one pass alone. torch's selective checkpointing refuses such a pass.
"""

from collections import defaultdict, deque
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

ROUTING = ("moe_engine::router_topk",)
PRODUCTS = (
    "aten::mm",
    "aten::addmm",
    "aten::linear",
    "moe_engine::experts",
    "moe_engine::grouped_mm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
)
KEPT = {"full": ROUTING, "selective": ROUTING + PRODUCTS}


def recomputed(compute: Callable[..., Any], kind: str, *inputs: Any) -> Any:
    """compute(*inputs), whose activations backward computes again; `kind`: a key of KEPT."""

    def passes() -> tuple[TorchDispatchMode, TorchDispatchMode]:
        """The modes of the first pass and of the second, joined by the queues of kept results."""
        results = defaultdict(deque)
        return _Pass(kind, partial(_keep, results)), _Pass(kind, partial(_take, results))

    return checkpoint(compute, *inputs, use_reentrant=False, context_fn=passes)


class _Pass(TorchDispatchMode):
    """One pass through a layer: `run` executes the operators of a kind's results."""

    def __init__(self, kind: str, run: Callable[..., Any]):
        super().__init__()
        self.kept, self.run = KEPT[kind], run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = partial(func, *args, **(kwargs or {}))
        return self.run(func, call) if func.name().partition(".")[0] in self.kept else call()


def _keep(results: dict[Any, deque], func: Any, call: Callable[[], Any]) -> Any:
    out = call()
    results[func].append(tree_map_only(Tensor, Tensor.detach, out))  # apart from the graph, which leads back here
    return out


def _take(results: dict[Any, deque], func: Any, call: Callable[[], Any]) -> Any:
    return results[func].popleft()
