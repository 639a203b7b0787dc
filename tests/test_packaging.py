"""What an installation contains: every module of the three folders, under nnunet_dsp, and nothing else."""

import ast
import email
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import nnunet_dsp

try:
    import tomllib
except ImportError:  # Python 3.10
    tomllib = None

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "nnunet_dsp": "nnunet_dsp",
    "nnunet_dsp/trainers": "trainers",
    "nnunet_dsp/dataset_conversion": "dataset_conversion",
}
TREE = [*FOLDERS.values(), "setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "conftest.py"]


def build(source, kind, into):
    """The wheel that `pip install .` (kind "wheel") or `pip install -e .` (kind "editable") would unpack."""
    program = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", program, str(into)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = Path(into).glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what is built from, so that no build/ is left in the repository."""
    pytest.importorskip("setuptools", minversion="70.1", reason="the wheel is built by the setuptools that is here")
    copy = tmp_path_factory.mktemp("tree")
    for name in TREE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.is_file():
            shutil.copy(source, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    """The wheel, built beside the leftovers of an older build."""
    leftover = tree / "build" / "lib" / "nnunet_dsp"
    leftover.mkdir(parents=True)
    (leftover / "renamed_since.py").touch()
    (tree / "build" / "lib" / "trainers").mkdir()
    (tree / "build" / "lib" / "trainers" / "__init__.py").touch()
    return build(tree, "wheel", tmp_path_factory.mktemp("wheel"))


def names_in(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.startswith("nnunet_dsp-")}


def metadata_of(wheel, name="METADATA"):
    with zipfile.ZipFile(wheel) as archive:
        (path,) = [n for n in archive.namelist() if n.endswith(f".dist-info/{name}")]
        return archive.read(path).decode()


def run_with(site_packages, program):
    """What `program` prints in an interpreter whose only site-packages is the given one, far from the source tree."""
    program = f"import site; site.addsitedir({str(site_packages)!r})\n{program}"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_every_module_of_the_three_folders_and_nothing_else(wheel):
    expected = {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for package, folder in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".json", ".typed", ".j2", ".css", ".js") and "__pycache__" not in path.parts
    }
    assert names_in(wheel) == expected
    some = {"py.typed", "report/page.html.j2", "nnunet_entry/nnunet_dsp_trainers.py"}
    assert {f"nnunet_dsp/{name}" for name in some} <= expected


def test_nothing_but_nnunet_dsp_appears_in_site_packages(wheel):
    with zipfile.ZipFile(wheel) as archive:
        top = {name.split("/")[0] for name in archive.namelist()}
    assert top == {"nnunet_dsp", f"nnunet_dsp-{nnunet_dsp.__version__}.dist-info"}
    assert metadata_of(wheel, "top_level.txt").split() == ["nnunet_dsp"]


def test_the_metadata_says_what_it_is(wheel):
    metadata = email.message_from_string(metadata_of(wheel))
    assert metadata["Name"] == "nnunet-dsp"
    assert metadata["Version"] == nnunet_dsp.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert "Apache-2.0" in (metadata["License-Expression"], metadata["License"])
    assert "nnunetv2>=2.8.1" in metadata.get_all("Requires-Dist")
    assert set(metadata.get_all("Provides-Extra")) == {"test", "dev", "acdc", "instances", "multicut", "waterz"}
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert metadata_of(wheel, "entry_points.txt").split("\n")[:2] == [
        "[console_scripts]",
        "nnunet_dsp = nnunet_dsp.cli:main",
    ]


def test_a_plain_installation_finds_both_mapped_packages(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site-packages")
    package = tmp_path / "site-packages" / "nnunet_dsp"
    check_installation(tmp_path / "site-packages", package, mapped_into=package)


def test_an_editable_installation_finds_both_mapped_packages(tree, tmp_path):
    with zipfile.ZipFile(build(tree, "editable", tmp_path)) as archive:
        archive.extractall(tmp_path / "site-packages")
    top = {p.name for p in (tmp_path / "site-packages").iterdir()}
    assert not top & {"trainers", "dataset_conversion", "tests", "nnunet_dsp", "conftest.py", "setup.py"}
    check_installation(tmp_path / "site-packages", tree / "nnunet_dsp", mapped_into=tree)


def check_installation(site_packages, package, mapped_into):
    """nnunet_dsp and its mapped packages are found where they should be; the bare names are not found at all."""
    program = (
        "import importlib.util\n"
        "for name in ('nnunet_dsp', 'nnunet_dsp.trainers', 'nnunet_dsp.dataset_conversion'):\n"
        "    print(importlib.util.find_spec(name).origin)\n"
        "print(importlib.util.find_spec('trainers'), importlib.util.find_spec('dataset_conversion'))\n"
    )
    assert run_with(site_packages, program).splitlines() == [
        str(package / "__init__.py"),
        str(mapped_into / "trainers" / "__init__.py"),
        str(mapped_into / "dataset_conversion" / "__init__.py"),
        "None None",
    ]


def test_the_root_s_conftest_finds_both_mapped_packages_without_an_installation(tree, tmp_path):
    (tree / "tests").mkdir(exist_ok=True)
    (tree / "tests" / "test_it.py").write_text(
        "import importlib.util, pathlib\n"
        "def test_it():\n"
        "    root = pathlib.Path(__file__).parents[1]\n"
        "    import nnunet_dsp.dataset_conversion as found\n"
        "    assert pathlib.Path(found.__file__) == root / 'dataset_conversion' / '__init__.py'\n"
        "    spec = importlib.util.find_spec('nnunet_dsp.trainers')\n"
        "    assert pathlib.Path(spec.origin) == root / 'trainers' / '__init__.py'\n"
        "    assert importlib.util.find_spec('nnunet_dsp.tests') is None\n"
    )
    for command in (["-m", "pytest"], ["-c", "import sys, pytest; sys.path.remove(''); sys.exit(pytest.main())"]):
        done = subprocess.run(
            [sys.executable, *command, "-q", "-p", "no:cacheprovider"], cwd=tree, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(tomllib is None, reason="tomllib needs Python 3.11")
def test_the_declared_dependencies_are_what_the_code_imports():
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    declared = project["dependencies"] + project["optional-dependencies"]["acdc"]
    modules = {
        "connected-components-3d": "cc3d",
        "dynamic-network-architectures": "dynamic_network_architectures",
        "pillow": "PIL",
        "PyYAML": "yaml",
        "scikit-image": "skimage",
    }
    names = {line.split(">")[0].split("=")[0].split("!")[0].strip() for line in declared}
    declared_modules = {modules.get(name, name) for name in names}
    imported = set()
    for folder in FOLDERS.values():
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    imported.add((node.module or "").split(".")[0])
    third_party = imported - set(sys.stdlib_module_names) - {"nnunet_dsp"}
    assert third_party - declared_modules == set(), "imported, but not in pyproject.toml"
    assert declared_modules - third_party == set(), "in pyproject.toml, but imported nowhere"
