"""Reading a frozen dataclass of settings from the plans that travel with a model; one way for every method."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

Settings = TypeVar("Settings")


def settings_from_plans(
    cls: type[Settings], key: str, plans: Mapping[str, Any], default: Settings | None = None, *, strict: bool = True
) -> Settings:
    """The settings under `key` in a plans dictionary; what it leaves out comes from `default`.

    Args:
        cls: a frozen dataclass whose fields all have defaults.
        strict: refuse unknown names. Prediction passes over them: a model of another version still is a model.

    Raises:
        ValueError: an unknown name or an impossible value.
    """
    given = plans.get(key, {})
    if not isinstance(given, Mapping):
        raise ValueError(f'Expected "{key}" in the plans to be an object, but got {type(given).__name__}.')
    known = {field.name: field.type for field in fields(cls)}  # type: ignore[arg-type]
    if not strict:
        given = {name: value for name, value in given.items() if name in known}
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f" Did you mean `{near[0]}`?" if near else f" Known: {', '.join(known)}."
            raise ValueError(f'Unknown setting `{name}` under "{key}" in the plans.{hint}')
    return replace(default or cls(), **given)  # type: ignore[type-var]


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """ValueError unless a setting is one of the choices."""
    if value not in choices:
        raise ValueError(f"Expected setting `{name}` to be one of {', '.join(choices)}, but got {value!r}.")


def number(name: str, value: Any) -> None:
    """ValueError unless a setting is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"Expected setting `{name}` to be a finite number, but got {value!r}.")


def whole_number(name: str, value: Any, least: int) -> None:
    """ValueError unless a setting is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"Expected setting `{name}` to be a whole number of at least {least}, but got {value!r}.")
