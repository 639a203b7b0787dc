"""A preprocessed dataset's annotations, read and validated in the main process before the first epoch.

Workers that die hide their cause; so everything a user may have written wrongly is found here, with case and entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from tqdm import tqdm

from nnunet_dsp.annotations import (
    AnnotationError,
    Annotations,
    LabelNames,
    check_against_image,
    find_contradictions,
    read_folder,
)
from nnunet_dsp.geometry import CaseFrame
from nnunet_dsp.patch_annotations import CaseAnnotations, map_case

ANNOTATIONS_FOLDER = "annotationsTr"
_SHOWN_PROBLEMS = 10


def is_weak(properties: Mapping[str, Any], annotated_key: tuple[int, ...]) -> bool:
    """Whether no voxel of a case's mask is annotated, by the class locations that nnU-Net stored with it."""
    locations = properties.get("class_locations", {})
    return annotated_key in locations and len(locations[annotated_key]) == 0


def find_weak_cases(folder: Path, cases: Sequence[str], annotated_key: tuple[int, ...]) -> list[str]:
    """The cases of a preprocessed configuration whose mask is the ignore label all over."""
    shown = tqdm(cases, desc="Looking for cases without mask", disable=len(cases) < 500)
    return [case for case in shown if is_weak(load_pickle(str(folder / f"{case}.pkl")), annotated_key)]


def load_case_annotations(
    annotations_folder: Path,
    preprocessed_folder: Path,
    cases: Sequence[str],
    all_cases: Sequence[str],
    case_shape: Callable[[str], Sequence[int]],
    labels: LabelNames,
    transpose_forward: Sequence[int],
    read_mask: Callable[[str], npt.NDArray[Any] | None],
) -> dict[str, CaseAnnotations]:
    """Reads, validates and maps the annotations of the given cases.

    Args:
        annotations_folder: one JSON file a case; may be missing altogether.
        preprocessed_folder: nnU-Net's folder of one configuration (the .pkl files).
        cases: the training cases.
        all_cases: every case of the dataset; a file that belongs to none of them is an error.
        case_shape: the shape (3,) of a case's stored array.
        labels: the dataset's.
        transpose_forward: the plans'.
        read_mask: a case's mask in raw voxels, (z, y, x), or None where the case has none.

    Returns:
        By case; cases without a file, or with a file that says nothing, are left out.

    Raises:
        AnnotationError: naming every case and entry that is wrong (the first ten of them).
    """
    if not annotations_folder.is_dir():
        return {}
    wanted = set(cases)
    read: Mapping[str, Annotations] = read_folder(annotations_folder, cases=all_cases, labels=labels)
    problems: list[str] = []
    mapped: dict[str, CaseAnnotations] = {}
    relevant = {case: said for case, said in read.items() if case in wanted and not said.is_empty}
    for case, said in tqdm(relevant.items(), desc="Validating annotations", disable=len(relevant) < 200):
        source = f"{case} ({annotations_folder.name}/{case}.json)"
        properties = load_pickle(str(preprocessed_folder / f"{case}.pkl"))
        raw_shape = _raw_shape(properties, transpose_forward)
        try:
            check_against_image(said, raw_shape, source=source, labels=labels)
        except AnnotationError as error:
            problems.append(str(error))
            continue
        mask = read_mask(case)
        if mask is not None:
            ignore = labels.ignore_label
            problems += find_contradictions(said, mask, source=source, labels=labels, ignore_label=ignore)
        frame = CaseFrame.from_properties(properties, transpose_forward, case_shape(case))
        mapped[case] = map_case(said, labels, frame)
    if problems:
        more = len(problems) - _SHOWN_PROBLEMS
        shown = "\n".join(problems[:_SHOWN_PROBLEMS]) + (f"\n... and {more} more." if more > 0 else "")
        raise AnnotationError(
            f"{len(problems)} of the annotations cannot be right:\n{shown}\n"
            "Correct them and run `nnunet_dsp prepare` again; it lists all of them."
        )
    return mapped


def _raw_shape(properties: Mapping[str, Any], transpose_forward: Sequence[int]) -> tuple[int, ...]:
    shape = np.zeros(3, dtype=np.int64)
    shape[list(transpose_forward)] = properties["shape_before_cropping"]
    return tuple(int(size) for size in shape)
