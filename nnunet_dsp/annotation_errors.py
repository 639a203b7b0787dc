"""How annotation errors are worded: the exception, and the few helpers that put values into sentences."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


class AnnotationError(ValueError):
    """Something a user wrote about an image that cannot be used; the message names file, entry and remedy."""


def whole(value: Any) -> int | None:
    """The int a JSON number stands for (1 and 1.0 are the same number); None for anything else, bool included."""
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return int(value)
    return int(value) if isinstance(value, float) and value.is_integer() else None


def show(value: Any) -> str:
    """A value from a file as messages show it: short, printable."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a very large number"
    if isinstance(value, (str, int, float)):
        text = repr(value if not isinstance(value, str) else value[:60])
        return text if not isinstance(value, str) or len(value) <= 60 else f"{text}..."
    if isinstance(value, (list, tuple)):
        plain = len(value) <= 4 and not any(isinstance(entry, (list, tuple, Mapping)) for entry in value)
        return f"[{', '.join(map(show, value))}]" if plain else f"a list of {len(value)} entries"
    return "an object" if isinstance(value, Mapping) else f"a {type(value).__name__}"


def listed(names: Sequence[str]) -> str:
    """Names as messages list them."""
    return ", ".join(repr(name) for name in names)


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """A sentence (with a space before it) that names what was probably meant, or nothing."""
    lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word[:100].strip().lower(), lower, n=1)
    return f" Did you mean {lower[close[0]]!r}?" if close else ""
