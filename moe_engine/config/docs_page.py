"""The tables of docs/config.md, made of what the settings say: python -m moe_engine.config.docs_page docs/config.md"""

import re
import sys
from pathlib import Path
from typing import Any

import yaml

from moe_engine.config.messages import SECTIONS


def with_tables(page: str) -> str:
    """The page with the table under each `## section` made anew."""
    for section in SECTIONS:
        old = re.compile(rf"(^## {section}$.*?^)\| key \|.*?\n(?!\|)", re.MULTILINE | re.DOTALL)
        page = old.sub(lambda found, section=section: found[1] + table(section), page)
    return page


def table(section: str) -> str:
    """Key, default and meaning of every setting of a section."""
    kind = SECTIONS[section]
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for key, about in kind.settings().items():
        field = kind.model_fields[key]
        derived = about.derived or field.default_factory
        default = "derived" if derived else "required" if field.is_required() else written(field.default)
        rows.append(f"| `{key}` | {default} | {about.text} |")
    return "\n".join(rows) + "\n"


def written(value: Any) -> str:
    """A default as YAML has it."""
    if isinstance(value, tuple):
        return str(list(value))
    return str(value) if isinstance(value, float) else yaml.safe_dump(value).partition("\n")[0]


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
