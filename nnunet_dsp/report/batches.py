"""Training batches as the network will get them: drawn by the trainer's own loader, after augmentation, and pictured.

Nothing is written into nnU-Net's folders: the trainer runs on a temporary folder of links to the preprocessed dataset.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from nnunet_dsp.batch import AnnotationBatch
from nnunet_dsp.dataset_conversion import raw_dataset
from nnunet_dsp.label_names import LabelNames
from nnunet_dsp.pseudo_labels import allowed_classes
from nnunet_dsp.report.drawing import (
    IGNORED,
    OUTSIDE,
    UNDRAWN,
    Colour,
    Frame,
    Mark,
    Picture,
    Window,
    encode_image,
    encode_layer,
    hatch,
    intensity_range,
    rgb,
    shrink_labels,
    to_bytes,
)

SIZE = 320  # display units of a patch's longer side
_BAND = 7  # display units that a band of evidence lines is wide at least
_SETS = 6  # sets of allowed classes that are named
_PAPER = 244  # grey of "any class"


class BatchOptions(NamedTuple):
    """Which loader to draw from: nnU-Net's -p, -c, -f and -tr, and how often."""

    batches: int
    plans: str
    configuration: str
    fold: int | str
    trainer: str
    seed: int


@dataclass(slots=True)
class ItemReport:
    """One item of a training batch.

    Attributes:
        case: where the patch comes from. masked: whether the item's mask counts.
        seen: image with points and boxes; mask: the target; allowed: what the filter leaves. Last two may be missing.
        facts: lines of text about tags, lines of boxes and the like.
        sets: the sets of classes that voxels may still have, in words, with their share, the most common first.
    """

    case: str
    masked: bool
    seen: Picture
    mask: Picture | None
    allowed: Picture
    facts: list[str] = field(default_factory=list)
    sets: list[tuple[str, float]] = field(default_factory=list)


@dataclass(slots=True)
class BatchReport:
    """One training batch: what it holds, and its items."""

    number: int
    summary: str
    items: list[ItemReport]


def choose_configuration(dataset: str, plans: str) -> str:
    """The configuration to draw from where the user names none: the only one that is preprocessed.

    Raises:
        FileNotFoundError: the dataset is not planned, or nothing is preprocessed.
        ValueError: there are several.
    """
    base, content = _plans(dataset, plans)
    ready = []
    for name, configuration in content["configurations"].items():
        identifier = configuration.get("data_identifier")
        if identifier and (base / identifier).is_dir():
            ready.append(name)
    if not ready:
        raise FileNotFoundError(
            f"Nothing of {plans} is preprocessed in {base}. Run nnUNetv2_plan_and_preprocess first."
        )
    if len(ready) > 1:
        raise ValueError(f"{plans} of {dataset} has several configurations: {', '.join(ready)}. Choose one with -c.")
    return ready[0]


def draw_batches(dataset: str, options: BatchOptions) -> tuple[list[BatchReport], list[str]]:
    """Draw training batches through the trainer's own loader and picture them.

    Args:
        dataset: full name, as in nnUNet_preprocessed.
        options: which loader.

    Returns:
        The batches, and what the trainer printed on the way (which cases it has, warnings).

    Raises:
        ValueError, FileNotFoundError, NotImplementedError: what training itself would raise.
    """
    base, content = _plans(dataset, options.plans)
    if options.configuration not in content["configurations"]:
        known = ", ".join(content["configurations"])
        raise ValueError(f"{options.plans} has no configuration {options.configuration!r}, but: {known}.")
    with _workbench(base, dataset) as said:
        trainer = _make_trainer(base, content, options)
        loader, validation = trainer.get_dataloaders()
        reports = []
        try:
            for number in tqdm(range(1, options.batches + 1), desc="Drawing training batches"):
                reports.append(_report(number, next(loader), trainer))
        finally:
            for generator in (loader, validation):
                if hasattr(generator, "_finish"):
                    generator._finish()
    interesting = ("WARNING", "Training on", "Each batch", "Of these")
    lines = [line for line in said.getvalue().splitlines() if any(word in line for word in interesting)]
    return reports, [line.split(": ", 1)[-1] if line[:2] == "20" else line for line in lines]


def _plans(dataset: str, plans: str) -> tuple[Path, dict[str, Any]]:
    base = raw_dataset.environment_folder("nnUNet_preprocessed") / dataset
    file = base / f"{plans}.json"
    if not file.is_file():
        found = sorted(p.stem for p in base.glob("*Plans*.json"))
        there = f" There are: {', '.join(found)} (-p)." if found else ""
        raise FileNotFoundError(
            f"There are no plans {file}.{there} --batches shows what the network gets, so the dataset must be planned "
            "and preprocessed: nnUNetv2_plan_and_preprocess."
        )
    return base, raw_dataset.read_json(file)


@contextlib.contextmanager
def _workbench(base: Path, dataset: str) -> Iterator[io.StringIO]:
    """A temporary nnUNet_preprocessed and nnUNet_results, and no worker processes; yields what is printed meanwhile.

    The trainer syncs annotations, writes splits_final.json and a log; all that goes where nobody misses it.
    """
    names = ("nnUNet_preprocessed", "nnUNet_results", "nnUNet_n_proc_DA")
    before = {name: os.environ.get(name) for name in names}
    printed = io.StringIO()
    with tempfile.TemporaryDirectory(prefix="nnunet_dsp_check_") as root:
        preprocessed, results = Path(root, "preprocessed"), Path(root, "results")
        (preprocessed / dataset).mkdir(parents=True)
        results.mkdir()
        for entry in sorted(base.iterdir()):
            target = preprocessed / dataset / entry.name
            if entry.name == "annotationsTr":
                shutil.copytree(entry, target)
            else:
                os.symlink(entry.resolve(), target, target_is_directory=entry.is_dir())
        os.environ.update(nnUNet_preprocessed=str(preprocessed), nnUNet_results=str(results), nnUNet_n_proc_DA="0")
        try:
            with contextlib.redirect_stdout(printed):
                yield printed
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def _make_trainer(base: Path, plans: dict[str, Any], options: BatchOptions) -> Any:
    from nnunet_dsp import trainers
    from nnunet_dsp.settings import PLANS_KEY

    trainer_class = getattr(trainers, options.trainer, None)
    if trainer_class is None:
        from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

        try:
            trainer_class = recursive_find_trainer_class_by_name(options.trainer)
        except RuntimeError as error:
            raise ValueError(f"nnU-Net finds no trainer {options.trainer!r}: {' '.join(str(error).split())}") from error
    content = {**plans, "continue_training": False}
    if issubclass(trainer_class, trainers.nnUNetTrainerDSP):
        content[PLANS_KEY] = {**plans.get(PLANS_KEY, {}), "seed": options.seed}
    else:
        np.random.seed(options.seed)
        torch.manual_seed(options.seed)
    trainer = trainer_class(
        content,
        options.configuration,
        options.fold,
        raw_dataset.read_json(base / "dataset.json"),
        torch.device("cpu"),
    )
    trainer._set_batch_size_and_oversample()  # what initialize() does before the network, which is not needed here
    if isinstance(trainer, trainers.nnUNetTrainerDSP):  # the batches of the warm-up hold masked cases only
        trainer.current_epoch = math.ceil(trainer.settings.pseudo_label_warmup * trainer.num_epochs)
    if trainer.is_cascaded:
        raise NotImplementedError(
            f"{options.configuration} is the second stage of a cascade, which --batches cannot draw."
        )
    return trainer


# --- one batch


def _report(number: int, batch: dict[str, Any], trainer: Any) -> BatchReport:
    data: Tensor = batch["data"]
    target: Tensor = batch["target"][0] if isinstance(batch["target"], (list, tuple)) else batch["target"]
    labels = trainer.label_manager
    num_classes = int(labels.num_segmentation_heads)
    size, spatial = data.shape[0], tuple(data.shape[2:])
    if "annotations" in batch:
        annotations = AnnotationBatch.from_list(batch["annotations"])
    else:
        annotations = AnnotationBatch.empty(size, num_classes, len(spatial))
    num_masked = int(batch.get("num_masked", size))
    if labels.has_regions:
        raise NotImplementedError("--batches cannot picture targets that are regions.")
    names = LabelNames.from_dataset_json({"labels": labels.label_dict}).names  # in the order of their numbers
    allowed = allowed_classes(annotations, target[:, 0], num_classes, spatial, labels.ignore_label)
    cases = [str(case) for case in batch.get("keys", [""] * size)]
    items = []
    for item in range(size):
        masked = item >= size - num_masked
        drawing = _Item(item, data[item].numpy(), target[item, 0].numpy(), annotations, labels.ignore_label, names)
        items.append(drawing.report(cases[item], masked, allowed[item].numpy()))
    open_voxels = allowed.sum(1) > 1
    summary = (
        f"{size} patches of {' × '.join(map(str, spatial))} voxels, {num_masked} of them from cases with a mask; "
        f"{len(annotations.points)} points, {len(annotations.box_class)} boxes with {len(annotations.line_box)} lines "
        f"of evidence. {1 - float(open_voxels.float().mean()):.0%} of all voxels have one class left."
    )
    return BatchReport(number, summary, items)


class _Item:
    """One item of a batch on its way to pictures. In 3D one slice is shown, the one with most to see."""

    def __init__(
        self,
        item: int,
        image: npt.NDArray[Any],
        target: npt.NDArray[Any],
        annotations: AnnotationBatch,
        ignore: int | None,
        names: Sequence[str],
    ) -> None:
        self.names, self.ignore = names, ignore
        self.spatial = image.shape[1:]
        voxels = int(np.prod(self.spatial))
        self.dim = len(self.spatial)

        def mine(flat: Tensor) -> npt.NDArray[np.bool_]:
            return np.asarray((flat >= item * voxels) & (flat < (item + 1) * voxels))

        def places(flat: Tensor, chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
            index = np.unravel_index(flat.numpy()[chosen] - item * voxels, self.spatial)
            full = index if self.dim == 3 else (np.zeros_like(index[0]), *index)
            return np.stack(full, axis=1)

        chosen = mine(annotations.points)
        self.points = places(annotations.points, chosen)
        self.point_class = annotations.point_class.numpy()[chosen]
        chosen = mine(annotations.box_voxels)
        self.box_voxels = places(annotations.box_voxels, chosen)
        self.box_of_voxel = annotations.box_of_voxel.numpy()[chosen]
        self.box_line = annotations.box_line.numpy()[chosen]
        self.boxes = np.flatnonzero(annotations.box_item.numpy() == item)
        self.box_class = annotations.box_class.numpy()
        self.box_tight = annotations.box_tight.numpy()
        self.line_box = annotations.line_box.numpy()
        self.tags = annotations.tags[item].numpy()
        self.complete = annotations.complete_boxes[item].numpy()
        self.listed = annotations.listed[item].numpy()

        def volume(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
            return array if self.dim == 3 else array[..., None, :, :]

        nothing = np.zeros(self.spatial, bool)
        self.image, self.target = volume(image), volume(target)
        self.partial = volume(annotations.partial[item].numpy() if annotations.partial.numel() else nothing)
        self.outside = volume(annotations.outside[item].numpy() if annotations.outside.numel() else nothing)
        index = self._best_slice()
        self.window = Window(0, index, (0, 0), (self.image.shape[2], self.image.shape[3]))
        self.frame = Frame(self.window, float(SIZE))
        self.shape = (math.ceil(self.frame.height), math.ceil(self.frame.width))

    def _best_slice(self) -> int:
        depth = self.image.shape[1]
        score = 20.0 * np.bincount(self.points[:, 0], minlength=depth)
        score += np.bincount(self.box_voxels[:, 0], minlength=depth) / max(1, self.image[0, 0].size) * 10
        known = (self.target >= 0) & (self.target != (-1 if self.ignore is None else self.ignore))
        score += (known & (self.target > 0)).mean(axis=(1, 2)) * 20
        score += np.ptp(self.image[0], axis=(1, 2)) > 0  # a slice of padding shows nothing
        score -= self.outside.mean(axis=(1, 2)) + np.abs(np.arange(depth) - (depth - 1) / 2) / (10 * depth)
        return int(score.argmax())

    def report(self, case: str, masked: bool, allowed: npt.NDArray[np.bool_]) -> ItemReport:
        codes = self._target_codes()
        drawn = bool((self.target != (-1 if self.ignore is None else self.ignore)).any())
        sets = self._sets(allowed)
        place = f"slice {self.window.index} of 0 to {self.image.shape[1] - 1}" if self.dim == 3 else ""
        result = ItemReport(
            case=case,
            masked=masked,
            seen=self._picture(*self._evidence_layer(), self._marks(), f"Patch of {case} with points and boxes"),
            mask=self._picture(*hatch(codes), (), f"Mask of the patch of {case}") if drawn else None,
            allowed=self._allowed_picture(allowed, case),
            facts=[*([place] if place else []), *self._facts()],
            sets=sets,
        )
        return result

    # --- pictures

    def _picture(
        self, codes: npt.NDArray[Any], colours: dict[int, Colour], marks: Sequence[Mark], description: str
    ) -> Picture:
        window = self.window.cut(self.image[0])
        image, media = encode_image(to_bytes(window, intensity_range(window)), self.shape)
        return Picture(
            width=round(self.frame.width, 1),
            height=round(self.frame.height, 1),
            image=image,
            media=media,
            layer=encode_layer(codes, colours),
            marks=tuple(marks),
            description=description,
            sharp=max(window.shape) < 0.7 * SIZE,
        )

    def _target_codes(self) -> npt.NDArray[np.int64]:
        ignored = -1 if self.ignore is None else self.ignore
        target = self.window.cut(self.target).astype(np.int64)
        codes = np.where((target == ignored) | (target < 0), IGNORED, target)
        codes = np.where(self.window.cut(self.partial), UNDRAWN, codes)
        codes = np.where(self.window.cut(self.outside), OUTSIDE, codes)
        return np.asarray(shrink_labels(codes, self.shape, IGNORED), dtype=np.int64)

    def _evidence_layer(self) -> tuple[npt.NDArray[np.int64], dict[int, Colour]]:
        """Boxes by their lines: bands where rows or columns count, a checkerboard where both do, grey where neither."""
        rows, columns = self.image.shape[2:]
        codes = np.zeros((rows, columns), np.int64)
        colours: dict[int, Colour] = {}
        here = self.box_voxels[:, 0] == self.window.index
        band = max(1, round(_BAND * max(rows, columns) / SIZE))
        for box in self.boxes[np.argsort([-(self.box_of_voxel == k).sum() for k in self.boxes], kind="stable")]:
            if not self.box_tight[box]:
                continue
            chosen = here & (self.box_of_voxel == box)
            y, x = self.box_voxels[chosen, 1], self.box_voxels[chosen, 2]
            lines = self.box_line[chosen][:, -2:]
            counts = lines >= 0
            first = np.where(counts, lines, np.iinfo(np.int64).max).min(axis=0, initial=np.iinfo(np.int64).max)
            parity = np.where(counts, (lines - first) // band, 0).sum(axis=1) % 2
            label = int(self.box_class[box])
            strong, weak, none = 1000 + 3 * label, 1001 + 3 * label, 1002 + 3 * label
            codes[y, x] = np.where(counts.any(axis=1), np.where(parity == 0, strong, weak), none)
            colours[strong], colours[weak] = (*rgb(label), 135), (*rgb(label), 45)
            colours[none] = (128, 128, 128, 120)
        outside = self.window.cut(self.outside)
        if outside.any():
            crossed, more = hatch(np.where(outside, OUTSIDE, 0))
            codes = np.where(outside, crossed, codes)
            colours.update(more)
        down, across = (
            np.linspace(0, size, min(size, wanted), endpoint=False).astype(int)
            for size, wanted in zip((rows, columns), self.shape, strict=True)
        )
        return codes[np.ix_(down, across)], colours

    def _marks(self) -> list[Mark]:
        from scipy.spatial import ConvexHull

        marks = []
        for box in self.boxes:
            chosen = (self.box_of_voxel == box) & (self.box_voxels[:, 0] == self.window.index)
            if not chosen.any():
                continue
            voxels = self.box_voxels[chosen][:, 1:]
            corners = (voxels[:, None] + np.array([[0, 0], [0, 1], [1, 0], [1, 1]])).reshape(-1, 2)
            outline = corners[ConvexHull(corners).vertices]
            at = tuple(value for corner in outline.tolist() for value in self.frame.place(corner))
            label, tight = int(self.box_class[box]), bool(self.box_tight[box])
            count = int((self.line_box == box).sum())
            title = f"box of {self.names[label]}, {f'{count} lines count' if tight else 'loose'}"
            marks.append(Mark("outline", at, label, title, not tight))
        for place, label in zip(self.points.tolist(), self.point_class.tolist(), strict=True):
            if place[0] == self.window.index:
                at = self.frame.place((place[1] + 0.5, place[2] + 0.5))
                marks.append(Mark("point", at, int(label), f"point of {self.names[label]}"))
        return marks

    def _allowed_picture(self, allowed: npt.NDArray[np.bool_], case: str) -> Picture:
        """One class left: its colour (background dark); several: the lighter the more; outside: crossed."""
        volume = allowed if self.dim == 3 else allowed[:, None]
        shown = self.window.cut(volume)
        count = shown.sum(axis=0)
        codes = np.where(count == 1, shown.argmax(axis=0), 1000 + count)
        codes = np.where(self.window.cut(self.outside), OUTSIDE, codes)
        codes = np.asarray(shrink_labels(codes, self.shape), dtype=np.int64)
        classes = len(self.names)
        colours: dict[int, Colour] = {0: (43, 43, 51, 255)}
        colours.update({label: (*rgb(label), 255) for label in range(1, classes)})
        for number in range(2, classes + 1):
            grey = round(120 + (_PAPER - 120) * (number - 1) / max(1, classes - 1))
            colours[1000 + number] = (grey, grey, grey, 255)
        where = codes == OUTSIDE
        if where.any():
            crossed, more = hatch(np.where(where, OUTSIDE, 0))
            codes = np.where(where, crossed, codes)
            colours.update({code: (*colour[:3], 255) for code, colour in more.items()})
        blank, media = encode_image(np.full((2, 2), 128, np.uint8), (2, 2))
        return Picture(
            width=round(self.frame.width, 1),
            height=round(self.frame.height, 1),
            image=blank,
            media=media,
            layer=encode_layer(codes, colours),
            marks=(),
            description=f"Classes that the voxels of the patch of {case} may still have",
            sharp=max(shown.shape[1:]) < 0.7 * SIZE,
        )

    # --- words

    def _sets(self, allowed: npt.NDArray[np.bool_]) -> list[tuple[str, float]]:
        """The sets of classes that voxels of the whole patch may still have, most common first."""
        inside = ~(self.outside if self.dim == 3 else self.outside[0])
        columns = allowed[:, inside]
        if not columns.size:
            return []
        packed = np.packbits(columns, axis=0).T
        values, index, numbers = np.unique(packed, axis=0, return_index=True, return_counts=True)
        order = np.argsort(-numbers)
        found = []
        for position in order[:_SETS].tolist():
            classes = np.flatnonzero(columns[:, index[position]])
            if len(classes) == len(self.names):
                words = "any class"
            elif len(classes) > max(3, len(self.names) // 2):
                left_out = [self.names[c] for c in range(len(self.names)) if c not in set(classes.tolist())]
                words = f"any but {', '.join(left_out)}"
            else:
                words = " or ".join(self.names[c] for c in classes.tolist())
                words = f"only {words}" if len(classes) == 1 else words
            found.append((words, float(numbers[position] / columns.shape[1])))
        if len(values) > _SETS:
            found.append((f"{len(values) - _SETS} other sets", float(numbers[order[_SETS:]].sum() / columns.shape[1])))
        return found

    def _facts(self) -> list[str]:
        facts = []
        for value, word in ((1, "present"), (0, "absent")):
            classes = [name for name, tag in zip(self.names, self.tags, strict=True) if tag == value]
            if classes:
                facts.append(f"{word} in this patch: {', '.join(classes)}")
        complete = [name for name, all_boxed in zip(self.names, self.complete, strict=True) if all_boxed]
        if complete:
            facts.append(f"boxes are complete for {', '.join(complete)}")
        tight = self.boxes[self.box_tight[self.boxes]] if len(self.boxes) else self.boxes
        if len(self.boxes):
            lines = int(np.isin(self.line_box, tight).sum())
            loose = len(self.boxes) - len(tight)
            text = f"{len(tight)} tight box(es), {lines} of whose lines count as evidence"
            facts.append(text + (f"; {loose} loose" if loose else ""))
        if len(self.points):
            facts.append(f"{len(self.points)} point(s)")
        if self.partial.any():
            drawn = [name for name, one in zip(self.names[1:], self.listed[1:], strict=True) if one]
            facts.append(f"the annotator of the mask drew {', '.join(drawn) or 'no class'} only")
        if self.outside.any():
            facts.append(f"{self.outside.mean():.0%} of the patch lies outside the image")
        return facts
