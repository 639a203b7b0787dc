"""The commands that a benchmark's folder was filled by, as they are typed. `benchmark instances` uses it too."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

# Options by name: what a folder remembers of them.
Options = Mapping[str, Any]


def flag_of(name: str) -> str:
    """The flag of an option."""
    return {"dataset": "-d", "configuration": "-c"}.get(name, "--" + name.replace("_", "-"))


def shown_value(value: Any) -> str:
    """An option's value as it is typed."""
    if value is None:
        return "not given"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def with_definitions(earlier: Sequence[str], new: Sequence[str], untrained: Collection[str] = ()) -> list[str]:
    """The arms that are defined after a call: the earlier ones, which are still known, and the new ones.

    Args:
        earlier, new: values of --arm, NAME=DEFINITION each.
        untrained: names of earlier ones that may be defined anew, for nothing has been trained by them.

    Raises:
        ValueError: a name has two definitions; a mean over seeds would then mix two arms.
    """
    replaced = {text.partition("=")[0] for text in new} & set(untrained)
    definitions: dict[str, str] = {}
    for text in (*(text for text in earlier if text.partition("=")[0] not in replaced), *new):
        name = text.partition("=")[0]
        if definitions.setdefault(name, text) != text:
            raise ValueError(
                f"--arm {text}: there is another arm of this name already, {definitions[name]}. Give one of them "
                "another name, or choose a new folder with -o."
            )
    return list(definitions.values())


def with_call(calls: Sequence[Options], selection: Options) -> list[Options]:
    """The selections that a folder was asked for so far, and one more.

    Args:
        calls: those so far, in their order; every option's value is a list.
        selection: what is asked for now.

    Returns:
        All of them, without those that another one contains.
    """
    if any(_contains(call, selection) for call in calls):
        return list(calls)
    return [*(call for call in calls if not _contains(selection, call)), selection]


def _contains(larger: Options, smaller: Options) -> bool:
    return all(set(values) <= set(larger.get(name, ())) for name, values in smaller.items())


def command_line(benchmark: str, folder: str, parts: Iterable[tuple[Options, Options]]) -> str:
    """The command that makes what a folder holds, all that is not as by default spelt out.

    Args:
        benchmark: accuracy or instances.
        folder: what -o is to say.
        parts: options and their defaults.
    """
    words = ["nnunet_dsp", "benchmark", benchmark, "-o", folder]
    for options, defaults in parts:
        for name, value in options.items():
            if value == defaults.get(name):
                continue
            if name == "arm":
                words += [word for text in value for word in ("--arm", text)]
            elif isinstance(value, bool):
                words.append(flag_of(name) if value else "--no" + flag_of(name)[1:])
            else:
                words += [flag_of(name), *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)
