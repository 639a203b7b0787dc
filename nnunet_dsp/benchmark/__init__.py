"""``nnunet_dsp benchmark NAME``: timing and accuracy, one command each.

A command is a row in COMMANDS and a module with ``add_arguments(parser)`` and ``run(args) -> int``. Its module (and
with it torch) is imported only when that command is asked for.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from typing import Any

COMMANDS: dict[str, tuple[str, str]] = {
    "parity": (
        "nnunet_dsp.benchmark.parity",
        "compare losses, gradients, filter and head with recordings of the authors' released code",
    ),
    "loss": ("nnunet_dsp.benchmark.loss", "time the four DSP losses against a cross entropy"),
    "head": ("nnunet_dsp.benchmark.head", "time the prototype head against its own convolutions"),
    "filter": ("nnunet_dsp.benchmark.filter", "time the pseudo-label filter against a softmax"),
    "loader": ("nnunet_dsp.benchmark.loader", "time the annotation loader against nnU-Net's"),
    "step": ("nnunet_dsp.benchmark.step", "time a training step against nnU-Net's"),
    "prompt": ("nnunet_dsp.benchmark.prompt", "time a step of the prompt trainer against nnU-Net's"),
    "decoder": ("nnunet_dsp.benchmark.decoder", "time how affinities become instances"),
    "startup": ("nnunet_dsp.benchmark.startup", "time the command's start and the reading of a dataset's annotations"),
    "accuracy": ("nnunet_dsp.benchmark.accuracy", "train and compare: what each kind of annotation is worth"),
    "instances": ("nnunet_dsp.benchmark.instances", "train and compare: what a few labelled instances are worth"),
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
    subparsers = parser.add_subparsers(dest="benchmark", metavar="NAME", required=True, parser_class=_LazyParser)
    for name, (module, summary) in COMMANDS.items():
        subparsers.add_parser(name, help=summary, description=summary, module=module)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark that was asked for; its exit status."""
    module, _ = COMMANDS[args.benchmark]
    return int(importlib.import_module(module).run(args))
