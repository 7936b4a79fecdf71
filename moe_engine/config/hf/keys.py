"""What the other keys of a config.json do: those that are no size, no router, and not spelled in two ways.

    PASSED       belong to transformers, and change no output
    HARMLESS     change the function, unless they have one of these values
    unknown      no model of these families reads them in transformers 4.57 and 5.24: they change nothing, and the user
                 is told so; beside code of its own (`auto_map`), which is never run, they may mean anything: refused

A sliding window of W tokens is full attention for sequences of up to W: it shortens max_position_embeddings.
"""

from collections.abc import Mapping
from typing import Any

from moe_engine.config.hf.families.llama_moe_v2 import LLAMA_MOE_V2
from moe_engine.config.messages import shown

NO_EFFECT = frozenset(
    # of every configuration
    "architectures model_type transformers_version name_or_path _name_or_path _commit_hash tokenizer_class torch_dtype "
    "dtype use_bfloat16 torchscript return_dict output_attentions output_hidden_states output_router_logits use_cache "
    "chunk_size_feed_forward is_encoder_decoder is_decoder gradient_checkpointing tf_legacy_loss num_labels id2label "
    "label2id problem_type finetuning_task task_specific_params classifier_dropout pretraining_tp tie_encoder_decoder "
    "cross_attention_hidden_size _attn_implementation_autoset _flash_attn_2_enabled max_window_layers "
    "model_max_length unsloth_version "
    # token ids
    "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id prefix "
    # of generation, written by transformers before 4.41
    "max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty "
    "temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size bad_words_ids "
    "encoder_no_repeat_ngram_size num_return_sequences output_scores return_dict_in_generate forced_bos_token_id "
    "forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens "
    "begin_suppress_tokens".split()
)
READ_ELSEWHERE = frozenset(
    "rope_theta rope_scaling rope_parameters original_max_position_embeddings sliding_window use_sliding_window "
    "layer_types auto_map".split()
)
ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")  # and no repository of code
EXPERTS = ("eager", "batched_mm", "grouped_mm")
HARMLESS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("_attn_implementation", "attn_implementation", "_attn_implementation_internal"), ATTENTION),
    **dict.fromkeys(("_experts_implementation", "experts_implementation", "_experts_implementation_internal"), EXPERTS),
    "hidden_act": ("silu", "swish"),
    **dict.fromkeys(("attention_bias", "mlp_bias", "add_cross_attention"), (False,)),
    "attention_dropout": (0,),
    "partial_rotary_factor": (1,),
    "is_causal": (True,),
    **dict.fromkeys(("clip_qkv", "attention_chunk_size", "alibi", "use_alibi", "num_kv_shared_layers"), ()),
    **dict.fromkeys(("kv_sharing_modes", "pruned_heads", "per_layer_config", "fusion_config"), ()),
    **dict.fromkeys(("quantization_config", "compression_config", "quantization", "transformers_weights"), ()),
    **dict.fromkeys(("trust_remote_code", *LLAMA_MOE_V2), ()),
}
EMPTY = (False, 0, "", [], {})  # stand for null where no value is harmless
SHOWN = 8


def judge(config: Mapping[str, Any], kind: str, known: set[str], problems: list[str], notes: list[str]) -> None:
    """Judge the keys that are not `known` to the family `kind`: what changes the model, and what changes nothing."""
    unknown = []
    for key, value in config.items():
        if value is None or key in known or key in NO_EFFECT or key in READ_ELSEWHERE:
            continue
        if key not in HARMLESS:
            unknown.append(shown(key)[1:-1])
        elif value not in (HARMLESS[key] or EMPTY):
            allowed = " or ".join(map(shown, HARMLESS[key])) or "null"
            problems.append(f"{key}: found {shown(value)}, only {allowed} is supported")
    names = ", ".join(unknown[:SHOWN]) + (f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else "")
    code = config.get("auto_map") and kind != "llama_moe_v2"
    if unknown and code:
        problems.append(
            f"{names}: the model's own code (auto_map) may read this, and is never run; remove auto_map to have the "
            f"model that transformers' {kind} is"
        )
    elif unknown:
        notes.append(f"{names}: no key of transformers' {kind}, changes nothing")
    elif code:
        notes.append(f"auto_map: that code is never run; the model is transformers' {kind}")


def window_of(config: Mapping[str, Any], kind: str, problems: list[str]) -> int | None:
    """How many tokens attention looks back on, itself among them; None: on all.

    Qwen3-MoE has a window if `use_sliding_window` says so, Mixtral whatever it says. transformers' Llama and OLMoE have
    none, but its caches and other readers give them one, unless `use_sliding_window` is false.
    """
    window, use = config.get("sliding_window"), config.get("use_sliding_window")
    if kind == "qwen3_moe":
        window = config.get("sliding_window", 4096) if use else None
    elif use is False and kind not in ("mixtral", "llama_moe_v2"):
        window = None
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
        problems.append(f"sliding_window: found {shown(window)}, expected null or a number of tokens")
        return None
    kinds = config.get("layer_types") or []
    fine = {"full_attention"} | ({"sliding_attention"} if window else set())
    if not isinstance(kinds, list) or any(layer not in fine for layer in map(str, kinds)):
        problems.append(f"layer_types: found {shown(kinds)}, only full_attention is supported")
    return window
