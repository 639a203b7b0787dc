"""`nnunet_dsp prepare -d ID`: makes a raw dataset with weak annotations ready for nnUNetv2_plan_and_preprocess.

Run it after adding images or annotations. It checks every annotation file against its image and its mask, gives images
without a mask a label file that is 'ignore' all over, declares the ignore label in dataset.json, writes the dataset
fingerprint (in which nnU-Net itself would count ignore voxels as foreground), and copies annotationsTr and
splits_final.json to nnUNet_preprocessed. With a problem in the annotations it changes nothing. Instance datasets
(`nnunet_dsp convert instances`) are prepared likewise; they have label images only, no annotation files.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nnunet_dsp.annotations import (
    AnnotationError,
    Annotations,
    LabelNames,
    case_file,
    check_against_image,
    describe_source,
    find_contradictions,
    read_annotations,
)
from nnunet_dsp.dataset_conversion import raw_dataset
from nnunet_dsp.dataset_conversion.arguments import add_processes_argument
from nnunet_dsp.dataset_conversion.array_files import check_whole
from nnunet_dsp.dataset_conversion.fingerprint import fingerprint_is_contaminated, write_fingerprint
from nnunet_dsp.dataset_conversion.instance_labels import ignore_value, is_instance_dataset
from nnunet_dsp.dataset_conversion.parallel import map_cases
from nnunet_dsp.dataset_conversion.raw_dataset import RawCase, RawDataset
from nnunet_dsp.dataset_conversion.splits import SPLITS_FILE, read_splits

__all__ = ["add_arguments", "fingerprint_is_contaminated", "prepare", "run", "sync_annotations"]

FOLDER = "annotationsTr"
SHOWN = 20  # problems printed, worst first; --all-problems prints them all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "-d", dest="datasets", metavar="ID", nargs="+", required=True, help="ids or names of raw datasets"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check, and say what would be changed, but change nothing"
    )
    parser.add_argument("--all-problems", action="store_true", help=f"print every problem (default: the {SHOWN} worst)")
    add_processes_argument(parser)


def run(args: argparse.Namespace) -> int:
    folders = [raw_dataset.environment_folder("nnUNet_raw") / raw_dataset.dataset_name(d) for d in args.datasets]
    raw_dataset.environment_folder("nnUNet_preprocessed")
    shown = None if args.all_problems else SHOWN
    results = [prepare(f, dry_run=args.dry_run, processes=args.num_processes, shown=shown) for f in folders]
    return 0 if all(results) else 1


def prepare(folder: Path, *, dry_run: bool = False, processes: int = 1, shown: int | None = SHOWN) -> bool:
    """Prepare one raw dataset, saying what is done; False, and nothing changed, if its annotations have problems."""
    dataset = raw_dataset.read_dataset(folder)
    would = "would be " if dry_run else ""
    print(f"{folder.name}")
    missing = [c for c in dataset.cases.values() if not c.label.is_file()]
    annotations, problems, masked = check_dataset(dataset, processes=processes)
    if problems:
        shown = len(problems) if shown is None else shown
        print(
            f"{folder.name}: {len(problems)} problem(s) in {FOLDER}, worst first; nothing was changed.", file=sys.stderr
        )
        for problem in problems[:shown]:
            print(f"  {problem}", file=sys.stderr)
        if len(problems) > shown:
            print(f"  ... and {len(problems) - shown} more (--all-problems prints them).", file=sys.stderr)
        return False
    _count_cases(dataset, annotations, masked)

    partial = any(said.mask_labels is not None for said in annotations.values())
    changed = _new_dataset_json(dataset, bool(missing) or partial)
    for key, value in changed.items():
        old = dataset.json.get(key)
        print(f"  dataset.json: {key} {would}changed from {json.dumps(old)} to {json.dumps(value)}.")
    if changed and not dry_run:
        raw_dataset.write_json(folder / "dataset.json", dataset.json | changed)
    if missing:
        print(f"  labelsTr: {len(missing)} label files {would}written, 'ignore' all over, for images without a mask.")
    if not dry_run:
        if missing:
            _write_ignored_labels(RawDataset(folder, dataset.json | changed, dataset.cases), missing, processes)
        dataset = raw_dataset.read_dataset(folder)
    _to_preprocessed(dataset, annotations, dry_run=dry_run, processes=processes)
    return True


def _count_cases(dataset: RawDataset, annotations: dict[str, Annotations], masked: dict[str, bool]) -> None:
    """Say how many cases have what."""
    weak = {n for n, a in annotations.items() if not a.is_empty}
    with_mask = {n for n, some in masked.items() if some}
    if is_instance_dataset(dataset.json):
        print(
            f"  {len(dataset.cases)} cases with instances for labels: {len(with_mask)} with some labelled, "
            f"{len(set(dataset.cases) - with_mask)} with nothing. Train them with nnUNetTrainerCRAC."
        )
        return
    nothing = set(dataset.cases) - weak - with_mask
    print(
        f"  {len(dataset.cases)} cases: {len(with_mask)} with a mask or part of one, {len(weak - with_mask)} "
        "with weak annotations only, "
        f"{len(nothing)} with nothing."
    )
    if not with_mask:
        print("  No case has a mask, so nothing can be validated, and nnU-Net's Dice during training means nothing.")


def _new_dataset_json(dataset: RawDataset, needs_ignore: bool) -> dict[str, Any]:
    """The entries of dataset.json that must change."""
    changed: dict[str, Any] = {}
    if needs_ignore and dataset.ignore_label is None:
        instances = is_instance_dataset(dataset.json)
        ignore = ignore_value(dataset.json) if instances else max(dataset.labels.values()) + 1
        changed["labels"] = {**dataset.json["labels"], "ignore": ignore}
    if dataset.json["numTraining"] != len(dataset.cases):
        changed["numTraining"] = len(dataset.cases)
    entries = dataset.json.get("dataset", {})
    if any("label" not in entry for entry in entries.values()):
        default = {n: f"labelsTr/{n}{dataset.file_ending}" for n in entries}
        changed["dataset"] = {n: {"label": default[n], **entry} for n, entry in entries.items()}
    return changed


class _LabelJob(NamedTuple):
    case: RawCase
    reader_writer: Any
    ignore: int


def _write_ignored_label(job: _LabelJob) -> None:
    job.case.label.parent.mkdir(parents=True, exist_ok=True)
    images, properties = job.reader_writer().read_images([str(i) for i in job.case.images])
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=job.case.label.parent) as temporary:
        file = Path(temporary) / job.case.label.name
        labels = np.full(images.shape[1:], job.ignore, np.min_scalar_type(job.ignore))
        raw_dataset.write_label(job.reader_writer, labels, file, properties)
        for written in sorted(Path(temporary).iterdir()):  # a 3D tif comes with a .json
            os.replace(written, job.case.label.parent / written.name)


def _write_ignored_labels(dataset: RawDataset, cases: Sequence[RawCase], processes: int) -> None:
    ignore = dataset.ignore_label
    if ignore is None:
        raise ValueError(f"{dataset.folder / 'dataset.json'} declares no ignore label.")
    reader_writer = dataset.reader_writer()
    jobs = [_LabelJob(c, reader_writer, ignore) for c in cases]
    for _ in map_cases(_write_ignored_label, jobs, processes=processes, description="Writing labels"):
        pass


class _CheckJob(NamedTuple):
    case: RawCase
    file: Path
    reader_writer: Any
    labels: LabelNames
    ignore: int | None


def check_dataset(
    dataset: RawDataset, *, processes: int = 1
) -> tuple[dict[str, Annotations], list[str], dict[str, bool]]:
    """Check every annotation file against dataset.json, its image and its mask.

    Returns:
        The annotations by case; the problems in sentences that name the file, worst first: files that belong to no
        case or cannot be read, annotations that do not fit the image, contradictions; and for each case whether a
        voxel of it is masked.
    """
    labels = LabelNames.from_dataset_json(dataset.json)
    folder = dataset.folder / FOLDER
    found: list[tuple[int, str]] = []
    if not is_instance_dataset(dataset.json):
        dataset.labels  # noqa: B018  refuses other regions, with a message
    elif files := sorted(p.name for p in folder.glob("*.json")) if folder.is_dir() else []:
        text = (
            f"{FOLDER} holds {len(files)} file(s), such as {files[0]}, but the labels of this dataset are instances, "
            "which are annotated in label images only: nnUNetTrainerCRAC reads no points, boxes or tags. Remove the "
            "folder, or declare plain labels and train nnUNetTrainerDSP."
        )
        return {}, [text], {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.suffix.lower() != ".json" or path.name.startswith("."):
            continue
        if path.suffix != ".json":
            found.append(
                (0, f"{describe_source(path)}: the file name ends in {path.suffix}. Rename it to {path.stem}.json.")
            )
        elif path.stem not in dataset.cases:
            found.append(
                (0, f"{describe_source(path)}: there is no case {path.stem!r} in imagesTr. Rename or remove the file.")
            )
    reader_writer = dataset.reader_writer()
    jobs = [
        _CheckJob(c, case_file(folder, c.name), reader_writer, labels, dataset.ignore_label)
        for c in dataset.cases.values()
    ]
    annotations: dict[str, Annotations] = {}
    masked: dict[str, bool] = {}
    results = map_cases(_check_case, jobs, processes=processes, description="Checking annotations")
    for job, (read, problems, some_mask) in zip(jobs, results, strict=True):
        masked[job.case.name] = some_mask
        found += problems
        if read is not None:
            annotations[job.case.name] = read
    return annotations, [text for _, text in sorted(found, key=lambda f: f[0])], masked


def _check_case(job: _CheckJob) -> tuple[Annotations | None, list[tuple[int, str]], bool]:
    """Annotations (None: no file, or unusable), problems with severity (0 is worst), whether any voxel is masked."""
    for image in job.case.images:
        try:
            check_whole(image)
        except (OSError, RuntimeError, ValueError, zlib.error) as error:
            raise ValueError(f"{image} cannot be read: {error}") from error
    mask = None
    if job.case.label.is_file():
        mask, _ = raw_dataset.read_label(job.reader_writer, job.case.label)
    masked = mask is not None and (job.ignore is None or bool((mask != job.ignore).any()))
    if not job.file.is_file():
        return None, [], masked
    source = describe_source(job.file)
    try:
        annotations = read_annotations(job.file, job.labels)
    except AnnotationError as error:
        return None, [(0, str(error))], masked
    images, _ = job.reader_writer().read_images([str(i) for i in job.case.images])
    try:
        check_against_image(annotations, images.shape[1:], source=source, labels=job.labels)
    except AnnotationError as error:
        return annotations, [(1, str(error))], masked
    if mask is None:
        mask = np.full(images.shape[1:], -1, np.int16)  # nobody drew anything
        ignore: int | None = -1
    else:
        ignore = job.ignore
    if mask.shape != images.shape[1:]:
        return (
            annotations,
            [
                (
                    1,
                    f"{source}: the label file {job.case.label} has the shape {mask.shape}, its image "
                    f"{images.shape[1:]}.",
                )
            ],
            masked,
        )
    contradictions = find_contradictions(annotations, mask, source=source, labels=job.labels, ignore_label=ignore)
    return annotations, [(2, text) for text in contradictions], masked


def _to_preprocessed(
    dataset: RawDataset, annotations: dict[str, Annotations], *, dry_run: bool, processes: int
) -> None:
    target = raw_dataset.environment_folder("nnUNet_preprocessed") / dataset.folder.name
    if dry_run:
        print(
            f"  The fingerprint, {len(annotations)} annotation files and splits_final.json, if there is one, "
            f"would be written to {target}."
        )
        return
    target.mkdir(exist_ok=True)
    if dataset.ignore_label is None:
        print("  The dataset has no ignore label: nnU-Net's own fingerprint is right, nothing to do.")
    else:
        basis, written = write_fingerprint(dataset, target, annotations, processes=processes)
        on = {
            "masks": "the masked voxels",
            "annotations": "the voxels at points and inside boxes, for no mask shows any foreground",
            "everything": "all voxels, for there is no mask, point or box of any foreground",
        }[basis]
        print(f"  Fingerprint {'written' if written else 'up to date'}: foreground intensities are those of {on}.")
    copied = sync_annotations(dataset.folder, target, missing_is_empty=True)
    print(f"  {copied} annotation file(s) brought up to date in {target / FOLDER}.")
    _copy_splits(dataset, target)
    for plans in sorted(target.glob("*Plans*.json")):
        if fingerprint_is_contaminated(raw_dataset.read_json(plans), target, dataset.json):
            print(
                f"  {plans.name} was made from another fingerprint and uses its intensities. Plan and preprocess again."
            )
    print(
        f"  Next: nnUNetv2_plan_and_preprocess -d {dataset.folder.name[7:10]}   (without --clean, which would "
        "undo the fingerprint)"
    )


def _copy_splits(dataset: RawDataset, target: Path) -> None:
    source = dataset.folder / SPLITS_FILE
    if not source.is_file():
        return
    if (target / SPLITS_FILE).exists():
        if source.read_bytes() != (target / SPLITS_FILE).read_bytes():
            print(
                f"  {target / SPLITS_FILE} differs from the one in nnUNet_raw and is kept. Remove it to use the other."
            )
        return
    splits = read_splits(source, dataset.cases)
    raw_dataset.write_json(target / SPLITS_FILE, splits)
    print(f"  {SPLITS_FILE} with {len(splits)} fold(s) copied to nnUNet_preprocessed.")


def sync_annotations(
    raw_folder: str | os.PathLike[str],
    preprocessed_folder: str | os.PathLike[str],
    *,
    missing_is_empty: bool = False,
) -> int:
    """Bring the annotation files of nnUNet_preprocessed up to date with those of nnUNet_raw.

    New and changed files are copied, vanished ones removed, each atomically. Where `raw_folder` has no annotationsTr
    (on a cluster that has only nnUNet_preprocessed, for instance) nothing happens; an empty annotationsTr removes all.

    Args:
        raw_folder: nnUNet_raw/DatasetXXX_Name; need not exist.
        preprocessed_folder: nnUNet_preprocessed/DatasetXXX_Name.
        missing_is_empty: `raw_folder` is all there, so that without annotationsTr there are no annotations (any more).

    Returns:
        How many files were copied or removed.
    """
    source, target = Path(raw_folder) / FOLDER, Path(preprocessed_folder) / FOLDER
    if not source.is_dir() and not missing_is_empty:
        return 0
    files = {p.name: p for p in source.glob("*.json") if not p.name.startswith(".")}
    if not files and not target.is_dir():
        return 0
    target.mkdir(parents=True, exist_ok=True)
    changes = 0
    for name, file in files.items():
        if not (target / name).is_file() or file.read_bytes() != (target / name).read_bytes():
            with raw_dataset.replacing(target / name) as temporary:
                shutil.copyfile(file, temporary)
            changes += 1
    for file in target.glob("*.json"):
        if file.name not in files and not file.name.startswith("."):
            file.unlink(missing_ok=True)
            changes += 1
    return changes
