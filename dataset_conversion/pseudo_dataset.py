"""`nnunet_dsp pseudo-dataset -d SRC -i PREDICTIONS -o DST`: a dataset whose labels are a model's predictions.

    nnUNetv2_predict -i nnUNet_raw/Dataset501_Cells/imagesTr -o predictions -d 501 -c 2d -f 0 -tr nnUNetTrainerPrompt
    nnunet_dsp pseudo-dataset -d 501 -i predictions -o 502

makes Dataset502 of the images of 501 (linked) with the predictions as labels. Annotated voxels win: wherever SRC's own
label is not 'ignore', and where a point of annotationsTr lies, DST keeps what was annotated. A new network is then
trained on it as on any other dataset. With --threshold, voxels predicted with less confidence become 'ignore'; that
needs the .npz files of nnUNetv2_predict --save_probabilities.

Cases that SRC annotates completely need no prediction. An interrupted run is taken up where it stopped.
"""

import argparse
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nnunet_dsp.annotations import LabelNames, case_file, check_against_image, describe_source, read_annotations
from nnunet_dsp.dataset_conversion import raw_dataset
from nnunet_dsp.dataset_conversion.arguments import add_making_arguments
from nnunet_dsp.dataset_conversion.parallel import map_cases
from nnunet_dsp.dataset_conversion.raw_dataset import EVALUATION_FOLDER, RawCase, RawDataset
from nnunet_dsp.dataset_conversion.splits import SPLITS_FILE, read_splits

ANNOTATIONS = "annotationsTr"
STATE = "state.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("-d", dest="source", metavar="SRC", required=True, help="id or name of the raw dataset")
    parser.add_argument(
        "-i",
        dest="predictions",
        metavar="FOLDER",
        type=Path,
        required=True,
        help="predictions for SRC's imagesTr, one label file a case, as nnUNetv2_predict writes them",
    )
    parser.add_argument(
        "-o",
        dest="target",
        metavar="DST",
        required=True,
        help="the new dataset: an id, 1 to 999, or a full name such as Dataset502_CellsPseudo",
    )
    parser.add_argument("--name", help="name of the new dataset if DST is an id (default: that of SRC + 'Pseudo')")
    parser.add_argument(
        "--threshold",
        metavar="P",
        type=float,
        default=0.0,
        help="predicted voxels whose highest probability is below P become 'ignore', 0 to 1 (default: 0, none)",
    )
    add_making_arguments(parser)


class _Job(NamedTuple):
    """What a worker needs for one case."""

    case: RawCase
    prediction: Path | None
    probabilities: Path | None
    annotations: Path | None
    target: Path
    reader_writer: Any
    labels: dict[str, int]
    names: LabelNames
    ignore: int | None  # in SRC
    new_ignore: int
    threshold: float


class Counts(NamedTuple):
    """Voxels of one case by where their label comes from."""

    annotated: int
    predicted: int
    unsure: int


def merge(
    annotated: np.ndarray,
    known: np.ndarray,
    predicted: np.ndarray | None,
    confidence: np.ndarray | None,
    *,
    ignore: int,
    threshold: float,
) -> tuple[np.ndarray, Counts]:
    """One case's new label: what is annotated, else what is predicted, else (or if not sure enough) ignore.

    Args:
        annotated: (z, y, x) integer.
        known: (z, y, x) bool, where that counts.
        predicted: (z, y, x) integer, or None: there is no prediction, and everything is known.
        confidence: the highest probability of each voxel, or None where no threshold is set.
        ignore: the value for unsure voxels.
        threshold: least confidence. NaN is never sure.
    """
    if predicted is None:
        return annotated.copy(), Counts(int(known.sum()), 0, 0)
    unsure = np.zeros(annotated.shape, bool) if confidence is None else ~known & ~(confidence >= threshold)
    label = np.where(known, annotated, predicted)
    label[unsure] = ignore
    predicted_voxels = int((~known & ~unsure).sum())
    return label, Counts(int(known.sum()), predicted_voxels, int(unsure.sum()))


def _read_annotated(job: _Job) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """A case's label (z, y, x) with its points, where that is annotated (bool), and the file's properties."""
    mask, properties = raw_dataset.read_label(job.reader_writer, job.case.label)
    unknown = sorted(set(np.unique(mask).tolist()) - set(job.labels.values()) - {job.ignore})
    if unknown:
        raise ValueError(f"{job.case.label}: value(s) {unknown} are no label of dataset.json, which has {job.labels}.")
    known = np.ones(mask.shape, bool) if job.ignore is None else mask != job.ignore
    if job.annotations is not None:
        _apply_annotations(job, mask, known)
    return mask, known, properties


def _make_label(job: _Job) -> tuple[str, Counts]:
    mask, known, properties = _read_annotated(job)
    predicted = confidence = None
    if job.prediction is not None:
        predicted, _ = raw_dataset.read_label(job.reader_writer, job.prediction)
        if predicted.shape != mask.shape:
            raise ValueError(
                f"{job.prediction}: expected the shape of the image's label, {mask.shape}, but got {predicted.shape}. "
                "Is it a prediction for another image?"
            )
        unknown = sorted(set(np.unique(predicted).tolist()) - set(job.labels.values()))
        if unknown:
            raise ValueError(
                f"{job.prediction}: value(s) {unknown} are no label of dataset.json, which has {job.labels}. "
                "Is it a prediction of a model for another dataset?"
            )
        if job.probabilities is not None:
            confidence = read_confidence(job.probabilities, mask.shape)
    label, counts = merge(mask, known, predicted, confidence, ignore=job.new_ignore, threshold=job.threshold)
    # a 3D tif comes with a .json: both are written elsewhere first and renamed when whole
    building = job.target.parent / f".{job.target.name}.building"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    raw_dataset.write_label(job.reader_writer, label, building / job.target.name, properties)
    for file in sorted(building.iterdir(), key=lambda f: f.name == job.target.name):  # the label itself last
        os.replace(file, job.target.parent / file.name)
    building.rmdir()
    raw_dataset.write_json(_counts_file(job.target.parent, job.case.name), list(counts))
    return job.case.name, counts


def _apply_annotations(job: _Job, mask: np.ndarray, known: np.ndarray) -> None:
    """What annotationsTr says of a case, in place: points are annotated voxels; background of a mask that leaves
    classes out is not."""
    if job.annotations is None:
        return
    said = read_annotations(job.annotations, job.names)
    check_against_image(said, mask.shape, source=describe_source(job.annotations), labels=job.names)
    if said.mask_labels is not None and {"background", *said.mask_labels} < set(job.labels):
        known &= mask != job.labels["background"]
    highest = np.asarray(mask.shape) - 1
    for point in said.points:
        at = np.floor(np.asarray((0.0,) * (3 - len(point.at)) + tuple(point.at)) + 0.5).astype(int)
        voxel = tuple(np.clip(at, 0, highest))
        if not known[voxel]:
            mask[voxel] = job.labels[point.label]
            known[voxel] = True


def read_confidence(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The highest probability of each voxel, from a .npz of nnUNetv2_predict --save_probabilities.

    Raises:
        ValueError: the file cannot be read or holds something else.
    """
    try:
        with np.load(file, allow_pickle=False) as content:
            probabilities = content["probabilities"]
    except Exception as error:  # zipfile's, zlib's, numpy's own; a data error whatever the type
        raise ValueError(f"{file} cannot be read as nnU-Net's probabilities: {error}") from error
    if probabilities.ndim != 4 or probabilities.shape[1:] != shape or probabilities.dtype.kind != "f":
        raise ValueError(
            f"{file}: expected floating probabilities of shape (classes, {', '.join(map(str, shape))}), but got "
            f"{probabilities.dtype} {probabilities.shape}."
        )
    result: np.ndarray = probabilities.max(0).astype(np.float32)
    return result


def run(args: argparse.Namespace) -> int:
    if not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold: expected a number from 0 to 1, but got {args.threshold}.")
    source = raw_dataset.read_dataset(args.source)
    labels = source.labels
    target = raw_dataset.derived_dataset_folder(
        source.folder, args.target, args.name, "Pseudo", overwrite=args.overwrite
    )
    if not args.predictions.is_dir():
        raise FileNotFoundError(f"-i: there is no folder {args.predictions}.")
    new_ignore = max(labels.values()) + 1 if source.ignore_label is None else source.ignore_label
    working = target.parent / f".{target.name}.pseudo"
    jobs = _jobs(args, source, working / "labelsTr", new_ignore)
    done = _take_up(working, _fingerprint(args, source, jobs))
    counts = {name: count for name, count in done.items() if name in source.cases}
    if counts:
        print(f"Taking up an interrupted run: {len(counts)} of {len(jobs)} cases are done.")
    left = [job for job in jobs if job.case.name not in counts]
    for name, count in map_cases(_make_label, left, processes=args.num_processes, description="Making labels"):
        counts[name] = count
    total = Counts(*(sum(values) for values in zip(*counts.values(), strict=True)))
    _finish(args, source, working, target, total, new_ignore, len(jobs))
    voxels = sum(total)
    print(f"{target}: {len(jobs)} cases")
    for kind, number in total._asdict().items():
        print(f"  {kind:<10}{number / voxels:>8.2%} of the voxels")
    if total.unsure == 0:
        print("  No voxel is 'ignore', so dataset.json declares no such label.")
    print(f"Next: nnUNetv2_plan_and_preprocess -d {target.name[7:10]} (or nnUNetv2_preprocess with plans moved there)")
    return 0


def _jobs(args: argparse.Namespace, source: RawDataset, folder: Path, new_ignore: int) -> list[_Job]:
    """One for each case; ValueError names the cases whose prediction is missing."""
    ending = source.file_ending
    reader_writer = source.reader_writer()
    names = LabelNames.from_dataset_json(source.json)
    jobs, lacking, without_label, without_probabilities = [], [], [], []
    for case in source.cases.values():
        prediction = args.predictions / f"{case.name}{ending}"
        probabilities = args.predictions / f"{case.name}.npz"
        annotations = case_file(source.folder / ANNOTATIONS, case.name)
        if not case.label.is_file():
            without_label.append(case.name)
            continue
        if args.threshold > 0 and prediction.is_file() and not probabilities.is_file():
            without_probabilities.append(case.name)
        jobs.append(
            _Job(
                case=case,
                prediction=prediction if prediction.is_file() else None,
                probabilities=probabilities if args.threshold > 0 and prediction.is_file() else None,
                annotations=annotations if annotations.is_file() else None,
                target=folder / f"{case.name}{ending}",
                reader_writer=reader_writer,
                labels=source.labels,
                names=names,
                ignore=source.ignore_label,
                new_ignore=new_ignore,
                threshold=args.threshold,
            )
        )
        silent = source.ignore_label is not None or annotations.is_file()  # else the whole mask counts
        if not prediction.is_file() and silent and not _read_annotated(jobs[-1])[1].all():
            lacking.append(case.name)
    if without_label:
        raise ValueError(
            f"{source.folder}: {_some(without_label)} without a label file. Run `nnunet_dsp prepare -d "
            f"{source.folder.name[7:10]}`, which writes labels that are 'ignore' all over."
        )
    if lacking:
        raise ValueError(
            f"{args.predictions}: {_some(lacking)} not annotated completely and without a prediction CASE{ending}. "
            f"Predict them: nnUNetv2_predict -i {source.folder / 'imagesTr'} -o {args.predictions} ..."
        )
    if without_probabilities:
        raise ValueError(
            f"{args.predictions}: --threshold needs probabilities, but there is no CASE.npz for "
            f"{_some(without_probabilities)}. Predict with --save_probabilities."
        )
    if all(job.prediction is None for job in jobs):
        raise ValueError(
            f"{args.predictions} holds no prediction for {source.folder.name}: no file is named like its cases, for "
            f"instance {jobs[0].case.name}{ending}."
        )
    return jobs


def _some(cases: list[str]) -> str:
    more = f" and {len(cases) - 10} more" if len(cases) > 10 else ""
    return f"{len(cases)} case(s) ({', '.join(cases[:10])}{more})"


def _fingerprint(args: argparse.Namespace, source: RawDataset, jobs: list[_Job]) -> str:
    """Changes when anything a label is made of does: files by size and time, labels, threshold."""
    parts: list[Any] = [str(source.folder.resolve()), source.json["labels"], args.threshold]
    for job in jobs:
        for file in (job.case.label, job.prediction, job.probabilities, job.annotations):
            if file is not None:
                status = file.stat()
                parts.append([str(file.resolve()), status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _take_up(working: Path, fingerprint: str) -> dict[str, Counts]:
    """Prepares the working folder; the cases that an interrupted run on the same files left done in it."""
    state = working / STATE
    try:
        same = json.loads(state.read_text(encoding="utf-8")) == {"fingerprint": fingerprint}
    except (OSError, ValueError):
        same = False
    if not same:
        shutil.rmtree(working, ignore_errors=True)
        (working / "labelsTr").mkdir(parents=True)
        raw_dataset.write_json(state, {"fingerprint": fingerprint})
        return {}
    done = {}
    for file in (working / "labelsTr").glob(".*.counts.json"):  # written after the label, so the label is whole
        done[file.name[1 : -len(".counts.json")]] = Counts(*json.loads(file.read_text(encoding="utf-8")))
    return done


def _counts_file(folder: Path, case: str) -> Path:
    return folder / f".{case}.counts.json"


def _finish(
    args: argparse.Namespace,
    source: RawDataset,
    working: Path,
    target: Path,
    total: Counts,
    new_ignore: int,
    num_cases: int,
) -> None:
    """Puts the dataset together around the labels and gives it its name; the working folder goes."""
    with raw_dataset.building(target) as folder:
        for name in ("imagesTr", "labelsTr"):
            (folder / name).mkdir()
        for file in sorted((working / "labelsTr").iterdir()):
            if not file.name.startswith("."):
                shutil.copyfile(file, folder / "labelsTr" / file.name)
        for case in source.cases.values():
            raw_dataset.link_case_images(case, folder / "imagesTr", source.file_ending)
        for part in ("imagesTs", "labelsTs", EVALUATION_FOLDER):
            if (source.folder / part).is_dir():
                raw_dataset.link_folder(source.folder / part, folder / part)
        dataset_json = {k: v for k, v in source.json.items() if k not in ("dataset", "prompt")}
        plain: Mapping[str, int] = source.labels
        dataset_json["labels"] = {**plain, "ignore": new_ignore} if total.unsure else dict(plain)
        dataset_json |= {"numTraining": num_cases, "name": target.name[len("Dataset000_") :]}
        raw_dataset.write_json(folder / "dataset.json", dataset_json)
        splits = source.folder / SPLITS_FILE
        if splits.is_file():
            raw_dataset.write_json(folder / SPLITS_FILE, read_splits(splits, source.cases))
        raw_dataset.write_record(
            folder, "nnunet_dsp pseudo-dataset", vars(args), source=source.folder.name, voxels=total._asdict()
        )
    shutil.rmtree(working, ignore_errors=True)

