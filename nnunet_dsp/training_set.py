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

from nnunet_dsp.annotation_cache import (
    known_cases,
    read_cache,
    read_flags,
    signature,
    write_cache,
    write_flags,
)
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
    """Whether no voxel of a case's mask is annotated, by the class locations that nnU-Net stored with it; KeyError."""
    return len(properties["class_locations"][annotated_key]) == 0


def find_weak_cases(
    folder: Path, cases: Sequence[str], annotated_key: tuple[int, ...], cache_file: Path | None = None
) -> list[str]:
    """The cases of a preprocessed configuration whose mask is the ignore label all over.

    Args:
        folder: nnU-Net's folder of one configuration.
        cases: the cases in question.
        annotated_key: what nnU-Net calls the places of all labels but the ignore label in "class_locations".
        cache_file: what was found before, and where to keep it; None: nowhere.

    Raises:
        ValueError: a case was preprocessed with other labels.
    """
    known = read_flags(cache_file) if cache_file is not None else {}
    flags: dict[str, tuple[str, bool]] = {}
    for case in tqdm(cases, desc="Looking for cases without mask", disable=len(cases) < 500):
        key = signature([folder / f"{case}.pkl"], annotated_key)
        stored = known.get(case)
        if stored is not None and stored[0] == key:
            flags[case] = stored
        else:
            try:
                flags[case] = (key, is_weak(load_pickle(str(folder / f"{case}.pkl")), annotated_key))
            except KeyError:
                raise ValueError(
                    f"{folder / case}.pkl was preprocessed with other labels than dataset.json has now, perhaps before "
                    "the ignore label was declared. Run nnUNetv2_preprocess again."
                ) from None
    if cache_file is not None and flags != known:
        write_flags(cache_file, flags)
    return [case for case, (_, weak) in flags.items() if weak]


def load_case_annotations(
    annotations_folder: Path,
    preprocessed_folder: Path,
    cases: Sequence[str],
    all_cases: Sequence[str],
    case_shape: Callable[[str], Sequence[int]],
    labels: LabelNames,
    transpose_forward: Sequence[int],
    read_mask: Callable[[str], npt.NDArray[Any] | None],
    *,
    mask_file: Callable[[str], Path] | None = None,
    cache_file: Path | None = None,
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
        mask_file: the file that `read_mask` reads; a case is validated anew when it changes.
        cache_file: what was found before, and where to keep it; None: nowhere.

    Returns:
        By case; cases without a file, or with a file that says nothing, are left out.

    Raises:
        AnnotationError: naming every case and entry that is wrong (the first ten of them).
    """
    if not annotations_folder.is_dir():
        return {}
    wanted = set(cases)
    signatures: dict[str, str] = {}
    known: dict[str, CaseAnnotations] = {}
    cached: dict[str, tuple[str, CaseAnnotations]] = {}
    if cache_file is not None:
        settings = [labels.names, labels.ignore_label, list(transpose_forward)]
        for case in cases:
            file = annotations_folder / f"{case}.json"
            if file.is_file():
                others = [preprocessed_folder / f"{case}.pkl", *([mask_file(case)] if mask_file is not None else [])]
                signatures[case] = signature([file, *others], settings)
        cached = read_cache(cache_file)
        known = known_cases(cached, signatures)
        if len(known) == len(signatures) and not _orphans(annotations_folder, all_cases):
            return known
    read: Mapping[str, Annotations] = read_folder(annotations_folder, cases=all_cases, labels=labels)
    problems: list[str] = []
    mapped: dict[str, CaseAnnotations] = {}
    relevant = {case: said for case, said in read.items() if case in wanted and not said.is_empty}
    for case, said in tqdm(relevant.items(), desc="Validating annotations", disable=len(relevant) < 200):
        if case in known:
            mapped[case] = known[case]
            continue
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
    if cache_file is not None:
        kept = {case: entry for case, entry in cached.items() if case not in signatures}
        write_cache(cache_file, {**kept, **{case: (signatures[case], said) for case, said in mapped.items()}})
    return mapped


def _orphans(folder: Path, cases: Sequence[str]) -> bool:
    """Whether a file belongs to no case; read_folder() says so in words."""
    known = set(cases)
    return any(file.stem not in known for file in folder.glob("*.json") if not file.name.startswith("."))


def _raw_shape(properties: Mapping[str, Any], transpose_forward: Sequence[int]) -> tuple[int, ...]:
    shape = np.zeros(3, dtype=np.int64)
    shape[list(transpose_forward)] = properties["shape_before_cropping"]
    return tuple(int(size) for size in shape)
