"""The methods by name, each a module (see the package), and those that take importance scores."""

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
