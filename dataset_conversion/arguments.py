"""Arguments that the commands share; without imports that --help would wait for."""

from __future__ import annotations

from argparse import ArgumentParser, _ArgumentGroup

from nnunet_dsp.dataset_conversion.parallel import default_num_processes


def add_processes_argument(parser: ArgumentParser | _ArgumentGroup) -> None:
    """How many processes work side by side."""
    parser.add_argument(
        "--num-processes",
        metavar="N",
        type=int,
        default=default_num_processes(),
        help="worker processes (default: nnUNet_def_n_proc, else the number of cores, at most 8)",
    )


def add_making_arguments(parser: ArgumentParser | _ArgumentGroup) -> None:
    """How a dataset is made: with how many processes, and whether it may replace one."""
    add_processes_argument(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset that nnunet_dsp made before")


__all__ = ["add_making_arguments", "add_processes_argument"]
