"""env, register, unregister and doctor; the real site-packages is never written to."""

import json
import os
import pkgutil
import shutil
import site
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest

from nnunet_dsp import cli, environment
from nnunet_dsp.environment import ENTRY_FOLDER, PTH_NAME, VARIABLE, with_our_folder

ROOT = Path(__file__).resolve().parents[1]
OURS = str(ENTRY_FOLDER)
AWKWARD = '/a b/it\'s "$HOME" \\n `x`;*/ü'


@pytest.fixture
def site_packages(tmp_path, monkeypatch):
    """An empty folder that `register` takes for this Python's site-packages; no user site."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    real = sysconfig.get_path
    monkeypatch.setattr(
        sysconfig, "get_path", lambda name, *args: str(folder) if name == "purelib" else real(name, *args)
    )
    monkeypatch.setattr(site, "ENABLE_USER_SITE", False)
    return folder


def value_after_start(site_folder, value=None):
    """nnUNet_extTrainer in a new interpreter that reads the .pth files of `site_folder`, started with `value`."""
    env = {k: v for k, v in os.environ.items() if k != VARIABLE} | ({VARIABLE: value} if value is not None else {})
    program = (
        f"import json, os, site, sys; site.addsitedir(sys.argv[1]); print(json.dumps(os.environ.get({VARIABLE!r})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(site_folder)], env=env, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""  # site reports a line that raises on stderr, and goes on
    return json.loads(done.stdout)


# --- the value --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, "", " ", os.pathsep])
def test_an_empty_value_becomes_our_folder(value):
    assert with_our_folder(value) == OURS


def test_other_folders_stay_in_front_and_in_order():
    assert with_our_folder(f"/b{os.pathsep}/a") == os.pathsep.join(["/b", "/a", OURS])


def test_our_folder_is_not_added_twice():
    value = os.pathsep.join(["/b", OURS, "/a"])
    assert with_our_folder(value) == value
    assert with_our_folder(with_our_folder("/x")) == with_our_folder("/x")


def test_a_folder_that_only_begins_like_ours_is_another():
    assert with_our_folder(OURS + "_old") == os.pathsep.join([OURS + "_old", OURS])


def test_a_folder_holding_the_separator_is_refused():
    with pytest.raises(ValueError, match="separates folders in nnUNet_extTrainer"):
        with_our_folder(None, f"/odd{os.pathsep}folder")
    with pytest.raises(ValueError, match="separates folders in nnUNet_extTrainer"):
        environment.pth_line(f"/odd{os.pathsep}folder")


# --- env --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["sh", "bash", "zsh", "dash"])
@pytest.mark.parametrize("value", [None, "/others/trainers", AWKWARD])
def test_a_shell_that_evaluates_env_exports_the_value(shell, value):
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} on this machine")
    env = {k: v for k, v in os.environ.items() if k != VARIABLE} | ({VARIABLE: value} if value is not None else {})
    script = (
        f'eval "$("{sys.executable}" -m nnunet_dsp.cli env)"\n'
        f'"{sys.executable}" -c \'import os; print(os.environ["{VARIABLE}"])\''
    )
    done = subprocess.run([shell, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == (OURS if value is None else f"{value}{os.pathsep}{OURS}") + "\n"


@pytest.mark.parametrize(
    ("shell", "line"),
    [
        ("sh", f"export {VARIABLE}='/it'\"'\"'s:{OURS}'"),
        ("fish", f"set -gx {VARIABLE} '/it\\'s:{OURS}'"),
        ("powershell", f"$env:{VARIABLE} = '/it''s:{OURS}'"),
        ("cmd", f'set "{VARIABLE}=/it\'s:{OURS}"'),
    ],
)
def test_env_quotes_for_each_shell(shell, line, monkeypatch, capsys):
    monkeypatch.setenv(VARIABLE, "/it's")
    monkeypatch.setattr(os, "pathsep", ":")
    assert cli.main(["env", "--shell", shell]) == 0
    assert capsys.readouterr().out == line + "\n"


def test_env_help_shows_the_line_for_each_shell(capsys):
    assert cli.main(["env", "--help"]) == 0
    shown = capsys.readouterr().out
    for shell in environment.SHELLS.values():
        assert shell.evaluate in shown


# --- register and unregister ------------------------------------------------------------------------------------------


def test_register_writes_one_line_into_one_file(site_packages, capsys):
    assert cli.main(["register"]) == 0
    assert [p.name for p in site_packages.iterdir()] == [PTH_NAME]
    text = (site_packages / PTH_NAME).read_text()
    assert text.count("\n") == 1
    assert text.startswith("import os; ")
    assert text.endswith("\n")
    assert str(site_packages / PTH_NAME) in capsys.readouterr().out
    if os.name == "posix":
        assert (site_packages / PTH_NAME).stat().st_mode & 0o777 == 0o644


def test_registering_twice_changes_nothing(site_packages, capsys):
    assert cli.main(["register"]) == 0
    before = (site_packages / PTH_NAME).stat()
    capsys.readouterr()
    assert cli.main(["register"]) == 0
    assert capsys.readouterr().out.startswith("Registered already")
    after = (site_packages / PTH_NAME).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_registering_replaces_a_line_that_names_another_folder(site_packages):
    (site_packages / PTH_NAME).write_text(environment.pth_line("/where/it/was"))
    assert environment.register() == (site_packages / PTH_NAME, True)
    assert (site_packages / PTH_NAME).read_text() == environment.pth_line()


@pytest.mark.parametrize(
    "value", [None, "", "/others/trainers", AWKWARD, OURS, OURS + "_old", f"{OURS}{os.pathsep}/others"]
)
def test_a_registered_python_starts_with_the_value_that_env_would_print(value, site_packages):
    environment.register()
    assert value_after_start(site_packages, value) == with_our_folder(value)


def test_processes_started_by_a_registered_python_do_not_add_it_again(site_packages):
    environment.register()
    first = value_after_start(site_packages)
    assert value_after_start(site_packages, first) == first == OURS


def test_a_registration_outlives_the_package_without_raising(tmp_path, site_packages):
    folder = tmp_path / "was here" / "nnunet_entry"
    (site_packages / PTH_NAME).write_text(environment.pth_line(folder))
    assert value_after_start(site_packages) is None
    assert value_after_start(site_packages, "/others") == "/others"
    folder.mkdir(parents=True)
    assert value_after_start(site_packages) == str(folder)


def test_a_folder_with_an_awkward_name_is_registered_as_it_is(tmp_path, site_packages):
    folder = tmp_path / 'it\'s ü \\ %s {x} "y"\n' / "nnunet_entry"
    folder.mkdir(parents=True)
    line = environment.pth_line(folder)
    assert line.count("\n") == 1
    assert line.isascii()
    (site_packages / PTH_NAME).write_text(line)
    assert value_after_start(site_packages) == str(folder)


def test_the_line_takes_no_time_and_imports_nothing(site_packages):
    environment.register()
    program = textwrap.dedent(
        """
        import site, sys, time
        before, start = set(sys.modules), time.perf_counter()
        site.addsitedir(sys.argv[1])
        print(time.perf_counter() - start, *set(sys.modules) - before)
        """
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", program, str(site_packages)], capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(3)
    ]
    assert min(float(seconds) for seconds, *_ in runs) < 0.005
    assert not [name for _, *modules in runs for name in modules if "nnunet" in name or name == "torch"]


def test_unregister_removes_the_file_and_nothing_else(site_packages, capsys):
    (site_packages / "other.pth").write_text("# another's\n")
    environment.register()
    assert cli.main(["unregister"]) == 0
    assert [p.name for p in site_packages.iterdir()] == ["other.pth"]
    assert f"Removed {site_packages / PTH_NAME}" in capsys.readouterr().out
    assert cli.main(["unregister"]) == 0
    assert "Nothing to remove" in capsys.readouterr().out


def refuse_writing_to(monkeypatch, folder):
    """Let nothing be made in `folder`, for root too."""
    real = environment.tempfile.mkstemp

    def mkstemp(*args, **kwargs):
        if Path(kwargs["dir"]) == folder:
            raise PermissionError(13, "Permission denied", str(folder))
        return real(*args, **kwargs)

    monkeypatch.setattr(environment.tempfile, "mkstemp", mkstemp)


def test_where_site_packages_may_not_be_written_the_user_s_serves(tmp_path, site_packages, monkeypatch):
    user = tmp_path / "home" / "site-packages"
    refuse_writing_to(monkeypatch, site_packages)
    monkeypatch.setattr(site, "ENABLE_USER_SITE", True)
    monkeypatch.setattr(site, "getusersitepackages", lambda: str(user))
    assert environment.register() == (user / PTH_NAME, True)
    assert list(site_packages.iterdir()) == []
    assert environment.unregister() == [user / PTH_NAME]


def test_where_nothing_may_be_written_register_says_so_and_leaves_nothing(site_packages, monkeypatch, capsys):
    refuse_writing_to(monkeypatch, site_packages)
    assert cli.main(["register"]) == 1
    message = capsys.readouterr().err
    assert f"{site_packages}: Permission denied" in message
    assert "nnunet_dsp env" in message
    assert list(site_packages.iterdir()) == []


def test_a_write_that_breaks_off_leaves_no_file(site_packages, monkeypatch):
    def replace(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="No space left on device"):
        environment.register()
    assert list(site_packages.iterdir()) == []


# --- doctor -----------------------------------------------------------------------------------------------------------


def lines_of(text):
    """Doctor's output as {subject: (status, text, mend or None)}."""
    found = {}
    subject = ""
    for line in text.splitlines():
        status, rest = line[:8].strip(), line[9:]
        if status in ("ok", "PROBLEM"):
            subject, _, what = rest.partition(" ")
            found[subject] = (status, what.strip(), None)
        elif "mend: " in line:
            found[subject] = (*found[subject][:2], line.split("mend: ", 1)[1])
    return found


@pytest.fixture
def sound(tmp_path, monkeypatch, site_packages):
    """An environment in which nothing is wrong but, perhaps, how nnunet_dsp was installed."""
    for name in environment.NNUNET_FOLDERS:
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv(VARIABLE, OURS)
    monkeypatch.setattr(
        environment, "_check_distribution", lambda: environment.Finding("nnunet_dsp", "installed, let us say")
    )
    return tmp_path


def doctor(capsys):
    status = cli.main(["doctor"])
    captured = capsys.readouterr()
    assert captured.err == ""
    return status, lines_of(captured.out), captured.out


def test_doctor_finds_nothing_wrong_in_a_sound_environment(sound, capsys):
    status, lines, shown = doctor(capsys)
    assert [subject for subject, line in lines.items() if line[0] != "ok"] == []
    assert status == 0
    assert list(lines) == [
        "python", "nnunet_dsp", "nnunetv2", "torch", "requirements", "trainer",
        "nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results",
    ]  # fmt: skip
    assert sys.executable in lines["python"][1]
    assert "site-packages" in lines["nnunetv2"][1]
    assert "the same class object" in lines["trainer"][1]
    assert "set by the shell" in lines["trainer"][1]
    assert shown.splitlines()[-1] == "Everything is in order."
    assert "Inspecting module" not in shown  # nnU-Net's lookup talks


def test_doctor_says_when_it_is_the_registration_that_does_it(sound, site_packages, capsys):
    environment.register()
    _, lines, _ = doctor(capsys)
    assert f"registered by {site_packages / PTH_NAME}" in lines["trainer"][1]


def test_doctor_finds_that_nothing_points_at_the_trainers(sound, monkeypatch, capsys):
    monkeypatch.delenv(VARIABLE)
    status, lines, shown = doctor(capsys)
    assert status == 1
    assert lines["trainer"] == (
        "PROBLEM",
        "nnUNetTrainerDSP not found by nnU-Net: nnUNet_extTrainer is not set",
        f"{environment.SHELLS[environment.DEFAULT_SHELL].evaluate}   or, to make it last: nnunet_dsp register",
    )
    assert shown.splitlines()[-1] == "1 problem."


def test_doctor_finds_a_second_copy_of_the_trainer(sound, monkeypatch, capsys):
    other = sound / "other"
    other.mkdir()
    (other / "nnunet_dsp_other_copy.py").write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "class nnUNetTrainerDSP(nnUNetTrainer):\n    pass\n"
    )
    monkeypatch.setenv(VARIABLE, os.pathsep.join([str(other), OURS]))
    status, lines, _ = doctor(capsys)
    assert status == 1
    state, text, mend = lines["trainer"]
    assert state == "PROBLEM"
    assert f"a second copy of the class, from {other}" in text
    assert f"take {other} out of nnUNet_extTrainer" in mend


def test_doctor_shows_what_keeps_the_trainers_from_being_imported(sound, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "nnunet_dsp.trainers", None)  # `import` then raises ModuleNotFoundError
    status, lines, _ = doctor(capsys)
    assert status == 1
    assert lines["trainer"][0] == "PROBLEM"
    assert "import of nnunet_dsp.trainers halted" in lines["trainer"][1]
    assert 'python -c "import nnunet_dsp.trainers"' in lines["trainer"][2]


@pytest.mark.parametrize(
    ("version", "text"), [("2.7.9", "2.7.9, older than 2.8.1"), (None, "of unknown version"), ("2.10.0", None)]
)
def test_doctor_finds_an_old_nnunet(version, text, sound, monkeypatch, capsys):
    real = environment._version_of
    monkeypatch.setattr(environment, "_version_of", lambda name: version if name == "nnunetv2" else real(name))
    status, lines, _ = doctor(capsys)
    if text is None:
        assert (status, lines["nnunetv2"][0]) == (0, "ok")
    else:
        assert status == 1
        assert lines["nnunetv2"][1].startswith(text)
        assert lines["nnunetv2"][2] == 'pip install -U "nnunetv2>=2.8.1"'


def test_doctor_finds_a_missing_nnunet(monkeypatch):
    monkeypatch.setattr(environment, "_folder_of", lambda name: None)
    for check in (environment._check_nnunet, environment._check_torch):
        finding = check()
        assert finding.text == "not installed"
        assert finding.mend.startswith("pip install ")


def test_doctor_finds_requirements_that_are_missing_or_too_old(monkeypatch):
    asked = ["there>=1", "old>=2.0,!=2.5.*", "absent", 'elsewhere; python_version < "3"', 'extra-thing; extra == "dev"']
    monkeypatch.setattr(environment, "_requirements_of", lambda name: asked if name == "nnunet-dsp" else [])
    monkeypatch.setattr(environment, "_version_of", {"there": "1.2", "old": "2.5.1"}.get)
    assert environment._check_requirements() == environment.Finding(
        "requirements",
        "old is 2.5.1, nnunet-dsp wants !=2.5.*,>=2.0; absent is not installed",
        "pip install 'old!=2.5.*,>=2.0' absent",
    )


def test_doctor_finds_what_is_wrong_with_the_three_folders(sound, monkeypatch, capsys):
    monkeypatch.delenv("nnUNet_raw")
    monkeypatch.setenv("nnUNet_preprocessed", str(sound / "not there"))
    (sound / "a file").touch()
    monkeypatch.setenv("nnUNet_results", str(sound / "a file"))
    status, lines, shown = doctor(capsys)
    assert status == 1
    assert lines["nnUNet_raw"][1:] == (
        "not set; it names the folder for the datasets",
        "export nnUNet_raw=/path/to/nnUNet_raw",
    )
    assert lines["nnUNet_preprocessed"][1:] == (
        f"{sound / 'not there'} does not exist",
        f"mkdir -p '{sound / 'not there'}'",
    )
    assert lines["nnUNet_results"][1] == f"{sound / 'a file'} is no folder"
    assert shown.splitlines()[-1] == "3 problems."


def test_doctor_finds_a_folder_that_cannot_be_written(sound, monkeypatch):
    def temporary_file(dir):
        raise OSError(30, "Read-only file system", str(dir))

    monkeypatch.setattr(environment.tempfile, "TemporaryFile", temporary_file)
    finding = environment._check_folder("nnUNet_raw", "the datasets")
    assert finding.text == f"{sound / 'nnUNet_raw'} cannot be written to: Read-only file system"
    assert finding.mend == f"chmod u+rwx {sound / 'nnUNet_raw'}"


# --- the folder that nnU-Net searches ---------------------------------------------------------------------------------


def test_the_entry_folder_holds_one_module_for_nnunet_to_import():
    assert [module.name for module in pkgutil.iter_modules([OURS])] == ["nnunet_dsp_trainers"]


def test_the_entry_re_exports_every_trainer_as_the_same_object():
    from nnunet_dsp import trainers
    from nnunet_dsp.nnunet_entry import nnunet_dsp_trainers as entry

    assert "nnUNetTrainerDSP" in trainers.__all__
    for name in trainers.__all__:
        assert getattr(entry, name) is getattr(trainers, name)


def test_a_python_without_nnunet_dsp_is_told_what_to_do():
    program = "import sys; sys.path.insert(0, sys.argv[1]); import nnunet_dsp_trainers"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program, OURS], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"nnunet_dsp is not installed in {sys.executable}" in done.stderr
    assert "take the folder out of nnUNet_extTrainer" in done.stderr


def test_a_trainer_s_own_missing_dependency_is_shown_as_it_is(tmp_path):
    (tmp_path / "nnunet_dsp" / "trainers").mkdir(parents=True)
    (tmp_path / "nnunet_dsp" / "__init__.py").touch()
    (tmp_path / "nnunet_dsp" / "trainers" / "__init__.py").write_text("import nnunet_dsp_missing_dependency\n")
    program = "import sys; sys.path[:0] = sys.argv[1:]; import nnunet_dsp_trainers"
    command = [sys.executable, "-I", "-S", "-c", program, OURS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'nnunet_dsp_missing_dependency'"
