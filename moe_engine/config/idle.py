"""Why a setting has no effect: rules that settings name. Each gives the reason in a Run, None where there is none."""

from typing import Any

Run = Any  # a Run, whose sections name these rules


def no_experts(run: Run) -> str | None:
    return None if run.model.num_moe_layers else "no layer has experts"


def no_attention_experts(run: Run) -> str | None:
    return None if run.model.num_attention_moe_layers else "no layer has attention experts"


def no_router(run: Run) -> str | None:
    return None if run.model.num_attention_moe_layers else no_experts(run)


def no_attention_layers(run: Run) -> str | None:
    return None if run.model.num_attention_moe_layers else "attention_moe_layers names no layer"


def no_attention_experts_asked(run: Run) -> str | None:
    return None if run.model.num_attention_experts else "num_attention_experts is 0"


def attention_experts_not_cut(run: Run) -> str | None:
    cut = run.model.num_attention_moe_layers and run.parallel.ep > 1
    return None if cut else "ep cuts no attention experts"


def roomy(run: Run) -> str | None:
    enough = max(1, run.model.num_local_experts) / run.model.num_experts_per_tok
    return f"from {enough:g} upwards no token is dropped" if (run.model.capacity_factor or 0) >= enough else None


def no_aux_loss(run: Run) -> str | None:
    return "router_aux_loss is none" if run.model.router_aux_loss == "none" else None


def no_aux_coef(run: Run) -> str | None:
    return None if run.model.router_aux_loss_coef else "router_aux_loss_coef is 0"


def zero_is_0(run: Run) -> str | None:
    return None if run.parallel.zero else "zero is 0"


def alone(run: Run) -> str | None:
    shares = run.data_ranks > 1 or run.parallel.offload_optimizer or not run.parallel.zero
    return None if shares else "one data rank shares nothing"


def saved_at_the_end(run: Run) -> str | None:
    more = run.train.save_every > run.train.steps
    return "it is more than steps (the end is saved anyway)" if more else None


def prepared(run: Run) -> str | None:
    own = "prepared data has its own held-out part (prepare_data --eval-fraction)"
    return own if run.data.domains else None


def no_export(run: Run) -> str | None:
    return None if run.train.export_hf else "train.export_hf is not given"


def nothing_held_out(run: Run) -> str | None:
    return None if run.data.eval_fraction else "data.eval_fraction is 0"


def no_eval_batches(run: Run) -> str | None:
    none = run.train.eval_batches == 0 < run.train.eval_every
    return "eval_batches is 0: no evaluation" if none else None


def no_eval_steps(run: Run) -> str | None:
    none = run.train.eval_every == 0 < run.train.eval_batches
    return "eval_every is 0: no evaluation" if none else None
