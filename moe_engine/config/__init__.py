"""A run as one frozen, validated value: `Run` and its sections.

    Run -- model      what is trained: Hugging Face's names for sizes, plus routing and balancing
        -- parallel   dp x ep x tp, ZeRO, buckets (Megatron's and DeepSpeed's words)
        -- optimizer  AdamW and its schedule
        -- data       domains, tokenizer, masks
        -- train      length, batch, precision, recompute, where results go

Each part of the engine is built from its own section and never sees the rest. Unknown keys are refused, `null` means
"the default". `command_line.load` fills a Run from defaults < YAML < command line, derives what was not given and
reports everything that is wrong at once; `checks.py` checks a Run against a number of ranks. No torch here: `--help`,
the planner and the tests of the layout rules start without it.
"""

from moe_engine.config.model import AuxLoss, Model, RopeScaling
from moe_engine.config.run import Data, Domain, Optimizer, Parallel, Run, Train
from moe_engine.config.section import DTYPES, Section, divisors, is_number, short_dtype, torch_dtype

__all__ = [  # noqa: RUF022 (kinds of things, not letters)
    "Data", "Domain", "Model", "Optimizer", "Parallel", "RopeScaling", "Run", "Section", "Train",
    "AuxLoss", "DTYPES", "divisors", "is_number", "short_dtype", "torch_dtype",
]  # fmt: skip
