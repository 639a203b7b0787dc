"""Which labelled windows serve as prompt: named in dataset.json, or the most informative annotated ones.

Arrays and dictionaries only; the trainer reads the files. Windows are in voxels of the preprocessed case, (z, y, x),
half-open; what dataset.json names is in voxels of the image file, as in annotation files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from nnunet_dsp.annotations import AnnotationError
from nnunet_dsp.geometry import CaseFrame, FloatArray
from nnunet_dsp.patch_annotations import CaseAnnotations

PROMPT_KEY = "prompt"
NOT_A_KEY = -1
_ENOUGH = 16
"""Voxels of a class from which on a window shows it; fewer do where no window has more."""
_ENOUGH_ENTROPY = 0.75
_BOTTLENECK = 4
"""Voxels an axis that nnU-Net leaves at its network's lowest resolution; instance normalisation needs some."""

KnownLabels = npt.NDArray[np.int16]


@dataclass(frozen=True)
class PromptRequest:
    """A prompt the user named.

    Attributes:
        case: the case's name.
        start, stop: the window, voxels of the image file in array order, half-open; None: choose one in this case.
        source: where it stands, for messages.
    """

    case: str
    start: tuple[float, ...] | None
    stop: tuple[float, ...] | None
    source: str


@dataclass(frozen=True)
class PromptWindow:
    """A labelled window of a case; in a 2D configuration one voxel thick along z."""

    case: str
    start: tuple[int, int, int]
    stop: tuple[int, int, int]

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(a, b) for a, b in zip(self.start, self.stop, strict=True))


def read_requests(dataset_json: Mapping[str, Any], cases: Sequence[str]) -> list[PromptRequest]:
    """The prompts that dataset.json names: ``"prompt": {"case": "a", "bbox": [[y0, y1], [x0, x1]]}``, or a list.

    Args:
        cases: those there are.

    Raises:
        AnnotationError: anything that is not of this form, or an unknown case.
    """
    given = dataset_json.get(PROMPT_KEY)
    if given is None:
        return []
    entries = given if isinstance(given, list) else [given]
    requests = []
    for number, entry in enumerate(entries):
        source = f'dataset.json: "{PROMPT_KEY}"' + (f"[{number}]" if isinstance(given, list) else "")
        example = '{"case": "CASE", "bbox": [[y0, y1], [x0, x1]]}, "bbox" being optional'
        if not isinstance(entry, Mapping) or not isinstance(entry.get("case"), str):
            raise AnnotationError(f"{source}: expected {example}, but got {entry!r}.")
        unknown = sorted(set(entry) - {"case", "bbox"})
        if unknown:
            raise AnnotationError(f"{source}: unknown entry {unknown[0]!r}. Expected {example}.")
        if entry["case"] not in cases:
            near = ", ".join(cases[:5]) + (", ..." if len(cases) > 5 else "")
            raise AnnotationError(f"{source}: there is no training case {entry['case']!r}. There are: {near}.")
        start = stop = None
        if "bbox" in entry:
            start, stop = _bounds(entry["bbox"], source)
        requests.append(PromptRequest(entry["case"], start, stop, source))
    return requests


def _bounds(bbox: Any, source: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    pairs = isinstance(bbox, list) and len(bbox) in (2, 3) and all(isinstance(p, list) and len(p) == 2 for p in bbox)
    numbers = pairs and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and np.isfinite(v) for pair in bbox for v in pair
    )
    if not numbers or any(pair[0] >= pair[1] for pair in bbox):
        raise AnnotationError(
            f"{source}: expected a bbox [[y0, y1], [x0, x1]] (3D: z first) in voxels of the image file, array order, "
            f"each pair ascending, but got {bbox!r}."
        )
    return tuple(float(pair[0]) for pair in bbox), tuple(float(pair[1]) for pair in bbox)


def requested_span(request: PromptRequest, frame: CaseFrame, dim: int) -> tuple[slice, ...]:
    """The voxels of the preprocessed case that a request's bbox covers, (z, y, x).

    Raises:
        AnnotationError: the bbox has too few axes, or covers no voxel of the case.
    """
    start, stop = request.start, request.stop
    if start is None or stop is None:
        return (slice(0, int(frame.shape[0])), slice(0, int(frame.shape[1])), slice(0, int(frame.shape[2])))
    if len(start) == 2:
        if dim == 3 or frame.shape[0] != 1:
            raise AnnotationError(
                f"{request.source}: {request.case} is a 3D image, so its bbox needs three axes, z first, but got two."
            )
        start, stop = (0.0, *start), (1.0, *stop)
    low, high = frame.boxes(np.asarray([[start, stop]], dtype=np.float64))[0]
    first = np.clip(np.ceil(low - 1e-6), 0, frame.shape).astype(int)
    last = np.clip(np.floor(high - 1e-6) + 1, 0, frame.shape).astype(int)
    if (last <= first).any():
        raise AnnotationError(
            f"{request.source}: the bbox from {list(start)} to {list(stop)} lies outside {request.case}, which has "
            f"{[int(s) for s in frame.shape]} voxels after preprocessing. Coordinates are voxels of the image file in "
            "array order (y, x) or (z, y, x)."
        )
    return tuple(slice(int(a), int(b)) for a, b in zip(first, last, strict=True))


def raw_bounds(window: PromptWindow, frame: CaseFrame) -> list[list[float]]:
    """A window in voxels of the image file, (z, y, x), as a bbox for dataset.json; rounded to a tenth."""
    faces: FloatArray = np.asarray([window.start, window.stop], dtype=np.float64) - 0.5
    moved = (faces + 0.5) / frame.scale - 0.5 + frame.offset + 0.5
    raw = np.empty_like(moved)
    raw[:, list(frame.transpose)] = moved
    return [[round(float(a), 1), round(float(b), 1)] for a, b in raw.T]


def known_labels(
    segmentation: npt.NDArray[Any],
    labels: Sequence[int],
    ignore_label: int | None,
    annotations: CaseAnnotations | None = None,
) -> KnownLabels:
    """What is known of each voxel: the row of its label among `labels`, or NOT_A_KEY.

    Masks come first, whole or partial. Where they are silent, points count; and where every class has all its objects
    boxed, so does background outside all boxes. Background of a mask that leaves classes out is not known.

    Args:
        segmentation: (z, y, x) as nnU-Net stored it; -1, its mark for the outside, is background.
        labels: the dataset's label values, ascending, 0 first, without ignore.
        annotations: what else is said of the case, in its voxels.
    """
    known = np.full(segmentation.shape, NOT_A_KEY, np.int16)
    for row, label in enumerate(labels):
        known[segmentation == label] = row
    known[segmentation == -1] = 0
    if annotations is None:
        return known
    if not annotations.listed.all():
        known[known == 0] = NOT_A_KEY
    silent = segmentation == ignore_label if ignore_label is not None else np.zeros(segmentation.shape, np.bool_)
    if annotations.complete_boxes[1:].all() and len(annotations.complete_boxes) > 1:
        outside = silent.copy()
        for low, high in annotations.boxes:
            first = np.clip(np.floor(low), 0, None).astype(int)
            last = np.clip(np.ceil(high) + 1, 0, None).astype(int)
            outside[tuple(slice(a, b) for a, b in zip(first, last, strict=True))] = False
        known[outside] = 0
    voxels = np.clip(np.floor(annotations.points + 0.5).astype(int), 0, np.asarray(segmentation.shape) - 1)
    for voxel, label in zip(voxels.tolist(), annotations.point_class.tolist(), strict=True):
        if silent[tuple(voxel)]:
            known[tuple(voxel)] = label
    return known


def window_shape(case: Sequence[int], patch: Sequence[int], window: int) -> tuple[int, int, int]:
    """Size of a prompt window in a case of this shape: the setting, but neither beyond the patch nor the case."""
    sizes = [min(window or p, p) for p in patch]
    sizes = [1, *sizes] if len(sizes) == 2 else sizes
    z, y, x = (min(a, int(b)) for a, b in zip(sizes, case, strict=True))
    return z, y, x


def prompt_shape(
    windows: Sequence[PromptWindow], patch: Sequence[int], strides: Sequence[Sequence[int]], margin: int
) -> tuple[int, ...]:
    """Size of the images handed to the network as prompt: the largest window and its margin, to the strides' multiple.

    At most the patch, and at least four voxels an axis at the network's lowest resolution: a bare 64 x 64 window is a
    single voxel there in networks with seven stages, too few for instance normalisation.
    """
    dim = len(patch)
    total = np.prod(np.asarray(strides, dtype=int).reshape(len(strides), dim), axis=0)
    shape = []
    for axis in range(dim):
        largest = max(w.stop[3 - dim + axis] - w.start[3 - dim + axis] for w in windows)
        wanted = max(largest + 2 * margin, _BOTTLENECK * int(total[axis]))
        shape.append(min(int(patch[axis]), -(-wanted // int(total[axis])) * int(total[axis])))
    return tuple(shape)


def best_window(
    known: KnownLabels, size: Sequence[int], wanted: Sequence[int]
) -> tuple[float, frozenset[int], tuple[int, int, int]]:
    """The window that shows most of the wanted labels, and among those the most informative one.

    Information is the entropy of the labels times the annotated share of the window, plus the share of voxels at a
    border between labels. Beyond three quarters of what its labels could have, more entropy counts for nothing: an even
    mixture is most often one big object, and a window full of borders says more. Windows are looked at on a grid of an
    eighth of their size.

    Args:
        known: (z, y, x), NOT_A_KEY where nothing is known.
        size: of the window, not beyond `known`.
        wanted: rows of labels.

    Returns:
        The score (higher is better, below 0: nothing annotated), the labels shown, and where the window starts.
    """
    number = int(known.max(initial=NOT_A_KEY)) + 1
    if number == 0:
        return -1.0, frozenset(), (0, 0, 0)
    step = [max(d for d in range(1, max(1, s // 8) + 1) if s % d == 0) for s in size]
    count = np.stack([_window_sums(known == label, size, step) for label in range(number)])
    borders = _window_sums(_borders(known), size, step)
    total = count.sum(0)
    share = count / np.maximum(total, 1)
    entropy = -(share * np.log(np.maximum(share, 1e-12))).sum(0)
    shown = np.stack([c >= max(1, min(_ENOUGH, int(c.max()))) for c in count])
    enough = _ENOUGH_ENTROPY * np.log(np.maximum(shown.sum(0), 1))
    voxels = np.prod(size)
    covered = shown[[label for label in wanted if label < number]].sum(0)
    # the last term: of windows with a single label the fuller one
    score = covered * 10 + np.minimum(entropy, enough) * total / voxels + borders / voxels + 1e-3 * total / voxels
    score = np.where(total > 0, score, -1.0)
    best = int(np.argmax(score))
    z, y, x = (int(b) * s for b, s in zip(np.unravel_index(best, score.shape), step, strict=True))
    labels = frozenset(int(label) for label in np.flatnonzero(shown.reshape(number, -1)[:, best]))
    return float(score.flat[best]), labels, (z, y, x)


def _window_sums(mask: npt.NDArray[np.bool_], size: Sequence[int], step: Sequence[int]) -> npt.NDArray[np.int64]:
    """Number of set voxels in each window on the grid; `size` is a multiple of `step`, and neither exceeds the mask."""
    blocks = [n // s for n, s in zip(mask.shape, step, strict=True)]
    cut = mask[tuple(slice(0, n * s) for n, s in zip(blocks, step, strict=True))]
    cut = cut.reshape(blocks[0], step[0], blocks[1], step[1], blocks[2], step[2])
    sums: npt.NDArray[np.int64] = cut.sum(axis=(1, 3, 5), dtype=np.int64)
    for axis in range(3):  # one after the other: a window of 61 cubed would be 226981 terms a position
        sums = np.lib.stride_tricks.sliding_window_view(sums, size[axis] // step[axis], axis).sum(axis=-1)
    return sums


def _borders(known: KnownLabels) -> npt.NDArray[np.bool_]:
    """Voxels whose next neighbour along some axis is known to be something else."""
    result = np.zeros(known.shape, np.bool_)
    for axis in range(3):
        here = tuple(slice(None, -1) if a == axis else slice(None) for a in range(3))
        there = tuple(slice(1, None) if a == axis else slice(None) for a in range(3))
        result[here] |= (known[here] != known[there]) & (known[here] != NOT_A_KEY) & (known[there] != NOT_A_KEY)
    return result


def choose_windows(
    cases: Sequence[str],
    load: Callable[[str], KnownLabels],
    size_of: Callable[[Sequence[int]], Sequence[int]],
    num_labels: int,
    max_windows: int,
    given: Sequence[PromptWindow] = (),
) -> list[PromptWindow]:
    """The most informative annotated window of all cases, then one at a time those that show labels still missing.

    The same cases give the same windows: ties go to the first case and the first position.

    Args:
        cases: where to look.
        load: known_labels() of a case; called again for each further window, for not all may fit into memory.
        size_of: a case's shape to the window's size in it.
        num_labels: labels there are.
        max_windows: in all.
        given: windows that are in already.

    Returns:
        `given` and what was added; empty if nothing is annotated in any case.
    """
    windows = list(given)
    missing = set(range(num_labels))
    for window in windows:
        missing -= set(np.unique(load(window.case)[window.slices]).tolist())
    while missing and len(windows) < max_windows:
        best: tuple[float, PromptWindow | None, frozenset[int]] = (0.0, None, frozenset())
        shown = tqdm(cases, desc="Choosing the prompt", disable=len(cases) < 5, leave=False)
        for case in shown:
            labels = load(case)
            size = size_of(labels.shape)
            score, present, start = best_window(labels, size, sorted(missing))
            if score > best[0] and (not windows or present & missing):
                z, y, x = (a + int(b) for a, b in zip(start, size, strict=True))
                best = (score, PromptWindow(case, start, (z, y, x)), present)
        if best[1] is None:
            break
        windows.append(best[1])
        missing -= best[2]
    return windows


def cut_prompt(
    image: npt.NDArray[np.floating[Any]], known: KnownLabels, window: PromptWindow, shape: Sequence[int]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """A window with what surrounds it, as the network gets it.

    Args:
        image: (channels, z, y, x).
        known: (z, y, x).
        shape: of the result, two axes or three; the window fits.

    Returns:
        (channels, *shape), zeros where the case ends, as nnU-Net pads; and (*shape), NOT_A_KEY outside the window.
    """
    sizes = (1, *shape) if len(shape) == 2 else tuple(shape)
    labels = np.full(known.shape, NOT_A_KEY, np.int64)
    labels[window.slices] = known[window.slices]
    source, target = [], []
    for low, high, size, whole in zip(window.start, window.stop, sizes, known.shape, strict=True):
        first = (low + high) // 2 - size // 2
        first = min(max(first, 0), whole - size) if whole >= size else (whole - size) // 2
        inside = slice(max(first, 0), min(first + size, whole))
        source.append(inside)
        target.append(slice(inside.start - first, inside.stop - first))
    cut = np.zeros((image.shape[0], *sizes), np.float32)
    cut_labels = np.full(sizes, NOT_A_KEY, np.int64)
    for channel, whole_channel in zip(cut, image, strict=True):
        channel[tuple(target)] = whole_channel[tuple(source)]
    cut_labels[tuple(target)] = labels[tuple(source)]
    return cut.reshape(image.shape[0], *shape), cut_labels.reshape(shape)


def draw_prompt(
    images: npt.NDArray[np.floating[Any]],
    labels: npt.NDArray[np.integer[Any]],
    titles: Sequence[str],
    names: Sequence[str],
    file: Path,
) -> None:
    """Writes a picture of the prompts: each image, and its labels over it; what is no key is hatched.

    Args:
        images: (P, channels, *S); the first channel is shown, of 3D the slice with most keys.
        labels: (P, *S), NOT_A_KEY or row of `names`.
    """
    from nnunet_dsp.pictures import comparison

    rows = []
    for image, label, title in zip(images, labels, titles, strict=True):
        picture, mask = image[0], label
        if mask.ndim == 3:
            z = int((mask != NOT_A_KEY).sum(axis=(1, 2)).argmax())
            picture, mask = picture[z], mask[z]
        shown = np.where(mask == NOT_A_KEY, len(names), mask)
        rows.append({title: {"image": picture}, "labels": {"image": picture, "mask": shown}})
    comparison(rows, names, file, ignore_label=len(names), title="Prompt: the labelled voxels that vote")
