"""The command `nnunet_dsp`: which subcommands there are, and what becomes of their errors. No work is done here.

Nothing but the standard library is imported at the top: a command's module is imported when that command is asked for,
so that `nnunet_dsp --help` and `nnunet_dsp env` answer at once, and in a broken environment too.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NamedTuple

from nnunet_dsp import __version__

DEBUG_FLAG = "--debug"

EXIT_OK = 0
EXIT_DATA = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class Command(NamedTuple):
    """One subcommand.

    Attributes:
        name: what the user types.
        help: one line for `nnunet_dsp --help`.
        add_arguments: "module:function"; the function takes the subcommand's parser.
        run: "module:function"; the function takes the parsed namespace and returns the exit status.
    """

    name: str
    help: str
    add_arguments: str
    run: str


COMMANDS = (
    Command(
        "env",
        "print what the shell must export so that nnU-Net finds the trainers",
        "nnunet_dsp.environment:add_env_arguments",
        "nnunet_dsp.environment:run_env",
    ),
    Command(
        "register",
        "make nnU-Net find the trainers whenever this Python runs (one .pth file; undone by unregister)",
        "nnunet_dsp.environment:add_register_arguments",
        "nnunet_dsp.environment:run_register",
    ),
    Command(
        "unregister",
        "undo register",
        "nnunet_dsp.environment:add_unregister_arguments",
        "nnunet_dsp.environment:run_unregister",
    ),
    Command(
        "doctor",
        "check the installation and say how to mend what is wrong",
        "nnunet_dsp.environment:add_doctor_arguments",
        "nnunet_dsp.environment:run_doctor",
    ),
    Command(
        "plans",
        "derive plans with a smaller network, for a machine without a GPU",
        "nnunet_dsp.plans:add_arguments",
        "nnunet_dsp.plans:run",
    ),
    Command(
        "prepare",
        "check a dataset's annotations and get it ready for nnU-Net's planning and training",
        "nnunet_dsp.dataset_conversion.prepare:add_arguments",
        "nnunet_dsp.dataset_conversion.prepare:run",
    ),
    Command(
        "simulate",
        "make a dataset of mixed weak annotations from a fully annotated nnU-Net dataset",
        "nnunet_dsp.dataset_conversion.simulate:add_arguments",
        "nnunet_dsp.dataset_conversion.simulate:run",
    ),
    Command(
        "import",
        "import annotations from the tools people use, with their images",
        "nnunet_dsp.dataset_conversion.import_annotations:add_arguments",
        "nnunet_dsp.dataset_conversion.import_annotations:run",
    ),
    Command(
        "export",
        "export a dataset's annotations for other tools",
        "nnunet_dsp.dataset_conversion.export_annotations:add_arguments",
        "nnunet_dsp.dataset_conversion.export_annotations:run",
    ),
    Command(
        "check",
        "write a report that shows what was understood of a dataset's annotations",
        "nnunet_dsp.check:add_arguments",
        "nnunet_dsp.check:run",
    ),
    Command(
        "convert",
        "convert a public dataset to nnU-Net's format, with annotations",
        "nnunet_dsp.dataset_conversion.convert:add_arguments",
        "nnunet_dsp.dataset_conversion.convert:run",
    ),
    Command(
        "pseudo-dataset",
        "make a dataset of a model's predictions, annotated voxels kept",
        "nnunet_dsp.dataset_conversion.pseudo_dataset:add_arguments",
        "nnunet_dsp.dataset_conversion.pseudo_dataset:run",
    ),
    Command(
        "instances",
        "predict instance label maps and evaluate them",
        "nnunet_dsp.instances:add_arguments",
        "nnunet_dsp.instances:run",
    ),
    Command(
        "benchmark",
        "measure speed and accuracy, against nnU-Net and the authors' recorded results",
        "nnunet_dsp.benchmark:add_arguments",
        "nnunet_dsp.benchmark:run",
    ),
)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps line breaks in the epilog, and the commands' names beside their help."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._action_max_length = 20  # argparse forgets the indentation of subcommands when it measures their names


class _LazyParser(argparse.ArgumentParser):
    """An ArgumentParser that asks for its arguments only when it has to parse, and knows --debug at every level."""

    def __init__(self, *args, add_arguments: str | None = None, **kwargs):
        kwargs["allow_abbrev"] = False  # a misspelt or shortened flag is an error, not a guess
        super().__init__(*args, **kwargs)
        self._add_arguments = add_arguments
        self.add_argument(
            DEBUG_FLAG, action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )

    def parse_known_args(self, args=None, namespace=None):
        if self._add_arguments is not None:
            add_arguments, self._add_arguments = _load(self._add_arguments), None
            add_arguments(self)
        return super().parse_known_args(args, namespace)


def _load(reference: str) -> Callable:
    """The function that "module:function" names."""
    module_name, function_name = reference.split(":")
    return getattr(importlib.import_module(module_name), function_name)


def make_parser(commands: Sequence[Command] = COMMANDS) -> argparse.ArgumentParser:
    """The parser of `nnunet_dsp`, with every command's name and none of their modules imported."""
    parser = _LazyParser(
        prog="nnunet_dsp",
        formatter_class=_HelpFormatter,
        description="Train nnU-Net v2 from any mixture of masks, scribbles, boxes, points and tags.",
        epilog="`nnunet_dsp COMMAND --help` says more about a command. Training itself is nnU-Net's:"
        "\n  nnUNetv2_train DATASET CONFIGURATION FOLD -tr nnUNetTrainerDSP",
    )
    parser.add_argument("--version", action="version", version=f"nnunet_dsp {__version__}")
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for command in commands:
        subparsers.add_parser(
            command.name, help=command.help, description=_sentence(command.help), add_arguments=command.add_arguments
        )
    return parser


def main(argv: Sequence[str] | None = None, commands: Sequence[Command] = COMMANDS) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; None takes them from sys.argv.
        commands: the commands that exist; other than the default in tests only.

    Returns:
        The exit status: 0, 1 for what is wrong with the data or the installation, 2 for usage. Those errors become a
        message on stderr; with --debug they come with their traceback. Any other exception is a bug and passes through.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    name = "nnunet_dsp"
    try:
        arguments = make_parser(commands).parse_args(argv)
        command = next(c for c in commands if c.name == arguments.command)
        name = f"nnunet_dsp {command.name}"
        status = _load(command.run)(arguments)
        sys.stdout.flush()  # a reader that has gone must show here, not while the interpreter ends
        return EXIT_OK if status is None else int(status)
    except SystemExit as error:  # argparse, after it has printed
        return error.code if isinstance(error.code, int) else EXIT_OK if error.code is None else EXIT_USAGE
    except KeyboardInterrupt:
        return _fail(name, "interrupted", argv, EXIT_INTERRUPTED)
    except BrokenPipeError:  # `nnunet_dsp doctor | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DATA
    except ImportError as error:
        return _fail(name, _explain_import(error), argv, EXIT_DATA)
    except (ValueError, OSError, NotImplementedError) as error:
        return _fail(name, _message(error), argv, EXIT_DATA)


def _fail(name: str, message: str, argv: Sequence[str], status: int) -> int:
    if DEBUG_FLAG in argv:
        traceback.print_exc()
    print(f"{name}: {message}", file=sys.stderr)
    return status


def _message(error: BaseException) -> str:
    """What to tell the user of `error`: its text, the notes added on the way up, never nothing at all."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{os.fsdecode(error.filename)}: {error.strerror}"
    else:
        text = str(error) or type(error).__name__
    return "\n".join([text, *getattr(error, "__notes__", [])])


def _explain_import(error: ImportError) -> str:
    if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("nnunet_dsp."):
        return (
            f"{error}.\nPython found nnunet_dsp in {os.path.dirname(__file__)}. If that is the source tree, it hides "
            "the installed package: run from another folder, or install with `pip install -e .`"
        )
    return f"{error}.\n`nnunet_dsp doctor` says what the installation lacks."


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


if __name__ == "__main__":
    sys.exit(main())
