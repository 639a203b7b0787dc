"""The losses and the filter once more, from the formulas, with loops and `math`; nothing of the library is imported.

Slow, float64, small. A batch is what a person would write down (`WeakBatch`: boxes as corners, points as coordinates);
`fields` spells out the flat form that the library's batch has, so that this form is tested as well.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Voxel = tuple[int, ...]
EPS = 1e-7

TOLERANCE = {
    # by dtype of the logits: (relative, for values; of the largest entry, for gradients). Half-precision logits are
    # numbers like any other to losses that compute in float32; only the gradient is rounded on its way back.
    "float64": (1e-9, 1e-6),  # gradients: that is what finite differences give
    "float32": (1e-5, 1e-4),
    "float16": (1e-5, 2e-3),
    "bfloat16": (1e-5, 1e-2),
}


@dataclass
class Box:
    item: int
    label: int
    start: Voxel
    stop: Voxel
    tight: bool = True
    cut: frozenset[tuple[int, int]] = frozenset()
    """Lines (axis, coordinate) that the crop cut: they promise nothing."""

    def voxels(self) -> Iterator[Voxel]:
        return itertools.product(*(range(a, b) for a, b in zip(self.start, self.stop, strict=True)))

    def lines(self) -> list[tuple[int, int]]:
        every = [(axis, at) for axis in range(len(self.start)) for at in range(self.start[axis], self.stop[axis])]
        return [line for line in every if line not in self.cut]


@dataclass
class WeakBatch:
    """Everything that can be said about a batch, item by item."""

    shape: Voxel
    num_classes: int
    logits: list[list[dict[Voxel, float]]]  # [item][class][voxel]
    tags: list[list[int]]
    points: list[tuple[int, int, Voxel]] = field(default_factory=list)  # item, class, voxel
    boxes: list[Box] = field(default_factory=list)
    complete: list[list[bool]] = field(default_factory=list)
    target: list[dict[Voxel, int]] | None = None  # [item][voxel], num_classes: nobody drew
    components: list[dict[Voxel, int]] | None = None
    outside: list[set[Voxel]] = field(default_factory=list)
    partial: list[set[Voxel]] = field(default_factory=list)
    listed: list[list[bool]] = field(default_factory=list)

    @property
    def items(self) -> range:
        return range(len(self.logits))

    @property
    def classes(self) -> range:
        return range(self.num_classes)

    def voxels(self) -> Iterator[Voxel]:
        return itertools.product(*(range(size) for size in self.shape))

    def flat(self, item: int, voxel: Voxel) -> int:
        index = item
        for size, at in zip(self.shape, voxel, strict=True):
            index = index * size + at
        return index


def softmax(batch: WeakBatch) -> list[dict[Voxel, list[float]]]:
    result = []
    for scores in batch.logits:
        item: dict[Voxel, list[float]] = {}
        for voxel in batch.voxels():
            largest = max(scores[c][voxel] for c in batch.classes)
            exponentials = [math.exp(scores[c][voxel] - largest) for c in batch.classes]
            item[voxel] = [e / sum(exponentials) for e in exponentials]
        result.append(item)
    return result


def allowed_set(batch: WeakBatch, item: int, voxel: Voxel) -> set[int]:
    """The classes a voxel may still have."""
    if batch.target is not None and 0 <= batch.target[item][voxel] < batch.num_classes:
        return {batch.target[item][voxel]}
    points = {label for i, label, at in batch.points if i == item and at == voxel}
    if points:
        return points
    classes = set()
    for c in batch.classes:
        if batch.tags[item][c] == 0:
            continue
        boxes = [box for box in batch.boxes if box.item == item and box.label == c]
        if batch.complete[item][c] and not any(voxel in set(box.voxels()) for box in boxes):
            continue
        if voxel in batch.partial[item] and c != 0 and batch.listed[item][c]:
            continue
        classes.add(c)
    return classes or set(batch.classes)


def default_losses(batch: WeakBatch, eps: float = EPS) -> dict[str, float]:
    """Section by section: D_c, the four kinds of evidence, the mean over classes with a positive."""
    p = softmax(batch)
    valid = [[v for v in batch.voxels() if v not in batch.outside[b]] for b in batch.items]
    allowed = [{v: allowed_set(batch, b, v) for v in batch.voxels()} for b in batch.items]
    denominator = []
    for c in batch.classes:
        mass = 0.0
        for b in batch.items:
            for v in valid[b]:
                mass += 1 - p[b][v][c] if c in allowed[b][v] else 1
        denominator.append(math.log(mass + eps))

    evidence: dict[str, list[tuple[int, float]]] = {"image": [], "box": [], "point": [], "mask": []}
    for b in batch.items:
        for c in batch.classes:
            if batch.tags[b][c] == 1 and valid[b]:
                mean = sum(p[b][v][c] for v in valid[b]) / len(valid[b])
                evidence["image"].append((c, math.log(mean + eps)))
    for box in batch.boxes:
        maxima = []
        for axis, at in box.lines():
            line = [p[box.item][v][box.label] for v in box.voxels() if v[axis] == at and v in valid[box.item]]
            maxima += [max(line)] if line else []
        if box.tight and maxima:
            evidence["box"].append((box.label, math.log(sum(maxima) / len(maxima) + eps)))
    for b, c, v in batch.points:
        if v in valid[b]:
            scores = [batch.logits[b][k][v] for k in batch.classes]
            largest = max(scores)
            log_sum = largest + math.log(sum(math.exp(score - largest) for score in scores))
            evidence["point"].append((c, scores[c] - log_sum))
    if batch.target is not None and batch.components is not None:
        members: dict[int, list[tuple[int, Voxel]]] = {}
        for b in batch.items:
            for v in valid[b]:
                if batch.components[b][v] > 0 and 0 <= batch.target[b][v] < batch.num_classes:
                    members.setdefault(batch.components[b][v], []).append((b, v))
        for voxels in members.values():
            c = batch.target[voxels[0][0]][voxels[0][1]]
            mean = sum(p[b][v][c] for b, v in voxels) / len(voxels)
            evidence["mask"].append((c, math.log(mean + eps)))

    losses = {}
    for kind, positives in evidence.items():
        terms = []
        for c in batch.classes:
            logs = [log for label, log in positives if label == c]
            if logs:
                terms.append(denominator[c] - sum(logs) / len(logs))
        losses[kind] = sum(terms) / len(terms) if terms else 0.0
    return losses


def gradients(
    losses: Callable[[], Mapping[str, float]], scores: list[tuple[dict[Any, float], Any]], step: float = 1e-5
) -> dict[str, list[float]]:
    """Central differences of every loss with respect to every (dictionary, key) of `scores`, in that order."""
    result: dict[str, list[float]] = {}
    for where, key in scores:
        middle = where[key]
        where[key] = middle + step
        above = losses()
        where[key] = middle - step
        below = losses()
        where[key] = middle
        for kind in above:
            result.setdefault(kind, []).append((above[kind] - below[kind]) / (2 * step))
    return result


def default_gradients(batch: WeakBatch) -> dict[str, list[float]]:
    """In the order of a contiguous (B, C, *S) tensor."""
    scores = [(batch.logits[b][c], v) for b in batch.items for c in batch.classes for v in batch.voxels()]
    return gradients(lambda: default_losses(batch), scores)


def fields(batch: WeakBatch) -> dict[str, Any]:
    """The batch in flat form, as nested lists under the names of the library's fields.

    `box_line` has one row for each entry of `box_voxels`; `outside` and `partial` are empty where there are none.
    """
    box_voxels, box_of_voxel, box_line, line_box = [], [], [], []
    for k, box in enumerate(batch.boxes):
        number = {line: len(line_box) + i for i, line in enumerate(box.lines())}
        line_box += [k] * len(number)
        for v in box.voxels():
            box_voxels.append(batch.flat(box.item, v))
            box_of_voxel.append(k)
            box_line.append([number.get((axis, at), -1) for axis, at in enumerate(v)])

    def dense(sets: list[set[Voxel]]) -> list[Any]:
        return [[v in s for v in batch.voxels()] for s in sets] if any(sets) else []

    return {
        "tags": batch.tags,
        "points": [batch.flat(b, v) for b, _, v in batch.points],
        "point_class": [c for _, c, _ in batch.points],
        "box_item": [box.item for box in batch.boxes],
        "box_class": [box.label for box in batch.boxes],
        "box_tight": [box.tight for box in batch.boxes],
        "box_voxels": box_voxels,
        "box_of_voxel": box_of_voxel,
        "box_line": box_line,
        "line_box": line_box,
        "complete_boxes": batch.complete,
        "listed": batch.listed,
        "partial": dense(batch.partial),
        "outside": dense(batch.outside),
    }


def random_batch(
    seed: int,
    shape: Voxel,
    num_classes: int,
    items: int = 2,
    kinds: frozenset[str] = frozenset({"tags", "points", "boxes", "complete", "mask", "outside", "partial"}),
    scale: float = 2.0,
) -> WeakBatch:
    """Any mixture of annotations, contradictions included; the last item carries nothing if there are several."""
    r = random.Random(seed)
    batch = WeakBatch(shape, num_classes, [], [])
    everything = list(batch.voxels())
    batch.logits = [[{v: r.gauss(0, scale) for v in everything} for _ in range(num_classes)] for _ in range(items)]
    batch.tags = [[-1] * num_classes for _ in range(items)]
    batch.complete = [[False] * num_classes for _ in range(items)]
    batch.listed = [[True] * num_classes for _ in range(items)]
    batch.outside = [set() for _ in range(items)]
    batch.partial = [set() for _ in range(items)]
    annotated = range(items - 1) if items > 1 else range(1)
    if "mask" in kinds:
        batch.target = [dict.fromkeys(everything, num_classes) for _ in range(items)]
        batch.components = [dict.fromkeys(everything, 0) for _ in range(items)]
    next_id = 1
    for b in annotated:
        if "tags" in kinds:
            batch.tags[b] = [r.choice((-1, 0, 1, 1)) for _ in range(num_classes)]
        if "outside" in kinds and r.random() < 0.7:
            edge = r.randrange(shape[-1])
            batch.outside[b] = {v for v in everything if v[-1] >= edge} if edge else set()
        if "boxes" in kinds:
            for _ in range(r.randrange(1, 4)):
                corners = [sorted(r.sample(range(size + 1), 2)) for size in shape]
                box = Box(b, r.randrange(num_classes), *(tuple(c[i] for c in corners) for i in (0, 1)))
                box.tight = r.random() < 0.8
                box.cut = frozenset(line for line in box.lines() if r.random() < 0.2)
                batch.boxes.append(box)
            if "complete" in kinds:
                batch.complete[b] = [r.random() < 0.4 for _ in range(num_classes)]
        if "points" in kinds:
            batch.points += [(b, r.randrange(num_classes), r.choice(everything)) for _ in range(r.randrange(1, 4))]
        if "partial" in kinds and r.random() < 0.7:
            batch.listed[b] = [r.random() < 0.5 for _ in range(num_classes)]
            batch.partial[b] = {v for v in everything if r.random() < 0.3}
        if batch.target is not None and batch.components is not None:
            # Slabs of one class each stand for components; some voxels are nobody's.
            for start in range(0, shape[0], 2):
                c = r.randrange(num_classes)
                for v in everything:
                    if start <= v[0] < start + 2 and v not in batch.partial[b] and r.random() < 0.5:
                        batch.target[b][v] = c
                        batch.components[b][v] = next_id
                next_id += 1
    return batch


# --- the released code, on recordings -----------------------------------------------------------------------------


def released_losses(record: Mapping[str, Any], logits: list[dict[Any, float]] | None = None) -> dict[str, float]:
    """The four losses of a recording (arrays under "in/..."), written down as the reference restates them.

    Literal: the negatives are a table N[b][k][pixel], made anew for each class. Where a class's boxes overlap they
    subtract once: that is what the recordings show.

    Args:
        record: in/logits, in/class_mask, in/components, in/valid, in/tags_b, in/boxes_b, in/points_b.
        logits: instead of in/logits, one dictionary {(class, row, column): score} for each item.
    """
    items, num_classes, height, width = record["in/logits"].shape
    pixels = [(r, q) for r in range(height) for q in range(width)]
    if logits is None:
        logits = released_scores(record)
    p: list[dict[Any, float]] = []
    for b in range(items):
        table = {}
        for r, q in pixels:
            largest = max(logits[b][c, r, q] for c in range(num_classes))
            exponentials = [math.exp(logits[b][c, r, q] - largest) for c in range(num_classes)]
            for c in range(num_classes):
                table[c, r, q] = exponentials[c] / sum(exponentials)
        p.append(table)
    valid = [{(r, q): int(record["in/valid"][b, r, q] != 0) for r, q in pixels} for b in range(items)]
    given = {kind: [record.get(f"in/{kind}_{b}") for b in range(items)] for kind in ("tags", "boxes", "points")}
    totals = dict.fromkeys(("image", "box", "point", "mask"), 0.0)
    for c in range(num_classes):
        logs: dict[str, list[float]] = {kind: [] for kind in totals}
        carriers = dict.fromkeys(totals, 0)
        carriers["mask"] = items
        summed = 0.0
        for b in range(items):
            mask, ids = record["in/class_mask"][b], record["in/components"][b]
            negatives = {(k, *at): (0 if k == c else valid[b][at]) for k in range(num_classes) for at in pixels}
            plain = {(k, *at): valid[b][at] for k in range(num_classes) for at in pixels}
            tags, boxes, points = given["tags"][b], given["boxes"][b], given["points"][b]
            if tags is not None:
                carriers["image"] += 1
                if c in tags.tolist():
                    total = sum(p[b][c, r, q] * valid[b][r, q] for r, q in pixels)
                    logs["image"].append(math.log(total / max(sum(valid[b].values()), 1) + EPS))
                else:
                    negatives = dict(plain)
            if boxes is not None and len(boxes):
                carriers["box"] += 1
                negatives = dict(plain)
                inside = set()
                for _, label, x, y, x2, y2 in boxes.tolist():
                    rows = [r for r in range(min(y, y2), max(y, y2)) if 0 <= r < height]
                    columns = [q for q in range(min(x, x2), max(x, x2)) if 0 <= q < width]
                    if label != c or not rows or not columns or max(len(rows), len(columns)) <= 1:
                        continue
                    inside |= set(itertools.product(rows, columns))
                    total = sum(max(p[b][c, r, q] for r in rows) for q in columns)
                    total += sum(max(p[b][c, r, q] for q in columns) for r in rows)
                    logs["box"].append(math.log(total / (len(rows) + len(columns)) + EPS))
                for at in inside:
                    negatives[(c, *at)] -= 1
            if points is not None and len(points):
                carriers["point"] += 1
                for _, _, r, q in points.tolist():
                    for k in range(num_classes):
                        negatives[k, r, q] = 1
                for _, label, r, q in points.tolist():
                    if label == c:
                        negatives[c, r, q] = 0
                        logs["point"].append(math.log(p[b][c, r, q] + EPS))
            if any(mask[at] == c for at in pixels):
                negatives = dict(plain)
                held = set()
                for _, label, r, q in points.tolist() if points is not None else []:
                    if label == c and mask[r, q] != 255:
                        held.add(int(ids[r, q]))
                        component = [at for at in pixels if ids[at] == ids[r, q] and mask[at] != 255]
                        logs["mask"].append(math.log(sum(p[b][(c, *at)] for at in component) / len(component) + EPS))
                for at in pixels:
                    if int(ids[at]) in held and mask[at] != 255:
                        negatives[(c, *at)] -= 1
            summed += sum(p[b][key] * negatives[key] for key in negatives)
        log_negatives = math.log(max(summed, 0.0) + EPS)
        for kind, found in logs.items():
            if found:
                totals[kind] += (log_negatives - (1 + sum(found)) / len(found)) / ((c + 1) * carriers[kind])
    return totals


def released_scores(record: Mapping[str, Any]) -> list[dict[Any, float]]:
    items, num_classes, height, width = record["in/logits"].shape
    keys = list(itertools.product(range(num_classes), range(height), range(width)))
    return [{key: float(record["in/logits"][(b, *key)]) for key in keys} for b in range(items)]


def released_gradients(record: Mapping[str, Any]) -> dict[str, list[float]]:
    """In the order of a contiguous (B, C, H, W) tensor."""
    logits = released_scores(record)
    scores = [(table, key) for table in logits for key in table]
    return gradients(lambda: released_losses(record, logits), scores)


def released_filter(record: Mapping[str, Any]) -> list[float]:
    """Filtered probabilities in the order of a contiguous (B, C, H, W) tensor; NaN where no class is left."""
    items, num_classes, height, width = record["in/logits"].shape
    result = []
    for b, scores in enumerate(released_scores(record)):
        probability = {}
        tags, boxes, points = (record.get(f"in/{kind}_{b}") for kind in ("tags", "boxes", "points"))
        for r, q in itertools.product(range(height), range(width)):
            row = [scores[c, r, q] for c in range(num_classes)]
            if tags is not None:
                row = [score if c in tags.tolist() else -math.inf for c, score in enumerate(row)]
            covering = set()
            for _, label, x, y, x2, y2 in boxes.tolist() if boxes is not None else []:
                if min(x, x2) <= q < max(x, x2) and min(y, y2) <= r < max(y, y2):
                    covering.add(label)
            if covering:
                row = [score if c in covering else -math.inf for c, score in enumerate(row)]
            for _, label, i, j in points.tolist() if points is not None else []:
                if (i, j) == (r, q):
                    row = [1.0 if c == label else -math.inf for c in range(num_classes)]
            if max(row) == -math.inf:
                row = [math.nan] * num_classes
            else:
                exponentials = [math.exp(score - max(row)) for score in row]
                row = [e / sum(exponentials) for e in exponentials]
            drawn = int(record["in/class_mask"][b, r, q])
            if drawn != 255:
                row = [float(c == drawn) for c in range(num_classes)]
            for c in range(num_classes):
                probability[c, r, q] = row[c]
        result += [probability[key] for key in itertools.product(range(num_classes), range(height), range(width))]
    return result
