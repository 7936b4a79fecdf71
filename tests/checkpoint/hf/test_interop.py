"""What transformers 4.57 and 5.24 read in the config.json files that are written, each in an environment of its own.

`make interop` makes the environments; without them the tests skip. AutoConfig alone is asked, which needs no torch.
"""

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from moe_engine.checkpoint.hf.export import ExportOptions, export_checkpoint
from moe_engine.checkpoint.hf.folder import HfFolder
from moe_engine.checkpoint.hf.to_checkpoint import import_folder
from moe_engine.config import Model, RopeScaling
from moe_engine.config.files import preset_names, read_model
from moe_engine.config.hf import family_of, model_and_notes, model_from_hf, model_to_hf
from moe_engine.errors import ConfigError
from tests.checkpoint.hf.small import LLAMA3, save, theirs
from tests.config.test_hf import LLAMA, NO_FAMILY, ODD, PUBLISHED
from tools.upcycle import main as upcycle

ROOT = Path(__file__).parents[3]
READERS = {version: ROOT / f".venv-interop-{version}" / "bin" / "python" for version in (4, 5)}
PROBE = """
import json, sys, transformers
from transformers import AutoConfig
new = transformers.__version__.startswith("5")
for folder in sys.argv[1:]:
    c = AutoConfig.from_pretrained(folder)
    rope = dict((c.rope_parameters if new else getattr(c, "rope_scaling", None)) or {})
    theta = rope.pop("rope_theta", None) if new else c.rope_theta
    if rope.get("rope_type") == "default":
        rope = {}
    experts = getattr(c, "num_local_experts" if c.model_type == "mixtral" else "num_experts", 0)
    print(json.dumps({
        "theta": theta, "scaling": rope, "dtype": str(c.dtype).replace("torch.", ""), "experts": experts,
        "head_dim": getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads,
        "top_k": getattr(c, "num_experts_per_tok", 0), "kv": c.num_key_value_heads, "eos": c.eos_token_id,
        "bos": c.bos_token_id, "tied": c.tie_word_embeddings, "positions": c.max_position_embeddings,
        "window": getattr(c, "sliding_window", None), "eps": c.rms_norm_eps, "type": c.model_type,
    }))
"""
DUMP = """
import json
from transformers import AutoConfig
for kind in ("llama", "mixtral", "qwen3_moe", "olmoe"):
    config = AutoConfig.for_model(kind, pad_token_id=None)
    for diff in (True, False):
        print(json.dumps(json.loads(config.to_json_string(use_diff=diff)) | {"model_type": kind}))
"""
SCALED = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
pytestmark = pytest.mark.slow


def run(version: int, script: str, *arguments: str) -> list[dict[str, Any]]:
    """The JSON lines that a script prints under transformers `version`."""
    if not READERS[version].exists():
        pytest.skip(f"no {READERS[version].parent.parent.name}: `make interop` makes it")
    command = [str(READERS[version]), "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "rope" not in done.stderr, done.stderr  # a reader that doubts what it finds says so
    return [json.loads(line) for line in done.stdout.splitlines()]


def read(version: int, configs: Mapping[str, Mapping[str, Any]], folder: Path) -> dict[str, dict[str, Any]]:
    """What one version reads in each config.json."""
    for name, config in configs.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(config))
    return dict(zip(configs, run(version, PROBE, *(str(folder / name) for name in configs)), strict=True))


def says(model: Model, config: Mapping[str, Any]) -> dict[str, Any]:
    """What every reader has to find."""
    return {
        "theta": model.rope_theta,
        "scaling": model.rope_scaling.model_dump() if model.rope_scaling else {},
        "dtype": "bfloat16",
        "head_dim": model.head_dim,
        "kv": model.num_key_value_heads,
        "tied": model.tie_word_embeddings,
        "eps": model.rms_norm_eps,
        "positions": model.max_position_embeddings,
        "type": config["model_type"],
        "window": None,
    } | ({"experts": model.num_local_experts, "top_k": model.num_experts_per_tok} if model.num_local_experts else {})


def test_case_02_both_versions_read_the_same_in_what_is_written(tmp_path: Path) -> None:
    models = {name: Model.model_validate(read_model(name)) for name in preset_names() if name not in NO_FAMILY}
    models["odd"] = Model.model_validate(ODD)
    rope = {"rope_scaling": RopeScaling.model_validate(SCALED), "rope_theta": 1e4}
    models |= {f"{name}-llama3": model.model_copy(update=rope) for name, model in models.items()}
    ids = {"eos_token_id": [2, 3], "bos_token_id": 1}
    configs = {
        name: model_to_hf(model, kind := family_of(model), "bfloat16", None, ids | {"model_type": kind})
        for name, model in models.items()
    }
    four, five = (read(version, configs, tmp_path) for version in (4, 5))
    for name, model in models.items():
        assert four[name] == five[name], name
        wanted = says(model, configs[name])
        assert {key: five[name][key] for key in wanted} == wanted, name
        assert (five[name]["eos"], five[name]["bos"]) == ([2, 3], 1)


def test_case_02a_a_llama_of_transformers_5_upcycled_and_exported(tmp_path: Path) -> None:
    """Its rope_parameters alone would be Mixtral's default theta, unscaled, to transformers 4."""
    hf = save(theirs("llama", rope_parameters=LLAMA3 | {"rope_theta": 1e4}, tie_word_embeddings=True), tmp_path / "hf")
    assert "rope_theta" not in json.loads((hf / "config.json").read_text())
    flags = ["--method", "copy", "--experts", "4", "--receipt-tokens", "0", "--out"]
    assert upcycle(["--hf", str(hf), *flags, str(tmp_path / "up")]) == 0
    import_folder(HfFolder(tmp_path / "up"), tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "five", ExportOptions(version=5))
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "four", ExportOptions(version=4))
    configs = {name: json.loads((tmp_path / name / "config.json").read_text()) for name in ("up", "four", "five")}
    four, five = (read(version, configs, tmp_path / "read") for version in (4, 5))
    wanted = says(HfFolder(hf).model, configs["up"]) | {"experts": 4, "dtype": "float32", "eos": 2}
    for found in (four["up"], five["up"], four["four"], five["four"], five["five"]):
        assert {key: found[key] for key in wanted} == wanted
    assert four["five"]["theta"] == 1e6 and four["five"]["scaling"] == {}, "or there was nothing to mend"


def test_case_02c_what_one_version_alone_would_read_is_refused_or_read_as_both_do(tmp_path: Path) -> None:
    """Every pair of spellings: where the engine reads a model at all, 5 reads that one, and 4 unless it is 5's own."""
    rope = SCALED
    spelled = {
        "old": {"rope_theta": 7.0, "rope_scaling": rope},
        "new": {"rope_parameters": rope | {"rope_theta": 7.0}},
        "both": {"rope_theta": 7.0, "rope_scaling": rope, "rope_parameters": rope | {"rope_theta": 7.0}},
        "theta aside": {"rope_theta": 7.0, "rope_parameters": {"rope_type": "default"}},
        "other theta": {"rope_theta": 7.0, "rope_parameters": {"rope_type": "default", "rope_theta": 8.0}},
        "theta inside": {"rope_theta": 7.0, "rope_scaling": rope | {"rope_theta": 9.0}},
        "other scaling": {"rope_scaling": rope, "rope_parameters": rope | {"factor": 2.0}},
        "other length": {"rope_scaling": rope, "original_max_position_embeddings": 77},
    }
    names = {"": {}, "num_experts": {"num_experts": 9}, "num_local_experts": {"num_local_experts": 9}}
    names |= {"same": {"num_experts": 9, "num_local_experts": 9}, "other": {"num_experts": 8, "num_local_experts": 9}}
    configs = {
        f"{kind} {a} {b}".strip(): LLAMA | {"model_type": kind, "num_key_value_heads": 2} | theirs | experts
        for kind in ("llama", "mixtral", "qwen3_moe", "olmoe")
        for a, theirs in spelled.items()
        for b, experts in (names.items() if kind != "llama" else [("", {})])
    }
    read_by_us: dict[str, Model] = {}
    for name, config in configs.items():
        try:
            read_by_us[name] = model_from_hf(config)
        except ConfigError:
            assert "other" in name or "inside" in name, name
    assert not [name for name in read_by_us if "other" in name or "inside" in name]
    found = read(5, {name: configs[name] for name in read_by_us}, tmp_path)
    for name, model in read_by_us.items():
        wanted = says(model, configs[name]) | {"dtype": "None"}
        assert {key: found[name][key] for key in wanted} == wanted, name


@pytest.mark.parametrize("version", [4, 5])
def test_case_18a_what_transformers_writes_by_itself_needs_no_warning(version: int) -> None:
    for config in run(version, DUMP):
        assert model_and_notes(config)[1] == []


def test_published_configs_are_read_as_both_versions_read_them(tmp_path: Path) -> None:
    if not PUBLISHED.is_dir():
        pytest.skip(f"the published configs are not at {PUBLISHED}")
    configs, models = {}, {}
    for path in sorted(PUBLISHED.glob("*.json")):
        config = json.loads(path.read_text())
        if config["model_type"] in ("llama", "mixtral", "qwen3_moe"):
            configs[path.stem], models[path.stem] = config, model_from_hf(config)
    assert len(configs) > 6
    four, five = (read(version, configs, tmp_path) for version in (4, 5))
    for name, model in models.items():
        wanted = says(model, configs[name])
        assert {key: five[name][key] for key in wanted} == wanted and four[name] == five[name], name
