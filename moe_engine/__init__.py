"""moe_engine: a compact, parallelism-first training engine for Mixture-of-Experts language models.

Notation, used everywhere. A local tensor carries its dimensions as a suffix (`x_TD`, `weight_TK`); parameters and
checkpoint keys do not (`experts.w_gate_up`).

    B sequences          T tokens here           E experts              R routed rows leaving (T*K)
    S sequence length    D hidden size           L experts here (E/ep)  M rows received
    V vocabulary         F expert / FFN width    K experts per token    C head dim
                         H query heads           G kv heads              A attention experts, of h = H/A query heads

Placement, in docstrings: `x[T/tp, D]` is cut along tp; `y[T, D]{tp}` is a partial sum still to be reduced over tp.
`axis` is a direction of the mesh (dp, ep, tp), `dim` a dimension of a tensor.
"""

__version__ = "0.1.0"

SUPERVISION = {
    "ExpertLabelEmbedding": "model.supervision",
    "compute_routing_supervision_loss": "model.supervision",
    "get_expert_utilization_stats": "model.supervision",
    "SupervisedMoEWrapper": "train.supervised_wrapper",
}


def __getattr__(name: str) -> object:
    """The names of supervised routing (S1.24), imported when they are asked for: they need torch."""
    if name in SUPERVISION:
        from importlib import import_module

        return getattr(import_module(f"moe_engine.{SUPERVISION[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
