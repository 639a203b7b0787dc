"""Made-up electron micrographs of cells with four kinds of organelles: no download, any number of cases, 2D or 3D.

Each case has its own brightness, contrast, blur, noise and tint of its structures, and distractors that look like one
class and are background (dark granules, strands of reticulum), so that a few masks do not show all there is. Case i of
a seed is the same however many are made.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from nnunet_dsp.dataset_conversion import raw_dataset
from nnunet_dsp.dataset_conversion.arguments import add_making_arguments
from nnunet_dsp.dataset_conversion.parallel import map_cases

NAME = "synthetic"
HELP = "made-up cells with organelles, four classes (2D PNG or 3D NIfTI)"

LABELS = {"background": 0, "membrane": 1, "mitochondrion": 2, "nucleus": 3, "vesicles": 4}  # background: cytoplasm
DEFAULT_SIZE = {2: 192, 3: 64}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-d", dest="dataset_id", metavar="ID", type=int, required=True, help="id of the new dataset, 1 to 999"
    )
    parser.add_argument("--name", default="Synthetic", help="name of the new dataset (default: %(default)s)")
    parser.add_argument("--dim", type=int, choices=(2, 3), default=2, help="axes of the images (default: %(default)s)")
    parser.add_argument("--cases", metavar="N", type=int, default=24, help="training cases (default: %(default)s)")
    parser.add_argument(
        "--test", metavar="N", type=int, default=8, help="cases in imagesTs and labelsTs (default: %(default)s)"
    )
    parser.add_argument(
        "--size",
        metavar="VOXELS",
        type=int,
        help="edge length; 3D volumes are half as high (default: 192 in 2D, 64 in 3D)",
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed, same dataset (default: %(default)s)")
    add_making_arguments(parser)


class _Scale(NamedTuple):
    """Lengths in voxels."""

    cell: float
    wiggle: float
    mito_radius: tuple[float, float]
    vesicle_cluster: tuple[float, float]
    mitochondria: float  # per volume of a cell


SCALES = {2: _Scale(52, 5, (5.5, 9), (10, 16), 0.75), 3: _Scale(36, 2, (4, 6), (8, 11), 2.0)}


def make_cells(shape: tuple[int, ...], random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One image and its labels.

    Args:
        shape: (y, x) or (z, y, x).
        random: where everything random comes from.

    Returns:
        Image, uint8, and labels, uint8, both of this shape.
    """
    scale = SCALES[len(shape)]
    cells, membrane = _cells(shape, scale, random)
    depth = ndimage.distance_transform_edt(~membrane)  # to the nearest membrane
    labels = np.where(membrane, LABELS["membrane"], 0).astype(np.uint8)

    cytoplasm = random.uniform(0.62, 0.8)
    dark = random.uniform(0.08, 0.28)
    image = cytoplasm + random.uniform(0.02, 0.06) * _smooth(shape, 1.2, random) + 0.02 * _smooth(shape, 5, random)
    image = _reticulum(image, depth, dark, random)
    image[membrane] = dark + 0.04 * _smooth(shape, 2, random)[membrane]
    if random.random() < 0.55:
        _add_nucleus(image, labels, cells, depth, cytoplasm, dark, random)
    for _ in range(random.poisson(1.0) if random.random() < 0.75 else 0):
        _add_vesicles(image, labels, cells, depth, cytoplasm, dark, scale, random)
    wanted = (
        random.poisson(scale.mitochondria * np.prod([s / scale.cell for s in shape])) if random.random() < 0.92 else 0
    )
    # this case's mitochondria against its cytoplasm: mostly darker, sometimes of its tint or brighter
    tint = random.choice([random.uniform(-0.36, -0.12), random.uniform(-0.06, 0.14)], p=[0.6, 0.4])
    for _ in range(wanted):
        _add_mitochondrion(image, labels, cells, depth, cytoplasm + tint, dark, scale, random)
    _add_granules(image, labels, depth, dark, random)
    return _photograph(image, random), labels


def _smooth(shape: tuple[int, ...], sigma: float, random: np.random.Generator) -> np.ndarray:
    """Smooth noise of mean 0 and standard deviation 1."""
    noise = ndimage.gaussian_filter(random.standard_normal(shape), sigma, mode="wrap")
    return (noise - noise.mean()) / noise.std()


def _cells(shape: tuple[int, ...], scale: _Scale, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Number of the cell at each voxel, and where the membranes between them are."""
    margin = scale.cell
    number = int(np.prod([(s + 2 * margin) / scale.cell for s in shape]))
    seeds = random.uniform([-margin] * len(shape), [s + margin for s in shape], (number, len(shape)))
    grid = np.indices(shape).astype(float)
    for axis in range(len(shape)):
        grid[axis] += scale.wiggle * _smooth(shape, 7, random) + 1.2 * _smooth(shape, 2.5, random)
    cells = cKDTree(seeds).query(grid.reshape(len(shape), -1).T)[1].reshape(shape)
    border = ndimage.maximum_filter(cells, 2) != ndimage.minimum_filter(cells, 2)
    thicker = ndimage.binary_dilation(border) & (_smooth(shape, 6, random) > (-0.4 if len(shape) == 2 else 1.0))
    return cells, border | thicker


def _ellipsoid(
    shape: tuple[int, ...], center: np.ndarray, radii: np.ndarray, bend: float, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Normalised distance from the centre (1 at the border) and the coordinate along the first radius, in voxels."""
    axes = np.linalg.qr(random.standard_normal((len(shape), len(shape))))[0]
    local = np.tensordot(axes, np.indices(shape) - center.reshape(-1, *[1] * len(shape)), axes=1)
    local[-1] += bend * (local[0] / radii[0]) ** 2 * radii[-1]
    wobble = 1 + 0.08 * _smooth(shape, 4, random)
    return np.sqrt(((local / radii.reshape(-1, *[1] * len(shape))) ** 2).sum(0)) * wobble, local[0]


def _place(free: np.ndarray, random: np.random.Generator) -> np.ndarray | None:
    """A random voxel of `free`, None if there is none."""
    where = np.flatnonzero(free)
    return None if len(where) == 0 else np.array(np.unravel_index(random.choice(where), free.shape))


def _region(inside: np.ndarray, center: np.ndarray) -> np.ndarray:
    """The connected part of `inside` that holds `center`."""
    parts = ndimage.label(inside)[0]
    number = parts[tuple(center)]
    return parts == number if number else np.zeros_like(inside)


def _add_nucleus(
    image: np.ndarray,
    labels: np.ndarray,
    cells: np.ndarray,
    depth: np.ndarray,
    cytoplasm: float,
    dark: float,
    random: np.random.Generator,
) -> None:
    rim = np.pad(np.ones([s - 2 for s in depth.shape], bool), 1)  # most of the nucleus shall lie in the image
    room = np.minimum(depth, 1.5 * ndimage.distance_transform_edt(rim))
    center = np.array(np.unravel_index(room.argmax(), room.shape))
    radius = 0.85 * room.max()
    distance, _ = _ellipsoid(image.shape, center, radius * random.uniform(0.85, 1.15, image.ndim), 0, random)
    inside = _region((distance < 1) & (cells == cells[tuple(center)]) & (depth > 2), center)
    if inside.sum() < 30:
        return
    inner = ndimage.distance_transform_edt(inside)
    chromatin = _smooth(image.shape, 2.2, random)
    plasm = cytoplasm + random.choice([random.uniform(-0.2, -0.05), random.uniform(0.02, 0.12)])
    image[inside] = (plasm + 0.03 * chromatin - 0.2 * (chromatin > 0.8) - 0.15 * ((inner < 4) & (chromatin > 0)))[
        inside
    ]
    image[inside & (inner <= 1.5)] = dark + 0.1
    labels[inside] = LABELS["nucleus"]


def _add_mitochondrion(
    image: np.ndarray,
    labels: np.ndarray,
    cells: np.ndarray,
    depth: np.ndarray,
    matrix: float,
    dark: float,
    scale: _Scale,
    random: np.random.Generator,
) -> None:
    width = random.uniform(*scale.mito_radius)
    occupied = ndimage.distance_transform_edt(labels == 0)
    center = _place((occupied > 0.8 * width) & (depth > 0.8 * width), random)
    if center is None:
        return
    radii = np.full(image.ndim, width)
    radii[0] *= random.choice([1.1, 1.6, 2.6])
    distance, along = _ellipsoid(image.shape, center, radii, random.uniform(-0.8, 0.8), random)
    inside = _region((distance < 1) & (cells == cells[tuple(center)]) & (occupied > 1.5), center)
    if inside.sum() < 0.4 * (distance < 1).sum() or inside.sum() < 20:
        return
    inner = ndimage.distance_transform_edt(inside)
    cristae = np.sin(2 * np.pi * (along + 1.5 * _smooth(image.shape, 3, random)) / random.uniform(4, 5.5))
    image[inside] = (matrix + random.uniform(0.06, 0.13) * cristae + 0.03 * _smooth(image.shape, 1, random))[inside]
    image[inside & (inner <= 1.2)] = dark + 0.08
    labels[inside] = LABELS["mitochondrion"]


def _add_vesicles(
    image: np.ndarray,
    labels: np.ndarray,
    cells: np.ndarray,
    depth: np.ndarray,
    cytoplasm: float,
    dark: float,
    scale: _Scale,
    random: np.random.Generator,
) -> None:
    radius = random.uniform(*scale.vesicle_cluster)
    occupied = ndimage.distance_transform_edt(labels == 0)
    center = _place((occupied > 4) & (depth > 4), random)
    if center is None:
        return
    distance, _ = _ellipsoid(image.shape, center, np.full(image.ndim, radius), 0, random)
    room = (distance < 1) & (cells == cells[tuple(center)]) & (occupied > 3)
    nearest = np.full(image.shape, np.inf)  # to the centre of a vesicle
    grid = np.indices(image.shape)
    for _ in range(60):
        at = _place(room & (nearest > 6.2), random)
        if at is None:
            break
        nearest = np.minimum(nearest, np.sqrt(((grid - at.reshape(-1, *[1] * image.ndim)) ** 2).sum(0)))
    ring, core = (nearest < 3.3) & (labels == 0), nearest < 1.9
    image[ring] = dark + 0.05
    image[ring & core] = cytoplasm + 0.15 if random.random() < 0.6 else dark  # clear or dense cores
    whole = ndimage.binary_closing(np.pad(ring, 5), iterations=3)[(slice(5, -5),) * image.ndim]
    whole = ndimage.binary_fill_holes(whole)
    labels[whole & (labels == 0)] = LABELS["vesicles"]


def _reticulum(image: np.ndarray, depth: np.ndarray, dark: float, random: np.random.Generator) -> np.ndarray:
    """Dark strands in part of the cytoplasm: like membranes, but background."""
    strand = (np.abs(_smooth(image.shape, 4, random)) < 0.07) & (_smooth(image.shape, 12, random) > 0.5) & (depth > 3)
    return np.where(strand, dark + random.uniform(0.05, 0.2), image)


def _add_granules(
    image: np.ndarray, labels: np.ndarray, depth: np.ndarray, dark: float, random: np.random.Generator
) -> None:
    """Dark, smooth, round: in size and tint like small mitochondria, but background and without cristae."""
    for _ in range(random.poisson(5)):
        radius = random.uniform(1.5, 4)
        at = _place((ndimage.distance_transform_edt(labels == 0) > radius + 1) & (depth > radius + 1), random)
        if at is None:
            return
        distance = np.sqrt(((np.indices(image.shape) - at.reshape(-1, *[1] * image.ndim)) ** 2).sum(0))
        image[distance < radius] = dark + random.uniform(0, 0.22)


def _photograph(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Blur, uneven light, noise, gamma; uint8."""
    image = ndimage.gaussian_filter(image, random.uniform(0.4, 1.3))
    image = image * (1 + random.uniform(0, 0.12) * _smooth(image.shape, max(image.shape) / 4, random))
    image = np.clip(image + random.uniform(0.02, 0.11) * random.standard_normal(image.shape), 0, 1) ** random.uniform(
        0.8, 1.4
    )
    low, high = random.uniform(0, 0.15), random.uniform(0.85, 1)
    return np.rint(255 * (low + (high - low) * image)).astype(np.uint8)


def _make_case(job: tuple[int, int, tuple[int, ...], Path, Path]) -> None:
    index, seed, shape, image_file, label_file = job
    image, labels = make_cells(shape, np.random.default_rng([seed, index]))
    if len(shape) == 2:
        from skimage import io

        io.imsave(image_file, image, check_contrast=False)
        io.imsave(label_file, labels, check_contrast=False)
    else:
        import SimpleITK

        for array, file in ((image, image_file), (labels, label_file)):
            volume: Any = SimpleITK.GetImageFromArray(array)
            SimpleITK.WriteImage(volume, str(file), True)


def run(args: argparse.Namespace) -> int:
    size = DEFAULT_SIZE[args.dim] if args.size is None else args.size
    if size < 32 or args.cases < 1 or args.test < 0 or args.seed < 0:
        raise ValueError(
            "Expected --size of 32 or more, --cases of 1 or more, --test and --seed of 0 or more, but got "
            f"{size}, {args.cases}, {args.test} and {args.seed}."
        )
    shape = (size, size) if args.dim == 2 else (size // 2, size, size)
    ending = ".png" if args.dim == 2 else ".nii.gz"
    target = raw_dataset.new_dataset_folder(args.dataset_id, args.name, overwrite=args.overwrite)
    with raw_dataset.building(target) as folder:
        jobs = []
        for part, start, number in (("Tr", 0, args.cases), ("Ts", args.cases, args.test)):
            images, labels = folder / f"images{part}", folder / f"labels{part}"
            if number:
                images.mkdir()
                labels.mkdir()
            for index in range(start, start + number):
                name = f"cells_{index:03d}"
                jobs.append((index, args.seed, shape, images / f"{name}_0000{ending}", labels / f"{name}{ending}"))
        for _ in map_cases(_make_case, jobs, processes=args.num_processes, description="Making cells"):
            pass
        raw_dataset.write_dataset_json(
            folder,
            channel_names=["EM"],
            labels=LABELS,
            num_training=args.cases,
            file_ending=ending,
            description="synthetic",
            licence="CC0",
        )
        raw_dataset.write_record(folder, "nnunet_dsp convert synthetic", vars(args), seed=args.seed)
    print(f"{target}: {args.cases} training and {args.test} test cases of shape {shape}.")
    return 0
