"""Which folders become which packages; everything else about the distribution stands in pyproject.toml.

`trainers/` and `dataset_conversion/` lie at the top of the repository and are installed inside `nnunet_dsp`, so that
nothing but `nnunet_dsp` appears in site-packages. pyproject.toml has no word for that mapping together with a search.
"""

import shutil
from pathlib import Path

import setuptools
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

FOLDER_OF_PACKAGE = {
    "nnunet_dsp": "nnunet_dsp",
    "nnunet_dsp.trainers": "trainers",
    "nnunet_dsp.dataset_conversion": "dataset_conversion",
}


def packages() -> list[str]:
    """Every package of every mapped folder. Searched, not listed: a list by hand drops the next new subpackage."""
    found = []
    for package, folder in FOLDER_OF_PACKAGE.items():
        found += [package, *(f"{package}.{sub}" for sub in find_packages(folder))]
    return found


def licence() -> dict[str, str]:
    """The SPDX licence, under the name that this setuptools knows.

    In pyproject.toml the string form is an error before setuptools 77 and the table form is deprecated from 77 on.
    """
    major = int(setuptools.__version__.split(".")[0])
    return {"license_expression" if major >= 77 else "license": "Apache-2.0"}


class BuildFromScratch(build_py):
    """Empties build/lib first.

    setuptools packs whatever lies there, so a renamed module would be shipped under its old name as well.
    """

    def run(self):
        inside_build = Path("build").resolve() in Path(self.build_lib).resolve().parents
        if inside_build and not getattr(self, "editable_mode", False):
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


setup(
    packages=packages(),
    package_dir=FOLDER_OF_PACKAGE,
    package_data={"nnunet_dsp": ["py.typed", "schemas/*.json", "report/*.j2", "report/*.css", "report/*.js"]},
    include_package_data=False,
    cmdclass={"build_py": BuildFromScratch},
    **licence(),
)
