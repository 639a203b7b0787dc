"""How nnU-Net finds the trainers: the commands env, register, unregister and doctor.

nnU-Net looks for trainers in the folders that nnUNet_extTrainer names; here that variable is printed, set for good or
checked. Only the standard library is imported at the top: `env` runs in every new shell.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import os
import re
import shlex
import site
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

VARIABLE = "nnUNet_extTrainer"
ENTRY_FOLDER = Path(__file__).resolve().parent / "nnunet_entry"
TRAINER = "nnUNetTrainerDSP"
PTH_NAME = "nnunet_dsp_trainers.pth"
DISTRIBUTION = "nnunet-dsp"
MINIMUM_PYTHON = (3, 10)
MINIMUM_NNUNET = "2.8.1"
NNUNET_FOLDERS = {
    "nnUNet_raw": "the datasets",
    "nnUNet_preprocessed": "the preprocessed datasets",
    "nnUNet_results": "the trained models",
}


def with_our_folder(value: str | None, folder: str | os.PathLike[str] = ENTRY_FOLDER) -> str:
    """The value of nnUNet_extTrainer with our folder in it.

    Args:
        value: what the variable holds, folders separated by os.pathsep; None where it is unset.
        folder: the folder to add at the end, where it is not in there yet.

    Returns:
        What the variable should hold. Folders that others put there stay in front, in their order.

    Raises:
        ValueError: the folder's path holds os.pathsep; nnU-Net would take it for two.
    """
    folder = os.fspath(folder)
    if os.pathsep in folder:
        raise ValueError(
            f"{folder}: the path holds {os.pathsep!r}, which separates folders in {VARIABLE}.\n"
            "Install nnunet_dsp in a folder without it."
        )
    folders = [part for part in (value or "").split(os.pathsep) if part.strip()]
    return os.pathsep.join(folders if folder in folders else [*folders, folder])


# --- env --------------------------------------------------------------------------------------------------------------


def _quote_fish(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _quote_powershell(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


class Shell(NamedTuple):
    """A shell's way to export a variable, and the line with which a user makes it do so."""

    export: Callable[[str, str], str]
    evaluate: str


SHELLS = {
    "sh": Shell(lambda name, value: f"export {name}={shlex.quote(value)}", 'eval "$(nnunet_dsp env)"'),
    "fish": Shell(lambda name, value: f"set -gx {name} {_quote_fish(value)}", "nnunet_dsp env --shell fish | source"),
    "powershell": Shell(
        lambda name, value: f"$env:{name} = {_quote_powershell(value)}",
        "nnunet_dsp env --shell powershell | Invoke-Expression",
    ),
    "cmd": Shell(
        lambda name, value: f'set "{name}={value}"',
        "for /f \"delims=\" %i in ('nnunet_dsp env --shell cmd') do %i",
    ),
}
DEFAULT_SHELL = "powershell" if os.name == "nt" else "sh"


def add_env_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `nnunet_dsp env`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        f"Prints the line with which a shell exports {VARIABLE}, so that nnU-Net finds {TRAINER} and its variants.\n"
        "A value that the variable has already stays in front. To have the line run:\n\n"
        + "\n".join(f"  {name + ':':12}{shell.evaluate}" for name, shell in SHELLS.items())
        + "\n\n`sh` is for bash and zsh too. `nnunet_dsp register` makes it last for this Python."
    )
    parser.add_argument("--shell", choices=SHELLS, default=DEFAULT_SHELL, help="syntax to print (%(default)s)")


def run_env(args: argparse.Namespace) -> int:
    """`nnunet_dsp env`."""
    shell = SHELLS[args.shell]
    print(shell.export(VARIABLE, with_our_folder(os.environ.get(VARIABLE))))
    if sys.stdout.isatty():
        print(f"(Printed only. To have your shell run it: {shell.evaluate})", file=sys.stderr)
    return 0


# --- register and unregister ------------------------------------------------------------------------------------------


def pth_line(folder: str | os.PathLike[str] = ENTRY_FOLDER) -> str:
    """The one line of the .pth file; Python's site module executes it at the start of every interpreter.

    It does what with_our_folder() does, once the folder is there: after `pip uninstall nnunet-dsp` it does nothing. It
    imports nothing but os and may not raise. The path is written in ASCII, since site's decoding depends on the locale.

    Raises:
        ValueError: as with_our_folder().
    """
    with_our_folder(None, folder)  # refuses what cannot be registered
    path, name = ascii(os.fspath(folder)), ascii(VARIABLE)
    return (
        f"import os; os.path.isdir({path}) and {path} not in os.environ.get({name}, '').split(os.pathsep) "
        f"and os.environ.__setitem__({name}, os.pathsep.join(filter(None, (os.environ.get({name}), {path}))))\n"
    )


def site_folders() -> list[Path]:
    """The folders whose .pth files this Python reads and `register` may write to: its own, then the user's (if on)."""
    folders = [Path(sysconfig.get_path("purelib"))]
    if site.ENABLE_USER_SITE:
        folders.append(Path(site.getusersitepackages()))
    return folders


def registrations() -> list[Path]:
    """The .pth files of ours that this Python reads, at most one a folder."""
    return [path for folder in site_folders() if (path := folder / PTH_NAME).is_file()]


def register() -> tuple[Path, bool]:
    """Write the .pth file, into this Python's site-packages or, where that may not be written, into the user's.

    Returns:
        The file, and whether it was written (False: it stood there already, as it would be written now).

    Raises:
        OSError: no folder may be written; the message names them.
        ValueError: as with_our_folder().
    """
    line = pth_line()
    refusals = []
    for folder in site_folders():
        path = folder / PTH_NAME
        try:
            if path.is_file() and path.read_text(encoding="ascii", errors="replace") == line:
                return path, False
            folder.mkdir(parents=True, exist_ok=True)
            _write_atomically(path, line)
        except OSError as error:
            refusals.append(f"{folder}: {error.strerror or error}")
        else:
            return path, True
    raise OSError(
        "cannot write to the site-packages of this Python.\n"
        + "\n".join(f"  {refusal}" for refusal in refusals)
        + f"\nMake the folder writable, use a virtual environment, or put this line into your shell's start-up file:\n"
        f"  {SHELLS[DEFAULT_SHELL].evaluate}"
    )


def unregister() -> list[Path]:
    """Remove every .pth file of ours that this Python reads.

    Returns:
        The files removed; none where nothing was registered.

    Raises:
        OSError: a file may not be removed.
    """
    removed = registrations()
    for path in removed:
        path.unlink()
    return removed


def _write_atomically(path: Path, text: str) -> None:
    """Write `text` so that `path` never holds half of it: a broken .pth line would greet every start of Python."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".nnunet_dsp_", suffix=".tmp")
    try:
        with open(descriptor, "w", encoding="ascii", newline="\n") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide it from the other users of this Python
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def add_register_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `nnunet_dsp register`: none."""
    parser.description = (
        f"Writes {PTH_NAME}, a file of one line, into the site-packages of {sys.executable}. From then on every start "
        f"of this Python adds nnunet_dsp's folder to {VARIABLE} (a value that is set stays in front), so that "
        f"`nnUNetv2_train ... -tr {TRAINER}` works in every shell. `nnunet_dsp unregister` removes the file."
    )


def run_register(args: argparse.Namespace) -> int:
    """`nnunet_dsp register`."""
    path, written = register()
    print(f"{'Registered' if written else 'Registered already'}: {path}")
    print(f"Every start of {sys.executable} now adds {ENTRY_FOLDER} to {VARIABLE}.")
    print("To undo this (before nnunet_dsp is uninstalled, if it is): nnunet_dsp unregister")
    return 0


def add_unregister_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `nnunet_dsp unregister`: none."""
    parser.description = f"Removes the file {PTH_NAME} that `nnunet_dsp register` wrote."


def run_unregister(args: argparse.Namespace) -> int:
    """`nnunet_dsp unregister`."""
    removed = unregister()
    for path in removed:
        print(f"Removed {path}")
    if not removed:
        print("Nothing to remove: nnunet_dsp is not registered in " + " or ".join(map(str, site_folders())))
    return 0


# --- doctor -----------------------------------------------------------------------------------------------------------


class Finding(NamedTuple):
    """The outcome of one check.

    Attributes:
        subject: what was looked at, one word.
        text: what was found.
        mend: the line that mends it; None where nothing is wrong.
    """

    subject: str
    text: str
    mend: str | None = None


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `nnunet_dsp doctor`: none."""
    parser.description = (
        "Says which Python, nnU-Net and torch are in use, whether nnU-Net finds the trainers and whether its three "
        "folders can be used: one line a check, each problem with the line that mends it. Exit status 1 for any."
    )


def run_doctor(args: argparse.Namespace) -> int:
    """`nnunet_dsp doctor`."""
    problems = 0
    for finding in examine():
        problems += finding.mend is not None
        print(f"{'ok' if finding.mend is None else 'PROBLEM':8} {finding.subject:20} {finding.text}", flush=True)
        if finding.mend is not None:
            print(f"{'':8} {'':20} mend: {finding.mend}", flush=True)
    print("Everything is in order." if problems == 0 else f"{problems} problem{'s' if problems > 1 else ''}.")
    return 0 if problems == 0 else 1


def examine() -> Iterator[Finding]:
    """Every check, in the order in which problems are best mended."""
    yield _check_python()
    yield _check_distribution()
    yield _check_nnunet()
    yield _check_torch()
    yield _check_requirements()
    yield _check_trainer()
    for variable, content in NNUNET_FOLDERS.items():
        yield _check_folder(variable, content)


def _check_python() -> Finding:
    text = f"{sys.version.split()[0]} ({sys.executable})"
    if sys.version_info < MINIMUM_PYTHON:
        wanted = ".".join(map(str, MINIMUM_PYTHON))
        return Finding("python", f"{text}, older than {wanted}", f"python{wanted} -m venv .venv, and install there")
    return Finding("python", text)


def _check_distribution() -> Finding:
    here = Path(__file__).resolve().parent
    version = _version_of(DISTRIBUTION)
    if version is None:
        return Finding(
            "nnunet_dsp", f"not installed, only importable ({here})", f"pip install -e {shlex.quote(str(here.parent))}"
        )
    if importlib.util.find_spec("nnunet_dsp.trainers") is None:
        return Finding(
            "nnunet_dsp",
            f"{version}, but the source tree {here} hides what is installed",
            "run from another folder, or install with pip install -e .",
        )
    return Finding("nnunet_dsp", f"{version} ({here})")


def _check_nnunet() -> Finding:
    mend = f'pip install -U "nnunetv2>={MINIMUM_NNUNET}"'
    folder, version = _folder_of("nnunetv2"), _version_of("nnunetv2")
    if folder is None:
        return Finding("nnunetv2", "not installed", mend)
    if version is None:
        return Finding("nnunetv2", f"of unknown version ({folder})", mend)
    if _release(version) < _release(MINIMUM_NNUNET):
        return Finding("nnunetv2", f"{version}, older than {MINIMUM_NNUNET} ({folder})", mend)
    return Finding("nnunetv2", f"{version} ({folder})")


def _check_torch() -> Finding:
    if _folder_of("torch") is None:
        return Finding("torch", "not installed", "pip install torch (https://pytorch.org/get-started/locally)")
    try:
        import torch
    except Exception as error:
        return Finding("torch", f"cannot be imported: {_one_line(error)}", "pip install --force-reinstall torch")
    where = f"{torch.__version__} ({Path(torch.__file__).parent})"
    if torch.cuda.is_available():
        return Finding("torch", f"{where}, CUDA: {torch.cuda.get_device_name()}")
    if getattr(torch.backends, "mps", None) is not None and torch.backends.mps.is_available():
        return Finding("torch", f"{where}, no CUDA, but MPS: train with `nnUNetv2_train ... -device mps`")
    why = "no GPU in sight" if torch.version.cuda else "built without CUDA"
    return Finding("torch", f"{where}, {why}: train with `nnUNetv2_train ... -device cpu`")


def _check_requirements() -> Finding:
    """What nnunet-dsp and nnunetv2 say that they need, against what is installed."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return Finding("requirements", "packaging is not installed", "pip install packaging")
    unmet: dict[str, str] = {}
    checked = set()
    for distribution in (DISTRIBUTION, "nnunetv2"):
        for line in _requirements_of(distribution):
            requirement = Requirement(line)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            checked.add(requirement.name.lower())
            version = _version_of(requirement.name)
            wanted = f"{requirement.name}{requirement.specifier}"
            if version is None:
                unmet[wanted] = f"{wanted} is not installed"
            elif not requirement.specifier.contains(version, prereleases=True):
                unmet[wanted] = f"{requirement.name} is {version}, {distribution} wants {requirement.specifier}"
    if unmet:
        return Finding("requirements", "; ".join(unmet.values()), "pip install " + " ".join(map(shlex.quote, unmet)))
    return Finding("requirements", f"{len(checked)} packages, all there and new enough")


def _check_trainer() -> Finding:
    """nnU-Net's own lookup, in the environment of this process."""
    mend = f"{SHELLS[DEFAULT_SHELL].evaluate}   or, to make it last: nnunet_dsp register"
    value = os.environ.get(VARIABLE, "")
    named = os.fspath(ENTRY_FOLDER) in value.split(os.pathsep)
    files = [file for file in registrations() if file.read_text(encoding="ascii", errors="replace") == pth_line()]
    noise = io.StringIO()
    try:
        with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
            from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

            trainer = recursive_find_trainer_class_by_name(TRAINER)
            ours = getattr(importlib.import_module("nnunet_dsp.trainers"), TRAINER)
    except Exception as error:
        if not named and isinstance(error, RuntimeError):
            state = f"{VARIABLE} is {value!r}" if value else f"{VARIABLE} is not set"
            return Finding("trainer", f"{TRAINER} not found by nnU-Net: {state}", mend)
        return Finding(
            "trainer",
            f"nnU-Net's lookup of {TRAINER} fails: {_one_line(error)}",
            'mend what stands above first; python -c "import nnunet_dsp.trainers" shows the whole error',
        )
    if trainer is not ours:
        match = re.search(r"^Using trainer .* from: (.*)$", noise.getvalue(), flags=re.MULTILINE)
        other = match.group(1) if match else f"module {trainer.__module__}"
        return Finding(
            "trainer",
            f"{TRAINER} found, but as a second copy of the class, from {other}",
            f"take {other} out of {VARIABLE}; {mend}",
        )
    way = f"registered by {files[0]}" if files else "set by the shell"
    return Finding("trainer", f"{TRAINER} found by nnU-Net, the same class object, through {VARIABLE} ({way})")


def _check_folder(variable: str, content: str) -> Finding:
    value = os.environ.get(variable)
    if not value:
        return Finding(
            variable, f"not set; it names the folder for {content}", f"export {variable}=/path/to/{variable}"
        )
    path, quoted = Path(value), shlex.quote(value)
    if not path.exists():
        return Finding(variable, f"{value} does not exist", f"mkdir -p {quoted}")
    if not path.is_dir():
        return Finding(variable, f"{value} is no folder", f"export {variable}=/path/to/{variable}")
    try:
        with tempfile.TemporaryFile(dir=path):  # os.access() says yes to root, whatever the file system says
            pass
    except OSError as error:
        return Finding(variable, f"{value} cannot be written to: {error.strerror}", f"chmod u+rwx {quoted}")
    return Finding(variable, value)


def _version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirements_of(distribution: str) -> list[str]:
    try:
        return importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _folder_of(package: str) -> Path | None:
    """Where `package` would be imported from, without importing it; None where it would not be found."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        return None
    return Path(spec.origin).parent if spec.origin else Path(next(iter(spec.submodule_search_locations or [""])))


def _release(version: str) -> tuple[int, ...]:
    """(2, 8, 1) for "2.8.1", "2.8.1rc1" and "2.8.1+local"."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: " + " ".join(str(error).split())
