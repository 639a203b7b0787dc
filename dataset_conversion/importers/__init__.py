"""One module per format of `nnunet_dsp import FORMAT`. A new format is a new module here; nothing else changes.

A module has NAME ("coco"), HELP (one line), EXAMPLE (a command line for --help), add_arguments(parser) for options of
its own, and read(src, args, images) -> Iterable[SourceImage] (see dataset_conversion/imported.py). Modules whose names
start with an underscore are helpers.
"""

import importlib
import pkgutil
from types import ModuleType

_NEEDED = ("NAME", "HELP", "EXAMPLE", "add_arguments", "read")


def available_importers() -> dict[str, ModuleType]:
    """The format modules by their NAME, sorted."""
    names = [m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    found = [m for m in modules if all(hasattr(m, needed) for needed in _NEEDED)]
    return {m.NAME: m for m in sorted(found, key=lambda m: str(m.NAME))}
