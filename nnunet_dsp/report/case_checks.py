"""One case looked at from all sides: read, checked, counted and drawn. What is done in the worker processes.

Whatever goes wrong with a case ends up in its report as a finding; nothing is raised. The dataset as a whole is in
dataset_checks.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import cc3d
import numpy as np
import numpy.typing as npt

from nnunet_dsp.annotation_checks import Contradiction, box_voxels, locate_contradictions, point_voxels, show_position
from nnunet_dsp.annotations import (
    AnnotationError,
    Annotations,
    LabelNames,
    case_file,
    check_against_image,
    describe_source,
    read_annotations,
)
from nnunet_dsp.dataset_conversion.array_files import check_whole
from nnunet_dsp.dataset_conversion.raw_dataset import RawCase, read_label
from nnunet_dsp.report.drawing import Picture
from nnunet_dsp.report.findings import Finding
from nnunet_dsp.report.integrity import ReadOnce, check_case
from nnunet_dsp.report.views import CaseView

FOLDER = "annotationsTr"
MASKED, PARTIAL, WEAK, UNLABELLED, UNREADABLE = "masked", "partly masked", "weak", "unlabelled", "unreadable"
STATUSES = (MASKED, PARTIAL, WEAK, UNLABELLED, UNREADABLE)

_PICTURES_PER_KIND = 3  # of one case
_WHOLE_PICTURE = ("integrity", "warning", "annotation-file", "flat-image", "no-foreground")  # no place to point at
_TEXTS_PER_KIND = 100  # of one case; the rest is counted
_REACH = 3  # voxels around a box that are looked at for where its object really ends
_SAME_BOX = 0.9  # intersection over union from which two boxes are called the same
_PAIRS = 2000  # boxes of one case up to which every pair is compared


@dataclass(frozen=True, slots=True)
class CaseJob:
    """What a worker is told."""

    case: RawCase
    annotations_folder: Path
    reader_writer: Any
    labels: LabelNames | None
    expected_labels: tuple[int, ...] | None
    channels: int
    colours: bool
    channel: int
    slices: int
    size: int
    instances: bool = False


class BoxFit(NamedTuple):
    """How far a box's object begins after its start and ends after its stop, per axis, voxels (negative: before).

    None where the mask of its class goes on beyond what is looked at, as with objects that touch.
    """

    label: str
    begins: tuple[int | None, ...]
    ends: tuple[int | None, ...]


@dataclass(slots=True)
class CaseReport:
    """What is known about one case.

    Attributes:
        name: the case.
        status: one of STATUSES.
        shape: of the image, (z, y, x), or () if it cannot be read. spacing: likewise, array order.
        annotated: share of voxels for which the mask says something, 0 to 1.
        voxels: how many of them hold each value of the mask.
        points, tight_boxes, loose_boxes: how many, by class.
        said: the annotations, None where there is no usable file.
        has_label_file: whether there is a mask file, if only one of ignored voxels.
        findings: what is wrong or doubtful.
        pictures: for the contact sheet. hidden: what they do not show, in words.
        digest: of the image's voxels.
        fits: of the boxes that could be compared with a mask.
        instances: voxels of each labelled instance, smallest first; None where the masks hold classes.
    """

    name: str
    status: str = UNREADABLE
    shape: tuple[int, ...] = ()
    spacing: tuple[float, ...] = ()
    annotated: float = 0.0
    voxels: dict[int, int] = field(default_factory=dict)
    points: Counter[str] = field(default_factory=Counter)
    tight_boxes: Counter[str] = field(default_factory=Counter)
    loose_boxes: Counter[str] = field(default_factory=Counter)
    said: Annotations | None = None
    has_label_file: bool = False
    findings: list[Finding] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    hidden: str = ""
    digest: str = ""
    fits: list[BoxFit] = field(default_factory=list)
    instances: list[int] | None = None


def look_at_case(job: CaseJob) -> CaseReport:
    """Read, check, count and draw one case. Anything a file can do wrong becomes a finding, nothing is raised."""
    report = CaseReport(job.case.name, has_label_file=job.case.label.is_file())
    try:
        _look(job, report)
    except Exception as error:  # whatever it is, the other cases must be reported
        text = f"{job.case.name}: the check itself failed here ({type(error).__name__}: {_one_line(error)})."
        report.findings.append(Finding("unreadable", text, job.case.name))
    return report


def _look(job: CaseJob, report: CaseReport) -> None:
    case = job.case
    reader = ReadOnce(job.reader_writer)
    image = _read_image(job, reader, report)
    mask = _read_mask(job, reader, report)
    if image is not None and job.expected_labels is not None:
        _ask_nnunet(job, reader, report, mask_readable=mask is not None)
    said = _read_annotations(job, report, image)
    if image is None:
        return
    report.digest = hashlib.blake2b(np.ascontiguousarray(image).view(np.uint8).data, digest_size=16).hexdigest()
    flat = [channel for channel, values in enumerate(image) if values.size and values.min() == values.max()]
    if flat:
        channels = f"channel {', '.join(map(str, flat))}" if len(image) > 1 else "the image"
        report.findings.append(
            Finding(
                "flat-image", f"{case.name}: {channels} holds the value {image[flat[0]].flat[0]:g} only.", case.name
            )
        )
    fits = mask is not None and mask.shape == image.shape[1:]
    if mask is not None and not fits:
        if not any(finding.kind == "integrity" for finding in report.findings):  # nnU-Net has said so
            text = f"{case.name}: the image has the shape {image.shape[1:]}, its mask {mask.shape} (z, y, x)."
            report.findings.append(Finding("unreadable", text, case.name))
        mask = None
    ignore = job.labels.ignore_label if job.labels is not None else None
    _count(report, mask, ignore, said)
    if mask is None and report.has_label_file:
        report.status = UNREADABLE
    view = CaseView(image, mask, said, job, report.spacing)
    if said is not None and job.labels is not None:
        _contradictions(report, said, mask, job.labels, view)
        if not said.is_empty:
            _doubtful_points(report, said, view)
            _doubtful_boxes(report, said, mask, job.labels, view)
    if mask is not None and job.instances:
        _doubtful_instances(report, mask, ignore, view)
    elif mask is not None and report.status == MASKED:
        _doubtful_mask(report, mask, view)
    report.pictures, report.hidden = view.contact_sheet()
    for picture in report.pictures:
        picture.description = f"{case.name}, {report.status}. {picture.description}"
    for finding in report.findings:
        if finding.picture is None and finding.kind in _WHOLE_PICTURE:
            finding.picture = report.pictures[0]


# --- reading


def _read_image(job: CaseJob, reader: ReadOnce, report: CaseReport) -> npt.NDArray[Any] | None:
    case = job.case
    if not case.images:
        text = f"{case.name}: no image file is named {case.name}_0000{''.join(case.label.suffixes)} and so on."
        report.findings.append(Finding("unreadable", text, case.name))
        return None
    printed = io.StringIO()
    try:
        for file in case.images:
            check_whole(file)
        with contextlib.redirect_stdout(printed):  # nnU-Net's readers print what is wrong before they raise
            image, properties = reader.read_images([str(file) for file in case.images])
    except Exception as error:  # each of nnU-Net's readers has its own
        reason = " ".join(printed.getvalue().split()) or _one_line(error) or type(error).__name__
        text = f"{case.name}: its image cannot be read ({', '.join(f.name for f in case.images)}): {reason}"
        report.findings.append(Finding("unreadable", text, case.name))
        return None
    infinite = int(np.isinf(image).sum())
    if infinite:
        text = (
            f"{case.name}: {infinite} voxel(s) of its image are infinite, and normalisation makes NaN of the whole "
            "image. Replace them."
        )
        report.findings.append(Finding("unreadable", text, case.name))
    report.shape = tuple(int(size) for size in image.shape[1:])
    report.spacing = tuple(float(size) for size in properties.get("spacing", (1, 1, 1)))
    return np.asarray(image)


def _read_mask(job: CaseJob, reader: ReadOnce, report: CaseReport) -> npt.NDArray[np.integer[Any]] | None:
    if not report.has_label_file:
        return None
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            mask: npt.NDArray[np.integer[Any]] = read_label(reader, job.case.label)[0]
    except ValueError as error:
        report.findings.append(Finding("unreadable", f"{job.case.name}: {_one_line(error)}", job.case.name))
        return None
    return mask


def _ask_nnunet(job: CaseJob, reader: ReadOnce, report: CaseReport, *, mask_readable: bool) -> None:
    label = job.case.label if mask_readable else None
    try:
        verdict = check_case(job.case.images, label, job.channels, job.expected_labels or (), reader)
    except Exception as error:  # nnU-Net's own code, on files nobody has looked at
        report.findings.append(Finding("integrity", f"{report.name}: {_one_line(error)}", report.name))
        return
    report.findings += [Finding("integrity", f"{report.name}: {text}", report.name) for text in verdict.errors]
    report.findings += [Finding("warning", f"{report.name}: {text}", report.name) for text in verdict.warnings]


def _read_annotations(job: CaseJob, report: CaseReport, image: npt.NDArray[Any] | None) -> Annotations | None:
    try:
        file = case_file(job.annotations_folder, job.case.name)
        if not file.exists():
            return None
        said = read_annotations(file, job.labels)
        if image is not None:
            check_against_image(said, image.shape[1:], source=describe_source(file), labels=job.labels)
    except (AnnotationError, OSError) as error:
        text = str(error) if isinstance(error, AnnotationError) else f"{job.case.name}: {error}"
        report.findings.append(Finding("annotation-file", text, job.case.name))
        return None
    if said.is_empty:
        report.findings.append(Finding("empty-file", f"{describe_source(file)} says nothing.", job.case.name))
    report.said = said
    report.points = Counter(point.label for point in said.points)
    report.tight_boxes = Counter(box.label for box in said.boxes if box.tight)
    report.loose_boxes = Counter(box.label for box in said.boxes if not box.tight)
    return said


def _count(
    report: CaseReport, mask: npt.NDArray[np.integer[Any]] | None, ignore: int | None, said: Annotations | None
) -> None:
    if mask is not None:
        values, numbers = np.unique(mask, return_counts=True)
        report.voxels = dict(zip(values.tolist(), numbers.tolist(), strict=True))
        ignored = report.voxels.pop(ignore, 0) if ignore is not None else 0
        report.annotated = 1 - ignored / max(1, mask.size)
    partly = report.annotated < 1 or (said is not None and said.mask_labels is not None)
    if report.voxels:
        report.status = PARTIAL if partly else MASKED
    else:
        report.status = WEAK if said is not None and not said.is_empty else UNLABELLED


# --- contradictions and doubtful things


def _add(report: CaseReport, kind: str, problems: Sequence[Contradiction], view: CaseView) -> None:
    """Findings of one kind, the first few with pictures, a great many cut short."""
    for number, problem in enumerate(problems):
        if number == _TEXTS_PER_KIND:
            text = f"{report.name}: and {len(problems) - number} more of the same kind."
            report.findings.append(Finding(kind, text, report.name))
            break
        finding = Finding(kind, f"{report.name}: {problem.text}", report.name, problem.points, problem.boxes)
        if number < _PICTURES_PER_KIND:
            finding.picture = view.close_up(problem)
        report.findings.append(finding)


def _contradictions(
    report: CaseReport, said: Annotations, mask: npt.NDArray[Any] | None, labels: LabelNames, view: CaseView
) -> None:
    if labels.has_regions:
        if not said.is_empty:
            text = f"{report.name}: nnUNetTrainerDSP trains with plain labels only. Declare plain labels."
            report.findings.append(Finding("regions", text, report.name))
        return
    if mask is None and not report.has_label_file:
        unknown = np.full(report.shape, -1, np.int16)  # nobody drew anything: what prepare will write
        groups = locate_contradictions(said, unknown, source=report.name, labels=labels, ignore_label=-1)
    else:
        groups = locate_contradictions(said, mask, source=report.name, labels=labels)
    by_kind: dict[str, list[Contradiction]] = {}
    for group in groups:
        for problem in group:
            by_kind.setdefault(problem.kind, []).append(problem)
    for kind, problems in by_kind.items():
        _add(report, kind, problems, view)


def _doubtful_points(report: CaseReport, said: Annotations, view: CaseView) -> None:
    from scipy.spatial import cKDTree

    if len(said.points) < 2:
        return
    at = np.array([point.at for point in said.points], dtype=np.float64)
    pairs = cKDTree(at).query_pairs(1.0 + 1e-6, output_type="ndarray") if len(at) < 100_000 else np.zeros((0, 2), int)
    voxels = point_voxels(said)
    problems = []
    for first, second in sorted(map(tuple, pairs.tolist())):
        one, other = said.points[first], said.points[second]
        same = one.label == other.label
        if not same and (voxels[first] == voxels[second]).all():
            continue  # a contradiction, reported as such
        what = f"both {one.label!r}" if same else f"{one.label!r} and {other.label!r}"
        text = f"points[{first}] and points[{second}] ({what}) are less than two voxels apart, "
        text += f"at {show_position(one.at)} and {show_position(other.at)}."
        problems.append(Contradiction("close-points", text, one.label, points=(first, second)))
    _add(report, "close-points", problems, view)


def _doubtful_boxes(
    report: CaseReport, said: Annotations, mask: npt.NDArray[Any] | None, labels: LabelNames, view: CaseView
) -> None:
    if not said.boxes:
        return
    start, stop = box_voxels(said)
    extent = stop - start
    axes = len(said.boxes[0].start)
    own = extent[:, 3 - axes :] if axes == 3 and report.shape[0] > 1 else extent[:, 1:]
    shape = np.array(report.shape)[3 - own.shape[1] :]
    thin, huge = [], []
    for index, box in enumerate(said.boxes):
        name = f"boxes[{index}] of {box.label!r} from {show_position(box.start)} to {show_position(box.stop)}"
        if (own[index] == 1).all():
            thin.append(Contradiction("thin-box", f"{name} holds a single voxel.", box.label, boxes=(index,)))
        elif (own[index] == 1).any() and (shape[own[index] == 1] > 1).all():
            problem = Contradiction("thin-box", f"{name} is one voxel thin.", box.label, boxes=(index,))
            thin.append(problem)
        if (own[index] >= 0.95 * shape).all() and (shape > 8).all():
            problem = Contradiction(
                "huge-box", f"{name} spans the image of {show_position(shape.tolist())}.", boxes=(index,)
            )
            huge.append(problem)
    if own.shape[1] == 3 and len(thin) > len(said.boxes) // 2:  # boxes drawn slice by slice: one habit, one finding
        text = f"{len(thin)} of {len(said.boxes)} boxes are one voxel thin; were they drawn slice by slice?"
        thin = [Contradiction("thin-box", text, boxes=thin[0].boxes)]
    _add(report, "thin-box", thin, view)
    _add(report, "huge-box", huge, view)
    _add(report, "double-box", _double_boxes(said, start, stop), view)
    if mask is not None and not labels.has_regions:
        loose, report.fits = _box_fits(said, mask, labels, start, stop)
        _add(report, "loose-fit", loose, view)


def _double_boxes(said: Annotations, start: npt.NDArray[np.int64], stop: npt.NDArray[np.int64]) -> list[Contradiction]:
    if len(start) > _PAIRS:  # exact copies only
        code = np.unique([box.label for box in said.boxes], return_inverse=True)[1].reshape(-1, 1)
        _, originals = np.unique(np.concatenate([start, stop, code], axis=1), axis=0, return_index=True)
        extra = np.setdiff1d(np.arange(len(start)), originals)
        text = "boxes[{0}] of {1!r} stands in the file more than once."
        return [Contradiction("double-box", text.format(i, said.boxes[i].label), boxes=(i,)) for i in extra.tolist()]
    size = np.prod(stop - start, axis=1).astype(np.float64)
    problems = []
    for first in range(len(start) - 1):
        later = slice(first + 1, None)
        low, high = np.maximum(start[first], start[later]), np.minimum(stop[first], stop[later])
        common = np.prod(np.clip(high - low, 0, None), axis=1).astype(np.float64)
        overlap = common / (size[first] + size[later] - common)
        for second in (np.flatnonzero(overlap >= _SAME_BOX) + first + 1).tolist():
            one, other = said.boxes[first], said.boxes[second]
            what = f"both {one.label!r}" if one.label == other.label else f"{one.label!r} and {other.label!r}"
            share = overlap[second - first - 1]
            how = "are the same" if share == 1 else f"overlap by {share:.0%}"
            text = f"boxes[{first}] and boxes[{second}] ({what}) {how}, at {show_position(one.start)}."
            problems.append(Contradiction("double-box", text, one.label, boxes=(first, second)))
    return problems


def _box_fits(
    said: Annotations,
    mask: npt.NDArray[np.integer[Any]],
    labels: LabelNames,
    start: npt.NDArray[np.int64],
    stop: npt.NDArray[np.int64],
) -> tuple[list[Contradiction], list[BoxFit]]:
    """Tight boxes with empty rows at their rim, and where the objects of all of them begin and end."""
    problems, fits = [], []
    axes = len(said.boxes[0].start)
    drawn = None if said.mask_labels is None else set(said.mask_labels)
    limit = np.array(mask.shape)
    for index, box in enumerate(said.boxes):
        if not box.tight or (drawn is not None and box.label not in drawn):
            continue
        low, high = np.maximum(start[index] - _REACH, 0), np.minimum(stop[index] + _REACH, limit)
        around = mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
        if labels.ignore_label is not None and (around == labels.ignore_label).any():
            continue
        inner = tuple(slice(a, b) for a, b in zip(start[index] - low, stop[index] - low, strict=True))
        where = around == labels.index(box.label)
        if not where[inner].any():
            continue  # a contradiction, reported as such
        empty = []
        for axis in range(3 - axes, 3):
            rows = np.flatnonzero(where[inner].any(axis=tuple(a for a in range(3) if a != axis)))
            extent = int(stop[index, axis] - start[index, axis])
            empty.append((int(rows[0]), extent - 1 - int(rows[-1]), extent))
        worst = max(max(before, after) for before, after, _ in empty)
        if any(max(before, after) >= max(2, 0.05 * extent) for before, after, extent in empty):
            text = (
                f"boxes[{index}] of {box.label!r} from {show_position(box.start)} to {show_position(box.stop)} is "
                f"tight, but on one side {worst} of its rows, columns or slices hold no voxel of {box.label!r}."
            )
            problems.append(Contradiction("loose-fit", text, box.label, boxes=(index,)))
        ids = cc3d.connected_components(where, connectivity=26, binary_image=True)
        touched = np.unique(ids[inner])
        grown = np.isin(ids, touched[touched > 0])
        begins: list[int | None] = []
        ends: list[int | None] = []
        for axis in range(3 - axes, 3):
            rows = np.flatnonzero(grown.any(axis=tuple(a for a in range(3) if a != axis))) + low[axis]
            first, last = int(rows[0]), int(rows[-1]) + 1
            begins.append(first - int(start[index, axis]) if first > low[axis] or first == 0 else None)
            ends.append(last - int(stop[index, axis]) if last < high[axis] or last == limit[axis] else None)
        fits.append(BoxFit(box.label, tuple(begins), tuple(ends)))
    return problems, fits


def _doubtful_mask(report: CaseReport, mask: npt.NDArray[np.integer[Any]], view: CaseView) -> None:
    if set(report.voxels) == {0}:
        report.findings.append(Finding("no-foreground", f"{report.name}: the mask shows nothing.", report.name))
        return
    if mask.size > 64 * 2**20:
        return  # labelling such a volume takes longer than the rest of the check
    ids, count = cc3d.connected_components(mask.astype(np.uint16), connectivity=26, return_N=True)
    sizes = np.bincount(ids.ravel(), minlength=count + 1)
    small = np.flatnonzero(sizes[1:] <= 2) + 1
    if not small.size:
        return
    place = np.argwhere(ids == small[0])[0]
    at = place[1:] if mask.shape[0] == 1 else place
    text = f"{small.size} area(s) of one or two voxels in the mask, the first at {show_position(at.tolist())}."
    finding = Finding("speck", f"{report.name}: {text}", report.name)
    finding.picture = view.close_up_at(place, place + 1)
    report.findings.append(finding)


def _doubtful_instances(
    report: CaseReport, mask: npt.NDArray[np.integer[Any]], ignore: int | None, view: CaseView
) -> None:
    """Counts instances; those of one or two voxels, and those in pieces that do not touch."""
    sizes = {value: number for value, number in report.voxels.items() if value > 0}
    report.instances = sorted(sizes.values())
    if set(report.voxels) == {0}:
        report.findings.append(Finding("no-foreground", f"{report.name}: the mask shows nothing.", report.name))
    specks = [value for value, number in sizes.items() if number <= 2]
    if specks:
        text = f"{report.name}: {len(specks)} instance(s) of one or two voxels, such as id {specks[0]}."
        report.findings.append(Finding("speck", text, report.name, picture=_close_up_of(mask == specks[0], view)))
    if mask.size > 64 * 2**20:
        return
    ids = np.where(mask == (-1 if ignore is None else ignore), 0, mask).clip(0).astype(np.uint32)
    pieces, number = cc3d.connected_components(ids, connectivity=6, return_N=True)
    if number <= len(sizes):
        return
    owner = np.zeros(number + 1, np.int64)
    owner[pieces.ravel()] = ids.ravel()
    counts = Counter(owner[1:].tolist())
    split = sorted(value for value, count in counts.items() if count > 1)
    where = pieces == int(np.flatnonzero(owner == split[0])[1])
    text = (
        f"{report.name}: {len(split)} of {len(sizes)} instances lie in pieces that do not touch, such as id {split[0]} "
        f"in {counts[split[0]]} pieces."
    )
    report.findings.append(Finding("pieces", text, report.name, picture=_close_up_of(where, view)))


def _close_up_of(where: npt.NDArray[np.bool_], view: CaseView) -> Picture:
    place = np.nonzero(where)
    return view.close_up_at(np.array([p.min() for p in place]), np.array([p.max() + 1 for p in place]))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
