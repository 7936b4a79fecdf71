"""A run as one frozen, validated value: `Run` and its sections.

    Run -- model      what is trained: Hugging Face's names for sizes, plus routing and balancing
        -- parallel   dp x ep x tp, ZeRO, buckets (Megatron's and DeepSpeed's words)
        -- optimizer  AdamW and its schedule
        -- data       domains, tokenizer, masks
        -- train      length, batch, precision, recompute, where results go

Each part of the engine is built from its own section and never sees the rest. Unknown keys are refused, `null` means
"the default". `config_cli.load` fills a Run from defaults < YAML < command line, derives what was not given and reports
everything that is wrong at once; `config_layout` checks a Run against a number of ranks. No torch here: `--help`, the
planner and the tests of the layout rules start without it.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

Size = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # our word -> torch's; users may write either


def short_dtype(word: Any) -> Any:
    """Our word for a dtype that may be given by torch's; what is neither stays as it is."""
    return next((ours for ours, torchs in DTYPES.items() if word == torchs), word)


def torch_dtype(word: str) -> str:
    """torch's word for a dtype that may be given by ours; what is neither stays as it is."""
    return DTYPES.get(word, word)


AuxLoss = Literal["micro_batch", "sequence", "global_batch", "hf_mixtral", "layerwise", "deepspeed_top2", "none"]


class Section(BaseModel):
    """Base of the sections: frozen, extra keys refused, no NaN, no boolean for a number; 5e7 is a whole number."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        fields = cls.model_fields
        return {k: v for k, v in values.items() if v is not None or k not in fields or fields[k].default is None}

    @field_validator("*", mode="before")
    @classmethod
    def _numbers(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and kind is not bool:
            raise ValueError("expected no boolean")
        if kind is int and isinstance(value, str) and "e" in value.lower() and is_number(value):
            return float(value)  # the field takes a whole float and refuses 1.5e0
        return value


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

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size  # of dense layers; of experts too unless moe_intermediate_size is given
    num_hidden_layers: Size
    num_attention_heads: Size
    num_key_value_heads: Size = Field(default_factory=lambda given: given["num_attention_heads"])
    head_dim: Size = Field(default_factory=lambda given: max(given["hidden_size"] // given["num_attention_heads"], 1))
    rms_norm_eps: Positive = 1e-5
    qk_norm: Literal["none", "head", "projection"] = "none"  # RMSNorm of q and k: per head (Qwen3), all heads (OLMoE)
    rope_theta: Positive = 1e4
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: Size = 4096
    tie_word_embeddings: bool = False
    initializer_range: Positive = 0.02

    num_local_experts: Count = 0
    num_experts_per_tok: Size = 2
    moe_intermediate_size: Size = Field(default_factory=lambda given: given["intermediate_size"])
    shared_intermediate_size: Count = 0  # of an expert that every token visits beside the chosen ones; 0: none
    norm_topk_prob: bool = True  # the weights of the chosen experts are renormalised to sum 1
    moe_layers: Literal["all"] | tuple[Count, ...] = "all"  # which layers hold experts; the others are dense
    routed_scaling_factor: Positive = 1.0  # multiplies the routed output
    capacity_factor: Positive | None = None  # None: dropless
    router_jitter_noise: Annotated[float, Field(ge=0, lt=1)] = 0.0
    router_aux_loss: AuxLoss = "micro_batch"
    router_aux_loss_coef: NonNegative = 0.01
    router_z_loss_coef: NonNegative = 0.0
    expert_bias_update_rate: NonNegative = 0.0  # 0: no expert bias

    num_attention_experts: Count = 0  # each a kv head with its query heads; 0: dense attention
    num_attention_experts_per_tok: Size = 2
    attention_moe_layers: Literal["all"] | tuple[Count, ...] = "all"
    attention_scaling_factor: Positive = 1.0  # multiplies the attention experts' output

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


class Parallel(Section):
    """How ranks share the work. world = dp * ep * tp; tp varies fastest, then ep, then dp.

    dp counts the replicas of each expert; all dp * ep ranks of one tp rank read different data. Bucket sizes count
    ELEMENTS, as in DeepSpeed: 5e7 is 100 MB of bf16 gradients, not 50 MB. More in `config_layout`.
    """

    dp: Size = 1  # derived from the number of ranks when not given
    ep: Size = 1
    tp: Size = 1
    zero: Annotated[int, Field(ge=0, le=3)] = 2
    replicate_attention_experts: bool = False  # whole on every ep rank: none of their rows travels over ep
    offload_optimizer: bool = False  # optimizer states live in host memory
    overlap_comm: bool = True
    reduce_bucket_size: Size = 50_000_000  # elements
    allgather_bucket_size: Size = 50_000_000  # elements


class Optimizer(Section):
    """AdamW, linear warm-up from 0 to `lr`, then cosine towards `min_lr`, which the step after the last would have."""

    lr: Positive = 1e-3
    min_lr: NonNegative = 0.0
    warmup_steps: Count = 0  # derived as steps // 10 when not given
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.1
    clip_grad: NonNegative = 1.0  # largest global gradient norm; 0: no clipping

    @model_validator(mode="after")
    def _falls(self) -> "Optimizer":
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}")
        return self


class Domain(Section):
    """One source of text: a prepared folder, drawn with probability weight / sum of weights.

    Also read from a string, `path`, `name=path` or `name=path:weight`; a path alone is named after its last part.
    """

    name: Annotated[str, Field(min_length=1, pattern=r"^[\w.+-]+$")]
    path: Annotated[str, Field(min_length=1)]
    weight: Positive = 1.0

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        name, equals, path = value.partition("=")
        if not equals or "/" in name:
            name, path = "", value
        start, colon, weight = path.rpartition(":")
        given = {"name": name, "path": path}
        if colon and start and is_number(weight):
            given |= {"path": start, "weight": weight}
        given["name"] = given["name"] or given["path"].rstrip("/").rpartition("/")[2]
        return given


class Data(Section):
    """What is read. Without domains: the Python standard library's own sources, found on this machine, as bytes."""

    domains: tuple[Domain, ...] = ()
    tokenizer: str | None = None  # None: the one the data was prepared with (bytes for the default corpus)
    allow_other_tokenizer: bool = False  # text whose tokenizer is not that of the weights is trained on all the same
    document_mask: bool = True  # attention and positions restart at each document of a packed window
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.01  # held out for evaluation

    @model_validator(mode="after")
    def _names_differ(self) -> "Data":
        names = [domain.name for domain in self.domains]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"domains: the name {', '.join(twice)} is used twice: write name=path to tell them apart")
        return self


class Train(Section):
    """Length, batch and bookkeeping. global_batch = micro_batch * accumulation * dp * ep, in sequences per step."""

    steps: Size = 300
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    seq_length: Annotated[int, Field(ge=2)] = 256
    micro_batch: Size = 1
    global_batch: Size = 1  # derived from accumulation when not given
    accumulation: Size = 1  # micro-batches per step; derived from global_batch when that is given
    precision: Annotated[Literal["fp32", "bf16"], BeforeValidator(short_dtype)] = "fp32"
    recompute: Literal["none", "selective", "full"] = "none"
    out: Annotated[str, Field(min_length=1)] = "runs/default"
    init_from: str | None = None  # Hugging Face folder or checkpoint whose weights, and model, a new run starts with
    export_hf: str | None = None  # folder to write the final weights to, for Hugging Face's readers
    hf_version: Annotated[int, Field(ge=4, le=5)] | None = None  # of transformers, in whose spelling; None: in both
    resume: str | None = None  # None, "auto" (the newest checkpoint in out) or the path of a checkpoint
    save_every: Count = 500  # the last step is always saved; 0: it alone
    async_save: bool = False  # write checkpoints while training goes on, from a copy in host memory
    keep_last: Count = 0  # newest checkpoints to keep; 0: all
    keep_every: Count = 0  # steps that it divides are kept too; 0: none
    step_timeout: NonNegative = 600.0  # seconds without progress after which the run ends; 0: never
    on_save_error: Literal["stop", "warn"] = "stop"  # when the disk refuses a checkpoint; the ones before stay
    eval_every: Count = 100  # 0: no evaluation
    eval_batches: Count = 8  # 0: no evaluation
    log_every: Count = 10  # 0: the last step alone


class Run(Section):
    """A whole run. `config_cli.load` builds one whose derived values are all filled in."""

    model: Model
    parallel: Parallel = Parallel()
    optimizer: Optimizer = Optimizer()
    data: Data = Data()
    train: Train = Train()

    @property
    def evaluates(self) -> bool:
        """Whether held-out text is read at all."""
        return self.train.eval_every > 0 and self.train.eval_batches > 0

    @property
    def world_size(self) -> int:
        """Ranks that the layout needs."""
        return self.parallel.dp * self.parallel.ep * self.parallel.tp

    @property
    def data_ranks(self) -> int:
        """Ranks that read different data: dp * ep."""
        return self.parallel.dp * self.parallel.ep


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def is_number(text: str) -> bool:
    """Whether `text` reads as a float."""
    try:
        float(text)
    except ValueError:
        return False
    return True
