"""The command line: help without heavy imports, exit statuses, what becomes of errors."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nnunet_dsp import __version__, cli

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "numpy", "nnunetv2", "batchgenerators", "scipy", "SimpleITK", "matplotlib")

SCRIPTED_COMMAND = """
import pathlib

def add_arguments(parser):
    parser.add_argument("--do", default="nothing")
    inner = parser.add_subparsers(dest="inner")
    inner.add_parser("deeper").add_argument("--flag")

def run(args):
    if args.do == "data":
        raise ValueError("case_012 (annotationsTr/case_012.json): point 3 lies outside the image.")
    if args.do == "note":
        error = ValueError("point 3 lies outside the image.")
        error.__notes__ = ["In case_012."]
        raise error
    if args.do == "file":
        pathlib.Path("no such folder/file.json").read_text()
    if args.do == "refuse":
        raise NotImplementedError("Regions are not supported.")
    if args.do == "import":
        import nnunet_dsp_of_no_such_name
    if args.do == "interrupt":
        raise KeyboardInterrupt
    if args.do == "bug":
        raise KeyError("a bug")
    return 7 if args.do == "seven" else 0
"""


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """main() with one command, `scripted`, whose behaviour --do chooses."""
    (tmp_path / "nnunet_dsp_scripted_command.py").write_text(SCRIPTED_COMMAND)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "nnunet_dsp_scripted_command", raising=False)
    module = "nnunet_dsp_scripted_command"
    commands = [
        cli.Command("scripted", "do as told", f"{module}:add_arguments", f"{module}:run"),
        cli.Command("absent", "not there", "nnunet_dsp.no_such_module:add_arguments", "nnunet_dsp.no_such_module:run"),
    ]
    return lambda *argv: cli.main(["scripted", *argv] if argv[:1] != ("absent",) else list(argv), commands)


def modules_after(*argv):
    """The modules that are loaded once `nnunet_dsp *argv` has run, in an interpreter of its own."""
    program = (
        "import io, json, sys, contextlib\n"
        "from nnunet_dsp import cli\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        f"    status = cli.main({list(argv)!r})\n"
        "print(json.dumps([status, list(sys.modules)]))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    status, modules = json.loads(done.stdout)
    assert status == 0
    return set(modules)


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["env"], ["env", "--help"], ["register", "--help"]])
def test_help_and_env_import_nothing_heavy(argv):
    assert not modules_after(*argv) & set(HEAVY)


def test_help_imports_no_command():
    assert "nnunet_dsp.environment" not in modules_after("--help")
    assert "nnunet_dsp.environment" in modules_after("env")


def test_help_answers_at_once():
    def seconds(*argv):
        start = time.perf_counter()
        subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, check=True)
        return time.perf_counter() - start

    # the fastest of several: a busy machine slows some of them, an import of torch all of them
    bare = min(seconds("-c", "pass") for _ in range(3))
    assert min(seconds("-m", "nnunet_dsp.cli", "--help") for _ in range(3)) < bare + 0.3


def test_help_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert f"    {command.name} " in shown
    assert {c.name for c in cli.COMMANDS} == {
        "env", "register", "unregister", "doctor", "plans", "prepare", "simulate", "convert", "benchmark",
        "import", "export", "check", "pseudo-dataset", "instances",
    }  # fmt: skip


@pytest.mark.parametrize("command", [c.name for c in cli.COMMANDS])
def test_every_command_has_help_and_something_to_run(command, capsys):
    assert cli.main([command, "--help"]) == 0
    assert f"usage: nnunet_dsp {command}" in capsys.readouterr().out
    assert callable(cli._load(next(c for c in cli.COMMANDS if c.name == command).run))


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"nnunet_dsp {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: COMMAND"),
        (["no-such-command"], "invalid choice: 'no-such-command'"),
        (["env", "--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["env", "--shel", "fish"], "unrecognized arguments: --shel fish"),
        (["env", "--shell", "tcsh"], "invalid choice: 'tcsh'"),
    ],
)
def test_usage_errors_exit_with_2_and_say_why(argv, message, capsys):
    assert cli.main(argv) == cli.EXIT_USAGE == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_a_command_s_own_status_is_the_exit_status(scripted):
    assert scripted() == 0
    assert scripted("--do", "seven") == 7


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "data",
            "nnunet_dsp scripted: case_012 (annotationsTr/case_012.json): point 3 lies outside the image.\n",
        ),
        ("note", "nnunet_dsp scripted: point 3 lies outside the image.\nIn case_012.\n"),
        ("file", "nnunet_dsp scripted: no such folder/file.json: No such file or directory\n"),
        ("refuse", "nnunet_dsp scripted: Regions are not supported.\n"),
    ],
)
def test_data_errors_exit_with_1_and_their_message_alone(what, message, scripted, capsys):
    assert scripted("--do", what) == cli.EXIT_DATA == 1
    captured = capsys.readouterr()
    assert captured.err == message
    assert captured.out == ""


def test_a_missing_library_exits_with_1_and_names_doctor(scripted, capsys):
    assert scripted("--do", "import") == 1
    assert "No module named 'nnunet_dsp_of_no_such_name'.\n`nnunet_dsp doctor` says" in capsys.readouterr().err


def test_a_missing_part_of_the_package_exits_with_1_and_says_where_it_was_sought(scripted, capsys):
    assert scripted("absent", "--help") == 1
    message = capsys.readouterr().err
    assert "No module named 'nnunet_dsp.no_such_module'" in message
    assert str(ROOT / "nnunet_dsp") in message


@pytest.mark.parametrize("argv", [["--debug", "--do", "data"], ["--do", "data", "--debug"]])
def test_debug_shows_the_traceback_before_the_message(argv, scripted, capsys):
    assert scripted(*argv) == 1
    message = capsys.readouterr().err
    assert message.startswith("Traceback")
    assert message.endswith("point 3 lies outside the image.\n")


def test_debug_is_known_to_nested_subcommands(scripted):
    assert scripted("deeper", "--debug", "--flag", "x") == 0


def test_an_interruption_exits_with_130_and_no_traceback(scripted, capsys):
    assert scripted("--do", "interrupt") == 130
    assert capsys.readouterr().err == "nnunet_dsp scripted: interrupted\n"


def test_a_bug_is_not_dressed_up_as_a_data_error(scripted):
    with pytest.raises(KeyError, match="a bug"):
        scripted("--do", "bug")


def test_a_reader_that_has_gone_leaves_no_traceback():
    program = (
        "import os, sys\n"
        "from nnunet_dsp import cli\n"
        "reader, writer = os.pipe(); os.close(reader); os.dup2(writer, 1)\n"
        "sys.exit(cli.main(['env']))"
    )
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
