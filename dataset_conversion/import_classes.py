"""Which class a name in an annotation file stands for, and what the user claims of whole classes (--complete, ...).

Names only: nothing here looks at an image or writes anything.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nnunet_dsp.annotation_errors import did_you_mean, listed
from nnunet_dsp.annotations import AnnotationError
from nnunet_dsp.dataset_conversion.imported import RasterMask, SourceImage, read_json_bounded, text_of
from nnunet_dsp.label_names import BACKGROUND, IGNORE

KINDS = ("boxes", "points", "tags")
ALL = "all"
MAX_CLASSES = 10_000


@dataclass(frozen=True)
class Classes:
    """What every name stands for.

    target: class by the name in the annotation file; None: to be left out. names: the dataset's classes in the order of
        their numbers, without background and ignore. renamed: what is to be told of names that had to change.
    """

    target: Mapping[str, str | None]
    names: tuple[str, ...]
    renamed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claims:
    """What the user says of all images: of which classes every object carries a box or a point, which classes every
    image was tagged for, and which the masks show completely (None: not said). Class names."""

    boxes: tuple[str, ...] = ()
    points: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    mask_labels: tuple[str, ...] | None = None


@dataclass
class Used:
    """How often each name occurs in the annotation files, and where first."""

    count: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    listed: list[str] = field(default_factory=list)

    def add(self, name: str, where: str) -> None:
        self.count[name] += 1
        self.first.setdefault(name, where)


def names_used(images: Iterable[SourceImage]) -> Used:
    """Every class name in marks, and the formats' own lists in their order."""
    used, known = Used(), set()
    for image in images:
        for name in image.classes:
            if name not in known:
                known.add(name)
                used.listed.append(name)
        for mark in image.marks:
            where = f"{image.source}: {mark.entry}"
            if isinstance(mark, RasterMask) and mark.label is None:
                for name in mark.names.values():
                    if name != BACKGROUND:
                        used.add(name, where)
            else:
                used.add(str(mark.label), where)
    return used


def read_map(file: Path) -> dict[str, str]:
    """A table of names and classes; an empty class means that the name is left out.

    Either JSON, an object of names and classes, or text with a line for each: name, then a tab, comma, semicolon or "="
    (the first of these that the file's first line holds), then the class. Lines that start with "#" are passed over.

    Raises:
        AnnotationError: no such table, or two classes for one name.
    """
    if file.suffix.lower() == ".json":
        content = read_json_bounded(file, 1 << 24)
        if not isinstance(content, dict) or not all(isinstance(v, (str, type(None))) for v in content.values()):
            raise AnnotationError(f'{file}: expected a JSON object of names and classes, {{"RBC": "red cell", ...}}.')
        return {name.strip(): (value or "").strip() for name, value in content.items()}
    lines = [line for line in text_of(file, 1 << 24).split("\n") if line.strip() and not line.lstrip().startswith("#")]
    if not lines:
        raise AnnotationError(f"{file}: the table of classes is empty. Write a line for each name: name,class.")
    separator = next((s for s in "\t,;=" if s in lines[0]), None)
    if separator is None:
        raise AnnotationError(
            f"{file}: expected lines of a name and a class with a comma between them, but got {lines[0][:80]!r}."
        )
    table: dict[str, str] = {}
    try:
        rows = list(csv.reader(lines, delimiter=separator, skipinitialspace=True))
    except csv.Error as error:
        raise AnnotationError(f"{file}: no table: {error}.") from None
    for number, row in enumerate(rows, start=1):
        cells = [cell.strip() for cell in row]
        if number == 1 and [c.lower() for c in cells[:2]] in (["source", "class"], ["name", "class"], ["from", "to"]):
            continue
        if len(cells) != 2:
            raise AnnotationError(f"{file}: line {number}: expected a name and a class, but got {len(cells)} cells.")
        if table.setdefault(cells[0], cells[1]) != cells[1]:
            raise AnnotationError(f"{file}: line {number}: {cells[0]!r} has two classes. Keep one.")
    return table


def resolve(
    used: Used,
    *,
    mapping: Mapping[str, str] | None = None,
    existing: Sequence[str] | None = None,
    only_used: bool = False,
) -> Classes:
    """Decide what each name stands for.

    A name that the mapping does not hold stands for the class of the same name, if the dataset exists or a mapping is
    given only for a class that is known; otherwise it makes a new class. New classes are numbered in the order of the
    format's own list, then of their names.

    Args:
        used: the names there are.
        mapping: class by name ("": left out); None: no table was given.
        existing: the classes of the dataset that is added to, without background; None: a new dataset.
        only_used: a new dataset has no class that is never marked.

    Raises:
        AnnotationError: unknown names (all of them, with what was probably meant), or names that cannot be classes.
    """
    names = [*dict.fromkeys([*used.listed, *sorted(used.count, key=_natural)])]
    if len(names) > MAX_CLASSES:
        raise AnnotationError(f"There are {len(names)} different class names, more than {MAX_CLASSES}. Is it the text?")
    if only_used:
        names = [name for name in names if used.count[name]]
    known = None if existing is None else {BACKGROUND, *existing}
    if mapping is not None:
        targets = {value for value in mapping.values() if value}
        if known is None:
            known = {*targets, BACKGROUND}
        elif targets - known:
            wrong = sorted(targets - known)[0]
            raise AnnotationError(
                f"--map names the class {wrong!r}, which the dataset does not have: "
                f"{listed(sorted(known))}.{did_you_mean(wrong, sorted(known))}"
            )
    target: dict[str, str | None] = {}
    unknown: list[str] = []
    renamed: list[str] = []
    for name in names:
        wanted = mapping[name] if mapping is not None and name in mapping else name
        if mapping is not None and name in mapping and not wanted:
            target[name] = None
            continue
        if known is not None and wanted not in known:
            if used.count[name] == 0:
                target[name] = None  # a class of the format's list that nothing is marked with
                continue
            unknown.append(
                f"{name!r} ({used.count[name]} times, first at {used.first[name]}).{did_you_mean(name, sorted(known))}"
            )
            continue
        target[name] = _fit_class(wanted, name, used, renamed)
    if unknown:
        shown = "\n  ".join(unknown[:10]) + (f"\n  ... and {len(unknown) - 10} more" if len(unknown) > 10 else "")
        raise AnnotationError(
            f"{len(unknown)} class name(s) are unknown; known are {listed(sorted(known or ()))}. Say in a table what "
            f"each stands for (name,class; no class leaves it out): --map FILE.\n  {shown}"
        )
    if existing is not None:
        return Classes(target, tuple(existing))
    order = [value for value in target.values() if value is not None]
    classes = tuple(name for name in dict.fromkeys(order) if name != BACKGROUND)
    if not classes:
        raise AnnotationError("No class is left: nothing is marked, or --map leaves out everything.")
    told = f"classes that are numbers are called {', '.join(renamed[:3])} and so on; --map FILE gives them names"
    return Classes(target, classes, (told,) if renamed else ())


def _fit_class(wanted: str, name: str, used: Used, renamed: list[str]) -> str:
    where = f" (first at {used.first[name]})" if name in used.first else ""
    if not wanted.strip():
        raise AnnotationError(
            f"Something is marked without a class{where}. Name one in a table, with an empty name before the comma: "
            '",class", or "," to leave it out: --map FILE.'
        )
    if wanted.strip().lower() == IGNORE:
        raise AnnotationError(
            f"{name!r}{where} cannot be a class: nnU-Net calls 'ignore' what nobody annotated. Map it: --map FILE."
        )
    if len(wanted) > 200 or not wanted.isprintable():
        raise AnnotationError(f"{wanted[:60]!r}{where} is no fit name for a class. Map it: --map FILE.")
    if wanted.isdecimal():
        renamed.append(f"class_{wanted}")
        return f"class_{wanted}"
    return wanted


def _natural(name: str) -> tuple[int, int, str]:
    """Sorts "2" before "10", and numbers before words."""
    return (0, int(name), "") if name.isdecimal() and len(name) < 18 else (1, 0, name)


def parse_claims(
    complete: Sequence[str] | None, mask_labels: str | None, names: Sequence[str], target: Mapping[str, str | None]
) -> Claims:
    """The user's --complete KIND=A,B (several) and --mask-labels A,B as class names.

    Args:
        names: the dataset's classes. target: what the annotation file's own names stand for: they are understood too.

    Raises:
        AnnotationError: an unknown kind or class.
    """
    claims: dict[str, tuple[str, ...]] = {}
    for text in complete or ():
        kind, equals, value = text.partition("=")
        kind = kind.strip().lower()
        kind = kind if kind in KINDS else next((k for k in KINDS if k.rstrip("es") == kind.rstrip("es")), kind)
        if not equals or kind not in KINDS:
            raise AnnotationError(
                f"--complete: expected KIND=CLASS,CLASS or KIND=all, KIND one of {', '.join(KINDS)}, but got {text!r}."
            )
        claims[kind] = (*claims.get(kind, ()), *_class_list(value, f"--complete {kind}", names, target))
    drawn = None if mask_labels is None else _class_list(mask_labels, "--mask-labels", names, target)
    unique = {kind: tuple(dict.fromkeys(value)) for kind, value in claims.items()}
    return Claims(unique.get("boxes", ()), unique.get("points", ()), unique.get("tags", ()), drawn)


def _class_list(text: str, flag: str, names: Sequence[str], target: Mapping[str, str | None]) -> tuple[str, ...]:
    if text.strip().lower() == ALL and ALL not in names:
        return tuple(names)
    found = []
    for word in (w.strip() for w in text.split(",")):
        name = word if word in names else target.get(word)
        if name is None or name not in names:
            raise AnnotationError(
                f"{flag}: there is no class {word!r}, only {listed(list(names))}.{did_you_mean(word, list(names))}"
            )
        found.append(name)
    return tuple(dict.fromkeys(found))
