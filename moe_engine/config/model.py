"""The section `model`: sizes, routing and balancing."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from moe_engine.config.idle import (
    no_attention_experts,
    no_attention_experts_asked,
    no_attention_layers,
    no_aux_coef,
    no_aux_loss,
    no_experts,
    no_router,
    roomy,
)
from moe_engine.config.section import Count, NonNegative, OnResume, Positive, Section, Size, divisors, setting

AuxLoss = Literal["micro_batch", "sequence", "global_batch", "hf_mixtral", "layerwise", "deepspeed_top2", "none"]


class RopeScaling(Section):
    """Llama-3 scaling of the rotary frequencies; the keys are Hugging Face's."""

    rope_type: Literal["llama3"] = "llama3"
    factor: Positive
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_max_position_embeddings: Size

    @model_validator(mode="after")
    def _bands(self) -> "RopeScaling":
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor {self.high_freq_factor} must be larger than low_freq_factor {self.low_freq_factor}"
            )
        return self


class Model(Section):
    """Sizes and routing of a Llama or Mixtral decoder; num_local_experts 0 is a dense model.

    `num_key_value_heads`, `head_dim` and `moe_intermediate_size` are derived when not given and always hold a number.
    """

    on_resume: ClassVar[OnResume] = "same"  # weights of one model are of no use to another

    vocab_size: Size = setting(..., "number of ids; more than the largest id in the text, and a multiple of tp")
    hidden_size: Size = setting(..., "width D")
    intermediate_size: Size = setting(
        ..., "width of dense FFNs, and of experts unless `moe_intermediate_size` is given"
    )
    num_hidden_layers: Size = setting(..., "decoder layers")
    num_attention_heads: Size = setting(..., "query heads")
    num_key_value_heads: Size = setting(
        ...,
        "key and value heads; derived: as many as query heads",
        default_factory=lambda given: given["num_attention_heads"],
    )
    head_dim: Size = setting(
        ...,
        "size of a head, even; derived: hidden_size / heads",
        default_factory=lambda given: max(given["hidden_size"] // given["num_attention_heads"], 1),
    )
    rms_norm_eps: Positive = setting(1e-5, "epsilon of every RMSNorm")
    qk_norm: Literal["none", "head", "projection"] = setting(
        "none",
        (
            "RMSNorm of queries and keys before rotation: `head`, each head by itself with one weight of head_dim"
            " (Qwen3); `projection`, all heads together (OLMoE)"
        ),
    )
    rope_theta: Positive = setting(1e4, "base of the rotary frequencies")
    rope_scaling: RopeScaling | None = setting(
        None,
        (
            "Llama-3 scaling: a mapping with `rope_type: llama3`, `factor`, `low_freq_factor`, "
            "`high_freq_factor`, `original_max_position_embeddings`"
        ),
    )
    max_position_embeddings: Size = setting(4096, "the longest `train.seq_length`", in_training_only=True)
    tie_word_embeddings: bool = setting(False, "the head shares the embedding's weights")
    initializer_range: Positive = setting(
        0.02, "standard deviation of the initial weights of all matrices", in_training_only=True
    )

    num_local_experts: Count = setting(0, "experts per MoE layer; 0: a dense model")
    num_experts_per_tok: Size = setting(2, "experts per token, top-k", idle=(no_experts,))
    moe_intermediate_size: Size = setting(
        ...,
        "width of an expert; derived: `intermediate_size`",
        default_factory=lambda given: given["intermediate_size"],
        idle=(no_experts,),
    )
    shared_intermediate_size: Count = setting(
        0,
        (
            "width of the shared expert, which every token of an MoE layer visits, unweighted, beside the "
            "chosen ones; 0: none"
        ),
        idle=(no_experts,),
    )
    norm_topk_prob: bool = setting(True, "scale the weights of the chosen experts to sum to 1", idle=(no_experts,))
    moe_layers: Literal["all"] | tuple[Count, ...] = setting(
        "all", "`all`, or a list of the layers (from 0) that hold experts; the others are dense"
    )
    routed_scaling_factor: Positive = setting(
        1.0, "multiplies the experts' output", in_training_only=True, idle=(no_experts,)
    )
    capacity_factor: Positive | None = setting(
        None,
        ("drop an expert's rows beyond ceil(factor * assignments / experts), per rank and micro-batch; null: dropless"),
        on_resume="warn",
        in_training_only=True,
        idle=(no_experts, roomy),
    )
    router_jitter_noise: Annotated[float, Field(ge=0, lt=1)] = setting(
        0.0,
        "x: in training, the router's input is multiplied by uniform(1 - x, 1 + x)",
        on_resume="warn",
        in_training_only=True,
        idle=(no_router,),
    )
    router_aux_loss: AuxLoss = setting(
        "micro_batch",
        (
            "balancing loss by name: `micro_batch`, `sequence`, `global_batch`, `hf_mixtral`, `layerwise`, "
            "`deepspeed_top2`, `none` ([parallelism.md](parallelism.md))"
        ),
        on_resume="warn",
        in_training_only=True,
        idle=(no_router, no_aux_coef),
    )
    router_aux_loss_coef: NonNegative = setting(
        0.01,
        "its weight in the objective",
        on_resume="warn",
        in_training_only=True,
        idle=(no_router, no_aux_loss),
    )
    router_z_loss_coef: NonNegative = setting(
        0.0,
        "weight of the mean of logsumexp(router logits)^2",
        on_resume="warn",
        in_training_only=True,
        idle=(no_router,),
    )
    expert_bias_update_rate: NonNegative = setting(
        0.0,
        "each step moves a bias on the choice of experts by this much against the load; 0: no bias",
        in_training_only=True,
        idle=(no_experts,),
    )

    num_attention_experts: Count = setting(
        0,
        (
            "experts per attention MoE layer, each a kv head with its query heads: a divisor of "
            "`num_attention_heads` and a multiple of `num_key_value_heads`; 0: dense attention"
        ),
        idle=(no_attention_layers,),
    )
    num_attention_experts_per_tok: Size = setting(
        2, "attention experts per token; their weights sum to 1", idle=(no_attention_experts,)
    )
    attention_moe_layers: Literal["all"] | tuple[Count, ...] = setting(
        "all",
        "`all`, or a list of the layers (from 0) whose attention is made of experts",
        idle=(no_attention_experts_asked,),
    )
    attention_scaling_factor: Positive = setting(
        1.0, "multiplies the attention experts' output", idle=(no_attention_experts,)
    )

    def is_moe(self, layer: int) -> bool:
        """Whether decoder layer `layer` (from 0) holds experts."""
        return self.num_local_experts > 0 and (self.moe_layers == "all" or layer in self.moe_layers)

    @property
    def num_moe_layers(self) -> int:
        """Number of decoder layers that hold experts."""
        return sum(self.is_moe(layer) for layer in range(self.num_hidden_layers))

    def is_attention_moe(self, layer: int) -> bool:
        """Whether the attention of decoder layer `layer` (from 0) is made of experts."""
        return self.num_attention_experts > 0 and (
            self.attention_moe_layers == "all" or layer in self.attention_moe_layers
        )

    @property
    def num_attention_moe_layers(self) -> int:
        """Number of decoder layers whose attention is made of experts."""
        return sum(self.is_attention_moe(layer) for layer in range(self.num_hidden_layers))

    @model_validator(mode="after")
    def _sizes_agree(self) -> "Model":
        heads, groups, experts = self.num_attention_heads, self.num_key_value_heads, self.num_local_experts
        problems = []
        if "head_dim" not in self.model_fields_set and self.hidden_size % heads:
            problems.append(f"num_attention_heads {heads} does not divide hidden_size {self.hidden_size}: add head_dim")
        elif self.head_dim % 2:
            problems.append(f"head_dim {self.head_dim} is odd: rotary embeddings need an even one")
        if heads % groups:
            valid = ", ".join(map(str, divisors(heads)))
            problems.append(f"num_key_value_heads {groups} does not divide {heads} attention heads: valid are {valid}")
        if experts and self.num_experts_per_tok > experts:
            problems.append(
                f"num_experts_per_tok {self.num_experts_per_tok} is more than num_local_experts {experts}: "
                f"valid are 1 to {experts}"
            )
        problems += self._attention_problems() if self.num_attention_experts else []
        for key, layers in (("moe_layers", self.moe_layers), ("attention_moe_layers", self.attention_moe_layers)):
            if isinstance(layers, str):  # all
                continue
            if len(set(layers)) < len(layers):
                problems.append(f"{key} {list(layers)} names a layer twice")
            if max(layers, default=0) >= self.num_hidden_layers:
                problems.append(
                    f"{key} {list(layers)} names a layer past the last: valid are 0 to {self.num_hidden_layers - 1}"
                )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _attention_problems(self) -> list[str]:
        """What keeps the attention experts from being made of whole heads."""
        heads, groups, experts = self.num_attention_heads, self.num_key_value_heads, self.num_attention_experts
        problems = []
        if heads % experts or experts % groups:
            valid = ", ".join(str(d) for d in divisors(heads) if d % groups == 0) or "none"
            problems.append(
                f"num_attention_experts {experts} must divide {heads} attention heads and be a multiple of {groups} "
                f"key-value heads: valid are {valid}"
            )
        if self.num_attention_experts_per_tok > experts:
            problems.append(
                f"num_attention_experts_per_tok {self.num_attention_experts_per_tok} is more than "
                f"num_attention_experts {experts}: valid are 1 to {experts}"
            )
        if self.qk_norm == "projection":
            problems.append("qk_norm projection takes the mean over all heads: with attention experts use head or none")
        return problems
