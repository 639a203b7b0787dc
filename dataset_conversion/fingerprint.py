"""The dataset fingerprint without ignore voxels, and telling whether plans were made from one that has them.

nnU-Net counts every voxel with a label above 0 as foreground (its issue #3055), so the ignore label, always the
highest, is counted too. Where most of a dataset is weakly annotated the intensity statistics, by which CT images are
normalised, are then those of the background.
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from nnunet_dsp import __version__
from nnunet_dsp.annotations import Annotations, LabelNames
from nnunet_dsp.dataset_conversion import raw_dataset
from nnunet_dsp.dataset_conversion.parallel import map_cases
from nnunet_dsp.dataset_conversion.raw_dataset import RawCase, RawDataset

FILE = "dataset_fingerprint.json"
MARK = "nnunet_dsp"  # the key we add; nnU-Net reads only those it knows
MARK_VERSION = 1
INTENSITIES = "foreground_intensity_properties_per_channel"
# nnU-Net's other schemes look at each image alone; a scheme not known here is taken to use the intensity properties
INDEPENDENT_SCHEMES = {"ZScoreNormalization", "NoNormalization", "RescaleTo01Normalization", "RGBTo01Normalization"}

Basis = Literal["masks", "annotations", "everything"]


class _Job(NamedTuple):
    """What a worker needs to write the label that the extractor shall see instead of a case's own."""

    case: RawCase
    target: Path
    reader_writer: Any
    ignore: int
    annotations: Annotations | None
    basis: Basis


def write_fingerprint(
    dataset: RawDataset, preprocessed_folder: Path, annotations: Mapping[str, Annotations], *, processes: int = 1
) -> tuple[Basis, bool]:
    """Let nnU-Net extract the fingerprint from labels in which ignore is background, and mark the result as ours.

    nnUNetv2_plan_and_preprocess takes the fingerprint that it finds, unless it is called with --clean.

    Args:
        dataset: every case has a label file; where it has no ignore label, the result is nnU-Net's own fingerprint.
        preprocessed_folder: nnUNet_preprocessed/DatasetXXX_Name, made if need be.
        annotations: by case. Where no mask shows any foreground, the voxels at points and inside boxes of foreground
            classes are taken instead; where there are none of these either, all voxels.

    Returns:
        Which voxels count as foreground, and whether the file was written (False: the one that was there is up to
        date).
    """
    preprocessed_folder.mkdir(parents=True, exist_ok=True)
    path = preprocessed_folder / FILE
    inputs = _digest(dataset, annotations)
    mark = _mark_of(path)
    if mark is not None and mark.get("inputs") == inputs:
        return mark["foreground"], False
    reader_writer = dataset.reader_writer()
    ignore = -1 if dataset.ignore_label is None else dataset.ignore_label
    with tempfile.TemporaryDirectory(prefix=".fingerprint-", dir=preprocessed_folder) as temporary:
        labels: dict[str, Path] = {}
        basis: Basis = "masks"
        for basis in ("masks", "annotations", "everything"):
            jobs = [
                _Job(
                    c,
                    Path(temporary) / f"{c.name}{dataset.file_ending}",
                    reader_writer,
                    ignore,
                    annotations.get(c.name),
                    basis,
                )
                for c in dataset.cases.values()
            ]
            foreground = 0
            for job, (count, label) in zip(
                jobs,
                map_cases(_write_label, jobs, processes=processes, description="Labels without ignore"),
                strict=True,
            ):
                foreground += count
                labels[job.case.name] = label
            if foreground:
                break
        content = _extract(dataset, labels, Path(temporary), processes)
        content[MARK] = {
            "ignore_excluded": True,
            "version": __version__,
            "format": MARK_VERSION,
            "foreground": basis,
            "inputs": inputs,
        }
        raw_dataset.write_json(path, content)
    return basis, True


def _extract(dataset: RawDataset, labels: Mapping[str, Path], folder: Path, processes: int) -> dict[str, Any]:
    """nnU-Net's extractor on other label files; it writes into `folder`."""
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

    extractor = DatasetFingerprintExtractor(dataset.folder.name, processes)
    # analyze_case is called as a static method of nnU-Net's class: nothing to override, but its input can be changed
    for name, label in labels.items():
        extractor.dataset[name]["label"] = str(label)
    # run() writes to join(nnUNet_preprocessed, dataset_name); of a join with an absolute path the latter remains
    extractor.dataset_name = str(folder.resolve())
    extractor.run(overwrite_existing=True)
    return raw_dataset.read_json(folder / FILE)


def _write_label(job: _Job) -> tuple[int, Path]:
    """Write the label the extractor shall see unless the case's own will do; its foreground voxels and its file."""
    mask, properties = raw_dataset.read_label(job.reader_writer, job.case.label)
    if job.basis == "masks":
        ignored = mask == job.ignore
        if not ignored.any():
            return int((mask > 0).sum()), job.case.label
        seen = np.where(ignored, 0, mask)
    elif job.basis == "annotations":
        seen = annotated_voxels(job.annotations, mask.shape).astype(np.uint8)
    else:
        seen = np.ones_like(mask)
    raw_dataset.write_label(job.reader_writer, seen, job.target, properties)
    return int((seen > 0).sum()), job.target


def annotated_voxels(annotations: Annotations | None, shape: tuple[int, ...]) -> np.ndarray:
    """Voxels at points and in boxes of foreground classes; bool, shape (z, y, x) with z = 1 for 2D images."""
    voxels = np.zeros(shape, bool)
    if annotations is None:
        return voxels
    for point in annotations.points:
        if point.label != "background":
            at = [min(max(round(v), 0), size - 1) for v, size in zip(point.at, shape[-len(point.at) :], strict=True)]
            voxels[(0,) * (3 - len(at)) + tuple(at)] = True
    for box in annotations.boxes:
        if box.label != "background":
            where = [slice(math.ceil(a), math.ceil(b)) for a, b in zip(box.start, box.stop, strict=True)]
            voxels[(slice(None),) * (3 - len(where)) + tuple(where)] = True
    return voxels


def _digest(dataset: RawDataset, annotations: Mapping[str, Annotations]) -> str:
    """What the fingerprint depends on: names, sizes and times of all files, the ignore label, the annotations."""
    state = hashlib.sha256(f"{MARK_VERSION} {dataset.json['labels']} {dataset.json['channel_names']}".encode())
    for case in sorted(dataset.cases.values(), key=lambda c: c.name):
        for file in (*case.images, case.label):
            status = os.stat(file)
            state.update(f"{case.name} {file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        state.update(repr(annotations.get(case.name)).encode())
    return state.hexdigest()


def _mark_of(fingerprint: Path) -> dict[str, Any] | None:
    """Our mark in a fingerprint file; None if there is no such file or it is not ours."""
    try:
        content = raw_dataset.read_json(fingerprint)
    except (FileNotFoundError, ValueError):
        return None
    mark = content.get(MARK)
    if not isinstance(mark, dict) or not mark.get("ignore_excluded") or mark.get("format") != MARK_VERSION:
        return None
    return mark


def fingerprint_is_contaminated(
    plans: Mapping[str, Any], preprocessed_folder: str | os.PathLike[str], dataset_json: Mapping[str, Any] | None = None
) -> bool:
    """Whether these plans normalise images by intensities that count ignore voxels as foreground.

    Args:
        plans: the content of a plans file.
        preprocessed_folder: nnUNet_preprocessed/DatasetXXX_Name, which holds the fingerprint.
        dataset_json: the dataset's; None: the one in `preprocessed_folder`.

    Returns:
        True where the dataset has an ignore label, some configuration has a normalisation that uses the dataset's
        intensities (CTNormalization), and those of the plans are not the ones of a fingerprint that `nnunet_dsp
        prepare` wrote.
    """
    folder = Path(preprocessed_folder)
    if dataset_json is None:
        dataset_json = raw_dataset.read_json(folder / "dataset.json")
    if LabelNames.from_dataset_json(dataset_json).ignore_label is None:
        return False
    schemes = {s for c in plans.get("configurations", {}).values() for s in c.get("normalization_schemes", ())}
    if schemes <= INDEPENDENT_SCHEMES:
        return False
    if _mark_of(folder / FILE) is None:
        return True
    right = raw_dataset.read_json(folder / FILE)[INTENSITIES]
    return not _same_numbers(json.loads(json.dumps(plans.get(INTENSITIES))), right)


def _same_numbers(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same_numbers(a[k], b[k]) for k in a)
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)
    return bool(a == b)
