"""The documents stay true: links lead somewhere, make targets exist, the groups they print are those of the mesh."""

import re
from pathlib import Path

import pytest

from moe_engine.parallel.mesh import rank_lists

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_targets_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", text):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"(?:^    |`)make ([a-z-]+)", text, re.MULTILINE):
        assert target in targets, f"{document.name} names make {target}"


def test_printed_groups_are_those_of_the_mesh() -> None:
    table = re.findall(
        r"^\| (tp|ep|dp|data) \| (.+?) \| (.+?) \|", (ROOT / "docs" / "parallelism.md").read_text(), re.MULTILINE
    )
    assert [row[0] for row in table] == ["tp", "ep", "dp", "data"]
    for layout, column in (((4, 2, 1), 1), ((2, 2, 2), 2)):
        groups = rank_lists(*layout)
        for row in table:
            printed = " ".join(str(ranks).replace(" ", "") for ranks in groups[row[0]])
            alone = all(len(ranks) == 1 for ranks in groups[row[0]])
            assert row[column] == ("each rank alone" if alone else printed)
