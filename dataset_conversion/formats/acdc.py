"""Cardiac cine MR (ACDC) as h5 files with dense labels and scribbles, the form of github.com/HiLab-git/WSL4MIS.

Expects patientXXX_frameYY.h5 with `image` (z, y, x) in [0, 1], `label` 0-3 and, for --scribbles, `scribble` 0-3 with 4
for what nobody drew on. The files hold no voxel size: ours is the most common one of ACDC unless --spacing says
otherwise. Training and test are split by patient. Needs h5py.

Sources: Bernard et al., IEEE TMI 2018 (images, labels); Valvano et al., IEEE TMI 2021 (scribbles).
"""

import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_dsp.dataset_conversion import raw_dataset
from nnunet_dsp.dataset_conversion.arguments import add_making_arguments
from nnunet_dsp.dataset_conversion.parallel import map_cases
from nnunet_dsp.dataset_conversion.raw_dataset import EVALUATION_FOLDER
from nnunet_dsp.dataset_conversion.splits import SPLITS_FILE, split_by_group

NAME = "acdc"
HELP = "cardiac MR with dense labels or scribbles, three classes (3D, NIfTI)"

LABELS = {"background": 0, "RV": 1, "MYO": 2, "LV": 3}
IGNORE = 4  # the scribbles' own value for "unlabelled"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", type=Path, help="the folder with patientXXX_frameYY.h5")
    parser.add_argument(
        "-d", dest="dataset_id", metavar="ID", type=int, required=True, help="id of the new dataset, 1 to 999"
    )
    parser.add_argument("--name", default="ACDC", help="name of the new dataset (default: %(default)s)")
    parser.add_argument(
        "--scribbles",
        action="store_true",
        help=f"train on the scribbles; the dense labels then lie in {EVALUATION_FOLDER} (default: on the dense labels)",
    )
    parser.add_argument(
        "--spacing",
        metavar="MM",
        type=float,
        nargs=3,
        default=[10.0, 1.5625, 1.5625],
        help="voxel size in mm along z, y, x, which the files do not state (default: 10 1.5625 1.5625)",
    )
    parser.add_argument(
        "--test-patients",
        metavar="N",
        type=int,
        default=4,
        help="the last N patients go to imagesTs and labelsTs (default: %(default)s)",
    )
    add_making_arguments(parser)


def find_cases(source: Path) -> dict[int, list[Path]]:
    """Files by patient number, both sorted; FileNotFoundError if there are none, ValueError for an odd name."""
    patients: dict[int, list[Path]] = {}
    for file in sorted(source.glob("*.h5")):
        match = re.fullmatch(r"patient(\d+)_frame\d+", file.stem)
        if match is None:
            raise ValueError(f"{file}: expected a name such as patient001_frame01.h5, for the split is by patient.")
        patients.setdefault(int(match[1]), []).append(file)
    if not patients:
        raise FileNotFoundError(f"{source} holds no files such as patient001_frame01.h5.")
    return dict(sorted(patients.items()))


def read_case(file: Path, scribbles: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Image (z, y, x) float32, dense label uint8, scribble uint8 or None, checked against each other.

    Raises:
        ValueError: not an h5 file of this form, or values that are no label.
        ModuleNotFoundError: without h5py.
    """
    import h5py

    try:
        with h5py.File(file, "r") as content:
            image, label = np.asarray(content["image"], np.float32), np.asarray(content["label"])
            scribble = np.asarray(content["scribble"]) if scribbles else None
    except (OSError, KeyError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    for name, array, highest in (("label", label, max(LABELS.values())), ("scribble", scribble, IGNORE)):
        if array is None:
            continue
        if image.ndim != 3 or array.shape != image.shape:
            raise ValueError(
                f"{file}: expected image and {name} of one shape (z, y, x), but got {image.shape} and {array.shape}."
            )
        unknown = sorted(set(np.unique(array).tolist()) - set(range(highest + 1)))
        if unknown:
            raise ValueError(f"{file}: unknown value(s) {unknown} in {name}. Known are 0 to {highest}.")
    return image, label.astype(np.uint8), None if scribble is None else scribble.astype(np.uint8)


def _convert_case(job: tuple[Path, Path, str, bool, list[float]]) -> None:
    file, folder, part, scribbles, spacing = job
    image, dense, drawn = read_case(file, scribbles)
    _write(image, folder / f"images{part}" / f"{file.stem}_0000.nii.gz", spacing)
    if drawn is None:
        _write(dense, folder / f"labels{part}" / f"{file.stem}.nii.gz", spacing)
    else:
        _write(drawn, folder / f"labels{part}" / f"{file.stem}.nii.gz", spacing)
        _write(dense, folder / EVALUATION_FOLDER / f"{file.stem}.nii.gz", spacing)


def _write(array: np.ndarray, file: Path, spacing: list[float]) -> None:
    import SimpleITK

    image: Any = SimpleITK.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])  # ITK counts x first
    SimpleITK.WriteImage(image, str(file), True)


def run(args: argparse.Namespace) -> int:
    try:
        import h5py  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError("convert acdc reads h5 files and needs h5py: pip install h5py") from error
    patients = find_cases(args.source)
    if not 0 <= args.test_patients < len(patients):
        raise ValueError(
            f"--test-patients: expected 0 to {len(patients) - 1} of the {len(patients)} patients, but got "
            f"{args.test_patients}."
        )
    if min(args.spacing) <= 0:
        raise ValueError(f"--spacing: expected three lengths above 0, but got {args.spacing}.")
    numbers = list(patients)
    train, test = numbers[: len(numbers) - args.test_patients], numbers[len(numbers) - args.test_patients :]
    target = raw_dataset.new_dataset_folder(args.dataset_id, args.name, overwrite=args.overwrite)
    with raw_dataset.building(target) as folder:
        for name in (
            "imagesTr",
            "labelsTr",
            *(["imagesTs", "labelsTs"] if test else []),
            *([EVALUATION_FOLDER] if args.scribbles else []),
        ):
            (folder / name).mkdir()
        jobs = [(f, folder, "Tr", args.scribbles, args.spacing) for n in train for f in patients[n]]
        jobs += [(f, folder, "Ts", False, args.spacing) for n in test for f in patients[n]]
        for _ in map_cases(_convert_case, jobs, processes=args.num_processes, description="Converting"):
            pass
        num_training = sum(len(patients[n]) for n in train)
        raw_dataset.write_dataset_json(
            folder,
            channel_names=["cine MRI"],
            labels={**LABELS, "ignore": IGNORE} if args.scribbles else LABELS,
            num_training=num_training,
            file_ending=".nii.gz",
            licence="see the terms of the ACDC challenge",
            reference="https://github.com/HiLab-git/WSL4MIS",
            description="spacing is assumed, the source states none",
        )
        splits = split_by_group({n: [f.stem for f in patients[n]] for n in train})
        if splits:
            raw_dataset.write_json(folder / SPLITS_FILE, splits)
        raw_dataset.write_record(folder, "nnunet_dsp convert acdc", vars(args), patients={"train": train, "test": test})
    print(
        f"{target}: {num_training} training cases of {len(train)} patients, "
        f"{len(jobs) - num_training} test cases of {len(test)} others; "
        f"voxel size {args.spacing} mm (z, y, x) is assumed."
    )
    return 0
