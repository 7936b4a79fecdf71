"""What a run would be, without starting it: settings checked, files opened, sizes and shapes computed.

The configuration, the layout and the batch arithmetic were checked when the run was loaded. Here the folders that the
run starts from and writes to are looked at, the tokenizer and the data opened, parameters counted, and the shapes of
one step listed room by room, for one rank.
"""

import math
from typing import Any

from moe_engine.config import Run
from moe_engine.config.command_line import Loaded
from moe_engine.config.sizes import heads_per_attention_expert, parameter_counts, rank_parameters
from moe_engine.data.corpus import loader_of, open_corpus
from moe_engine.data.loader import check_order
from moe_engine.errors import DataError
from moe_engine.model.flops import step_flops_per_token
from moe_engine.plan.start import start_lines, start_of
from moe_engine.prepare import default
from moe_engine.prepare.tokenizer.load import load_tokenizer


def describe(loaded: Loaded) -> list[str]:
    """The report of `--dry-run`. Raises ConfigError or DataError where the run itself would."""
    run = loaded.run
    first = [*loaded.derived, *(f"warning: {warning}" for warning in loaded.warnings)]
    start = start_of(run)
    state = start.checkpoint[1]["data"] if start.checkpoint else None
    parts = (
        first,
        start_lines(run, start),
        batch_lines(run),
        corpus_lines(run, state),
        parameter_lines(run),
        shape_lines(run),
    )
    return [line for part in parts for line in (*part, "")] + ["ok"]


def batch_lines(run: Run) -> list[str]:
    """Layout and batch arithmetic."""
    parallel, train = run.parallel, run.train
    tokens = train.global_batch * train.seq_length
    total = tokens * train.steps
    flops = tokens * step_flops_per_token(run.model, train.seq_length)
    return [
        f"layout      dp {parallel.dp} x ep {parallel.ep} x tp {parallel.tp}, world size {run.world_size}, "
        f"ZeRO {parallel.zero}, {train.precision}",
        f"batch       {train.global_batch} sequences = micro_batch {train.micro_batch} "
        f"x accumulation {train.accumulation} x {run.data_ranks} data ranks",
        f"tokens      {tokens:,} a step, "
        + (f"{train.epochs} epochs" if train.epochs else f"{total:,} in {train.steps:,} steps"),
        f"compute     {flops:.3e} FLOPs a step (matrix products, forward and backward)",
    ]


def corpus_lines(run: Run, state: dict[str, Any] | None) -> list[str]:
    """The domains with their tokens; opening them checks tokenizer, vocabulary and files, a loader the rest.

    state: of the loader of the run that is resumed, if one is.
    """
    if run.samples.given and not run.data.domains:
        return sample_lines(run)
    if not run.data.domains:
        tokenizer = load_tokenizer(run.data.tokenizer)
        if run.model.vocab_size <= tokenizer.eos_id:
            raise DataError(
                f"model.vocab_size {run.model.vocab_size} is too small for the default corpus, which has "
                f"{tokenizer.vocab_size} ids ({tokenizer.spec}); set model.vocab_size >= {tokenizer.vocab_size} or "
                "give --data"
            )
        if state:
            order = {"seed": run.train.seed, "seq_length": run.train.seq_length, "domains": [default.NAME]}
            check_order(state, order)
        made = f"(tokenizer {tokenizer.spec}; prepared when the run starts)"
        return [f"data        the Python standard library's own sources {made}"]
    train, held_out = open_corpus(run)
    loader = loader_of(run, train)
    if state:
        loader.load_state(state)
    weight = sum(domain.weight for domain in train)
    lines = [
        f"data        {domain.name}: {domain.dataset.tokens:,} tokens, {100 * domain.weight / weight:.1f} % of draws"
        for domain in train
    ]
    tokens = f"{sum(domain.dataset.tokens for domain in held_out):,} tokens"
    return [*lines, f"held out    {tokens if run.evaluates else 'not read: no evaluation'}"]


def sample_lines(run: Run) -> list[str]:
    """The sources of the samples that the run would prepare; formats, template and tokenizer are tried."""
    from moe_engine.plan.tokenizers import tokenizer_of
    from moe_engine.prepare.run_samples import described
    from moe_engine.prepare.samples import read_samples
    from moe_engine.prepare.template import Template

    sources, options = described(run)
    tokenizer = load_tokenizer(tokenizer_of(run))
    template = Template(tokenizer, options.template)
    if tokenizer.vocab_size > run.model.vocab_size:
        raise DataError(
            f"the tokenizer {tokenizer.spec} has {tokenizer.vocab_size} ids, model.vocab_size is "
            f"{run.model.vocab_size}; give the model's tokenizer"
        )
    lines = [f"template    {template.name}, tokenizer {tokenizer.spec}"]
    for name, source in sources.items():
        found = read_samples(source.paths, source.format, source.columns).format
        cap = "" if source.max_samples is None else f", {source.max_samples:,} samples at most"
        lines.append(f"samples     {name}: {found} format, weight {source.weight:g}{cap}; prepared when the run starts")
    return lines


def parameter_lines(run: Run) -> list[str]:
    """Parameters in all, active for one token, and on one rank."""
    counts, rank = parameter_counts(run.model), rank_parameters(run.model, run.parallel)
    by_part = [f"{part} {n:,}" for part, n in counts._asdict().items() if n and not part.startswith("active")]
    return [
        f"parameters  {counts.total:,} in all, {counts.active:,} active for one token",
        f"            {', '.join(by_part)}",
        f"per rank    {rank.resident:,} ({rank.dense:,} dense, {rank.expert:,} of experts); "
        f"optimizer states of {rank.owned:,}" + ("" if run.parallel.zero else " if ZeRO were on; stage 0 keeps all"),
    ]


def shape_lines(run: Run) -> list[str]:
    """The tensors of one micro-batch on one rank, in the order of the rooms they pass."""
    model, tp, ep, train = run.model, run.parallel.tp, run.parallel.ep, run.train
    tokens = train.micro_batch * train.seq_length
    heads, kv_heads = model.num_attention_heads // tp, model.num_key_value_heads // tp
    shapes = [
        ("tokens, labels, positions [B, S]", (train.micro_batch, train.seq_length)),
        ("x [T/tp, D]", (tokens // tp, model.hidden_size)),
    ]
    if model.num_attention_moe_layers < model.num_hidden_layers:
        shapes += [
            ("q [B, H/tp, S, C]", (train.micro_batch, heads, train.seq_length, model.head_dim)),
            ("k, v [B, G/tp, S, C]", (train.micro_batch, kv_heads, train.seq_length, model.head_dim)),
        ]
    if model.num_attention_moe_layers:
        experts, rows = model.num_attention_experts, tokens // tp * model.num_attention_experts_per_tok
        each, here = heads_per_attention_expert(model), 1 if run.parallel.replicate_attention_experts else ep
        shapes += [
            ("attention rows sent [R, D]", (rows, model.hidden_size)),
            ("attention w_q [A/ep, h/tp, C, D]", (experts // here, each // tp, model.head_dim, model.hidden_size)),
            ("attention w_k, w_v [A/ep, C, D]", (experts // here, model.head_dim, model.hidden_size)),
        ]
    if model.num_moe_layers:
        experts, width, chosen = model.num_local_experts, model.moe_intermediate_size, model.num_experts_per_tok
        rows = tokens // tp * chosen
        shapes += [
            ("router logits [T/tp, E], fp32", (tokens // tp, experts)),
            ("rows sent [R, D]", (rows, model.hidden_size)),
            ("rows received [M, D], balanced routing", (math.ceil(rows * tp), model.hidden_size)),
            ("w_gate_up [E/ep, 2, F/tp, D]", (experts // ep, 2, width // tp, model.hidden_size)),
            ("w_down [E/ep, D, F/tp]", (experts // ep, model.hidden_size, width // tp)),
        ]
        shared = model.shared_intermediate_size // tp
        shapes += [("shared expert's w_gate_up [2, F/tp, D]", (2, shared, model.hidden_size))] * bool(shared)
    shapes.append(("logits [T, V/tp]", (tokens, model.vocab_size // tp)))
    return ["one step on one rank", *(f"  {name:42} {list(shape)}" for name, shape in shapes)]
