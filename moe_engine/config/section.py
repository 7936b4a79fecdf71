"""What sections of a run are made of: types with bounds, and a base that refuses what it does not know."""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

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


OnResume = Literal["same", "warn", "free"]
Idle = Callable[[Any], str | None]  # Run -> why a setting has no effect in it, None where it has


class Setting(NamedTuple):
    """What a setting says of itself beside its type, bounds and default, once for all who ask.

    text: its meaning, in docs/config.md. flag: placeholder ("" for a switch) and help of its flag on the command line.
    on_resume: whether a run that resumes must have the same value, may have another with a warning, which may go on
    with `consequence`, or is free; None: as the section says. derived: computed when it is not given.
    in_training_only: of a model, the function of the weights does not depend on it. idle: rules that say why it has no
    effect.
    """

    text: str
    flag: tuple[str, str] | None = None
    on_resume: OnResume | None = None
    consequence: str = ""
    derived: bool = False
    in_training_only: bool = False
    idle: tuple[Idle, ...] = ()


def setting(
    default: Any, text: str, *, default_factory: Callable[[dict[str, Any]], Any] | None = None, **about: Any
) -> Any:
    """A field of a section; `about`: the other fields of Setting. default ...: required, or made by the factory."""
    extra: dict[str, Any] = {"setting": Setting(text, **about)}
    if default_factory:
        return Field(default_factory=default_factory, json_schema_extra=extra)
    return Field(default, json_schema_extra=extra)


class Section(BaseModel):
    """Base of the sections: frozen, extra keys refused, no NaN, no boolean for a number; 5e7 is a whole number."""

    on_resume: ClassVar[OnResume] = "warn"  # of the settings that say nothing of it

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True, protected_namespaces=()
    )

    @classmethod
    def settings(cls) -> dict[str, Setting]:
        """Key -> what it says of itself."""
        found: dict[str, Setting] = {}
        for key, field in cls.model_fields.items():
            about = (field.json_schema_extra or {})["setting"]  # pyright: ignore[reportIndexIssue, reportCallIssue, reportArgumentType]
            assert isinstance(about, Setting)
            found[key] = about._replace(on_resume=about.on_resume or cls.on_resume)
        return found

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
