"""Text from outside (paths, domain names, rows): printed so that it cannot move the cursor or forge a line."""

import unicodedata


def printable(text: str) -> str:
    """`text` on one line, with control, format and line-separator characters written as escapes (`\\x1b`, `\\n`)."""
    bad = {"Cc", "Cf", "Cs", "Zl", "Zp"}
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in bad else c for c in text)
