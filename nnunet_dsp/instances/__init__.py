"""``nnunet_dsp instances predict|evaluate``: instance label images from a trained nnUNetTrainerCRAC, and measures.

A command is a row in COMMANDS and a module with ``add_arguments(parser)`` and ``run(args) -> int``. Its module (and
with it torch) is imported only when that command is asked for.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from typing import Any

COMMANDS: dict[str, tuple[str, str]] = {
    "predict": (
        "nnunet_dsp.instances.predict_command",
        "predict instance label images with a trained nnUNetTrainerCRAC",
    ),
    "evaluate": (
        "nnunet_dsp.instances.evaluate_command",
        "compare instance label images with the truth: ARAND, VOI, AP, PQ",
    ),
}
"""Name: (module, one line of help)."""


class _LazyParser(argparse.ArgumentParser):
    """A parser that asks its module for arguments when it is about to parse, not when it is made."""

    def __init__(self, *args: Any, module: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._module = module

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        if self._module is not None:
            module, self._module = self._module, None
            importlib.import_module(module).add_arguments(self)
        return super().parse_known_args(args, namespace)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one subcommand for each row of COMMANDS."""
    subparsers = parser.add_subparsers(
        dest="instances_command", metavar="NAME", required=True, parser_class=_LazyParser
    )
    for name, (module, summary) in COMMANDS.items():
        subparsers.add_parser(name, help=summary, description=summary, module=module, allow_abbrev=False)


def run(args: argparse.Namespace) -> int:
    """Run the command that was asked for; its exit status."""
    module, _ = COMMANDS[args.instances_command]
    return int(importlib.import_module(module).run(args))
