"""The rows of metrics.jsonl; docs/metrics.md says what each field means."""

import math
from typing import Any

import torch

from moe_engine.config import Run
from moe_engine.model.flops import step_flops_per_token
from moe_engine.parallel.mesh import Mesh
from moe_engine.train.peak import peak_flops
from moe_engine.train.tally import StepReport


class Metrics:
    """Makes the rows of one run; collective, since all ranks agree on what their devices can do at most."""

    def __init__(self, run: Run, device: torch.device, mesh: Mesh):
        self.tokens = run.train.global_batch * run.train.seq_length
        self.flops = self.tokens * step_flops_per_token(run.model, run.train.seq_length)
        dtype = torch.bfloat16 if run.train.precision == "bf16" else torch.float32
        self.peak = peak_flops(device, dtype, mesh) * mesh.world.size
        layers = range(run.model.num_hidden_layers)
        moe, attention = ([i for i in layers if has(i)] for has in (run.model.is_moe, run.model.is_attention_moe))
        self.layers = {"moe_layers": moe, "attention_moe_layers": attention}

    def row(self, step: int, report: StepReport, lr: float, seconds: float, tokens_seen: int) -> dict[str, Any]:
        """Of one step, which took `seconds`."""
        return {
            "step": step,
            "loss": report.loss,
            **nested({name: value.tolist() for name, value in report.measures.items()}),
            "grad_norm": report.grad_norm,
            "lr": lr,
            "tokens": tokens_seen,
            "tokens_per_s": self.tokens / seconds,
            "mfu": self.flops / seconds / self.peak,
            "step_s": seconds,
            **{name: found for name, found in self.layers.items() if found},
            **({"skipped": report.skipped} if report.skipped else {}),
        }


def nested(measures: dict[str, Any]) -> dict[str, Any]:
    """Measures called NAME/KEY as mappings NAME; an entry of which nothing was counted, which is nan, is left out."""
    out: dict[str, Any] = {}
    for name, value in measures.items():
        name, slash, key = name.partition("/")
        if not slash:
            out[name] = value
        elif not math.isnan(value):
            out.setdefault(name, {})[key] = value
    return out
