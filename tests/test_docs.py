"""The documents stay true: links, files, flags, keys and targets exist; tables and examples are those of the code."""

import re
from pathlib import Path

import pytest
import yaml
from pydantic_core import PydanticUndefined

from moe_engine.config import AuxLoss, RopeScaling
from moe_engine.config.command_line import load
from moe_engine.config.docs_page import with_tables
from moe_engine.config.messages import SECTIONS
from moe_engine.log.console import progress_line
from moe_engine.log.rows import step_scalars
from moe_engine.parallel.mesh import rank_lists
from moe_engine.prepare.files import COMPRESSION, ROW_SUFFIXES, TEXT_SUFFIXES
from moe_engine.prepare.formats import TEXT_KEYS
from tests.test_readme import mistakes

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
# Names that stand for a reader's own files, or that CONTRIBUTING gives relative to an op's folder, or forbids.
EXAMPLES = {
    *(
        "configs/runs/mine.yaml",
        "moe_engine/ops/NAME/__init__.py",
        "csrc/NAME.cpp",
        "reference.py",
        "cases.py",
        "triton.py",
    ),
    *("utils.py", "helpers.py", "common.py", "_.py"),
}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_named_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", text):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"
    unlinked = re.sub(r"\]\([^)]*\)", "]", re.sub(r"\[[^\]]*\]\(", "](", text))
    found = [name for name in mistakes(unlinked) if name.partition(" ")[2] not in EXAMPLES]
    assert found == []


def test_printed_groups_are_those_of_the_mesh() -> None:
    table = re.findall(r"^\| (tp|ep|dp|data) \| (.+?) \| (.+?) \|", (DOCS / "parallelism.md").read_text(), re.MULTILINE)
    assert [row[0] for row in table] == ["tp", "ep", "dp", "data"]
    for layout, column in (((4, 2, 1), 1), ((2, 2, 2), 2)):
        groups = rank_lists(*layout)
        for row in table:
            printed = " ".join(str(ranks).replace(" ", "") for ranks in groups[row[0]])
            alone = all(len(ranks) == 1 for ranks in groups[row[0]])
            assert row[column] == ("each rank alone" if alone else printed)


def test_every_balancing_loss_is_explained() -> None:
    text = (DOCS / "parallelism.md").read_text()
    names = re.findall(r"^\| `(\w+)`(?: \(default\))? \| .* \| (?:1|k) \| (?:yes|no) \|$", text, re.MULTILINE)
    assert sorted(names) == sorted(AuxLoss.__args__)


def test_config_page_lists_every_key_with_its_default() -> None:
    """In the order of the model, section by section."""
    pages = re.split(r"^## (\w+)$", (DOCS / "config.md").read_text(), flags=re.MULTILINE)
    assert pages[1::2] == list(SECTIONS)
    derived = derived_keys()
    for section, page in zip(pages[1::2], pages[2::2], strict=True):
        rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+) \|$", page, re.MULTILINE)
        fields = SECTIONS[section].model_fields
        assert [row[0] for row in rows] == list(fields)
        for key, default, _ in rows:
            field = fields[key]
            if f"{section}.{key}" in derived or (field.default_factory and field.default is PydanticUndefined):
                assert default == "derived", key
            elif field.is_required():
                assert default == "required", key
            else:
                value = list(field.default) if isinstance(field.default, tuple) else field.default
                assert yaml.safe_load(default) == value or float(default) == value, key
    for key in RopeScaling.model_fields:
        assert f"`{key}" in pages[2]


def test_the_tables_of_the_config_page_are_what_the_settings_say() -> None:
    """If not: python -m moe_engine.config.docs_page docs/config.md."""
    page = (DOCS / "config.md").read_text(encoding="utf-8")
    assert with_tables(page) == page


def derived_keys() -> set[str]:
    """The keys that a run computes when they are not given; with a global batch it computes accumulation."""
    lines = load([], 8).derived + load(["--global-batch", "8"], 2).derived
    return {line.partition(" ")[0] for line in lines}


def test_config_example_is_read(tmp_path: Path) -> None:
    (example,) = re.findall(r"^```yaml\n(.*?)^```$", (DOCS / "config.md").read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "run.yaml").write_text(example)
    run = load(["--config", str(tmp_path / "run.yaml")], 2).run
    assert (run.parallel.ep, run.optimizer.lr, run.train.steps) == (2, 3e-3, 1000)
    assert [(domain.name, domain.weight) for domain in run.data.domains] == [("prose", 0.7), ("code", 0.3)]


def test_data_page_names_every_format_and_field() -> None:
    text = (DOCS / "data.md").read_text()
    for name in (*TEXT_SUFFIXES, *ROW_SUFFIXES, *COMPRESSION, *TEXT_KEYS):
        assert f"`{name}`" in text, name


def test_metrics_page_names_every_tag_and_the_real_line() -> None:
    text = (DOCS / "metrics.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| `(train/\w+)` \|$", text, re.MULTILINE))
    assert len(rows) > 10
    for name, tag in rows.items():
        assert step_scalars({"step": 1, name: 2.0}) == {tag: 2.0}
    (line,) = re.findall(r"^    (Step .+)$", text, re.MULTILINE)
    row = {"step": 120, "loss": 2.6021, "lr": 4.1e-4, "lm_loss": 2.5918, "grad_norm": 0.731, "tokens_per_s": 5120.0}
    assert line == progress_line(row | {"mfu": 0.213, "load_max_over_mean": [1.2, 1.42]}, 200, 131)
