"""Writing imported images, label maps and annotations into a raw nnU-Net dataset, new or there already.

What marks mean is decided in import_cases.py; nothing here changes it.
"""

from __future__ import annotations

import os
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any

from nnunet_dsp.annotations import AnnotationError, Annotations, case_file, find_contradictions, write_annotations
from nnunet_dsp.dataset_conversion import raw_dataset
from nnunet_dsp.dataset_conversion.image_files import stem_of
from nnunet_dsp.dataset_conversion.image_store import Form, ImageInfo, same_voxels, write_image
from nnunet_dsp.dataset_conversion.import_cases import Options, Said, said_of
from nnunet_dsp.dataset_conversion.imported import SourceImage

FOLDER = "annotationsTr"
HISTORY = "nnunet_dsp_imports.json"
MAX_NAME = 100


@dataclass(frozen=True)
class Job:
    """One image on its way into the dataset.

    source: what the parser said. info: the image's header, `shape` as the image will lie in the dataset. case: its
    name. form: what all images of the dataset look like. folder: the dataset under construction; None: only find out
    what would be written. spacing: (z, y, x), for stacks. existing: the image is a case of the dataset already.
    overwrite: replace annotations and mask of an existing case.
    """

    source: SourceImage
    info: ImageInfo
    shape: tuple[int, ...]
    turned: bool
    case: str
    form: Form
    options: Options
    folder: Path | None
    spacing: tuple[float, ...] | None = None
    existing: raw_dataset.RawCase | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Done:
    """What became of an image: see `Said`. masked: it has a mask or part of one. unknown: some of its voxels nobody
    drew, so that the dataset needs an ignore label."""

    annotations: Annotations
    counts: Counter[tuple[str, str]]
    notes: dict[str, list[str]]
    problems: list[str]
    marked: bool
    masked: bool
    unknown: bool


@lru_cache(maxsize=8)
def reader_writer(form: Form) -> Any:
    """The class with which nnU-Net will read images of this form."""
    from nnunetv2.imageio.reader_writer_registry import (
        determine_reader_writer_from_file_ending,
        recursive_find_reader_writer_by_name,
    )

    if form.reader is not None:
        return recursive_find_reader_writer_by_name(form.reader)
    return determine_reader_writer_from_file_ending(form.ending, None, verbose=False)


def do_job(job: Job) -> Done:
    """Work out what an image's marks say and, if the job has a folder, write image, mask and annotations.

    Raises:
        AnnotationError: marks that do not fit, an image that cannot be read, or annotations that are there already.
    """
    said = said_of(job.source, job.shape, job.options)
    _check_existing(job, said)
    if job.folder is not None:
        _write(job, said, job.folder)
    return _done(job, said)


def _write(job: Job, said: Said, folder: Path) -> None:
    if job.existing is None:
        image = folder / "imagesTr" / f"{job.case}_0000{job.form.ending}"
        write_image(job.source.file, job.info, job.form, image, data=job.source.embedded, turned=job.turned)
        if job.form.family == "stack" and job.spacing is not None:
            raw_dataset.write_json(folder / "imagesTr" / f"{job.case}.json", {"spacing": list(job.spacing)})
        files = [image]
    else:
        files = [folder / "imagesTr" / path.name for path in job.existing.images]
    reader = reader_writer(job.form)
    try:
        voxels, properties = reader().read_images([str(file) for file in files])
    except Exception as error:  # each of nnU-Net's readers has its own
        raise AnnotationError(f"{job.source.file}: nnU-Net cannot read the image: {error}") from None
    three = (1, *job.shape) if len(job.shape) == 2 else job.shape
    if voxels.shape[1:] != three:
        raise AnnotationError(
            f"{job.source.file}: nnU-Net reads the shape {voxels.shape[1:]}, but expected {three} from its header."
        )
    if said.label is not None:
        label = folder / "labelsTr" / f"{job.case}{job.form.ending}"
        label.unlink(missing_ok=True)  # it may be the same file as in the dataset that is being replaced
        label.with_name(f"{job.case}.json").unlink(missing_ok=True)
        raw_dataset.write_label(reader, said.label.reshape(three), label, properties)
    if not said.annotations.is_empty:
        path = case_file(folder / FOLDER, job.case)
        path.unlink(missing_ok=True)
        write_annotations(path, said.annotations, job.options.names)


def _done(job: Job, said: Said) -> Done:
    """Without the label map: a thousand of them do not fit into memory."""
    partial = said.annotations.mask_labels is not None
    if said.label is None:
        unknown = job.existing is None or not job.existing.label.is_file()
    else:
        unknown = bool((said.label == job.options.ignore).any())
    masked = said.label is not None and bool((said.label != job.options.ignore).any())
    return Done(said.annotations, said.counts, said.notes, said.problems, said.marked, masked, unknown or partial)


def _check_existing(job: Job, said: Said) -> None:
    """Refuse to replace what a case has, unless asked to; the mask it keeps must agree with its new annotations."""
    case = job.existing
    if case is None:
        return
    file = case_file(case.label.parent.parent / FOLDER, job.case)
    if file.is_file() and not said.annotations.is_empty and not job.overwrite:
        raise AnnotationError(
            f"{job.source.source}: the case {job.case!r} of the dataset has annotations already ({file}). "
            "--overwrite replaces them."
        )
    if not case.label.is_file():
        return
    mask, _ = raw_dataset.read_label(reader_writer(job.form), case.label)
    drawn = bool((mask != job.options.ignore).any())
    if said.label is not None and drawn and not job.overwrite:
        raise AnnotationError(
            f"{job.source.source}: the case {job.case!r} of the dataset has a mask already ({case.label}). "
            "--overwrite replaces it."
        )
    if said.label is None and drawn:
        said.problems[:] = find_contradictions(
            said.annotations, mask, source=job.source.source, labels=job.options.names, ignore_label=job.options.ignore
        )


def case_names(images: Sequence[SourceImage], root: Path, taken: Iterable[str] = ()) -> list[str]:
    """A name for each image's case: fit for a file name, unique (whatever the case of letters), the same every time.

    Images of one name in several folders get their folders' names in front; what is still the same gets a number. A
    "_0000" at the end, nnU-Net's channel number, goes away if all images have it.
    """
    wishes = [fit_name(image.name) for image in images]
    if wishes and all(re.fullmatch(r".+_0000", wish) for wish in wishes):
        wishes = [wish[: -len("_0000")] for wish in wishes]
    used = {name.lower() for name in taken}
    groups: dict[str, list[int]] = {}
    for index, wish in enumerate(wishes):
        groups.setdefault(wish.lower(), []).append(index)
    names = [""] * len(images)
    for members in groups.values():
        for index in members:
            name = wishes[index]
            if len(members) > 1:
                name = _with_folders(images[index], name, root)
            unique, number = name, 2
            while unique.lower() in used:
                unique, number = f"{name[: MAX_NAME - 8]}_{number}", number + 1
            used.add(unique.lower())
            names[index] = unique
    return names


def _with_folders(image: SourceImage, name: str, root: Path) -> str:
    try:
        folders = image.file.parent.relative_to(root).parts
    except ValueError:
        folders = ()
    return fit_name("_".join((*folders, name)))


def fit_name(text: str) -> str:
    """Letters, digits, "_" and "-" of a name, the rest as "_"; at most 100 characters, never empty."""
    text = re.sub(r"[^\w\-]+", "_", unicodedata.normalize("NFC", text)).strip("_-")
    while len(text.encode()) > MAX_NAME:
        text = text[:-1]
    return text or "image"


def cases_by_image(dataset: raw_dataset.RawDataset) -> dict[Path, str]:
    """The case that each image file became, as the dataset's list of imports has it."""
    file = dataset.folder / HISTORY
    history = raw_dataset.read_json(file) if file.is_file() else {}
    found: dict[Path, str] = {}
    for entry in history.get("imports") or ():
        cases = entry.get("cases") if isinstance(entry, dict) else None
        for case, said in cases.items() if isinstance(cases, dict) else ():
            if isinstance(said, dict) and isinstance(said.get("image"), str):
                found[Path(said["image"]).resolve()] = case
    return found


def existing_case(
    image: SourceImage, dataset: raw_dataset.RawDataset, root: Path, imported: Mapping[Path, str]
) -> raw_dataset.RawCase | None:
    """The case of a dataset that an annotated image is.

    A file called as nnU-Net calls the case's images (case_0000) is that case, whatever it looks like: people annotate a
    JPEG of a volume's slice or of a 16-bit image. A file that was imported as the case, or that is called like the case
    alone ("1.png"), as it is or as case_names() would call it, must show the same.

    Args:
        image: the image. dataset: the dataset.
        root: the folder of the images.
        imported: what cases_by_image() said.
    """
    stem = stem_of(image.file)
    for path in dataset.cases[stem[:-5]].images if re.search(r"_\d{4}$", stem) and stem[:-5] in dataset.cases else ():
        if stem == stem_of(path):
            return dataset.cases[stem[:-5]]
    wishes = [stem, fit_name(stem), fit_name(image.name), _with_folders(image, fit_name(image.name), root)]
    wishes += [wish[: -len("_0000")] for wish in wishes if wish.endswith("_0000")]
    for name in dict.fromkeys((imported.get(image.file.resolve(), ""), *wishes)):
        case = dataset.cases.get(name)
        if case is not None and same_voxels(image.file, case.images[0], image.embedded):
            return case
    return None


def copy_dataset(source: Path, target: Path) -> None:
    """Fill the new folder `target` with the files of a dataset: hard links, or copies; links stay links."""
    for folder, below, names in os.walk(source):
        there = target / Path(folder).relative_to(source)
        there.mkdir(exist_ok=True)
        links = [name for name in below if (Path(folder) / name).is_symlink()]
        below[:] = [name for name in below if name not in links]
        for name in [*names, *links]:
            file = Path(folder) / name
            if file.is_symlink():
                os.symlink(os.readlink(file), there / name)
                continue
            try:
                os.link(file, there / name)
            except OSError:
                shutil.copy2(file, there / name)


def write_history(folder: Path, entry: dict[str, Any]) -> None:
    """Add an import to the dataset's list of imports."""
    file = folder / HISTORY
    history = raw_dataset.read_json(file) if file.is_file() else {"imports": []}
    entries = history.get("imports")
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    raw_dataset.write_json(
        file, {"imports": [*(entries if isinstance(entries, list) else []), {"created": created, **entry}]}
    )
