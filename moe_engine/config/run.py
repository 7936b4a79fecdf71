"""`Run` and the sections that say how it is trained."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from moe_engine.config.idle import (
    alone,
    attention_experts_not_cut,
    counted_by_epochs,
    no_eval_batches,
    no_eval_steps,
    no_experts,
    no_export,
    no_router,
    nothing_held_out,
    prepared,
    saved_at_the_end,
    zero_is_0,
)
from moe_engine.config.model import Model
from moe_engine.config.samples import Samples
from moe_engine.config.section import (
    Count,
    NonNegative,
    OnResume,
    Positive,
    Section,
    Size,
    is_number,
    setting,
    short_dtype,
)
from moe_engine.config.supervision import Supervision


class Parallel(Section):
    """How ranks share the work. world = dp * ep * tp; tp varies fastest, then ep, then dp.

    dp counts the replicas of each expert; all dp * ep ranks of one tp rank read different data. Bucket sizes count
    ELEMENTS, as in DeepSpeed: 5e7 is 100 MB of bf16 gradients, not 50 MB. More in `checks.py`.
    """

    on_resume: ClassVar[OnResume] = "free"  # the numbers do not depend on it

    dp: Size = setting(
        1,
        "replicas of each expert; derived: ranks / (ep * tp)",
        flag=("N", "replicas of each expert (default: ranks / (ep * tp))"),
        derived=True,
    )
    ep: Size = setting(
        1, "ranks that share the experts of a layer", flag=("N", "ranks that share the experts of a layer")
    )
    tp: Size = setting(1, "ranks that share each matrix", flag=("N", "ranks that share each matrix"))
    zero: Annotated[int, Field(ge=0, le=3)] = setting(
        2,
        "DeepSpeed ZeRO stage; 0 only in fp32, 3 only with ep 1; no effect on one data rank",
        flag=("0|1|2|3", "ZeRO stage"),
    )
    replicate_attention_experts: bool = setting(
        False,
        "keep all attention experts on every ep rank, so that no rows travel over ep for them",
        idle=(attention_experts_not_cut,),
    )
    offload_optimizer: bool = setting(
        False,
        "keep optimizer states in host memory; needs zero 1, 2 or 3",
        flag=("", "keep optimizer states in host memory"),
    )
    overlap_comm: bool = setting(True, "reduce gradients during backward", idle=(zero_is_0, alone))
    reduce_bucket_size: Size = setting(
        50_000_000, "elements (not bytes) in a bucket of gradients", idle=(zero_is_0, alone)
    )
    allgather_bucket_size: Size = setting(
        50_000_000,
        "elements (not bytes) in a bucket of weights; an even number at stages 1 (fp32, or offloaded) and 2",
        idle=(zero_is_0, alone),
    )


class Optimizer(Section):
    """AdamW, linear warm-up from 0 to `lr`, then cosine towards `min_lr`, which the step after the last would have."""

    lr: Positive = setting(1e-3, "peak learning rate", flag=("X", "peak learning rate"))
    min_lr: NonNegative = setting(0.0, "learning rate at the end of the cosine")
    warmup_steps: Count = setting(0, "steps of the warm-up; derived: steps // 10", derived=True)
    beta1: Annotated[float, Field(ge=0, lt=1)] = setting(
        0.9, "decay rate of the first moment, the mean of the gradients"
    )
    beta2: Annotated[float, Field(ge=0, lt=1)] = setting(
        0.95, "decay rate of the second moment, the mean of their squares"
    )
    eps: Positive = setting(1e-8, "added to the square root in the denominator")
    weight_decay: NonNegative = setting(0.1, "applies to matrices, embeddings included, not to norms")
    router_lr_factor: Positive = setting(
        1.0, "times `lr`, for routers and the label embedding of supervised routing", idle=(no_router,)
    )
    expert_lr_factor: Positive = setting(1.0, "times `lr`, for experts", idle=(no_experts,))
    clip_grad: NonNegative = setting(1.0, "largest global gradient norm; 0: no clipping")

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

    domains: tuple[Domain, ...] = setting(
        (),
        (
            "prepared folders, `name=path:weight` or a mapping of `name`, `path`, `weight`; none: Python's "
            "standard library"
        ),
    )
    tokenizer: str | None = setting(
        None,
        "must match the tokenizer that prepared the data; without domains it encodes the standard library",
        flag=("PATH", "bytes, or a tokenizer file or folder (default: the data's own)"),
        on_resume="free",
    )
    allow_other_tokenizer: bool = setting(
        False,
        "`--allow-other-tokenizer`: train on text whose tokenizer is not the one beside the weights",
        flag=("", "train on tokens that the weights do not know"),
        on_resume="free",
    )
    packing: Literal["auto", "windows", "samples", "none"] = setting(
        "auto",
        (
            "how sequences are filled: text in `windows` cut from its stream, `samples` whole and several in one "
            "sequence, or one each (`none`); `auto` is what the data is"
        ),
        on_resume="free",
    )
    document_mask: bool = setting(True, "attention and positions restart at each document of a window")
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = setting(
        0.01,
        (
            "share of the standard library that is held out; prepared folders have their own "
            "(`tools/prepare_data.py --eval-fraction`)"
        ),
        idle=(prepared,),
    )

    @model_validator(mode="after")
    def _names_differ(self) -> "Data":
        names = [domain.name for domain in self.domains]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"domains: the name {', '.join(twice)} is used twice: write name=path to tell them apart")
        return self


class Train(Section):
    """Length, batch and bookkeeping. global_batch = micro_batch * accumulation * dp * ep, in sequences per step."""

    steps: Size = setting(
        300,
        "optimizer steps",
        flag=("N", "optimizer steps"),
        idle=(counted_by_epochs,),
        consequence="the learning rate follows the new schedule from here on",
    )
    epochs: Count = setting(
        0,
        "passes over the samples, each of them once a pass, which then decide `steps`; 0: count steps",
        flag=("N", "passes over the samples, in place of --steps"),
        consequence="the learning rate follows the new schedule from here on",
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = setting(
        0, "seed of weights, data order and router noise", flag=("N", "seeds weights, data order and noise")
    )
    seq_length: Annotated[int, Field(ge=2)] = setting(256, "tokens per sequence", flag=("N", "tokens of a sequence"))
    micro_batch: Size = setting(
        1, "sequences per data rank and forward pass", flag=("N", "sequences of one rank in one pass")
    )
    global_batch: Size = setting(
        1,
        "sequences per step: micro_batch * accumulation * dp * ep",
        flag=("N", "sequences of a step: micro-batch * accumulation * dp * ep"),
        derived=True,
    )
    accumulation: Size = setting(1, "micro-batches per step; derived: 1, or what `global_batch` requires", derived=True)
    precision: Annotated[Literal["fp32", "bf16"], BeforeValidator(short_dtype)] = setting(
        "fp32",
        "`fp32`, or `bf16` with fp32 master weights; torch's `float32` and `bfloat16` mean the same",
        flag=("fp32|bf16", "or torch's float32|bfloat16; bf16 keeps fp32 master weights"),
    )
    recompute: Literal["none", "selective", "full"] = setting(
        "none",
        (
            "what backward computes again: `none`; `selective`: all but matrix products, attention and routing,"
            " and the experts' hidden activations too; `full`: all but routing"
        ),
        flag=("none|selective|full", "activations to recompute in backward"),
        on_resume="free",
    )
    out: Annotated[str, Field(min_length=1)] = setting(
        "runs/default",
        "folder for logs, metrics, checkpoints",
        flag=("DIR", "where logs, metrics and checkpoints go"),
        on_resume="free",
    )
    init_from: str | None = setting(
        None,
        (
            "Hugging Face folder or checkpoint from which a new run takes its weights, and its model unless "
            "another is named; a run that resumes no longer needs it ([huggingface.md](huggingface.md))"
        ),
        flag=("PATH", "start with the weights of a Hugging Face folder or a checkpoint"),
        on_resume="free",
    )
    export_hf: str | None = setting(
        None,
        "folder to write the final weights to, in Hugging Face's format",
        flag=("DIR", "write the final weights as a Hugging Face folder"),
        on_resume="free",
    )
    hf_version: Annotated[int, Field(ge=4, le=5)] | None = setting(
        None,
        ("`4` or `5`: write its config.json in the spelling of transformers 4 or 5; null: in both, for either to read"),
        flag=("4|5", "spelling of its config.json, of transformers 4 or 5 (default: both)"),
        on_resume="free",
        idle=(no_export,),
    )
    resume: str | None = setting(
        None,
        "`auto`: the newest checkpoint in `out`, if any; or the folder of a checkpoint",
        flag=("auto|PATH", "continue from the newest checkpoint in --out, or from PATH"),
        on_resume="free",
    )
    save_every: Count = setting(
        500,
        "steps between checkpoints; the last step is always saved; 0: only the last step",
        flag=("N", "steps between checkpoints"),
        on_resume="free",
        idle=(saved_at_the_end,),
    )
    async_save: bool = setting(
        False,
        "write checkpoints while training goes on, from a copy of the rank's states in host memory",
        flag=("", "write checkpoints while training goes on"),
        on_resume="free",
    )
    keep_last: Count = setting(
        0,
        "how many of the newest checkpoints to keep; 0: all",
        flag=("N", "newest checkpoints to keep (default: all)"),
        on_resume="free",
    )
    keep_every: Count = setting(
        0,
        "also keep the checkpoints of steps that this number divides; 0: none",
        flag=("N", "also keep the checkpoints of steps that N divides"),
        on_resume="free",
    )
    step_timeout: NonNegative = setting(
        600.0,
        "seconds without a step, an evaluated batch or a save after which the run ends with code 70; 0: never",
        flag=("S", "end a run without progress for S seconds, and say why; 0: never"),
        on_resume="free",
    )
    on_save_error: Literal["stop", "warn"] = setting(
        "stop",
        "when the disk refuses a checkpoint: `stop` ends the run (exit code 74), `warn` trains on",
        on_resume="free",
    )
    eval_every: Count = setting(
        100,
        (
            "steps between evaluations; the last step is always evaluated; 0: no evaluation, and no held-out text"
            " is needed"
        ),
        on_resume="free",
        idle=(nothing_held_out, no_eval_batches),
    )
    eval_batches: Count = setting(
        8,
        "global batches of held-out text to evaluate, at most; 0: no evaluation, as with `eval_every` 0",
        on_resume="free",
        idle=(nothing_held_out, no_eval_steps),
    )
    log_every: Count = setting(
        10,
        (
            "steps between progress lines; the last step always has one; 0: only the last step; `metrics.jsonl`"
            " has every step"
        ),
        on_resume="free",
    )


class Run(Section):
    """A whole run. `command_line.load` builds one whose derived values are all filled in."""

    model: Model
    parallel: Parallel = Parallel()
    optimizer: Optimizer = Optimizer()
    data: Data = Data()
    samples: Samples = Samples()
    supervision: Supervision = Supervision()
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
