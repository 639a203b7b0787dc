"""`nnunet_dsp benchmark instances`: what a few labelled instances are worth on a dataset, against labels for all.

From one fully labelled instance dataset (`nnunet_dsp convert instances` makes it) it takes instances away, trains every
arm with nnU-Net's own command on the same images, plans and number of iterations, predicts the test cases' instances,
and reports. All it makes lies in the folder given by -o; the dataset is only read. Started again, it goes on where it
stopped.
"""

from __future__ import annotations

import argparse
from typing import Any

from nnunet_dsp.benchmark.training_arguments import (
    HELD_OUT,
    RUNNING,
    TRAINING,
    add_held_out_arguments,
    add_place_arguments,
    add_running_arguments,
    add_training_arguments,
)

EPILOG = """arms:
  full             every instance labelled, labelled edges only: the ceiling
  supervised       a share of the instances labelled, labelled edges only
  crac             also pseudo-labels from the other network's affinities (nnUNetTrainerCRAC)
  entropy-filter   the most certain of them
  error-predictor  those, and not what the error predictor takes for wrong
  soft             as crac, with the affinities themselves as pseudo-labels
  released         as crac, with the released code's oddities
  any other by --arm NAME=TRAINER[@full][:key=value,...], then --arms NAME; the keys are those of CRACSettings

examples, on two CPU cores:
  nnunet_dsp benchmark instances -d 703 -o DIR -c 2d --share 0.1 0.2 --arms full supervised crac --seeds 0 1 2 \\
    --plans small --patch 128 --batch-size 4 --features 12 24 48 96 --epochs 10 --iterations-per-epoch 100 --device cpu
  nnunet_dsp benchmark instances -o DIR --arms soft wide --arm wide=nnUNetTrainerCRAC:embedding_channels=32
"""

# What a call may not change in a folder that has runs already: name and default. The keys that `benchmark accuracy`
# has too mean what they mean there.
FIXED: dict[str, Any] = {"dataset": None, **TRAINING, "keep_background": False, **HELD_OUT}

# How trained networks are turned into results: to change it, only prediction and evaluation are done anew.
EVALUATION: dict[str, Any] = {
    "decoder": "mutex",
    "affinities": "average",
    "threshold": 0.5,
    "min_size": None,
    "step_size": 0.5,
    "foreground": True,
}

# What is remembered from call to call, and may change.
SELECTION: dict[str, Any] = {
    "arms": ["full", "supervised", "crac", "entropy-filter", "error-predictor"],
    "arm": [],
    "share": [0.1],
    "seeds": [0, 1, 2],
}
HOW = RUNNING


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_place_arguments(parser, "instances")

    what = parser.add_argument_group("what is compared (remembered in DIR)")
    what.add_argument("--arms", metavar="ARM", nargs="+", help=f"see below (default: {' '.join(SELECTION['arms'])})")
    what.add_argument("--arm", metavar="NAME=TRAINER[@full][:key=value,...]", action="append", help="another arm")
    what.add_argument(
        "--share", metavar="P", type=float, nargs="+", help="of each image's instances that are labelled (default: 0.1)"
    )
    what.add_argument(
        "--seeds", metavar="S", type=int, nargs="+", help="choose them and seed the trainings (default: 0 1 2)"
    )

    data = parser.add_argument_group("data (fixed once DIR exists)")
    data.add_argument(
        "--keep-background",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="labelled background stays labelled (default: no)",
    )
    add_held_out_arguments(data)

    train = parser.add_argument_group("training, the same for every arm (fixed once DIR exists)")
    add_training_arguments(
        train,
        configurations="2d or 3d_fullres",
        optimizers=("adam", "released", "sgd"),
        optimizer="adam, as in CRACSettings",
        rate="the optimizer's own",
    )

    predict = parser.add_argument_group("prediction (to change it in a DIR, nothing is trained anew)")
    predict.add_argument("--decoder", choices=("mutex", "multicut", "waterz", "components"), help="(default: mutex)")
    predict.add_argument("--affinities", choices=("implicit", "explicit", "average"), help="(default: average)")
    predict.add_argument("--threshold", metavar="P", type=float, help="of the affinities (default: 0.5)")
    predict.add_argument(
        "--min-size",
        metavar="VOXELS",
        type=int,
        help="smaller ones are left out (default: as `nnunet_dsp instances predict`, by each arm's own labels)",
    )
    predict.add_argument("--step-size", metavar="P", type=float, help="of the tiles, up to 0.5 (default: 0.5)")
    predict.add_argument(
        "--foreground",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="leave out what the network takes for background (default: yes)",
    )

    how = parser.add_argument_group("how it runs")
    add_running_arguments(how, "preprocessing and evaluation")


def run(args: argparse.Namespace) -> int:
    from nnunet_dsp.benchmark.instances.benchmark import run_benchmark

    return run_benchmark(args)
