"""Hugging Face's config.json <-> Model, in the spelling of transformers 4 or 5.

    spelling 4    rope_theta, rope_scaling {...}                        torch_dtype
    spelling 5    rope_parameters {rope_type, rope_theta, ...}          dtype

One `HfFamily` says what a model_type implies, and is used in both directions. What a config asks for and the engine
does not do is refused by name: read silently, it would be a different model. What is written is read back, and has to
give the same function. A router's balancing loss keeps the meaning of its coefficient: `hf_mixtral` (layers pooled, k
at uniform).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError

from moe_engine.config import Model
from moe_engine.config_report import refuse, shown, validation_problems

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
OPTIONAL = (
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings"),
    *("tie_word_embeddings", "initializer_range"),
)
DTYPES = ("float32", "bfloat16", "float16", "float64")
NO_EFFECT = frozenset(
    "architectures bos_token_id chunk_size_feed_forward dtype eos_token_id id2label is_encoder_decoder label2id "
    "max_window_layers model_type name_or_path _name_or_path output_attentions output_hidden_states "
    "output_router_logits pad_token_id pretraining_tp problem_type return_dict torch_dtype transformers_version "
    "use_cache rope_theta rope_scaling rope_parameters auto_map tokenizer_class unsloth_version model_max_length "
    "_attn_implementation_autoset _flash_attn_2_enabled is_decoder "
    "max_length temperature top_p top_k do_sample".split()
)
ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")  # and no repository of code
HARMLESS: dict[str, tuple[Any, ...]] = {
    "_attn_implementation": ATTENTION,
    "attn_implementation": ATTENTION,
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0,),
    "sliding_window": (),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1,),
    "clip_qkv": (),
}
ROUTING = {
    "num_experts_per_tok": "num_experts_per_tok",
    "router_aux_loss_coef": "router_aux_loss_coef",
}
ENDS = "num_moe_contract_layers"
LLAMA_MOE_V2 = (
    *(ENDS, "intermediate_size_residual", "scale_factor", "use_attn_moe", "attn_experts", "top_k_attn"),
    *("scale_factor_attn", "use_layer_wise_balance", "moe_type", "act_rescale", "add_rescale_bias"),
)
IN_TRAINING_ONLY = frozenset(
    "router_aux_loss router_aux_loss_coef router_z_loss_coef router_jitter_noise capacity_factor initializer_range "
    "expert_bias_update_rate routed_scaling_factor max_position_embeddings".split()
)  # routed_scaling_factor is folded into the experts where weights are written


class HfFamily(NamedTuple):
    """What a model_type says without saying it.

    defaults: Model keys where config.json is silent. implied: Model keys it always has. routing: Model key -> their
    key, of what routers and experts need. more, read, write: keys that stand for several of ours, and the two ways.
    """

    architecture: str
    defaults: dict[str, Any]
    implied: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    routing: dict[str, str] = {}  # noqa: RUF012
    more: tuple[str, ...] = ()
    read: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda config: {}
    write: Callable[[Model], dict[str, Any]] = lambda model: {}


def qwen3_moe_layers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every decoder_sparse_step-th layer holds experts, but for mlp_only_layers."""
    layers, dense = config["num_hidden_layers"], config.get("mlp_only_layers") or []
    step = config.get("decoder_sparse_step") or 1
    count = {"num_local_experts": config.get("num_local_experts") or config.get("num_experts") or 128}
    if not dense and step == 1:
        return count
    return count | {"moe_layers": [i for i in range(layers) if i not in dense and (i + 1) % step == 0]}


def qwen3_moe_keys(model: Model) -> dict[str, Any]:
    """The dense layers by their numbers."""
    dense = [i for i in range(model.num_hidden_layers) if not model.is_moe(i)]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


def llama_moe_v2_experts(config: Mapping[str, Any]) -> dict[str, Any]:
    """LLaMA-MoE-v2 (2411.15708): c dense layers at both ends, as wide as all experts; one expert that is always on."""
    experts, width, ends = config["num_local_experts"], config["intermediate_size"], config.get(ENDS) or 0
    always = config.get("intermediate_size_residual") or 0
    inner = {"moe_layers": list(range(ends, config["num_hidden_layers"] - ends))} if ends else {}
    values = inner | {"intermediate_size": experts * width + always, "shared_intermediate_size": always}
    values["routed_scaling_factor"] = config.get("scale_factor") or experts / config["num_experts_per_tok"]
    if not config.get("use_attn_moe"):
        return values
    groups = config["num_key_value_heads"]
    return values | {
        "num_attention_experts": config.get("attn_experts") or groups,
        "num_attention_experts_per_tok": config["top_k_attn"],
        "attention_scaling_factor": config.get("scale_factor_attn") or groups,
        "attention_moe_layers": inner.get("moe_layers", "all"),
    }


def llama_moe_v2_keys(model: Model) -> dict[str, Any]:
    """As its own converter writes them."""
    keys: dict[str, Any] = {
        ENDS: next((i for i in range(model.num_hidden_layers) if model.is_moe(i)), 0),
        "intermediate_size_residual": model.shared_intermediate_size or None,
        "scale_factor": model.routed_scaling_factor,
        "use_attn_moe": model.num_attention_moe_layers > 0,
    }
    if model.num_attention_moe_layers:
        keys |= {"attn_experts": model.num_attention_experts, "top_k_attn": model.num_attention_experts_per_tok}
        keys |= {"scale_factor_attn": model.attention_scaling_factor}
    return keys


FAMILIES = {
    "llama": HfFamily("LlamaForCausalLM", {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 2048}),
    "mixtral": HfFamily(
        "MixtralForCausalLM",
        {
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.001,
        },
        {"norm_topk_prob": True},
        ROUTING
        | {"num_local_experts": "num_local_experts", "router_jitter_noise": "router_jitter_noise"}
        | {"moe_intermediate_size": "intermediate_size"},
    ),
    "qwen3_moe": HfFamily(
        "Qwen3MoeForCausalLM",
        {
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e4,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "num_local_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
            "router_aux_loss_coef": 0.001,
        },
        {"qk_norm": "head"},
        ROUTING
        | {"num_local_experts": "num_experts", "moe_intermediate_size": "moe_intermediate_size"}
        | {"norm_topk_prob": "norm_topk_prob"},
        ("decoder_sparse_step", "mlp_only_layers", "num_local_experts"),
        qwen3_moe_layers,
        qwen3_moe_keys,
    ),
    "olmoe": HfFamily(
        "OlmoeForCausalLM",
        {
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e4,
            "max_position_embeddings": 4096,
            "num_local_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "router_aux_loss_coef": 0.01,
        },
        {"qk_norm": "projection"},
        ROUTING
        | {"num_local_experts": "num_experts", "moe_intermediate_size": "intermediate_size"}
        | {"norm_topk_prob": "norm_topk_prob"},
    ),
    "llama_moe_v2": HfFamily(
        "MixtralForCausalLM",
        {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_position_embeddings": 131072, "router_aux_loss_coef": 0.001},
        {"norm_topk_prob": True},
        ROUTING | {"num_local_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size"},
        LLAMA_MOE_V2,
        llama_moe_v2_experts,
        llama_moe_v2_keys,
    ),
}


def family_in(config: Mapping[str, Any]) -> str:
    """The one of FAMILIES that a config.json is of. LLaMA-MoE-v2 calls itself mixtral, and has keys of its own."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        refuse([f"model_type: found {shown(kind)}, expected {', '.join(FAMILIES)}"])
    return "llama_moe_v2" if kind == "mixtral" and ("use_attn_moe" in config or ENDS in config) else kind


def came_as(config: Mapping[str, Any]) -> str | None:
    """family_in, or None for a config.json that names no family of ours."""
    return family_in(config) if config.get("model_type") in FAMILIES else None


def model_from_hf(config: Mapping[str, Any]) -> Model:
    """The Model of a config.json (a dict) of one of FAMILIES; ConfigError lists every feature the engine lacks."""
    kind = family_in(config)
    family = FAMILIES[kind]
    problems: list[str] = []
    names = {key: key for key in SIZES + OPTIONAL} | family.routing
    values = family.defaults | {k: config[theirs] for k, theirs in names.items() if config.get(theirs) is not None}
    try:
        values |= family.read(config)
    except (KeyError, TypeError, ArithmeticError) as error:
        problems.append(f"{kind}: {error} is missing, 0 or no number")
    values |= family.implied | ({"router_aux_loss": "hf_mixtral"} if family.routing else {})
    values |= rope_from_hf(config, problems)
    problems += unsupported(config, {*names.values(), *family.more})
    try:
        model = Model.model_validate(values)
    except ValidationError as error:
        found = validation_problems(error, {}, "model").values()
        refuse([*problems, *(line.replace("model.", "", 1) for lines in found for line in lines)])
    if problems:
        refuse(problems)
    return model


def rope_from_hf(config: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """rope_theta and rope_scaling from either spelling; what is not llama3 scaling goes to `problems`."""
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = config.get(key) or {}
    if key == "rope_parameters" and config.get("rope_scaling") not in (None, rope):
        problems.append("rope_parameters and rope_scaling are both given and differ: remove the wrong one")
    if not isinstance(rope, dict):
        problems.append(f"{key}: found {shown(rope)}, expected a mapping")
        return {}
    rope = dict(rope)
    theta = rope.pop("rope_theta", config.get("rope_theta"))
    values = {} if theta is None else {"rope_theta": theta}
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    if kind == "llama3":
        values["rope_scaling"] = rope | {"rope_type": kind}
    elif kind != "default":
        problems.append(f"{key}: rope_type {shown(kind)} is not supported, expected default or llama3")
    return values


def unsupported(config: Mapping[str, Any], known: set[str]) -> list[str]:
    """One problem line for each key that would change the model in a way the engine does not follow."""
    problems = []
    for key, value in config.items():
        if value is None or key in known or key in NO_EFFECT:
            continue
        if key == "sliding_window" and config.get("use_sliding_window") is False:
            continue
        if key == "layer_types" and isinstance(value, list) and set(value) == {"full_attention"}:
            continue
        if key not in HARMLESS:
            if value not in (False, [], {}, ""):
                problems.append(
                    f"{shown(key)[1:-1]}: {shown(value)} is not a feature of the engine's {config['model_type']}"
                )
        elif value not in HARMLESS[key]:
            allowed = " or ".join(map(shown, HARMLESS[key])) or "null"
            problems.append(f"{key}: found {shown(value)}, only {allowed} is supported")
    return problems


def model_to_hf(
    model: Model, kind: str, dtype: str | None, version: int | None, carried: Mapping[str, Any]
) -> dict[str, Any]:
    """The config.json of a model as `kind`, one of FAMILIES.

    dtype: torch's name of it, "bfloat16". version: of transformers, 4 or 5; None: the spelling of `carried`, or 4.
    carried: the config.json that the weights came with, whose other keys (token ids) stay. ConfigError names what
    another family would be needed for.
    """
    gone = {"torch_dtype", "dtype", "rope_theta", "rope_scaling", "rope_parameters"}
    gone |= {"transformers_version"} if version else set()
    version = version or spelling_of(carried)
    if came_as(carried) != kind:  # of the dense parent, say
        gone |= set(carried) - NO_EFFECT
    if "num_experts" in FAMILIES[kind].routing.values():
        gone.add("num_local_experts")
    config = {key: value for key, value in carried.items() if key not in gone}
    config |= keys_of(model, kind, version) | {"dtype" if version > 4 else "torch_dtype": dtype}
    if lost := differences(model, model_from_hf(config)):
        refuse(
            f"{key}: {shown(ours)} cannot be written as {kind}, which has {shown(theirs)}"
            for key, (ours, theirs) in lost.items()
        )
    return config


def keys_of(model: Model, kind: str, version: int) -> dict[str, Any]:
    """What the config.json of a family says of a model, in the spelling of transformers `version`."""
    family = FAMILIES[kind]
    config: dict[str, Any] = {"architectures": [family.architecture], "hidden_act": "silu"}
    config |= {key: getattr(model, key) for key in SIZES + OPTIONAL}
    config |= {theirs: getattr(model, key) for key, theirs in family.routing.items()}
    config |= family.write(model) | {"model_type": "mixtral" if kind == "llama_moe_v2" else kind}
    if config["model_type"] == "mixtral":
        config["sliding_window"] = None
    return config | rope_to_hf(model, version)


def spelling_of(config: Mapping[str, Any]) -> int:
    """Whose spelling a config.json is in: transformers' 4, which 5 reads too, or 5."""
    return 5 if "dtype" in config or "rope_parameters" in config else 4


def dtype_of(config: Mapping[str, Any]) -> str | None:
    """torch's name of the dtype that a config.json gives, None if it gives none that weights may have."""
    name = config.get("dtype") or config.get("torch_dtype")
    return name if name in DTYPES else None


def rope_to_hf(model: Model, version: int) -> dict[str, Any]:
    """The keys of the rotary embedding in one of the two spellings."""
    scaling = model.rope_scaling.model_dump() if model.rope_scaling else None
    if version == 4:
        return {"rope_theta": model.rope_theta, "rope_scaling": scaling}
    return {"rope_parameters": {"rope_theta": model.rope_theta} | (scaling or {"rope_type": "default"})}


def differences(ours: Model, theirs: Model) -> dict[str, tuple[Any, Any]]:
    """Keys in which two models are different functions of the same weights, with both values."""
    layers, idle = range(ours.num_hidden_layers), set[str](IN_TRAINING_ONLY)
    if ours.num_moe_layers == len(layers):
        idle.add("intermediate_size")
    if not ours.num_moe_layers:
        idle |= {"num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "num_local_experts"}
        idle |= {"shared_intermediate_size"}
    if not ours.num_attention_moe_layers:
        idle |= {"num_attention_experts", "num_attention_experts_per_tok", "attention_scaling_factor"}
    for key, has in (("moe_layers", Model.is_moe), ("attention_moe_layers", Model.is_attention_moe)):
        if [has(ours, i) for i in layers] == [has(theirs, i) for i in range(theirs.num_hidden_layers)]:
            idle.add(key)
    pairs = {key: (getattr(ours, key), getattr(theirs, key)) for key in Model.model_fields if key not in idle}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def family_of(model: Model) -> str:
    """The model_type that holds a model; ConfigError when none does, with what stands against the nearest.

    Never llama_moe_v2, which has to be asked for: transformers' own Mixtral would load it and be wrong.
    """
    problems: dict[str, dict[str, tuple[Any, Any]]] = {}
    for kind in (kind for kind in FAMILIES if kind != "llama_moe_v2"):
        problems[kind] = differences(model, model_from_hf(keys_of(model, kind, 5)))
        if not problems[kind]:
            return kind
    kind, lost = min(problems.items(), key=lambda item: len(item[1]))
    refuse(
        f"model.{key}: no Hugging Face family of {', '.join(problems)} holds {shown(ours)}; {kind} has {shown(theirs)}"
        for key, (ours, theirs) in lost.items()
    )
