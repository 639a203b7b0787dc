"""How long an expert takes to annotate: a model the user can set, and the defaults with where they are from.

Defaults, all of crowd workers on photographs, so that experts on micrographs or CT will differ; what matters for the
curves are the ratios.

- mask: 79 s an object. Lin et al., Microsoft COCO, ECCV 2014, as Bearman et al. quote it for full supervision.
- rectangle (a mask of part of an image): as a mask, 79 s for each object seen in it.
- tag: 1 s a class and image. Bearman et al., What's the Point, ECCV 2016.
- point: 2.4 s for the first point of a class in an image, 0.9 s for each further one (next-point). Bearman et al.
- box: 7 s. Papadopoulos et al., Extreme Clicking, ICCV 2017. Drawn corner to corner it is 35 s (Su et al., 2012).
- scribble: 10.9 s a class and image. Bearman et al. ("squiggles").
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import NamedTuple

SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}
PER = ("object", "class", "image")


class Price(NamedTuple):
    """Seconds for each object, each class in an image, or each image."""

    seconds: float
    per: str

    def __str__(self) -> str:
        return f"{self.seconds:g}s/{self.per}"


DEFAULT: dict[str, Price] = {
    "mask": Price(79.0, "object"),
    "rectangle": Price(79.0, "object"),
    "tag": Price(1.0, "class"),
    "point": Price(2.4, "object"),
    "next-point": Price(0.9, "object"),
    "box": Price(7.0, "object"),
    "scribble": Price(10.9, "class"),
}


@dataclass(frozen=True)
class Counts:
    """What was annotated in the cases of one training.

    Attributes:
        mask_images, mask_classes, mask_objects: images with a mask; classes shown, summed over them; connected
            components.
        rectangle_images, rectangle_classes, rectangle_objects: likewise, within the annotated rectangles.
        tag_images, tags: images with tags; statements ("shown", "not shown"), summed over them.
        point_images, point_classes, points: images with points; classes pointed at, summed over them; points.
        box_images, box_classes, boxes: likewise.
        scribble_images, scribble_classes, scribbles: likewise; the background is scribbled on too. A scribble is one
            stroke in one plane.
    """

    mask_images: int = 0
    mask_classes: int = 0
    mask_objects: int = 0
    rectangle_images: int = 0
    rectangle_classes: int = 0
    rectangle_objects: int = 0
    tag_images: int = 0
    tags: int = 0
    point_images: int = 0
    point_classes: int = 0
    points: int = 0
    box_images: int = 0
    box_classes: int = 0
    boxes: int = 0
    scribble_images: int = 0
    scribble_classes: int = 0
    scribbles: int = 0

    def __add__(self, other: Counts) -> Counts:
        mine, theirs = asdict(self), asdict(other)
        return Counts(**{key: mine[key] + theirs[key] for key in mine})


def total(counts: Iterable[Counts]) -> Counts:
    """The sum."""
    result = Counts()
    for item in counts:
        result = result + item
    return result


def minutes(counts: Counts, prices: Mapping[str, Price]) -> float:
    """Expert time in minutes.

    Where points are priced by object, the first point of a class in an image costs "point", the others "next-point".
    """
    seconds = _cost(prices["mask"], counts.mask_images, counts.mask_classes, counts.mask_objects)
    seconds += _cost(prices["rectangle"], counts.rectangle_images, counts.rectangle_classes, counts.rectangle_objects)
    seconds += _cost(prices["tag"], counts.tag_images, counts.tags, counts.tags)
    seconds += _cost(prices["box"], counts.box_images, counts.box_classes, counts.boxes)
    seconds += _cost(prices["scribble"], counts.scribble_images, counts.scribble_classes, counts.scribbles)
    if prices["point"].per == "object":
        further = counts.points - counts.point_classes
        seconds += prices["point"].seconds * counts.point_classes + prices["next-point"].seconds * further
    else:
        seconds += _cost(prices["point"], counts.point_images, counts.point_classes, counts.points)
    return seconds / 60


def _cost(price: Price, images: int, classes: int, objects: int) -> float:
    return price.seconds * {"image": images, "class": classes, "object": objects}[price.per]


def parse_prices(texts: Iterable[str]) -> dict[str, Price]:
    """The defaults, changed by entries such as "mask=20min/image" or "point=3s/object".

    Raises:
        ValueError: an entry of another form.
    """
    prices = dict(DEFAULT)
    given = set()
    for text in texts:
        match = re.fullmatch(r"([a-z\-]+)=(\d+(?:\.\d+)?)\s*(s|min|h)/([a-z]+)", text)
        if match is None or match[1] not in DEFAULT or match[4] not in PER:
            raise ValueError(
                f"--cost: expected WHAT=NUMBER and unit, such as mask=20min/image or point=2.4s/object, with WHAT one "
                f"of {', '.join(DEFAULT)}, unit s, min or h, per {', '.join(PER)}; but got {text!r}."
            )
        if match[1] == "next-point" and match[4] != "object":
            raise ValueError(f"--cost: a further point is priced by object, but got {text!r}.")
        prices[match[1]] = Price(float(match[2]) * SECONDS[match[3]], match[4])
        given.add(match[1])
    if "point" in given and "next-point" not in given:
        prices["next-point"] = Price(prices["point"].seconds, "object")
    return prices
