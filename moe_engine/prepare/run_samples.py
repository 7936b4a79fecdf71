"""The samples of a run, prepared when it starts."""

from pathlib import Path
from typing import Any

from moe_engine.config import Run
from moe_engine.config.mixture import sources_of
from moe_engine.prepare.sample_shards import SampleOptions, SampleSource, prepare_samples


def prepare_run_samples(folder: Path, run: Run, tokenizer: str) -> dict[str, Any]:
    """The samples that a run names as tokens under `folder`; its manifest. ConfigError and DataError as
    prepare_samples has them."""
    sources, options = described(run)
    return prepare_samples(sources, folder, tokenizer, options, overwrite=True, quiet=True)


def described(run: Run) -> tuple[dict[str, SampleSource], SampleOptions]:
    """What prepare_samples needs to know of a run. A mixture's template and seed hold unless the run has its own."""
    given = run.samples
    sources, processing, _ = sources_of(given)
    said = given.model_fields_set
    options = SampleOptions(
        template=given.template if "template" in said else processing.get("prompt_template", given.template),
        train_on=given.train_on,
        max_length=min(run.train.seq_length, processing.get("max_seq_length", run.train.seq_length)),
        max_prompt=given.max_prompt,
        max_response=given.max_response,
        eval_fraction=given.eval_fraction,
        seed=given.seed if "seed" in said else processing.get("seed", given.seed),
        on_bad_row=given.on_bad_row,
    )
    domains = {
        name: SampleSource(s.path, s.format, dict(s.columns), s.samples, s.expert_label, s.weight)
        for name, s in sources.items()
    }
    return domains, options


def mixture_lines(manifest: dict[str, Any]) -> list[str]:
    """What was asked for and found, source by source (S0.18 to S0.24)."""
    domains, lines = manifest["domains"], []
    for name, entry in domains.items():
        asked = "all" if entry["asked"] is None else entry["asked"]
        lines.append(f"Loading {name} ({entry['format']} format, {asked} samples)...")
        lines.append(f"Loaded {entry['valid']} valid samples from {name}" + _details(entry))
        if entry["asked"] and entry["valid"] < entry["asked"]:
            lines.append(f"warning: {name}: {entry['asked']} samples were asked for and {entry['valid']} are there")
    counts = {split: sum(_samples(e, split) for e in domains.values()) for split in ("train", "eval")}
    if len(domains) > 1:
        lines.append(f"Mixing {len(domains)} dataset(s)...")
    lines.append(f"Final mixed dataset: {sum(counts.values())} samples")
    lines.append(f"Train samples: {counts['train']}, eval samples: {counts['eval']}")
    return lines


def _samples(entry: dict[str, Any], split: str) -> int:
    return entry["splits"][split]["documents"] // (2 if entry["pairs"] else 1)


def _details(entry: dict[str, Any]) -> str:
    lengths = entry["lengths"]
    reasons = [f"{count} {reason}" for reason, count in (entry["left_out"] | {"bad rows": entry["bad_rows"]}).items()]
    out = ", ".join(reason for reason in reasons if not reason.startswith("0 "))
    size = f"tokens: mean {lengths['mean']:.0f}, median {lengths['p50']}, 95 % {lengths['p95']}, max {lengths['p100']}"
    return f" (left out: {out})" * bool(out) + f" ({size}; {lengths['trained']:.0%} trained)"
