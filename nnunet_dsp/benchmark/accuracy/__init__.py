"""`nnunet_dsp benchmark accuracy`: what each kind of annotation is worth on a dataset, against vanilla nnU-Net.

From one fully annotated raw nnU-Net dataset it takes annotations away, trains every arm with nnU-Net's own commands on
the same images, plans and number of iterations, predicts the test cases, and reports. All it makes lies in the folder
given by -o; the dataset is only read. Started again, it goes on where it stopped.
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
  masks       nnU-Net on the masked cases alone
  full        nnU-Net with the masks of all training cases: the ceiling
  ignore      nnU-Net with its ignore label, the weak labels painted into masks as well as that allows
  selftrain   nnU-Net on the masks and on the predictions of `masks` for the other images, one round
  dsp         nnUNetTrainerDSP with everything in the setting
  dsp:KINDS   with some of it only: dsp:points, dsp:boxes, dsp:tags, dsp:scribbles, dsp:points+boxes, dsp:unlabelled
  dsp-PART    without a part: loss (all four DSP losses), image, box, point, mask (one of them), pseudo, marginal, head;
              several: dsp-loss-head, dsp:points-pseudo
  dsp:released   the authors' variant of the losses
  prompt:oneshot   nnUNetTrainerPromptOneShot: one masked case trains, another one's window (or rectangle) is the prompt
  prompt:partial   nnUNetTrainerPrompt on the masks and a rectangle in each other image
  any other trainer by --arm NAME=TRAINER[@DATA][:key=value,...], then --arms NAME
  ARM:pretrained   the arm, starting from weights of a training on the dataset of --pretrain: masks:pretrained,
              prompt:oneshot:pretrained
  ARM:second  a new nnU-Net on the arm's predictions for its training images, where annotated voxels keep their label:
              ignore:second, prompt:partial:second, prompt:partial:pretrained:second

settings (what the cases without mask carry):
  masks+tags, masks+points, masks+boxes, masks+scribbles, masks+rectangles, masks+points+boxes, ..., masks+unlabelled
  mixed       tags, points and boxes on each of them
  dealt       each of them has one of tags, points, boxes, in turn; dealt:points+boxes deals out these two

example, on two CPU cores:
  nnunet_dsp benchmark accuracy -d 501 -o DIR -c 2d --masks 3 --settings mixed --seeds 0 1 2 --arms masks full ignore \\
    selftrain dsp --plans small --patch 128 --batch-size 4 --features 12 24 48 96 --epochs 10 \\
    --iterations-per-epoch 150 --device cpu
"""

# What a call may not change in a folder that has runs already: name and default.
FIXED: dict[str, Any] = {
    "dataset": None,
    **TRAINING,
    "pretrain": None,
    "pretrain_epochs": None,
    **HELD_OUT,
    "share": 1.0,
    "points_per_object": 1,
    "loosen": 0,
    "min_size": 1,
    "box_classes": None,
    "rectangle": [64],
    "point_radius": 0.0,
    "tta": False,
    "step_size": 0.5,
    "tolerance": None,
}

# What may be given later than the others, if it was not given at first: no run can have used it.
LATER = ("pretrain", "pretrain_epochs")

# What is remembered from call to call, and may change: name and default.
SELECTION: dict[str, Any] = {
    "arms": ["masks", "full", "ignore", "selftrain", "dsp"],
    "arm": [],
    "settings": ["mixed"],
    "masks": [3],
    "weak": ["rest"],
    "seeds": [0, 1, 2],
}
HOW: dict[str, Any] = {**RUNNING, "cost": []}


def _weak(text: str) -> int | str:
    if text == "rest":
        return text
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a number of cases or 'rest', but got {text!r}")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_place_arguments(parser, "full masks")

    what = parser.add_argument_group("what is compared (remembered in DIR)")
    what.add_argument("--arms", metavar="ARM", nargs="+", help="see below (default: masks full ignore selftrain dsp)")
    what.add_argument(
        "--arm",
        metavar="NAME=TRAINER[@DATA][:key=value,...]",
        action="append",
        help="an arm of another trainer, to be named in --arms; DATA: weak (default), masks, full, ignore, pseudo, "
        "oneshot, unlabelled or kinds such as points+boxes; key=value go into the plans under nnunet_dsp",
    )
    what.add_argument("--settings", metavar="SETTING", nargs="+", help="see below (default: mixed)")
    what.add_argument("--masks", metavar="N", type=int, nargs="+", help="how many cases keep their mask (default: 3)")
    what.add_argument(
        "--weak", metavar="N", type=_weak, nargs="+", help="how many other cases are used, or 'rest' (default: rest)"
    )
    what.add_argument(
        "--seeds",
        metavar="S",
        type=int,
        nargs="+",
        help="choose the masked cases and seed the trainings (default: 0 1 2)",
    )

    data = parser.add_argument_group("data (fixed once DIR exists)")
    add_held_out_arguments(data, grouped="are held out together, and get their masks one after the other")
    data.add_argument("--share", metavar="P", type=float, help="probability that an object is annotated (default: 1)")
    data.add_argument("--points-per-object", metavar="N", type=int, help="(default: 1)")
    data.add_argument("--loosen", metavar="VOXELS", type=int, help="boxes are too large by up to this (default: 0)")
    data.add_argument("--min-size", metavar="VOXELS", type=int, help="smaller objects are overlooked (default: 1)")
    data.add_argument("--box-classes", metavar="CLASS", nargs="+", help="(default: all but net-like ones)")
    data.add_argument(
        "--rectangle", metavar="VOXELS", type=int, nargs="+", help="size for masks+rectangles: one number, or y x (64)"
    )
    data.add_argument("--point-radius", metavar="VOXELS", type=float, help="of points, for the arm ignore (default: 0)")

    train = parser.add_argument_group("training, the same for every arm (fixed once DIR exists)")
    add_training_arguments(
        train,
        configurations="2d, 3d_fullres, ...",
        optimizers=("sgd", "adamw"),
        optimizer="the trainer's own, nnU-Net's SGD",
        rate="the trainer's own",
    )
    train.add_argument(
        "--pretrain",
        metavar="DATASET",
        help="id or name of another raw dataset with full masks, for the arms ARM:pretrained; may be given later",
    )
    train.add_argument("--pretrain-epochs", metavar="N", type=int, help="of these trainings (default: --epochs)")

    predict = parser.add_argument_group("evaluation (fixed once DIR exists)")
    predict.add_argument(
        "--tta", action=argparse.BooleanOptionalAction, default=None, help="predict with mirroring (default: no)"
    )
    predict.add_argument("--step-size", metavar="P", type=float, help="of the sliding window (default: 0.5)")
    predict.add_argument(
        "--tolerance",
        metavar="DISTANCE",
        type=float,
        help="of the surface Dice, in the image's unit (default: twice the smallest voxel size)",
    )

    how = parser.add_argument_group("how it runs")
    add_running_arguments(how, "preprocessing, prediction, evaluation", jobs="1, or one for each of --gpus")
    how.add_argument("--gpus", metavar="ID", nargs="+", help="the jobs take turns on these (CUDA_VISIBLE_DEVICES)")
    how.add_argument("--commands", action="store_true", help="print every run as one command for a scheduler")
    how.add_argument("--run", metavar="RUN", help="do one run of those that --commands printed")
    how.add_argument(
        "--cost",
        metavar="WHAT=TIME",
        nargs="+",
        help="expert time, such as mask=20min/image point=3s/object (defaults: docs/accuracy.md)",
    )


def run(args: argparse.Namespace) -> int:
    from nnunet_dsp.benchmark.accuracy.benchmark import run_benchmark

    return run_benchmark(args)
