"""Instance label images of any kind, as an nnU-Net dataset that nnUNetTrainerCRAC trains on.

    nnunet_dsp convert instances cells -d 701 --label cell

reads cells/images and cells/labels (or masks): PNG, TIFF, BMP, JPEG (images), NIfTI, NRRD, MHA, NPY or HDF5, 2D or 3D,
one label image per image, of the same name (an ending such as _label, _mask or _cp_masks may follow). Every instance
has a whole number of its own; 0 is background. test_images and test_labels, or test/images and test/labels, become the
test set. Or name files:

    nnunet_dsp convert instances neuroproof -d 702 --images raw.tif --labels bodies.tif --train-slices 0:100 \\
        --test-slices 110:150

The voxels that nobody labelled: --sparse if those are the zeros, --ignore if they have a value of their own. Masks
without ids: --connected-components. A raw nnU-Net dataset (imagesTr, labelsTr, dataset.json) is read as it is, and its
classes' connected components become the instances.

Ids are renumbered from 1 in every image. An instance of several pieces becomes several instances (see
--keep-disconnected), since what lies between two pieces cannot tell that they belong together.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nnunet_dsp.dataset_conversion import raw_dataset
from nnunet_dsp.dataset_conversion.arguments import add_making_arguments
from nnunet_dsp.dataset_conversion.array_files import read_array
from nnunet_dsp.dataset_conversion.instance_labels import (
    connected_instances,
    is_instance_dataset,
    read_labels,
    region_labels,
    renumber,
)
from nnunet_dsp.dataset_conversion.instance_sources import Source, find_sources, nnunet_sources
from nnunet_dsp.dataset_conversion.parallel import map_cases
from nnunet_dsp.dataset_conversion.splits import SPLITS_FILE, split_by_group

NAME = "instances"
HELP = "instance label images (PNG, TIFF, NIfTI, NPY, HDF5) for nnUNetTrainerCRAC"

MOST_CHANNELS = 8


def _range(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"expected START:STOP, such as 0:100, but got {text!r}")
    return int(match[1]), int(match[2])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", type=Path, help="folder with images and labels")
    parser.add_argument(
        "-d", dest="dataset_id", metavar="ID", type=int, required=True, help="id of the new dataset, 1 to 999"
    )
    parser.add_argument("--name", default="Instances", help="name of the new dataset (default: %(default)s)")
    where = parser.add_argument_group("what is read (paths inside SRC, folders or files)")
    where.add_argument("--images", metavar="PATH", help="(default: images)")
    where.add_argument("--labels", metavar="PATH", help="(default: labels, or masks)")
    where.add_argument("--test-images", metavar="PATH", help="(default: test_images or test/images, if there)")
    where.add_argument("--test-labels", metavar="PATH", help="(default: test_labels or test/labels, if there)")
    where.add_argument("--image-key", metavar="KEY", help="array in HDF5 files that holds the image")
    where.add_argument("--label-key", metavar="KEY", help="array in HDF5 files that holds the labels")
    what = parser.add_argument_group("what labels mean")
    what.add_argument("--label", metavar="NAME", default="instance", help="the class's name (default: %(default)s)")
    what.add_argument("--sparse", action="store_true", help="0 is not background but what nobody labelled")
    what.add_argument("--ignore", metavar="VALUE", type=int, help="value of what nobody labelled")
    what.add_argument(
        "--connected-components", action="store_true", help="values are classes; each connected piece is an instance"
    )
    what.add_argument(
        "--values", metavar="VALUE", type=int, nargs="+", help="values that are instances, or classes of them (all)"
    )
    what.add_argument(
        "--keep-disconnected", action="store_true", help="an instance may have several pieces that do not touch"
    )
    what.add_argument(
        "--min-size",
        metavar="VOXELS",
        type=int,
        default=0,
        help="smaller instances count as not labelled: specks of a mask are neither instances nor background",
    )
    cut = parser.add_argument_group("which part")
    cut.add_argument(
        "--train-slices",
        metavar="START:STOP",
        type=_range,
        action="append",
        help="train on these slices of each volume only (first axis, half-open; repeatable: one case each)",
    )
    cut.add_argument(
        "--test-slices", metavar="START:STOP", type=_range, action="append", help="these slices are the test set"
    )
    cut.add_argument(
        "--tile", metavar="VOXELS", type=int, nargs="+", help="cut into tiles of at most this size: y x, or z y x"
    )
    cut.add_argument(
        "--spacing",
        metavar="S",
        type=float,
        nargs="+",
        help="voxel size z y x of volumes (default: the file's, in micrometres if a TIFF names its unit; or 1)",
    )
    add_making_arguments(parser)


class Options(NamedTuple):
    """How labels are read; see add_arguments()."""

    image_key: str | None
    label_key: str | None
    sparse: bool
    ignore: int | None
    components: bool
    values: tuple[int, ...] | None
    keep_disconnected: bool
    min_size: int
    tile: tuple[int, ...] | None
    spacing: tuple[float, ...] | None
    dim: int | None = None  # axes of the training labels, for test images without labels


class Piece(NamedTuple):
    """A part of a source that becomes a case."""

    case: str
    source: Source
    slices: tuple[int, int] | None
    options: Options


class Found(NamedTuple):
    """What a piece holds: the cases it makes (several where it is tiled) and what must be the same for all of them."""

    cases: list[str]
    instances: list[int]
    more_than_ids: int
    dim: int
    channels: int
    colour: bool
    integer: bool
    spacing: tuple[float, ...] | None


class Content(NamedTuple):
    """What a piece holds, before it is tiled: image (C, *S), ids (*S) from 1 on with -1 for what nobody labelled, how
    many different values the ids had, the file's geometry, and whether it is a colour picture."""

    image: npt.NDArray[Any]
    ids: npt.NDArray[np.int32]
    num_values: int
    geometry: dict[str, Any]
    colour: bool


def _read_piece(piece: Piece) -> Content:
    options, source = piece.options, piece.source
    read = [read_array(f, options.image_key) for f in source.images]
    label = None if source.label is None else read_labels(source.label, options.label_key, options.ignore)
    if label is not None:
        dim = label.ndim
    else:
        array, said = read[0]
        dim = options.dim or array.ndim - bool(said.get("colour") or said.get("channels"))
    arrays = [_channels_first(a, said, dim, None if label is None else label.shape, f)
              for (a, said), f in zip(read, source.images, strict=True)]  # fmt: skip
    image = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    if label is None:
        label = np.zeros(image.shape[1:], np.int32)
    if label.shape != image.shape[1:]:
        raise ValueError(
            f"{source.label}: the labels have the shape {label.shape}, their image {source.images[0].name} "
            f"{image.shape[1:]}."
        )
    if label.ndim not in (2, 3):
        raise ValueError(f"{source.label}: expected labels of two or three axes, but got the shape {label.shape}.")
    start = 0
    if piece.slices is not None:
        start, stop = piece.slices
        if label.ndim != 3 or stop > label.shape[0]:
            raise ValueError(f"{source.label}: there are no slices {start}:{stop} in labels of shape {label.shape}.")
        image, label = image[:, start:stop], label[start:stop]
    ids, num_values = _instances(label, options)
    geometry = _geometry(read[0][1], options, source.images[0].parent / f"{source.name}.json", start)
    colour = any(bool(said.get("colour")) for _, said in read)
    return Content(np.ascontiguousarray(image), ids, num_values, geometry, colour)


def _channels_first(
    array: npt.NDArray[Any], said: dict[str, Any], dim: int, shape: tuple[int, ...] | None, file: Path
) -> npt.NDArray[Any]:
    if array.dtype == np.bool_:
        array = array.astype(np.uint8)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{file}: the image holds NaN or infinity.")
    if array.dtype.kind not in "uif":
        raise ValueError(f"{file}: expected an image of numbers, but got {array.dtype}.")
    if array.ndim == dim:
        return array[None]
    if array.ndim != dim + 1:
        raise ValueError(f"{file}: expected {dim} axes, as the labels have, but got an image of shape {array.shape}.")
    if shape is None:  # no labels to compare with: whichever end can be channels
        last = array.shape[0] > MOST_CHANNELS >= array.shape[-1]
    else:
        last = array.shape[:-1] == shape
    last = bool(said.get("colour")) or (last and not said.get("channels"))
    moved = np.moveaxis(array, -1, 0) if last else array
    if moved.shape[0] > MOST_CHANNELS:
        raise ValueError(
            f"{file}: an image of shape {array.shape} has more than {MOST_CHANNELS} channels, or is a volume whose "
            "labels are flat."
        )
    if said.get("colour"):
        if moved.shape[0] in (2, 4):
            moved = moved[:-1]  # transparency
        if all(np.array_equal(moved[0], other) for other in moved[1:]):
            moved = moved[:1]
    return moved


def _instances(label: npt.NDArray[Any], options: Options) -> tuple[npt.NDArray[np.int32], int]:
    """Ids from 1 on, -1 for what nobody labelled, and how many values they come from."""
    unlabelled = np.zeros(label.shape, np.bool_) if options.ignore is None else label == options.ignore
    if options.sparse:
        unlabelled |= label == 0
    wanted = ~unlabelled & (label > 0)
    if options.values is not None:
        wanted &= np.isin(label, options.values)
    ids = renumber(np.where(wanted, label, 0))
    num_values = int(ids.max(initial=0))
    if options.components or not options.keep_disconnected:
        ids = connected_instances(ids)
    if options.min_size > 1:
        small = np.bincount(ids.ravel()) < options.min_size
        small[0] = False
        unlabelled = unlabelled | small[ids]
        ids = renumber(np.where(unlabelled, 0, ids))
    ids[unlabelled] = -1
    return ids, num_values


def _geometry(said: dict[str, Any], options: Options, sidecar: Path, start: int) -> dict[str, Any]:
    """Spacing, origin and direction as SimpleITK has them, as far as they are known."""
    geometry = dict(said.get("itk", {}))
    if options.spacing is not None:
        geometry = {"spacing": tuple(reversed(options.spacing))}
    elif not geometry and sidecar.is_file():  # nnU-Net's own way to say the spacing of a 3D tif
        spacing = raw_dataset.read_json(sidecar).get("spacing", [])
        if len(spacing) == 3:
            geometry = {"spacing": tuple(float(s) for s in reversed(spacing))}
    if not geometry and said.get("spacing") is not None:
        geometry = {"spacing": tuple(reversed(said["spacing"]))}
    if start and len(geometry.get("origin", ())) == 3:
        direction = np.reshape(geometry["direction"], (3, 3))
        geometry["origin"] = tuple(np.asarray(geometry["origin"]) + direction @ [0, 0, geometry["spacing"][2] * start])
    return geometry


def _tiles(shape: tuple[int, ...], tile: tuple[int, ...] | None) -> list[tuple[str, tuple[slice, ...]]]:
    """Name endings and slices of the tiles of an image: equal parts, none larger than `tile`."""
    if tile is None:
        return [("", tuple(slice(None) for _ in shape))]
    if len(tile) == len(shape) - 1:
        tile = (shape[0], *tile)
    if len(tile) != len(shape):
        raise ValueError(f"--tile: expected {len(shape)} numbers for images of shape {shape}, but got {list(tile)}.")
    edges = [np.linspace(0, n, -(-n // t) + 1).round().astype(int) for n, t in zip(shape, tile, strict=True)]
    found = []
    for index in np.ndindex(*(len(e) - 1 for e in edges)):
        where = tuple(slice(int(e[i]), int(e[i + 1])) for e, i in zip(edges, index, strict=True))
        name = "".join(f"_{axis}{i}" for axis, i in zip("zyx"[-len(shape) :], index, strict=True))
        found.append((name, where))
    return found


def _tiled(piece: Piece, ids: npt.NDArray[np.int32]) -> list[tuple[str, tuple[slice, ...], npt.NDArray[np.int32]]]:
    """The cases of a piece: names, slices, and ids counted anew in each."""
    cases = []
    for ending, where in _tiles(ids.shape, piece.options.tile):
        part = ids[where]
        unlabelled = part < 0
        inside = np.where(unlabelled, 0, part)
        renumbered = renumber(inside) if piece.options.keep_disconnected else connected_instances(inside)
        renumbered[unlabelled] = -1
        cases.append((f"{piece.case}{ending}", where, renumbered))
    return cases


def _look(piece: Piece) -> Found:
    image, ids, num_values, geometry, colour = _read_piece(piece)
    cases = _tiled(piece, ids)
    return Found(
        [name for name, _, _ in cases],
        [int(part.max(initial=0)) for _, _, part in cases],
        0 if piece.options.components else max(0, int(ids.max(initial=0)) - num_values),
        ids.ndim,
        image.shape[0],
        colour,
        image.dtype.kind == "u" and image.dtype.itemsize <= 2,
        tuple(reversed(geometry["spacing"])) if "spacing" in geometry else None,
    )


class _WriteJob(NamedTuple):
    piece: Piece
    images: Path
    labels: Path
    ending: str
    ignore: int
    channels: int


def _write(job: _WriteJob) -> None:
    image, ids, _, geometry, _ = _read_piece(job.piece)
    if image.shape[0] != job.channels:  # a grey picture among coloured ones
        image = np.repeat(image, job.channels, axis=0)
    for name, where, part in _tiled(job.piece, ids):
        origin = tuple(s.start or 0 for s in where)
        values = np.where(part < 0, job.ignore, part).astype(np.uint16)
        for channel in range(job.channels):
            _save(image[channel][where], job.images / f"{name}_{channel:04d}{job.ending}", geometry, origin)
        if job.piece.source.label is not None:
            _save(values, job.labels / f"{name}{job.ending}", geometry, origin)


def _save(array: npt.NDArray[Any], file: Path, geometry: dict[str, Any], start: tuple[int, ...]) -> None:
    if array.ndim == 3:
        import SimpleITK as sitk

        if array.dtype == np.float16:
            array = array.astype(np.float32)
        image = sitk.GetImageFromArray(np.ascontiguousarray(array))
        spacing = geometry.get("spacing", (1.0, 1.0, 1.0))
        image.SetSpacing([float(s) for s in spacing])
        if len(geometry.get("origin", ())) == 3:
            image.SetOrigin(geometry["origin"])
            image.SetDirection(geometry["direction"])
        image.SetOrigin(image.TransformIndexToPhysicalPoint([int(s) for s in reversed(start)]))
        sitk.WriteImage(image, str(file), True)
        return
    from skimage.io import imsave

    if array.dtype.kind == "u" and array.dtype.itemsize <= 2:
        imsave(file, array, check_contrast=False)
    else:
        imsave(file, array.astype(np.float32), check_contrast=False)


def _check(args: argparse.Namespace) -> Options:
    if args.min_size < 0:
        raise ValueError(f"--min-size: expected a number of voxels of at least 0, but got {args.min_size}.")
    if args.sparse and args.ignore is not None:
        raise ValueError("--sparse and --ignore both say what nobody labelled. Give one of them.")
    if args.tile is not None and (len(args.tile) not in (2, 3) or min(args.tile) < 8):
        raise ValueError(f"--tile: expected two or three numbers of at least 8 voxels, but got {args.tile}.")
    if args.spacing is not None and (len(args.spacing) != 3 or min(args.spacing) <= 0):
        raise ValueError(f"--spacing: expected three numbers above 0, z y x, but got {args.spacing}.")
    if not re.fullmatch(r"[A-Za-z0-9_\- ]+", args.label) or args.label in ("background", "ignore"):
        raise ValueError(f"--label: expected a name such as cell, but got {args.label!r}.")
    if args.test_slices and not args.train_slices:
        raise ValueError("--test-slices needs --train-slices: which slices are for training?")
    for low, high in args.test_slices or ():
        for start, stop in args.train_slices:
            if max(low, start) < min(high, stop):
                raise ValueError(
                    f"--test-slices {low}:{high} shares slices with --train-slices {start}:{stop}. What is trained on "
                    "tests nothing: leave a gap between them."
                )
    if args.test_slices and (args.test_images or args.test_labels):
        raise ValueError("--test-slices and --test-images both say what the test set is. Give one of them.")
    if args.connected_components and args.keep_disconnected:
        raise ValueError(
            "--connected-components makes every piece an instance, --keep-disconnected leaves pieces together. Give "
            "one of them."
        )
    return Options(
        args.image_key,
        args.label_key,
        args.sparse,
        args.ignore,
        args.connected_components,
        None if args.values is None else tuple(args.values),
        args.keep_disconnected,
        args.min_size,
        None if args.tile is None else tuple(args.tile),
        None if args.spacing is None else tuple(args.spacing),
    )


def _check_nnunet_options(args: argparse.Namespace, content: dict[str, Any]) -> None:
    """Refuse what a raw nnU-Net dataset says itself.

    Raises:
        ValueError: an option that would have no effect.
    """
    given = [f for f in ("images", "labels", "test_images", "test_labels") if getattr(args, f) is not None]
    if given:
        raise ValueError(
            f"--{given[0].replace('_', '-')}: {args.source} is a raw nnU-Net dataset (it holds dataset.json and "
            "imagesTr), which is read as a whole. Leave the option out, or name another folder as SRC."
        )
    ignore = content.get("labels", {}).get("ignore")
    if args.ignore is not None and ignore is not None and args.ignore != ignore:
        raise ValueError(
            f"--ignore {args.ignore}: {args.source / 'dataset.json'} says that {ignore} is what nobody labelled. Leave "
            "the option out, or change dataset.json."
        )
    if args.keep_disconnected and not is_instance_dataset(content):
        raise ValueError(
            f"--keep-disconnected: {args.source / 'dataset.json'} declares classes, of which every connected piece "
            "becomes an instance. Leave the option out."
        )


def _pieces(sources: list[Source], ranges: Sequence[tuple[int, int]] | None, options: Options) -> list[Piece]:
    if not ranges:
        return [Piece(s.name, s, None, options) for s in sources]
    return [Piece(f"{s.name}_{low:04d}-{high:04d}", s, (low, high), options) for s in sources for low, high in ranges]


def _same(found: dict[str, list[Found]], attribute: str, what: str) -> int:
    values = {getattr(f, attribute) for group in found.values() for f in group}
    if len(values) > 1:
        raise ValueError(f"Expected the same number of {what} in all images, but got {sorted(values)}.")
    return int(values.pop())


def _num_channels(found: Sequence[Found]) -> int:
    """How many channels the dataset has; a grey picture among coloured ones counts as coloured.

    Raises:
        ValueError: images have different numbers of channels otherwise.
    """
    channels = max(f.channels for f in found)
    fewer = [f for f in found if f.channels != channels]
    if fewer and not all(f.colour if f.channels == channels else f.channels == 1 for f in found):
        most = next(f for f in found if f.channels == channels)
        raise ValueError(
            f"Expected the same number of channels in all images, but got {fewer[0].channels} in {fewer[0].cases[0]} "
            f"and {channels} in {most.cases[0]}. Only grey pictures among colour pictures are repeated."
        )
    return channels


def run(args: argparse.Namespace) -> int:
    options = _check(args)
    classes: dict[str, Any] = {}
    if (args.source / "dataset.json").is_file() and (args.source / "imagesTr").is_dir():
        train, test, content = nnunet_sources(args.source)
        _check_nnunet_options(args, content)
        classes = {k: content[k] for k in ("channel_names",) if k in content}
        ignore = content.get("labels", {}).get("ignore")
        options = options._replace(
            components=options.components or not is_instance_dataset(content),
            ignore=options.ignore if ignore is None else int(ignore),
        )
    else:
        train, test = find_sources(args)
    jobs = {
        "Tr": _pieces(train, args.train_slices, options),
        "Ts": _pieces(train, args.test_slices, options) if args.test_slices else _pieces(test, None, options),
    }
    for group in jobs.values():  # a test case may have the name of a training case
        names = [p.case for p in group]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"Several images would become the case {twice[0]}. Rename them.")
    if args.test_slices and test:
        print(f"{len(test)} test images of {args.source} are left out: --test-slices says what the test set is.")
    target = raw_dataset.new_dataset_folder(args.dataset_id, args.name, overwrite=args.overwrite)
    found = {"Tr": list(map_cases(_look, jobs["Tr"], processes=args.num_processes, description="Reading Tr"))}
    # a test image without labels may have two channels or be a volume of two slices: training labels tell
    dim = _same(found, "dim", "axes")
    jobs["Ts"] = [piece._replace(options=piece.options._replace(dim=dim)) for piece in jobs["Ts"]]
    if jobs["Ts"]:
        found["Ts"] = list(map_cases(_look, jobs["Ts"], processes=args.num_processes, description="Reading Ts"))
    everything = [f for group in found.values() for f in group]
    _same(found, "dim", "axes")
    channels = _num_channels(everything)
    most = max(n for f in everything for n in f.instances)
    if not any(n for f in found["Tr"] for n in f.instances):
        left_out = [f for f, given in (("--values", args.values), ("--min-size", args.min_size > 1)) if given]
        why = f"Did {' and '.join(left_out)} leave all of them out?" if left_out else "Is 0 the labels' only value?"
        raise ValueError(f"{args.source}: no training image shows an instance. {why}")
    labels = region_labels(args.label, most)
    ending = ".nii.gz" if dim == 3 else ".png" if all(f.integer for f in everything) else ".tif"
    with raw_dataset.building(target) as folder:
        writing = []
        for part, group in jobs.items():
            if group:
                images, label_folder = folder / f"images{part}", folder / f"labels{part}"
                images.mkdir()
                if any(p.source.label is not None for p in group):
                    label_folder.mkdir()
                writing += [_WriteJob(p, images, label_folder, ending, labels["ignore"], channels) for p in group]
        for _ in map_cases(_write, writing, processes=args.num_processes, description="Writing"):
            pass
        cases = {number: f.cases for number, f in enumerate(found["Tr"])}
        named = list(classes.get("channel_names", {}).values())
        raw_dataset.write_dataset_json(
            folder,
            channel_names=named if len(named) == channels else _channel_names(channels),
            labels=labels,
            num_training=sum(map(len, cases.values())),
            file_ending=ending,
            regions_class_order=[1],
            instance_labels=True,
        )
        if any(len(group) > 1 for group in cases.values()) and len(cases) > 1:
            raw_dataset.write_json(folder / SPLITS_FILE, split_by_group(cases))  # tiles of one image stay together
        raw_dataset.write_record(folder, "nnunet_dsp convert instances", vars(args))
    in_image = [n for f in found["Tr"] for n in f.instances]
    print(
        f"{target}: {sum(map(len, cases.values()))} training cases, {sum(len(f.cases) for f in found.get('Ts', []))} "
        f"test cases; {min(in_image)} to {max(in_image)} instances in a case."
    )
    split = sum(f.more_than_ids for f in everything)
    if split:
        print(f"  {split} instances more than there were ids: pieces that do not touch are instances of their own.")
    if dim == 3:
        print(f"  {_said_of_spacing(everything)}")
    print(f"Next: nnUNetv2_plan_and_preprocess -d {args.dataset_id} --verify_dataset_integrity")
    return 0


def _said_of_spacing(found: Sequence[Found]) -> str:
    sizes = sorted({f.spacing for f in found if f.spacing is not None})
    without = sum(f.spacing is None for f in found)
    text = " or ".join(" x ".join(f"{s:g}" for s in size) for size in sizes[:3]) + (", ..." if len(sizes) > 3 else "")
    said = [f"Voxel size z y x: {text}."] if sizes else []
    if without:
        said.append(f"{without} of {len(found)} volumes name no voxel size: 1 x 1 x 1 was assumed (see --spacing).")
    return " ".join(said)


def _channel_names(channels: int) -> list[str]:
    return {1: ["image"], 3: ["R", "G", "B"]}.get(channels, [f"channel_{i}" for i in range(channels)])
