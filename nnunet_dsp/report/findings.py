"""What a check can find: the kinds, how bad they are and what to do, and the record of one finding.

Nothing here looks at data; case_checks.py and dataset_checks.py find, page.py shows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from nnunet_dsp.report.drawing import Picture


class Severity(IntEnum):
    """How bad a finding is; the smaller the worse."""

    ERROR = 0
    DOUBTFUL = 1
    NOTE = 2

    @property
    def word(self) -> str:
        return {0: "error", 1: "doubtful", 2: "note"}[self.value]


class Kind(NamedTuple):
    """One kind of finding: its severity, a heading, and what it means or what to do, in a sentence or two."""

    severity: Severity
    title: str
    advice: str


# In the order in which they are shown: errors first, what spoils most first.
KINDS: dict[str, Kind] = {
    "dataset": Kind(
        Severity.ERROR,
        "The dataset as a whole",
        "dataset.json and the folders must be right before anything else can be checked.",
    ),
    "unreadable": Kind(
        Severity.ERROR,
        "Images and masks that cannot be used",
        "nnU-Net will fail on the same files. Export them again.",
    ),
    "integrity": Kind(
        Severity.ERROR,
        "nnU-Net's own integrity check",
        "What nnUNetv2_plan_and_preprocess --verify_dataset_integrity refuses, in its own words.",
    ),
    "annotation-file": Kind(
        Severity.ERROR,
        "Annotation files that cannot be used",
        "They are malformed, belong to no image, or do not fit their image.",
    ),
    "point": Kind(
        Severity.ERROR,
        "Points that contradict the mask or each other",
        "Many of them at once usually mean swapped or flipped coordinates.",
    ),
    "box": Kind(
        Severity.ERROR,
        "Boxes that hold nothing of their class",
        "The mask is complete inside the box and shows no voxel of the class.",
    ),
    "complete": Kind(
        Severity.ERROR,
        "Objects without the box or point they should have",
        '"complete" promises one for every object; the network is taught that there is nothing anywhere else.',
    ),
    "tag": Kind(Severity.ERROR, "Tags that something else contradicts", "Correct the tag, or what contradicts it."),
    "mask": Kind(Severity.ERROR, "Masks with values they should not hold", "Correct the mask or the list of classes."),
    "regions": Kind(
        Severity.ERROR,
        "Weak annotations in a dataset with regions",
        "Labels that are lists of values have no class of their own in a voxel, so points and boxes cannot use them.",
    ),
    "split": Kind(Severity.ERROR, "splits_final.json", "nnU-Net trains and validates by this file."),
    "training": Kind(
        Severity.ERROR, "Training batches", "The training's own loader fails here, so the training would, too."
    ),
    "shifted": Kind(
        Severity.DOUBTFUL,
        "Boxes shifted against the masks",
        "Boxes are half-open and counted from 0: start is the object's first voxel, stop the one after its last.",
    ),
    "loose-fit": Kind(
        Severity.DOUBTFUL,
        "Tight boxes that do not fit",
        "A tight box promises its class in each of its rows, columns and slices. "
        'Shrink the box, or write "tight": false.',
    ),
    "thin-box": Kind(
        Severity.DOUBTFUL, "Boxes of one voxel, or one voxel thin", "Often a click that was taken for a box."
    ),
    "double-box": Kind(Severity.DOUBTFUL, "Boxes drawn twice", "The same object counts twice, or as two classes."),
    "huge-box": Kind(
        Severity.DOUBTFUL, "Boxes around the whole image", "They say hardly more than a tag; is the object that large?"
    ),
    "close-points": Kind(
        Severity.DOUBTFUL, "Points within a voxel of each other", "Probably one click that was saved twice."
    ),
    "pieces": Kind(
        Severity.DOUBTFUL,
        "Instances in pieces that do not touch",
        "An id that was used twice looks like this. What lies between two pieces cannot tell that they belong "
        "together, so every decoder gives them two ids. `nnunet_dsp convert instances` makes them instances of their "
        "own.",
    ),
    "never": Kind(
        Severity.DOUBTFUL,
        "Classes that never occur",
        "The network gets an output for each of them and never learns what it is for.",
    ),
    "twins": Kind(
        Severity.DOUBTFUL,
        "The same image more than once",
        "If one copy validates what another trained, the validation result is too good.",
    ),
    "flat-image": Kind(Severity.DOUBTFUL, "Images without contrast", "All voxels of a channel have the same value."),
    "orphan-label": Kind(Severity.DOUBTFUL, "Masks without an image", "nnU-Net passes over them."),
    "warning": Kind(
        Severity.DOUBTFUL,
        "Warnings of nnU-Net's integrity check",
        "Training will run; image and mask may still not lie on each other.",
    ),
    "unprepared": Kind(
        Severity.NOTE,
        "What nnunet_dsp prepare will do",
        "Run it before nnUNetv2_plan_and_preprocess; nnU-Net's own integrity check fails until then.",
    ),
    "no-mask": Kind(
        Severity.NOTE,
        "Classes without a mask",
        "They can be learned from the other annotations, but nothing measures how well.",
    ),
    "no-background": Kind(
        Severity.NOTE,
        "No labelled background",
        "Nothing can tell the network what is no object: instances will fill the images. Right where objects do, as "
        "neurons in electron micrographs; else label some background.",
    ),
    "rare": Kind(Severity.NOTE, "Classes in one case only", "Nothing is left to validate them on once it trains."),
    "empty-file": Kind(Severity.NOTE, "Annotation files that say nothing", "They count as unlabelled."),
    "no-foreground": Kind(Severity.NOTE, "Masks of background only", "Fine if there is nothing to see."),
    "speck": Kind(Severity.NOTE, "Specks in masks", "One or two voxels, often slips of the brush."),
}
_RANK = {kind: rank for rank, kind in enumerate(KINDS)}


@dataclass(slots=True)
class Finding:
    """One thing found.

    Attributes:
        kind: a key of KINDS.
        text: what is wrong, where, and if the kind's advice does not say so what to do.
        case: the case it is about, None for the dataset as a whole.
        points, boxes: numbers of the entries of the annotation file it is about.
        picture: what it looks like, where it can be shown.
    """

    kind: str
    text: str
    case: str | None = None
    points: tuple[int, ...] = ()
    boxes: tuple[int, ...] = ()
    picture: Picture | None = None

    @property
    def severity(self) -> Severity:
        return KINDS[self.kind].severity

    def to_json(self) -> dict[str, object]:
        return {
            "severity": self.severity.word,
            "kind": self.kind,
            "case": self.case,
            "text": self.text,
            "points": list(self.points),
            "boxes": list(self.boxes),
        }


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """By kind in the order of KINDS; within a kind as they came."""
    return sorted(findings, key=lambda finding: (finding.severity, _RANK[finding.kind]))
