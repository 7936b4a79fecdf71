"""`Samples`: which rows of instructions or conversations a run is fine-tuned on, and how they become tokens."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from moe_engine.config.idle import no_mixture, no_samples
from moe_engine.config.section import Count, NonNegative, OnResume, Section, Size, setting


def _paths(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _columns(value: Any) -> Any:
    """Pairs of a mapping, or of `prompt=question,response=answer`."""
    if isinstance(value, dict):
        return tuple(value.items())
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in value.split(",")]
    if not all(ours and equals and theirs for ours, equals, theirs in pairs):
        raise ValueError("expected OURS=THEIRS,..., such as prompt=question,response=answer")
    return tuple((ours.strip(), theirs.strip()) for ours, _, theirs in pairs)


Paths = Annotated[tuple[str, ...], BeforeValidator(_paths)]
Columns = Annotated[tuple[tuple[str, str], ...], BeforeValidator(_columns)]  # ours, theirs


class Source(Section):
    """One source of a mixture. `path`, one or several, is `name` unless given; `samples` caps what is taken of it."""

    name: Annotated[str, Field(min_length=1)]
    path: Paths = ()
    split: str | None = None
    format: str | None = None
    columns: Columns = ()
    weight: NonNegative = 1.0
    samples: Size | None = None
    samples_validation: Size | None = None
    enabled: bool = True
    expert_label: str | None = None
    type: str | None = None
    task_type: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_mapping(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class Samples(Section):
    """Rows that are prepared under `out`/data when the run starts. Without files and mixture: none."""

    on_resume: ClassVar[OnResume] = "free"  # the tokens that they give are compared

    files: Paths = setting(
        (),
        "files or folders of samples: alpaca, ShareGPT, messages, OASST, questions and answers, preference pairs",
        flag=("PATH", "samples to train on: a file or folder of rows"),
    )
    mixture: str | None = setting(
        None,
        "YAML file of sources with weights and caps ([finetuning.md](finetuning.md))",
        flag=("FILE", "YAML file of sources of samples, with weights"),
    )
    mode: Literal["full", "validation"] = setting(
        "full",
        "`full`: all enabled sources of the mixture; `validation`: `samples_validation` of the first, to see it work",
        flag=("full|validation", "all sources of the mixture, or a little of the first"),
        idle=(no_mixture,),
    )
    format: str | None = setting(
        None,
        "format of the rows; null: recognised from the first",
        flag=("NAME", "format of the rows (default: recognised)"),
        idle=(no_samples,),
    )
    columns: Columns = setting(
        (),
        "columns by our names: `{prompt: question, response: reply}`",
        flag=("OURS=THEIRS,...", "columns, such as prompt=question,response=reply"),
        idle=(no_samples,),
    )
    template: str = setting(
        "auto",
        "chat template: `auto` is the tokenizer's own; `instruction`; or a file of jinja",
        flag=("NAME|FILE", "chat template: auto (the tokenizer's), instruction, or a file"),
        idle=(no_samples,),
    )
    train_on: Literal["all", "responses", "last-response"] = setting(
        "responses",
        "tokens with a label: `all`, the assistant's turns, or its last turn",
        flag=("all|responses|last-response", "tokens that are trained"),
        idle=(no_samples,),
    )
    max_prompt: Size | None = setting(
        None,
        "tokens of a prompt, at most; null: three quarters of `seq_length` where the sample is longer",
        flag=("N", "tokens of a prompt, at most"),
        idle=(no_samples,),
    )
    max_response: Size | None = setting(
        None, "tokens of the last response, at most", flag=("N", "tokens of a response, at most"), idle=(no_samples,)
    )
    max_samples: Size | None = setting(
        None, "samples of each source, at most", flag=("N", "samples of each source, at most"), idle=(no_samples,)
    )
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = setting(
        0.05, "share of each source that is held out", idle=(no_samples,)
    )
    seed: Count = setting(42, "of which samples are taken and which held out", idle=(no_samples,))
    on_bad_row: Literal["stop", "skip"] = setting(
        "stop", "`skip` lists rows that cannot be used and goes on", idle=(no_samples,)
    )

    @property
    def given(self) -> bool:
        """Whether any rows are named."""
        return bool(self.files or self.mixture)
