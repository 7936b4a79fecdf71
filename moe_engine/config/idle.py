"""Why a setting has no effect: rules that settings name. Each gives the reason in a Run, None where there is none."""

from typing import Any

Run = Any  # a Run, whose sections name these rules


def no_experts(run: Run) -> str | None:
    """Of feed-forward experts, in a model without any."""
    return None if run.model.num_moe_layers else "no layer has experts"


def no_attention_experts(run: Run) -> str | None:
    """Of attention experts, in a model without any."""
    return None if run.model.num_attention_moe_layers else "no layer has attention experts"


def no_router(run: Run) -> str | None:
    """Of routers, in a model that has neither kind."""
    return None if run.model.num_attention_moe_layers else no_experts(run)


def no_attention_layers(run: Run) -> str | None:
    """Of the number of attention experts, which no layer holds."""
    return None if run.model.num_attention_moe_layers else "attention_moe_layers names no layer"


def no_attention_experts_asked(run: Run) -> str | None:
    """Of a list of layers for attention experts, of which there are 0."""
    return None if run.model.num_attention_experts else "num_attention_experts is 0"


def attention_experts_not_cut(run: Run) -> str | None:
    """Of their place on ep ranks, where ep does not cut them."""
    cut = run.model.num_attention_moe_layers and run.parallel.ep > 1
    return None if cut else "ep cuts no attention experts"


def roomy(run: Run) -> str | None:
    """Of a capacity factor so large that every expert has room for all tokens."""
    enough = max(1, run.model.num_local_experts) / run.model.num_experts_per_tok
    return f"from {enough:g} upwards no token is dropped" if (run.model.capacity_factor or 0) >= enough else None


def no_aux_loss(run: Run) -> str | None:
    """Of the coefficient of a balancing loss that is none."""
    return "router_aux_loss is none" if run.model.router_aux_loss == "none" else None


def no_aux_coef(run: Run) -> str | None:
    """Of the kind of a balancing loss whose coefficient is 0."""
    return None if run.model.router_aux_loss_coef else "router_aux_loss_coef is 0"


def zero_is_0(run: Run) -> str | None:
    """Of ZeRO's buckets and overlap, at stage 0."""
    return None if run.parallel.zero else "zero is 0"


def alone(run: Run) -> str | None:
    """Of ZeRO's buckets and overlap, on one data rank that offloads nothing."""
    shares = run.data_ranks > 1 or run.parallel.offload_optimizer or not run.parallel.zero
    return None if shares else "one data rank shares nothing"


def saved_at_the_end(run: Run) -> str | None:
    """Of an interval that no step of the run reaches."""
    more = run.train.save_every > run.train.steps
    return "it is more than steps (the end is saved anyway)" if more else None


def prepared(run: Run) -> str | None:
    """Of the held-out share, where prepared data has its own."""
    own = "prepared data has its own held-out part (prepare_data --eval-fraction)"
    return own if run.data.domains else None


def no_export(run: Run) -> str | None:
    """Of an export's spelling, without an export."""
    return None if run.train.export_hf else "train.export_hf is not given"


def nothing_held_out(run: Run) -> str | None:
    """Of evaluation, without held-out text."""
    return None if run.data.eval_fraction else "data.eval_fraction is 0"


def no_eval_batches(run: Run) -> str | None:
    """Of the interval between evaluations of no batch."""
    none = run.train.eval_batches == 0 < run.train.eval_every
    return "eval_batches is 0: no evaluation" if none else None


def no_eval_steps(run: Run) -> str | None:
    """Of the length of evaluations that never come."""
    none = run.train.eval_every == 0 < run.train.eval_batches
    return "eval_every is 0: no evaluation" if none else None


def counted_by_epochs(run: Run) -> str | None:
    """Of a number of steps, where epochs decide it."""
    return f"train.epochs is {run.train.epochs}" if run.train.epochs else None


def no_samples(run: Run) -> str | None:
    """Of how rows become tokens, where there are none."""
    return None if run.samples.given else "no samples are named (samples.files or samples.mixture)"


def no_mixture(run: Run) -> str | None:
    """Of the parts of a mixture, where there is none."""
    return None if run.samples.mixture else "samples.mixture names no file"


def no_supervision(run: Run) -> str | None:
    """Of how routers are taught, where they are not."""
    return None if run.supervision.routing_weight else "supervision.routing_weight is 0"


def map_not_read(run: Run) -> str | None:
    """Of a map of labels to experts, where the target is another."""
    return None if run.supervision.target == "fixed" else f"supervision.target is {run.supervision.target}"
