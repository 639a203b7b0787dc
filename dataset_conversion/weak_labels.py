"""What an annotator with less time would have said of an image, from its mask: tags, points, boxes, strokes, parts.

Pure functions on arrays. Which case gets what, and everything on disk, is in simulate.py.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage, sparse
from scipy.sparse.csgraph import dijkstra
from scipy.spatial import cKDTree

from nnunet_dsp.annotations import Annotations, Box, Point

# what a random stream is for: asking for boxes does not move the points
POINTS, BOXES, SCRIBBLES, SHARE, RECTANGLES = 1, 2, 3, 4, 5

TOO_MUCH = 0.5  # a box that covers more than this share of the image says nearly nothing
LOOKS = 20  # places for a rectangle that an annotator considers before taking one that shows less than two classes


@dataclass(frozen=True)
class WeakOptions:
    """How a simulated annotator works. Class names are those of dataset.json.

    share: probability of each object to be pointed at, boxed or scribbled on, 0 to 1. A larger share keeps the objects
        of a smaller one.
    points_per_object: how many voxels of each object are pointed at (all, if it has fewer). The objects of a class that
        is like a net in this image share theirs: they lie anywhere on the class.
    loosen: each side of a box is moved outwards by 0 to this many voxels; above 0 the boxes are not tight.
    min_size: objects of fewer voxels are overlooked; their classes are then neither complete nor tagged by them.
    complete: say for which classes every object was annotated, where that is so.
    tags_absent: also say which classes the image does not show.
    rectangle: size in voxels of the one part of the image that is annotated; one number for all axes, or one an axis.
    """

    share: float = 1.0
    points_per_object: int = 1
    loosen: int = 0
    min_size: int = 1
    complete: bool = True
    tags_absent: bool = True
    tag_classes: tuple[str, ...] = ()
    point_classes: tuple[str, ...] = ()
    box_classes: tuple[str, ...] = ()
    scribble_classes: tuple[str, ...] = ()
    stroke_length: int = 60
    stroke_radius: int = 1
    rectangle: tuple[int, ...] = ()


@dataclass(frozen=True)
class ImageObject:
    """A connected component of one class.

    start, stop: its bounding box in voxels, array order, half-open; voxels: which of the box's voxels belong to it,
        bool.
    """

    label: str
    start: tuple[int, ...]
    stop: tuple[int, ...]
    voxels: np.ndarray

    @property
    def size(self) -> int:
        """Number of voxels."""
        return int(self.voxels.sum())

    def is_net_like(self, shape: tuple[int, ...]) -> bool:
        """Whether it spans more than half of an image of that shape, and fills less than half of what it spans."""
        spanned = self.voxels.size
        return spanned > TOO_MUCH * math.prod(shape) and self.size < spanned / 2


def find_objects(mask: np.ndarray, labels: Mapping[str, int], classes: Collection[str]) -> list[ImageObject]:
    """Connected components of the given classes, by class and then by where they begin.

    Voxels that touch by a corner are connected (8 neighbours in 2D, 26 in 3D): a one-voxel diagonal does not make two
    organelles.

    Args:
        mask: shape (y, x) or (z, y, x), integer.
        labels: value in the mask by class name.
        classes: the names wanted; "background" may be among them.
    """
    objects = []
    for name in sorted(set(classes), key=lambda n: labels[n]):
        # not cc3d: its 4.1.1 tears components apart in 2D bool arrays of some sizes (8 neighbours)
        components, _ = ndimage.label(mask == labels[name], np.ones((3,) * mask.ndim))
        for number, box in enumerate(ndimage.find_objects(components), start=1):
            voxels = components[box] == number
            objects.append(ImageObject(name, tuple(s.start for s in box), tuple(s.stop for s in box), voxels))
    return objects


def annotate(
    mask: np.ndarray,
    labels: Mapping[str, int],
    kinds: Collection[str],
    options: WeakOptions,
    seed: tuple[int, ...],
    spacing: tuple[float, ...] | None = None,
) -> Annotations:
    """Tags, points and boxes for one image.

    Args:
        mask: shape (y, x) or (z, y, x), integer, every voxel annotated.
        labels: value in the mask by class name, with background and without ignore.
        kinds: any of "tags", "points", "boxes"; others are not looked at.
        seed: the same seed gives the same annotations, whatever the other cases are.
        spacing: voxel size along each axis of the mask, any unit; 1 if None.
    """
    classes = {
        n
        for kind, names in (
            ("tags", options.tag_classes),
            ("points", options.point_classes),
            ("boxes", options.box_classes),
        )
        if kind in kinds
        for n in names
    }
    everything = find_objects(mask, labels, classes)
    seen = [o for o in everything if o.size >= options.min_size]
    overlooked = {o.label for o in everything if o.size < options.min_size}
    taken = _take(seen, options.share, labels, seed)
    nets = {o.label for o in seen if o.is_net_like(mask.shape)}
    complete = tuple(n for n in labels if n not in overlooked) if options.complete and options.share >= 1 else ()
    present: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    points: list[Point] = []
    boxes: list[Box] = []
    if "tags" in kinds:
        visible = {o.label for o in seen}
        present = tuple(n for n in labels if n in options.tag_classes and n in visible)
        if options.tags_absent:
            absent = tuple(n for n in labels if n in options.tag_classes and n not in visible | overlooked)
    if "points" in kinds:
        random = np.random.default_rng([*seed, POINTS])
        for item in taken:
            if item.label in options.point_classes and item.label not in nets:
                points += [Point(item.label, p) for p in draw_points(item, options.points_per_object, random, spacing)]
        for name in (n for n in labels if n in nets and n in options.point_classes):
            members = [o for o in seen if o.label == name]  # also those left out by `share`, or the net might be
            number = options.points_per_object * sum(o.label == name for o in taken)
            points += [Point(name, p) for p in scatter_points(members, number, [*seed, POINTS, labels[name]])]
    if "boxes" in kinds:
        random = np.random.default_rng([*seed, BOXES])
        boxes = [draw_box(o, options.loosen, mask.shape, random) for o in taken if o.label in options.box_classes]
    return Annotations(
        shape=tuple(mask.shape),
        present=present,
        absent=absent,
        points=tuple(points),
        boxes=tuple(boxes),
        complete_points=tuple(
            n for n in complete if "points" in kinds and n in options.point_classes and n not in nets
        ),
        complete_boxes=tuple(n for n in complete if "boxes" in kinds and n in options.box_classes),
    )


def _take(
    objects: list[ImageObject], share: float, labels: Mapping[str, int], seed: tuple[int, ...]
) -> list[ImageObject]:
    """The objects that are annotated; a stream per class, so that it does not matter which other classes are."""
    streams = {o.label: np.random.default_rng([*seed, SHARE, labels[o.label]]) for o in objects}
    return [o for o in objects if streams[o.label].random() < share]


def draw_points(
    item: ImageObject, number: int, random: np.random.Generator, spacing: tuple[float, ...] | None = None
) -> list[tuple[float, ...]]:
    """Voxel centres inside an object, without repetition, more likely the farther they are from its border.

    The weight is the squared distance to the nearest voxel outside (the image's border counts as one): people click
    well inside.

    Returns:
        At most `number` tuples of whole floats in voxels of the image, array order.
    """
    inside = np.pad(item.voxels, 1)
    weight = ndimage.distance_transform_edt(inside, sampling=spacing)[inside] ** 2
    where = np.argwhere(inside) - 1 + np.asarray(item.start)
    chosen = random.choice(len(where), size=min(number, len(where)), replace=False, p=weight / weight.sum())
    return [tuple(float(v) for v in where[i]) for i in chosen]


def scatter_points(items: list[ImageObject], number: int, seed: Sequence[int]) -> list[tuple[float, ...]]:
    """Voxel centres anywhere on the objects, without repetition, each voxel as likely as any other.

    So one points at membranes: on the net, wherever. A point in each connected component would put most of them into
    the crumbs beside it, and a point far from the border into its blots.

    Args:
        items: one or more.
        number: of points; the same seed gives the first ones of a larger number.

    Returns:
        At most `number` tuples of whole floats in voxels of the image, array order.
    """
    where = np.concatenate([np.argwhere(item.voxels) + np.asarray(item.start) for item in items])
    chosen = np.random.default_rng(seed).permutation(len(where))[:number]
    return [tuple(float(v) for v in where[i]) for i in chosen]


def draw_box(item: ImageObject, loosen: int, shape: tuple[int, ...], random: np.random.Generator) -> Box:
    """The object's bounding box, each side moved outwards by 0 to `loosen` voxels but not out of the image."""
    start, stop = np.asarray(item.start), np.asarray(item.stop)
    if loosen:
        start = np.maximum(start - random.integers(0, loosen + 1, len(shape)), 0)
        stop = np.minimum(stop + random.integers(0, loosen + 1, len(shape)), shape)
    return Box(item.label, tuple(float(v) for v in start), tuple(float(v) for v in stop), tight=loosen == 0)


def box_coverage(annotations: Annotations) -> dict[str, float]:
    """For each class with boxes, the share of the image that lies in at least one of them, 0 to 1."""
    if annotations.shape is None:
        return {}
    covered: dict[str, np.ndarray] = {}
    for box in annotations.boxes:
        where = tuple(slice(int(a), int(b)) for a, b in zip(box.start, box.stop, strict=True))
        covered.setdefault(box.label, np.zeros(annotations.shape, bool))[where] = True
    return {name: float(area.mean()) for name, area in covered.items()}


def scribble(
    mask: np.ndarray, labels: Mapping[str, int], ignore: int, options: WeakOptions, seed: tuple[int, ...]
) -> np.ndarray:
    """A partial mask: one stroke on each component of each class in each slice, `ignore` everywhere else.

    A stroke is a piece of the component's skeleton, from a random place on, thickened by options.stroke_radius without
    leaving the component. 3D images are scribbled on slice by slice along the first axis, as people do.

    Args:
        mask: shape (y, x) or (z, y, x), integer.
        labels: value by class name; options.scribble_classes are the ones scribbled on.
        ignore: value for voxels without a stroke.
        seed: as in annotate().

    Returns:
        Shape and dtype of `mask`.
    """
    random = np.random.default_rng([*seed, SCRIBBLES])
    strokes = np.full_like(mask, ignore)
    slices = (mask[None], strokes[None]) if mask.ndim == 2 else (mask, strokes)
    for mask_slice, stroke_slice in zip(*slices, strict=True):
        for item in find_objects(mask_slice, labels, options.scribble_classes):
            if item.size >= options.min_size and random.random() < options.share:
                box = tuple(slice(a, b) for a, b in zip(item.start, item.stop, strict=True))
                stroke_slice[box][_stroke(item.voxels, options, random)] = labels[item.label]
    return strokes


def _stroke(voxels: np.ndarray, options: WeakOptions, random: np.random.Generator) -> np.ndarray:
    """Voxels of a stroke within a 2D component, bool; at least one."""
    from skimage.morphology import skeletonize

    inside = np.pad(voxels, 1)
    skeleton = skeletonize(inside)
    if not skeleton.any():
        distance = ndimage.distance_transform_edt(inside)
        skeleton = distance == distance.max()
    line = np.argwhere(skeleton)
    pairs = cKDTree(line).query_pairs(1.5, output_type="ndarray")  # 1.5: corners touch
    lengths = np.linalg.norm(line[pairs[:, 0]] - line[pairs[:, 1]], axis=1)
    graph = sparse.coo_matrix((lengths, (pairs[:, 0], pairs[:, 1])), shape=(len(line), len(line))).tocsr()
    distance = dijkstra(graph, directed=False, indices=int(random.integers(len(line))), limit=options.stroke_length / 2)
    drawn = np.zeros_like(inside)
    drawn[tuple(line[np.isfinite(distance)].T)] = True
    if options.stroke_radius:
        drawn = ndimage.binary_dilation(drawn, iterations=options.stroke_radius)
    return (drawn & inside)[1:-1, 1:-1]


def check_rectangle(size: Sequence[int], axes: int) -> None:
    """
    Raises:
        ValueError: `size` has neither one number nor one an axis.
    """
    if len(size) not in (1, axes):
        raise ValueError(
            f"--rectangle: expected one number or {axes}, one for each axis of the images ({axes}D), but got "
            f"{len(size)}: {' '.join(map(str, size))}."
        )


def rectangle(
    mask: np.ndarray, ignore: int, size: tuple[int, ...], seed: tuple[int, ...]
) -> tuple[np.ndarray, tuple[slice, ...]]:
    """A partial mask: one rectangle (3D: block) of the image as it is, `ignore` everywhere else.

    Its place is drawn at random, anew while it shows a single class and others could be shown: nobody asked for one
    rectangle annotates an empty corner. After twenty draws the one with most classes is taken.

    Args:
        mask: shape (y, x) or (z, y, x), integer, every voxel annotated.
        ignore: value for everything outside.
        size: voxels, one number for all axes or one an axis; cut to the image.
        seed: as in annotate().

    Returns:
        Shape and dtype of `mask`; and where the rectangle is.

    Raises:
        ValueError: `size` has neither one number nor one an axis.
    """
    check_rectangle(size, mask.ndim)
    sizes = [min(s, n) for s, n in zip(size * (mask.ndim // len(size)), mask.shape, strict=True)]
    random = np.random.default_rng([*seed, RECTANGLES])
    best: tuple[int, tuple[slice, ...]] = (0, ())
    for _ in range(LOOKS):
        first = [int(random.integers(0, n - s + 1)) for s, n in zip(sizes, mask.shape, strict=True)]
        where = tuple(slice(a, a + s) for a, s in zip(first, sizes, strict=True))
        shown = len(np.unique(mask[where]))
        if shown > best[0]:
            best = (shown, where)
        if shown > 1:
            break
    partial = np.full_like(mask, ignore)
    partial[best[1]] = mask[best[1]]
    return partial, best[1]
