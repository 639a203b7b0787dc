"""`nnunet_dsp export FORMAT -d ID`: a dataset's annotations for other tools, as COCO JSON or CSV.

`nnunet_dsp import` reads both back to the same annotations. COCO holds everything of 2D datasets, masks included (as
run lengths, an annotation for each connected area); CSV holds tags, points and boxes in 2D and 3D, but no masks.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_dsp.annotations import Annotations, LabelNames, case_file, read_annotations
from nnunet_dsp.dataset_conversion import raw_dataset
from nnunet_dsp.dataset_conversion.image_store import probe
from nnunet_dsp.dataset_conversion.importers._rle import encode
from nnunet_dsp.dataset_conversion.importers.coco import OWN_KEY
from nnunet_dsp.label_names import BACKGROUND

FOLDER = "annotationsTr"
COLUMNS = ("image", "kind", "label", "z", "y", "x", "zmax", "ymax", "xmax", "tight")
"""Of the CSV: coordinates as in annotation files (voxels, array order, centres at whole numbers, boxes half-open)."""


@dataclass(frozen=True)
class ExportedCase:
    """A case as it is exported. file: name of its (first) image file; shape: (y, x) or (z, y, x); label: its mask with
    `ignore` where nobody drew, None without one."""

    name: str
    file: str
    shape: tuple[int, ...]
    annotations: Annotations
    label: npt.NDArray[Any] | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "Example:\n  nnunet_dsp export coco -d 501 -o cells.json"
    parser.add_argument("format", metavar="FORMAT", choices=sorted(WRITERS), help=" or ".join(sorted(WRITERS)))
    parser.add_argument("-d", dest="dataset", metavar="ID", required=True, help="id or name of a raw dataset")
    parser.add_argument(
        "-o",
        dest="output",
        metavar="FILE",
        type=Path,
        help="the file to write (default: DatasetXXX_Name.json or .csv here)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")


def run(args: argparse.Namespace) -> int:
    """Export; returns the exit status.

    Raises:
        ValueError, OSError: no such dataset, annotations that cannot be read, or a file that exists.
    """
    from tqdm import tqdm

    dataset = raw_dataset.read_dataset(args.dataset)
    labels = LabelNames.from_dataset_json(dataset.json)
    dataset.labels  # noqa: B018  refuses regions, with a message
    ending, masks, write = WRITERS[args.format]
    output = args.output or Path(f"{dataset.folder.name}{ending}")
    if output.exists() and not args.overwrite:
        raise FileExistsError(f"{output} exists already. Name another file (-o), or pass --overwrite to replace it.")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {output.parent} to write {output.name} to.")
    reader = dataset.reader_writer() if masks else None
    cases = []
    for case in tqdm(dataset.cases.values(), desc="Reading", disable=len(dataset.cases) < 50):
        cases.append(_read_case(dataset, case, labels, reader))
    text = write(cases, labels, dataset.ignore_label)
    with raw_dataset.replacing(output) as temporary:
        temporary.write_text(text, encoding="utf-8")
    images = _folder_of_images(dataset)
    print(
        f"Wrote {len(cases)} cases to {output}. Its images: {images}\n"
        f"Back again: nnunet_dsp import {args.format} {output} --images {images} -d NEW_ID"
    )
    if not masks and any(case.label.is_file() for case in dataset.cases.values()):
        print("Masks in labelsTr are not in it: a table has no place for them.")
    if any(len(case.images) > 1 for case in dataset.cases.values()):
        print("Only the first channel's image files are named in it.")
    return 0


def _folder_of_images(dataset: raw_dataset.RawDataset) -> Path:
    """Where `import` finds the images: it follows no links out of the folder it is given, as `simulate` makes them."""
    files = [case.images[0] for case in dataset.cases.values()]
    real = [file.resolve() for file in files]
    if len({file.parent for file in real}) == 1 and [f.name for f in real] == [f.name for f in files]:
        return real[0].parent
    return dataset.folder / "imagesTr"


def _read_case(
    dataset: raw_dataset.RawDataset, case: raw_dataset.RawCase, labels: LabelNames, reader: Any
) -> ExportedCase:
    file = case_file(dataset.folder / FOLDER, case.name)
    annotations = read_annotations(file, labels) if file.is_file() else Annotations()
    mask = None
    if reader is not None and case.label.is_file():
        mask, _ = raw_dataset.read_label(reader, case.label)
        mask = mask[0] if mask.shape[0] == 1 else mask
    return ExportedCase(case.name, case.images[0].name, probe(case.images[0]).shape, annotations, mask)


def to_coco(cases: Sequence[ExportedCase], labels: LabelNames, ignore: int | None) -> str:
    """COCO JSON.

    Category ids are the dataset's label numbers. What COCO has no word for stands under "nnunet_dsp", in images (the
    classes whose boxes or points are complete, those the mask shows completely) and in annotations (a box that is not
    tight, a mask without a box of its own).

    Raises:
        ValueError: a 3D image.
    """
    import json

    number = {name: labels.index(name) for name in labels.names}
    images: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    used: set[int] = set()
    for index, case in enumerate(cases, start=1):
        if len(case.shape) != 2:
            raise ValueError(
                f"{case.name} is a 3D image, and COCO is 2D: nnunet_dsp export csv holds points and boxes."
            )
        said = case.annotations
        image: dict[str, Any] = {"id": index, "file_name": case.file, "width": case.shape[1], "height": case.shape[0]}
        entries = [{"category_id": number[name]} for name in said.present]
        entries += [_coco_point(point.at, number[point.label]) for point in said.points]
        entries += [_coco_box(box.start, box.stop, box.tight, number[box.label]) for box in said.boxes]
        own: dict[str, Any] = {
            "boxes": [number[name] for name in said.complete_boxes],
            "points": [number[name] for name in said.complete_points],
        }
        own = {key: value for key, value in own.items() if value}
        if said.absent:
            image["neg_category_ids"] = [number[name] for name in said.absent]
            own.setdefault("boxes", [])  # LVIS means that all boxes of such an image are complete; here that is said
        if case.label is not None and (ignore is None or bool((case.label != ignore).any())):
            entries += _coco_masks(case.label, labels, ignore)
            if ignore is not None and bool((case.label == ignore).any()):
                if said.mask_labels is not None:  # holds where masks are; the rest is unknown
                    own["mask_labels"] = [number[name] for name in said.mask_labels if name != BACKGROUND]
            else:
                drawn = said.mask_labels if said.mask_labels is not None else labels.names
                own["drawn"] = [number[name] for name in drawn if name != BACKGROUND]
        if own:
            image[OWN_KEY] = own
        images.append(image)
        for entry in entries:
            used.add(entry["category_id"])
            found.append({"id": len(found) + 1, "image_id": index, "iscrowd": 0, **entry})
    categories = [
        {"id": value, "name": name, "supercategory": "", "keypoints": ["point"], "skeleton": []}
        for name, value in number.items()
        if name != BACKGROUND
        or value in used
        or any(0 in image.get("neg_category_ids", ()) for image in images)
        or any(0 in values for image in images for values in image.get(OWN_KEY, {}).values())
    ]
    content = {"info": {"description": "nnunet_dsp"}, "images": images, "annotations": found, "categories": categories}
    return json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n"


def _coco_point(at: Sequence[float], category: int) -> dict[str, Any]:
    y, x = (_from_corner(v) for v in at[-2:])
    return {"category_id": category, "keypoints": [x, y, 2], "num_keypoints": 1}


def _from_corner(centre: float) -> float:
    """A coordinate counted from the outer corner of the first pixel, within the pixel that the point lies in."""
    t = centre + 0.5
    if not t.is_integer():
        return t
    return math.nextafter(t, -math.inf) if t > 0 else 1e-9  # a whole number would be read as that pixel's centre


def _coco_box(start: Sequence[float], stop: Sequence[float], tight: bool, category: int) -> dict[str, Any]:
    y0, x0 = (math.ceil(v) for v in start[-2:])  # the first voxel in it: boxes of annotation files count centres
    y1, x1 = (math.ceil(v) for v in stop[-2:])
    entry: dict[str, Any] = {"category_id": category, "bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)}
    return entry if tight else {**entry, OWN_KEY: {"tight": False}}


def _coco_masks(label: npt.NDArray[Any], labels: LabelNames, ignore: int | None) -> list[dict[str, Any]]:
    """An annotation for each connected area of each class; for the background one, if parts of the mask are unknown."""
    from scipy import ndimage

    entries = []
    partial = ignore is not None and bool((label == ignore).any())
    for name in labels.names:
        value = labels.index(name)
        if name == BACKGROUND and not partial:
            continue
        areas, number = ndimage.label(label == value, np.ones((3, 3)))
        if name == BACKGROUND:
            areas = (areas > 0).astype(np.int32)
            number = min(number, 1)
        for index, where in enumerate(ndimage.find_objects(areas, number), start=1):
            mask = areas == index if where is None else np.zeros(label.shape, bool)
            if where is not None:
                mask[where] = areas[where] == index
            y, x = where
            entries.append(
                {
                    "category_id": value,
                    "segmentation": {"counts": encode(mask), "size": list(label.shape)},
                    "bbox": [x.start, y.start, x.stop - x.start, y.stop - y.start],
                    "area": int(mask.sum()),
                    OWN_KEY: {"box": False},
                }
            )
    return entries


def to_csv(cases: Sequence[ExportedCase], labels: LabelNames, ignore: int | None) -> str:
    """A table with a row for each tag, point, box and complete class; a row of kind "image" for each image."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for case in cases:
        said = case.annotations
        rows: list[Mapping[str, Any]] = [{"kind": "image"}]
        rows += [{"kind": "present", "label": name} for name in said.present]
        rows += [{"kind": "absent", "label": name} for name in said.absent]
        rows += [{"kind": "point", "label": p.label, **_named(p.at)} for p in said.points]
        for box in said.boxes:
            start, stop = ([math.ceil(v) for v in corner] for corner in (box.start, box.stop))
            tight = "yes" if box.tight else "no"
            rows.append({"kind": "box", "label": box.label, **_named(start), **_named(stop, "max"), "tight": tight})
        rows += [{"kind": "complete_points", "label": name} for name in said.complete_points]
        rows += [{"kind": "complete_boxes", "label": name} for name in said.complete_boxes]
        for row in rows:
            writer.writerow([case.file, *(row.get(column, "") for column in COLUMNS[1:])])
    return text.getvalue()


def _named(values: Sequence[float], suffix: str = "") -> dict[str, str]:
    return {
        f"{axis}{suffix}": repr(float(v)).removesuffix(".0")
        for axis, v in zip("zyx"[-len(values) :], values, strict=True)
    }


Writer = Callable[[Sequence[ExportedCase], LabelNames, "int | None"], str]
WRITERS: dict[str, tuple[str, bool, Writer]] = {"coco": (".json", True, to_coco), "csv": (".csv", False, to_csv)}
"""By format: file ending, whether it holds masks, and what turns cases into text."""
