"""`nnunet_dsp benchmark accuracy`: what each kind of annotation is worth on a dataset, against vanilla nnU-Net.

From one fully annotated raw nnU-Net dataset it takes annotations away, trains every arm with nnU-Net's own commands on
the same images, plans and number of iterations, predicts the test cases, and reports. All it makes lies in the folder
given by -o; the dataset is only read. Started again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

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
    "configuration": "2d",
    "planner": None,
    "plans": "nnunet",
    "patch": None,
    "batch_size": None,
    "features": None,
    "epochs": 1000,
    "iterations_per_epoch": 250,
    "pretrain": None,
    "pretrain_epochs": None,
    "val_iterations": 1,
    "optimizer": None,
    "lr": None,
    "precision": "float32",
    "evaluate_on": "test",
    "test_cases": None,
    "test_fold": None,
    "test_share": None,
    "val_cases": None,
    "val_fold": None,
    "val_share": None,
    "split_seed": 0,
    "group": None,
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
HOW: dict[str, Any] = {"device": "cuda", "threads": None, "num_processes": None, "cost": []}


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
    parser.add_argument("-d", dest="dataset", metavar="ID", help="id or name of a raw dataset with full masks")
    parser.add_argument("-o", dest="output", metavar="DIR", type=Path, required=True, help="folder for all it makes")

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
    data.add_argument("--evaluate-on", choices=("test", "val"), help="val: to choose parameters by (default: test)")
    for part, help_text in (("test", "where there is no imagesTs with labelsTs"), ("val", "with --evaluate-on val")):
        name = {"test": "test", "val": "validation"}[part]
        data.add_argument(
            f"--{part}-cases", metavar="CASE", nargs="+", help=f"training cases held out as {name} cases, {help_text}"
        )
        data.add_argument(
            f"--{part}-fold", metavar="K", type=int, help="or the validation cases of a fold of splits_final.json (0)"
        )
        data.add_argument(f"--{part}-share", metavar="P", type=float, help="or a random share (default: 0.2)")
    data.add_argument("--split-seed", metavar="S", type=int, help="of that random share (default: 0)")
    data.add_argument(
        "--group", metavar="REGEX", help="cases with the same match (say, of the patient) are held out together"
    )
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
    train.add_argument("-c", dest="configuration", help="2d, 3d_fullres, ... (default: 2d)")
    train.add_argument("--planner", metavar="NAME", help="nnU-Net's -pl, such as nnUNetPlannerResEncM")
    train.add_argument("--plans", choices=("nnunet", "small"), help="small: as `nnunet_dsp plans` derives (nnunet)")
    train.add_argument("--patch", metavar="N", type=int, nargs="+", help="with --plans small: patch size in voxels")
    train.add_argument("--batch-size", metavar="N", type=int, help="with --plans small (default: as planned)")
    train.add_argument("--features", metavar="N", type=int, nargs="+", help="with --plans small: channels by stage")
    train.add_argument("--epochs", metavar="N", type=int, help="(default: 1000)")
    train.add_argument("--iterations-per-epoch", metavar="N", type=int, help="(default: 250)")
    train.add_argument(
        "--pretrain",
        metavar="DATASET",
        help="id or name of another raw dataset with full masks, for the arms ARM:pretrained; may be given later",
    )
    train.add_argument("--pretrain-epochs", metavar="N", type=int, help="of these trainings (default: --epochs)")
    train.add_argument("--val-iterations", metavar="N", type=int, help="of nnU-Net's online validation (default: 1)")
    train.add_argument("--optimizer", choices=("sgd", "adamw"), help="(default: the trainer's own, nnU-Net's SGD)")
    train.add_argument("--lr", type=float, help="initial learning rate (default: the trainer's own)")
    train.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        help="on a CPU; bfloat16 halves the time where the CPU has it; on CUDA nnU-Net's own (default: float32)",
    )

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
    how.add_argument("-device", "--device", choices=("cpu", "cuda", "mps"), help="(default: cuda)")
    how.add_argument("--jobs", metavar="N", type=int, default=1, help="trainings side by side (default: 1)")
    how.add_argument("--gpus", metavar="ID", nargs="+", help="the jobs take turns on these (CUDA_VISIBLE_DEVICES)")
    how.add_argument("--threads", metavar="N", type=int, help="of each training on a CPU (default: all cores)")
    how.add_argument("--num-processes", metavar="N", type=int, help="of preprocessing, prediction, evaluation")
    how.add_argument("--plan", action="store_true", help="say what would be done and how long it would take")
    how.add_argument("--time", action="store_true", help="with --plan: time a few iterations first (prepares the data)")
    how.add_argument("--commands", action="store_true", help="print every run as one command for a scheduler")
    how.add_argument("--run", metavar="RUN", help="do one run of those that --commands printed")
    how.add_argument("--report-only", action="store_true", help="report what has finished; train nothing")
    how.add_argument(
        "--cost",
        metavar="WHAT=TIME",
        nargs="+",
        help="expert time, such as mask=20min/image point=3s/object (defaults: docs/accuracy.md)",
    )


def run(args: argparse.Namespace) -> int:
    from nnunet_dsp.benchmark.accuracy.benchmark import run_benchmark

    return run_benchmark(args)
