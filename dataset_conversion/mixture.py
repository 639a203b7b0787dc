"""Which case gets which annotations: masks for a few, some or all weak kinds for the others."""

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import numpy as np

Count = int | Literal["rest"]
KINDS = ("tags", "points", "boxes", "scribbles", "rectangles")
ATTEMPTS = 1000  # draws of masked cases, in search of ones that together show every class


def assign(
    classes_of: Mapping[str, Collection[str]],
    *,
    masks: int,
    kinds: Mapping[str, Count],
    unlabelled: int = 0,
    masked_cases: Sequence[str] | None = None,
    same_cases: bool = False,
    cover: bool = True,
    seed: int = 0,
) -> dict[str, tuple[str, ...]]:
    """Deal out the annotations.

    Args:
        classes_of: the classes that each case shows.
        masks: how many cases keep their mask; the number of `masked_cases` if those are given.
        kinds: for each of "tags", "points", "boxes", "scribbles", "rectangles" how many cases get it, or "rest": every
            case that is neither masked nor unlabelled. Numbered kinds go to different cases as far as the cases reach.
        unlabelled: how many cases get nothing.
        same_cases: numbered kinds all start from the same case instead.
        cover: draw masked cases that together show as many classes as possible, as one who chooses what to annotate
            would.

    Returns:
        For each case, in the order given: ("mask",), or its weak kinds, or () for nothing.

    Raises:
        ValueError: numbers that do not fit the dataset, or unknown case names.
    """
    names = list(classes_of)
    random = np.random.default_rng([seed, 0])
    if masked_cases is not None:
        unknown = sorted(set(masked_cases) - set(names))
        if unknown:
            raise ValueError(f"--masked-cases: the source dataset has no case {', '.join(unknown)}.")
        chosen = set(masked_cases)
    else:
        if not 0 <= masks <= len(names):
            raise ValueError(
                f"--masks: expected 0 to {len(names)}, the number of cases of the source, but got {masks}."
            )
        chosen = _choose_masked(classes_of, masks, cover, random)
    others = [names[i] for i in random.permutation(len(names)) if names[i] not in chosen]
    if not 0 <= unlabelled <= len(others):
        raise ValueError(f"--unlabelled: expected 0 to {len(others)}, the cases without a mask, but got {unlabelled}.")
    weak = others[unlabelled:]
    kinds_of: dict[str, tuple[str, ...]] = {name: ("mask",) if name in chosen else () for name in names}
    position = 0
    for kind in KINDS:
        count = kinds.get(kind, 0)
        number = len(weak) if count == "rest" else count
        if not 0 <= number <= len(weak):
            raise ValueError(
                f"--{kind}: expected 0 to {len(weak)}, the cases neither masked nor unlabelled, or 'rest', but "
                f"got {count}."
            )
        first = 0 if same_cases or count == "rest" else position
        for name in [weak[(first + i) % len(weak)] for i in range(number)]:
            kinds_of[name] += (kind,)
        if count != "rest":
            position += number
    return kinds_of


def _choose_masked(
    classes_of: Mapping[str, Collection[str]], masks: int, cover: bool, random: np.random.Generator
) -> set[str]:
    names = list(classes_of)
    everything = set().union(*classes_of.values())
    best: tuple[int, list[str]] = (-1, [])
    for _ in range(ATTEMPTS if cover and masks else 1):
        drawn = [names[i] for i in random.permutation(len(names))[:masks]]
        shown = len(set().union(*(classes_of[n] for n in drawn)))
        if shown > best[0]:
            best = (shown, drawn)
        if shown == len(everything):
            break
    return set(best[1])
