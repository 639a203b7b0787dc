"""Lets `python -m pytest` at the root test this source tree, installed plainly, installed editable or not at all.

The root is on sys.path there, so `nnunet_dsp` is the source folder, which holds neither `trainers` nor
`dataset_conversion` (setup.py maps them in). The finder below answers for exactly these two names.
"""

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

ROOT = Path(__file__).resolve().parent
FOLDERS = {
    "nnunet_dsp.trainers": ROOT / "trainers",
    "nnunet_dsp.dataset_conversion": ROOT / "dataset_conversion",
}


class SourceTreeFinder(MetaPathFinder):
    """Finds the two packages that lie beside `nnunet_dsp/` in the source tree but inside it when installed."""

    def find_spec(self, fullname, path=None, target=None):
        folder = FOLDERS.get(fullname)
        if folder is None or not (folder / "__init__.py").is_file():
            return None
        return importlib.util.spec_from_file_location(
            fullname, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


sys.meta_path.insert(0, SourceTreeFinder())
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # `pytest` instead of `python -m pytest`

try:
    from hypothesis import settings
except ImportError:
    pass
else:  # a busy machine is no failure, and a failure must come back on the next run
    settings.register_profile("nnunet_dsp", deadline=None, derandomize=True)
    settings.load_profile("nnunet_dsp")
