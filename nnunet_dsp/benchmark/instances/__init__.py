"""`nnunet_dsp benchmark instances`: what a few labelled instances are worth on a dataset, against labels for all.

From one fully labelled instance dataset (`nnunet_dsp convert instances` makes it) it takes instances away, trains every
arm with nnU-Net's own command on the same images, plans and number of iterations, predicts the test cases' instances,
and reports. All it makes lies in the folder given by -o; the dataset is only read. Started again, it goes on where it
stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

EPILOG = """arms:
  full             every instance labelled, labelled edges only: the ceiling
  supervised       a share of the instances labelled, labelled edges only
  unfiltered       also the other network's affinities as pseudo-labels, all of them
  crac             the most certain of them (nnUNetTrainerCRAC)
  error-predictor  those, and not what the error predictor takes for wrong
  hard             as crac, with pseudo-labels of 0 or 1
  released         as crac, with the released code's oddities
  any other by --arm NAME=TRAINER[@full][:key=value,...], then --arms NAME; the keys are those of CRACSettings

examples, on two CPU cores:
  nnunet_dsp benchmark instances -d 703 -o DIR -c 2d --share 0.1 0.2 --arms full supervised crac --seeds 0 1 2 \\
    --plans small --patch 128 --batch-size 4 --features 12 24 48 96 --epochs 10 --iterations-per-epoch 100 --device cpu
  nnunet_dsp benchmark instances -o DIR --arms hard wide --arm wide=nnUNetTrainerCRAC:embedding_channels=32
"""

# What a call may not change in a folder that has runs already: name and default. The keys that `benchmark accuracy`
# has too mean what they mean there.
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
    "val_iterations": 1,
    "optimizer": None,
    "lr": None,
    "precision": "float32",
    "keep_background": False,
    "evaluate_on": "test",
    "test_cases": None,
    "test_fold": None,
    "test_share": None,
    "val_cases": None,
    "val_fold": None,
    "val_share": None,
    "split_seed": 0,
    "group": None,
}

# How trained networks are turned into results: to change it, only prediction and evaluation are done anew.
EVALUATION: dict[str, Any] = {
    "decoder": "mutex",
    "affinities": "average",
    "threshold": 0.5,
    "min_size": 10,
    "step_size": 0.5,
    "foreground": True,
}

# What is remembered from call to call, and may change.
SELECTION: dict[str, Any] = {
    "arms": ["full", "supervised", "unfiltered", "crac", "error-predictor"],
    "arm": [],
    "share": [0.1],
    "seeds": [0, 1, 2],
}
HOW: dict[str, Any] = {"device": "cuda", "threads": None, "num_processes": None}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("-d", dest="dataset", metavar="ID", help="id or name of a raw dataset with instances")
    parser.add_argument("-o", dest="output", metavar="DIR", type=Path, required=True, help="folder for all it makes")

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
        "--group", metavar="REGEX", help="cases with the same match (say, of the section) are held out together"
    )

    train = parser.add_argument_group("training, the same for every arm (fixed once DIR exists)")
    train.add_argument("-c", dest="configuration", help="2d or 3d_fullres (default: 2d)")
    train.add_argument("--planner", metavar="NAME", help="nnU-Net's -pl, such as nnUNetPlannerResEncM")
    train.add_argument("--plans", choices=("nnunet", "small"), help="small: as `nnunet_dsp plans` derives (nnunet)")
    train.add_argument("--patch", metavar="N", type=int, nargs="+", help="with --plans small: patch size in voxels")
    train.add_argument("--batch-size", metavar="N", type=int, help="with --plans small (default: as planned)")
    train.add_argument("--features", metavar="N", type=int, nargs="+", help="with --plans small: channels by stage")
    train.add_argument("--epochs", metavar="N", type=int, help="(default: 1000)")
    train.add_argument("--iterations-per-epoch", metavar="N", type=int, help="(default: 250)")
    train.add_argument("--val-iterations", metavar="N", type=int, help="of nnU-Net's online validation (default: 1)")
    train.add_argument("--optimizer", choices=("adam", "released", "sgd"), help="as in CRACSettings (default: adam)")
    train.add_argument("--lr", type=float, help="initial learning rate (default: the optimizer's own)")
    train.add_argument(
        "--precision", choices=("float32", "bfloat16"), help="on a CPU; as in `benchmark accuracy` (default: float32)"
    )

    predict = parser.add_argument_group("prediction (to change it in a DIR, nothing is trained anew)")
    predict.add_argument("--decoder", choices=("mutex", "multicut", "waterz", "components"), help="(default: mutex)")
    predict.add_argument("--affinities", choices=("implicit", "explicit", "average"), help="(default: average)")
    predict.add_argument("--threshold", metavar="P", type=float, help="of the affinities (default: 0.5)")
    predict.add_argument("--min-size", metavar="VOXELS", type=int, help="smaller ones are left out (default: 10)")
    predict.add_argument("--step-size", metavar="P", type=float, help="of the tiles, up to 0.5 (default: 0.5)")
    predict.add_argument(
        "--foreground",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="leave out what the network takes for background (default: yes)",
    )

    how = parser.add_argument_group("how it runs")
    how.add_argument("-device", "--device", choices=("cpu", "cuda", "mps"), help="(default: cuda)")
    how.add_argument("--jobs", metavar="N", type=int, default=1, help="trainings side by side (default: 1)")
    how.add_argument("--threads", metavar="N", type=int, help="of each training on a CPU (default: all cores)")
    how.add_argument("--num-processes", metavar="N", type=int, help="of preprocessing and evaluation")
    how.add_argument("--plan", action="store_true", help="say what would be done and how long it would take")
    how.add_argument("--time", action="store_true", help="with --plan: time a few iterations first (prepares the data)")
    how.add_argument("--report-only", action="store_true", help="report what has finished; train nothing")


def run(args: argparse.Namespace) -> int:
    from nnunet_dsp.benchmark.instances.benchmark import run_benchmark

    return run_benchmark(args)
