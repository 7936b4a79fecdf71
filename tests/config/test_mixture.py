"""Mixtures of sources, in the shape of S0.25."""

from pathlib import Path

import pytest

from moe_engine.config.mixture import read_mixture, sources_of
from moe_engine.config.samples import Samples
from moe_engine.errors import ConfigError

S0 = """
datasets:
  - name: "vicgalle/alpaca-gpt4"
    weight: 0.3
    samples: 15000
    samples_validation: 500
    type: general_instruction
  - {name: "OpenAssistant/oasst2", weight: 0.25, samples: 12000, type: conversation}
  - {name: "iamtarun/python_code_instructions_18k_alpaca", weight: 0.2, samples: 10000, type: code}
  - {name: gsm8k, weight: 0.15, samples: 7500, type: reasoning, split: train}
  - {name: "garage-bAInd/Open-Platypus", weight: 0.1, samples: 5000, type: creative}
processing: {max_seq_length: 1024, shuffle: true, seed: 42, prompt_template: instruction}
training: {learning_rate: 2.0e-5}
"""


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mixture.yaml"
    path.write_text(text)
    return str(path)


def test_the_mixture_of_s0(tmp_path: Path) -> None:
    """S0.25: weights sum to 1, samples to 49,500."""
    mixture = read_mixture(write(tmp_path, S0))
    assert list(mixture.sources) == [
        "alpaca-gpt4",
        "oasst2",
        "python_code_instructions_18k_alpaca",
        "gsm8k",
        "Open-Platypus",
    ]
    assert sum(source.weight for source in mixture.sources.values()) == pytest.approx(1)
    assert sum(source.samples or 0 for source in mixture.sources.values()) == 49_500
    assert mixture.sources["gsm8k"].path == ("gsm8k:train",)
    assert mixture.processing["prompt_template"] == "instruction" and "training" in mixture.notes[0]


def test_validation_takes_a_little_of_the_first(tmp_path: Path) -> None:
    """S0.11."""
    path = write(tmp_path, S0)
    (source,) = sources_of(Samples(mixture=path, mode="validation")).sources.values()
    assert source.samples == 500 and source.name == "vicgalle/alpaca-gpt4"
    assert len(sources_of(Samples(mixture=path)).sources) == 5
    capped = sources_of(Samples(mixture=path, max_samples=6000)).sources
    assert [source.samples for source in capped.values()] == [6000, 6000, 6000, 6000, 5000]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (S0.replace("0.25", "0.35"), r"weights alpaca-gpt4 0\.3, oasst2 0\.35, .* sum to 1\.1, expected 1"),
        (S0.replace("samples: 15000", "sample: 15000"), "sample of dataset 1 .*: unknown key, did you mean samples"),
        (S0.replace("weight: 0.3", "weight: much"), "dataset 1, weight .*: found 'much'"),
        (S0.replace("seed: 42", "sede: 42"), "sede.*: unknown key, did you mean"),
        (S0.replace("datasets:", "dataset:"), "dataset .*: unknown key, did you mean datasets"),
        ("datasets: []", "found no enabled entry under `datasets`"),
        ("datasets: [{name: a, enabled: false}]", "found no enabled entry"),
    ],
)
def test_what_is_wrong_with_a_mixture(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_mixture(write(tmp_path, text))


def test_columns_in_either_spelling() -> None:
    pairs = (("prompt", "question"), ("response", "reply"))
    assert Samples(columns="prompt=question, response=reply").columns == pairs  # type: ignore[arg-type]
    assert Samples(columns=dict(pairs)).columns == pairs  # type: ignore[arg-type]
    assert Samples.model_validate({"columns": [list(pair) for pair in pairs]}).columns == pairs
    with pytest.raises(ValueError, match="expected OURS=THEIRS"):
        Samples(columns="prompt")  # type: ignore[arg-type]
