"""Instances in nnU-Net's format: one region whose values are the ids of one image's instances, and `ignore`.

    "labels": {"background": 0, "cell": [1, 2, ..., N], "ignore": N + 1}, "regions_class_order": [1]

N is the largest number of instances in an image; every image counts its own from 1. nnU-Net's commands take the dataset
as it is: its own trainers see one foreground class, nnUNetTrainerCRAC sees the ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cc3d
import numpy as np
import numpy.typing as npt

from nnunet_dsp.dataset_conversion import raw_dataset
from nnunet_dsp.dataset_conversion.array_files import read_array
from nnunet_dsp.dataset_conversion.parallel import map_cases
from nnunet_dsp.dataset_conversion.raw_dataset import EVALUATION_FOLDER, RawCase, RawDataset
from nnunet_dsp.dataset_conversion.splits import SPLITS_FILE

IntArray = npt.NDArray[np.integer[Any]]
MOST_IDS = 32766  # nnU-Net keeps preprocessed labels as int16, and `ignore` needs a value above the ids
INSTANCES_KEY = "instance_labels"
LEAST_BACKGROUND = 0.005  # share of the labelled voxels; a few holes between cells that fill the image are none

LABEL_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".png", ".tif", ".tiff", ".bmp", ".npy", ".h5", ".hdf5", ".hdf")


def is_label_file(path: Path) -> bool:
    """Whether a file can be read as a label image, by its name."""
    return path.is_file() and not path.name.startswith(".") and path.name.lower().endswith(LABEL_ENDINGS)


def name_of(path: Path) -> str:
    """The file's name without its ending."""
    ending = next((e for e in LABEL_ENDINGS if path.name.lower().endswith(e)), path.suffix)
    return path.name[: len(path.name) - len(ending)]


def read_labels(path: Path, key: str | None = None, ignore: int | None = None) -> IntArray:
    """A label image as whole numbers of at least 0, (y, x) or (z, y, x).

    Of pictures with a palette, as annotation tools write them, the indices are the ids; colours are for the eye.

    Args:
        key: see array_files.read_array().
        ignore: value of what nobody labelled, which may be negative.

    Raises:
        ValueError: the file cannot be read, is a JPEG or in colour, or holds negative or broken numbers.
    """
    if path.suffix.lower() in (".jpg", ".jpeg"):
        raise ValueError(
            f"{path}: JPEG changes values along edges, so that ids and masks come back as others. Export the labels "
            "without loss (PNG or TIFF)."
        )
    array, said = read_array(path, key, palette_indices=True)
    if said.get("colour"):
        others = range(1, array.shape[-1] - (array.shape[-1] in (2, 4)))  # transparency says nothing
        if array.ndim == 3 and all(np.array_equal(array[..., 0], array[..., c]) for c in others):
            array = array[..., 0]
        else:
            raise ValueError(
                f"{path}: expected one number a voxel, the instance's id, but got a colour image of shape "
                f"{array.shape}. Export the labels as integers (16 bit PNG or TIFF), not as a picture of them."
            )
    if array.dtype == np.bool_:
        return array.astype(np.uint8)
    if array.dtype.kind not in "uif":
        raise ValueError(f"{path}: expected whole numbers, the instances' ids, but got {array.dtype}.")
    if array.dtype.kind == "f":
        if not np.isfinite(array).all() or not np.array_equal(np.rint(array), array):
            raise ValueError(
                f"{path}: expected whole numbers, the instances' ids, but got {array.dtype} from {array.min()} to "
                f"{array.max()}. Was it resampled with interpolation, or is it a probability map?"
            )
        array = array.astype(np.int64)
    if array.size and int(array.min()) < 0:
        negative = np.unique(array[array < 0])
        if negative.tolist() != [ignore]:
            raise ValueError(
                f"{path}: expected ids of at least 0, but the lowest is {negative[0]}. If that is what nobody "
                f"labelled, say --ignore {negative[0]}."
            )
    return array


def connected_instances(labels: IntArray, *, keep: Sequence[int] = ()) -> npt.NDArray[np.int32]:
    """Ids 1..n, one for each connected piece of each value above 0: by faces, 4 neighbours in 2D, 6 in 3D.

    Serves masks without ids, and instances whose pieces hang together only outside of the image: no method can tell
    that two pieces belong together by what lies between them.

    Args:
        labels: (y, x) or (z, y, x); touching pieces of different values stay apart.
        keep: values that are no instance (the ignore label): 0 in the result.
    """
    values, numbered = np.unique(labels, return_inverse=True)
    dense = numbered.reshape(labels.shape).astype(np.uint32) + 1
    dense[np.isin(labels, [0, *keep])] = 0
    found = cc3d.connected_components(dense, connectivity=4 if labels.ndim == 2 else 6)
    return np.asarray(found, dtype=np.int32)


def renumber(labels: IntArray) -> npt.NDArray[np.int32]:
    """Ids 1..n in the order of the old ones; 0 stays."""
    values, inverse = np.unique(labels, return_inverse=True)
    numbered = inverse.reshape(labels.shape).astype(np.int32)
    return np.asarray(numbered if values.size and values[0] == 0 else numbered + 1, dtype=np.int32)


def region_labels(name: str, most_instances: int) -> dict[str, Any]:
    """The "labels" of dataset.json for images of up to so many instances; to be written with regions_class_order [1].

    Raises:
        ValueError: more than nnU-Net can store.
    """
    if most_instances > MOST_IDS:
        raise ValueError(
            f"An image holds {most_instances} instances, but nnU-Net stores preprocessed labels as 16 bit integers, "
            f"which leaves {MOST_IDS} ids. Cut the image into smaller ones (--tile), each with ids of its own."
        )
    number = max(2, most_instances)  # nnU-Net takes a list of one value for an ordinary label
    return {"background": 0, name: list(range(1, number + 1)), "ignore": number + 1}


def is_instance_dataset(content: dict[str, Any]) -> bool:
    """Whether a dataset.json declares one region of instance ids, as region_labels() has it."""
    labels = {n: v for n, v in content.get("labels", {}).items() if n not in ("background", "ignore")}
    return len(labels) == 1 and all(isinstance(v, list) and len(v) > 1 for v in labels.values())


def sparse_instances(
    labels: IntArray,
    share: float,
    ignore: int,
    seed: int | Sequence[int],
    *,
    known: int | None = None,
    keep_background: bool = False,
) -> tuple[npt.NDArray[np.integer[Any]], int, int]:
    """Keep whole instances, drawn at random, and call everything else unlabelled.

    Args:
        labels: instance ids, 0 is background.
        share: of the instances to keep, in (0, 1]; rounded, at least one where there is any. 1 changes nothing.
        ignore: the ignore label.
        seed: same seed, same instances. Those kept at a smaller share are kept at a larger one too.
        known: value in `labels` that is ignored already.
        keep_background: what is 0 stays 0; else it is unlabelled, as somebody leaves it who draws a few instances.

    Returns:
        Labels of the same dtype with the kept ids as they were, how many are kept, and how many there were.
    """
    if not 0 < share <= 1:
        raise ValueError(f"Expected a share of the instances above 0 and up to 1, but got {share}.")
    ids = np.unique(labels)
    ids = ids[(ids > 0) & (ids != (-1 if known is None else known))]
    if share == 1:
        return labels.copy(), len(ids), len(ids)
    number = min(len(ids), max(1, round(share * len(ids))))
    order = np.random.default_rng(seed).permutation(ids)
    kept = order[:number]
    stays = np.isin(labels, [*kept.tolist(), 0] if keep_background else kept)
    return np.where(stays, labels, ignore).astype(labels.dtype), len(kept), len(ids)


class _SparseJob(NamedTuple):
    case: RawCase
    target: Path
    reader_writer: Any
    share: float
    ignore: int
    known: int | None
    seed: int
    keep_background: bool


def _make_sparse(job: _SparseJob) -> tuple[str, int, int]:
    labels, properties = raw_dataset.read_label(job.reader_writer, job.case.label)
    labels = labels.astype(np.int32)
    if labels.size and not 0 <= int(labels.min()) <= int(labels.max()) <= job.ignore:
        raise ValueError(
            f"{job.case.label}: expected ids from 0 to {job.ignore}, as dataset.json declares them, but got "
            f"{labels.min()} to {labels.max()}."
        )
    sparse, kept, among = sparse_instances(
        labels,
        job.share,
        job.ignore,
        (job.seed, *job.case.name.encode()),
        known=job.known,
        keep_background=job.keep_background,
    )
    raw_dataset.write_label(job.reader_writer, sparse, job.target, properties)
    return job.case.name, kept, among


def ignore_value(content: dict[str, Any]) -> int:
    """The ignore label of an instance dataset's dataset.json, or the value it would have."""
    labels = content["labels"]
    known = labels.get("ignore")
    return int(max(v for name, v in _flat(labels) if name != "ignore")) + 1 if known is None else int(known)


def check_instances(source: RawDataset) -> int:
    """The ignore label of an instance dataset, or the value it would have.

    Raises:
        ValueError: no instance dataset, or labels are missing.
    """
    if not is_instance_dataset(source.json):
        raise ValueError(
            f"{source.folder / 'dataset.json'} declares no instances (one label whose value is the list of all ids). "
            "`nnunet_dsp convert instances` makes such a dataset, from ordinary masks too."
        )
    missing = [c.name for c in source.cases.values() if not c.label.is_file()]
    if missing:
        raise ValueError(f"{source.folder}: {len(missing)} cases have no label file: {', '.join(missing[:10])}.")
    return ignore_value(source.json)


def write_sparse_labels(
    source: RawDataset,
    folder: Path,
    share: float,
    *,
    seed: int = 0,
    keep_background: bool = False,
    processes: int = 1,
) -> dict[str, tuple[int, int]]:
    """The label files of an instance dataset with only a share of each image's instances; see write_sparse_dataset().

    Args:
        folder: where they are written, under the names they have.

    Returns:
        By case how many instances are labelled, and of how many.
    """
    ignore, known, reader_writer = check_instances(source), source.ignore_label, source.reader_writer()
    jobs = [
        _SparseJob(
            case,
            folder / f"{case.name}{source.file_ending}",
            reader_writer,
            share,
            ignore,
            known,
            seed,
            keep_background,
        )
        for case in source.cases.values()
    ]
    made = map_cases(_make_sparse, jobs, processes=processes, description="Drawing instances")
    return {name: (kept, among) for name, kept, among in made}


def write_sparse_dataset(
    source: RawDataset,
    target: Path,
    share: float,
    *,
    seed: int = 0,
    keep_background: bool = False,
    processes: int = 1,
    arguments: Any = None,
) -> dict[str, tuple[int, int]]:
    """A copy of an instance dataset in which a share of each image's instances is labelled; `nnunet_dsp simulate`'s.

    Images are linked. The full labels are linked to labelsTr_evaluation, where nnU-Net does not look; test cases and
    splits_final.json come along.

    Args:
        source: a raw dataset as `nnunet_dsp convert instances` makes it.
        target: where it goes (see raw_dataset.new_dataset_folder).
        share: of the instances that stay labelled, above 0 and up to 1, in each image; at least one.
        seed: same seed, same instances; a larger share keeps those of a smaller one and more.
        keep_background: labelled background stays labelled.
        arguments: the command's, for the record.

    Returns:
        By case how many instances are labelled, and of how many.

    Raises:
        ValueError: no instance dataset, or labels are missing.
    """
    ignore = check_instances(source)
    if not 0 < share <= 1:
        raise ValueError(f"--instances: expected a share of the instances above 0 and up to 1, but got {share}.")
    with raw_dataset.building(target) as folder:
        for name in ("labelsTr", "imagesTr", EVALUATION_FOLDER):
            (folder / name).mkdir()
        counted = write_sparse_labels(
            source, folder / "labelsTr", share, seed=seed, keep_background=keep_background, processes=processes
        )
        if not any(among for _, among in counted.values()):
            raise ValueError(f"{source.folder / 'labelsTr'}: no label image shows an instance, so none can be kept.")
        for case in source.cases.values():
            raw_dataset.link_case_images(case, folder / "imagesTr", source.file_ending)
            for file, new_name in raw_dataset.label_files(case.label, f"{case.name}{source.file_ending}"):
                raw_dataset.link_file(file, folder / EVALUATION_FOLDER / new_name)
        for part in ("imagesTs", "labelsTs"):
            if (source.folder / part).is_dir():
                raw_dataset.link_folder(source.folder / part, folder / part)
        if (source.folder / SPLITS_FILE).is_file():
            raw_dataset.link_file(source.folder / SPLITS_FILE, folder / SPLITS_FILE)
        content = {k: v for k, v in source.json.items() if k != "dataset"}
        content["labels"] = {**source.json["labels"], "ignore": ignore}
        raw_dataset.write_json(folder / "dataset.json", {**content, "name": target.name[len("Dataset000_") :]})
        raw_dataset.write_record(
            folder,
            "nnunet_dsp simulate --instances",
            vars(arguments) if arguments is not None else {},
            source=source.folder.name,
            share=share,
            seed=seed,
            instances={name: {"labelled": kept, "of": among} for name, (kept, among) in counted.items()},
        )
    return counted


def _flat(labels: dict[str, Any]) -> list[tuple[str, int]]:
    return [(n, int(v)) for n, values in labels.items() for v in (values if isinstance(values, list) else [values])]


__all__ = [
    "LEAST_BACKGROUND",
    "MOST_IDS",
    "check_instances",
    "connected_instances",
    "ignore_value",
    "is_instance_dataset",
    "is_label_file",
    "name_of",
    "read_labels",
    "region_labels",
    "renumber",
    "sparse_instances",
    "write_sparse_dataset",
    "write_sparse_labels",
]
