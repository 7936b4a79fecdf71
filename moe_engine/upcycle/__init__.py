"""Every published way of making a Mixture-of-Experts from a dense Llama: METHODS, name -> module.

    copy  half  drop  virtual  mix                        experts as wide as the dense layer, or shards of copies
    random  clustering  gradient  llama_moe_v2            the dense neurons partitioned
    sharing_inner  sharing_inter  residual                neurons chosen by importance, shared between experts

A module has `child(parent, options)`, the Model of the result; `build(layer, dense, options, ...)`, the experts of one
layer; and `expected(options)`, what theory says of the result. SCORED methods take importance scores [E, F] as a fourth
argument (`importance.py`; llama_moe_v2 optionally), `mix` the other dense layers. `attention.py` splits attention and
goes with any of them. Routers come from `routers.py` and `prompts.py`, `transplant.py` puts the parts into a model and
`receipt.py` compares it with its parent. Tensors keep their dtype; what is drawn depends on (seed, layer, expert).
"""

from moe_engine.upcycle import (
    clustering,
    copy,
    drop,
    gradient,
    half,
    llama_moe_v2,
    mix,
    random,
    residual,
    sharing_inner,
    sharing_inter,
    virtual,
)
from moe_engine.upcycle.layer import Dense, Routed
from moe_engine.upcycle.options import Options

__all__ = ["METHODS", "SCORED", "Dense", "Options", "Routed"]

METHODS = {
    "copy": copy,
    "half": half,
    "random": random,
    "clustering": clustering,
    "gradient": gradient,
    "sharing_inner": sharing_inner,
    "sharing_inter": sharing_inter,
    "residual": residual,
    "llama_moe_v2": llama_moe_v2,
    "drop": drop,
    "virtual": virtual,
    "mix": mix,
}
SCORED = ("gradient", "sharing_inner", "sharing_inter", "residual")
