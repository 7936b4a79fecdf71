"""Which layouts a run can have, and what in a run is derived or has no effect.

    dp * ep * tp = world        ep divides the experts        tp divides heads, kv heads, FFN widths, vocabulary
                                                              and the tokens of a micro-batch

A refused layout is answered with the valid values, before any process group exists.
"""

import math

from moe_engine.config import Run, divisors
from moe_engine.config.messages import SECTIONS, refuse


def check_layout(run: Run, world_size: int) -> None:
    """Refuse a run that cannot work on `world_size` ranks: one ConfigError with every problem and the valid values."""
    if problems := layout_problems(run, world_size):
        refuse(problems)


def layout_problems(run: Run, world_size: int) -> list[str]:
    """What keeps `run` from working on `world_size` ranks, one line each; empty when nothing does."""
    parallel, tp_sizes = run.parallel, tp_must_divide(run)
    ok_ep = sorted(set(divisors(math.gcd(*experts_to_cut(run).values()) or 1)) & set(divisors(world_size)))
    ok_tp = [tp for tp in divisors(world_size) if all(size % tp == 0 for size in tp_sizes.values())]
    problems = []
    if parallel.ep not in ok_ep:
        cut = [f"{name} {size}" for name, size in experts_to_cut(run).items()]
        what = " and of ".join(cut) or "1 (no layer has experts)"
        fits = [ep for ep in ok_ep if world_size % (ep * parallel.tp) == 0] if parallel.tp in ok_tp else ok_ep
        problems.append(
            f"parallel.ep: found {parallel.ep}, expected a divisor of {what} and of the {world_size} ranks: "
            f"valid ep {ranges(parallel.tp, 'tp', ok_tp)}{numbers(fits)}"
        )
    if parallel.tp not in ok_tp:
        uncut = [f"{name} {size}" for name, size in tp_sizes.items() if size % parallel.tp]
        what = ", ".join(uncut) or f"the {world_size} ranks"
        fits = [tp for tp in ok_tp if world_size % (tp * parallel.ep) == 0] if parallel.ep in ok_ep else ok_tp
        problems.append(
            f"parallel.tp: found {parallel.tp}, which does not divide {what}: "
            f"valid tp {ranges(parallel.ep, 'ep', ok_ep)}{numbers(fits)}"
        )
    if not problems and run.world_size != world_size:
        problems.append(product_problem(run, world_size, ok_ep, ok_tp))
    return problems + other_problems(run)


def ranges(value: int, name: str, valid: list[int]) -> str:
    """The condition under which a list of valid values holds."""
    return f"with {name} {value}: " if value in valid else f"(with a valid {name}): "


def numbers(values: list[int]) -> str:
    """A list of numbers for a message."""
    return ", ".join(map(str, values)) or "none"


def product_problem(run: Run, world_size: int, ok_ep: list[int], ok_tp: list[int]) -> str:
    """The line for dp * ep * tp that is not the number of ranks."""
    dp, ep, tp = run.parallel.dp, run.parallel.ep, run.parallel.tp
    cell = ep * tp
    line = f"parallel.dp: found dp {dp} * ep {ep} * tp {tp} = {run.world_size}, expected the {world_size} ranks: "
    if world_size % cell == 0:
        return f"{line}valid dp with ep {ep} and tp {tp} is {world_size // cell} (leave --dp out to have it derived)"
    pairs = [f"{e} x {t}" for e in ok_ep for t in ok_tp if world_size % (e * t) == 0]
    return f"{line}valid ep x tp are {', '.join(pairs[:24])}{', ...' if len(pairs) > 24 else ''}"


def experts_to_cut(run: Run) -> dict[str, int]:
    """Name and number of the experts that ep cuts; none when no layer holds any."""
    model, counts = run.model, {}
    if model.num_moe_layers:
        counts["num_local_experts"] = model.num_local_experts
    if model.num_attention_moe_layers and not run.parallel.replicate_attention_experts:
        counts["num_attention_experts"] = model.num_attention_experts
    return counts


def tp_must_divide(run: Run) -> dict[str, int]:
    """Name and size of everything that tp cuts."""
    model, train = run.model, run.train
    sizes = {
        "vocab_size": model.vocab_size,
        "micro_batch * seq_length": train.micro_batch * train.seq_length,
    }
    if model.num_attention_moe_layers < model.num_hidden_layers:
        sizes["num_attention_heads"] = model.num_attention_heads
        sizes["num_key_value_heads"] = model.num_key_value_heads
    if model.num_attention_moe_layers:
        each = model.num_attention_heads // model.num_attention_experts
        sizes["num_attention_heads / num_attention_experts"] = each
    if model.num_moe_layers < model.num_hidden_layers:
        sizes["intermediate_size"] = model.intermediate_size
    if model.num_moe_layers:
        sizes["moe_intermediate_size"] = model.moe_intermediate_size
        sizes["shared_intermediate_size"] = model.shared_intermediate_size
    return sizes


def other_problems(run: Run) -> list[str]:
    """Problems of settings in different sections that do not depend on the number of ranks."""
    model, parallel, train = run.model, run.parallel, run.train
    problems = []
    if parallel.zero == 3 and parallel.ep > 1:
        problems.append(
            f"parallel.zero: found 3 with ep {parallel.ep}, expected 0, 1 or 2: ZeRO-3 works with ep 1 only"
        )
    if parallel.zero == 0 and train.precision == "bf16" and run.data_ranks > 1:
        problems.append(
            "parallel.zero: found 0 with precision bf16, expected 1, 2 or 3: DeepSpeed keeps fp32 master weights from "
            "stage 1 on"
        )
    if parallel.zero == 0 and parallel.offload_optimizer:
        problems.append("parallel.offload_optimizer: found true with zero 0, expected zero 1, 2 or 3")
    size, offload = parallel.allgather_bucket_size, parallel.offload_optimizer
    # its nccl_start_alignment_factor, of which its optimizer for stage 1 in bf16 without offload asks nothing
    in_pairs = parallel.zero == 2 or (parallel.zero == 1 and (train.precision == "fp32" or offload))
    if in_pairs and size % 2 and (run.data_ranks > 1 or offload):
        near = f"{size - 1} or {size + 1}" if size > 1 else "2"
        problems.append(
            f"parallel.allgather_bucket_size: found {size} with zero {parallel.zero}, expected an even number, such as "
            f"{near}: DeepSpeed gathers elements in pairs"
        )
    plane = parallel.ep * train.micro_batch * train.seq_length
    if model.num_attention_moe_layers and plane >= 1 << 24:
        problems.append(
            f"train.micro_batch: found ep {parallel.ep} * micro_batch {train.micro_batch} * seq_length "
            f"{train.seq_length} = {plane} tokens, expected less than 2^24 with attention experts"
        )
    if train.seq_length > model.max_position_embeddings:
        problems.append(
            f"train.seq_length: found {train.seq_length}, expected at most model.max_position_embeddings "
            f"{model.max_position_embeddings}"
        )
    unit = train.micro_batch * run.data_ranks
    if train.global_batch != unit * train.accumulation:
        near = sorted({max(1, train.global_batch // unit) * unit, (train.global_batch // unit + 1) * unit})
        problems.append(
            f"train.global_batch: found {train.global_batch}, expected micro_batch {train.micro_batch} * accumulation "
            f"{train.accumulation} * dp {parallel.dp} * ep {parallel.ep} = {unit * train.accumulation}"
            + (f": the nearest valid values are {numbers(near)}" if train.global_batch % unit else "")
        )
    return problems


def derive(run: Run, world_size: int) -> tuple[Run, list[str], list[str]]:
    """Fill in what was not given: dp, accumulation or global_batch, warmup_steps.

    Returns (run, one line per derived value, warnings). Nothing is checked here: `layout_problems` does.
    """
    parallel, train, optimizer = run.parallel, run.train, run.optimizer
    lines, warnings = [], []
    cell = parallel.ep * parallel.tp
    if "dp" not in parallel.model_fields_set:
        parallel = parallel.model_copy(update={"dp": max(1, world_size // cell)})
        lines.append(f"parallel.dp = {parallel.dp} ({world_size} ranks / (ep {parallel.ep} * tp {parallel.tp}))")
    unit = train.micro_batch * parallel.dp * parallel.ep
    batch = f"micro_batch {train.micro_batch} * dp {parallel.dp} * ep {parallel.ep}"
    if "global_batch" not in train.model_fields_set:
        train = train.model_copy(update={"global_batch": unit * train.accumulation})
        lines.append(f"train.global_batch = {train.global_batch} ({batch} * accumulation {train.accumulation})")
    elif "accumulation" not in train.model_fields_set:
        train = train.model_copy(update={"accumulation": max(1, train.global_batch // unit)})
        lines.append(f"train.accumulation = {train.accumulation} (global_batch {train.global_batch} / ({batch}))")
    if train.epochs:
        lines.append(f"train.steps = what {train.epochs} epochs take, counted when the data is open")
    elif "warmup_steps" not in optimizer.model_fields_set:
        optimizer = optimizer.model_copy(update={"warmup_steps": train.steps // 10})
        lines.append(f"optimizer.warmup_steps = {optimizer.warmup_steps} (steps {train.steps} // 10)")
    elif optimizer.warmup_steps > train.steps:
        warnings.append(
            f"optimizer.warmup_steps {optimizer.warmup_steps} is more than the {train.steps} steps and would never "
            f"reach lr {optimizer.lr:g}: clamped to {train.steps}"
        )
        optimizer = optimizer.model_copy(update={"warmup_steps": train.steps})
    for key in ("num_key_value_heads", "head_dim", "moe_intermediate_size"):
        if key not in run.model.model_fields_set and (key != "moe_intermediate_size" or run.model.num_moe_layers):
            lines.append(f"model.{key} = {getattr(run.model, key)}")
    return run.model_copy(update={"parallel": parallel, "train": train, "optimizer": optimizer}), lines, warnings


def differs_from_default(run: Run, dotted: str) -> bool:
    """Whether the value of `section.key` is another than the section's default (derived defaults: any value is)."""
    section, _, key = dotted.partition(".")
    part = getattr(run, section)
    return getattr(part, key, None) != type(part).model_fields[key].default


def without_effect(run: Run, given: set[str]) -> list[str]:
    """Warnings on settings that change nothing, among the dotted keys that the user wrote (`given`)."""
    model, data, warnings = run.model, run.data, list[str]()
    dense = not model.num_moe_layers
    for section, kind in SECTIONS.items():
        for key, about in kind.settings().items():
            dotted = f"{section}.{key}"
            if dotted in given and differs_from_default(run, dotted):
                whys = (rule(run) for rule in about.idle)
                warnings += [f"{dotted} has no effect: {why}" for why in whys if why]
    if len(data.domains) == 1 and data.domains[0].weight != 1:
        warnings.append("data.domains weight has no effect: there is one domain")
    if not dense and model.num_experts_per_tok == 1 and model.norm_topk_prob and model.num_local_experts > 1:
        warnings.append(
            "model.norm_topk_prob with num_experts_per_tok 1 makes every routing weight 1: the router learns from the "
            "balancing losses alone"
        )
    if model.num_local_experts and dense:
        warnings.append("model.num_local_experts has no effect: moe_layers names no layer")
    return warnings
