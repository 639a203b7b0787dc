"""`nnunet_dsp convert FORMAT ...`: finds the formats (one module each in formats/) and hands over to the one asked for.

A new format is a module in formats/ with NAME, HELP, add_arguments(parser) and run(args) -> int; nothing else changes.
"""

import argparse
import importlib
import pkgutil
from types import ModuleType

from nnunet_dsp.dataset_conversion import formats


def available_formats() -> dict[str, ModuleType]:
    """The format modules by their NAME, sorted."""
    modules = [importlib.import_module(f"{formats.__name__}.{m.name}") for m in pkgutil.iter_modules(formats.__path__)]
    return {m.NAME: m for m in sorted((m for m in modules if hasattr(m, "NAME")), key=lambda m: str(m.NAME))}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one sub-subcommand per format."""
    subparsers = parser.add_subparsers(dest="format", metavar="FORMAT", required=True)
    for name, module in available_formats().items():
        sub = subparsers.add_parser(
            name, help=module.HELP, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(sub)
        sub.set_defaults(_run_format=module.run)


def run(args: argparse.Namespace) -> int:
    """Convert; returns the exit status."""
    return int(args._run_format(args))
