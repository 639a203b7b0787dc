"""The page: what was found, as one HTML file that needs nothing beside itself.

Every text that comes from a file is escaped by the template engine; the page's own script is the only one that the
page's security policy lets run. What stands where is in page.html.j2, how it looks in page.css.
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple

from nnunet_dsp import __version__
from nnunet_dsp.pictures import class_colour
from nnunet_dsp.report.case_checks import MASKED, PARTIAL, STATUSES, UNLABELLED, UNREADABLE, WEAK, CaseReport
from nnunet_dsp.report.dataset_checks import ClassCounts
from nnunet_dsp.report.drawing import Picture, hatch_number, marker_number, rgb
from nnunet_dsp.report.findings import KINDS, Finding, Kind, Severity

if TYPE_CHECKING:
    from nnunet_dsp.report.batches import BatchReport

_PICTURED = 12  # findings of a kind that are shown with their picture
_LISTED = 300  # findings of a kind that are listed
STATUS_WORDS = {
    MASKED: "a mask of the whole image",
    PARTIAL: "a mask of a part of it, or of some classes",
    WEAK: "tags, points or boxes, no mask",
    UNLABELLED: "nothing; training uses it through pseudo-labels",
    UNREADABLE: "image or mask cannot be used",
}


@dataclass(slots=True)
class Report:
    """All that the page shows."""

    dataset: str
    description: str
    has_ignore: bool
    classes: list[ClassCounts]
    cases: list[CaseReport]
    findings: list[Finding]
    batches: list[BatchReport] = field(default_factory=list)
    batch_notes: list[str] = field(default_factory=list)
    batches_of: str = ""
    instances: bool = False

    def _number(self, severity: Severity) -> int:
        return sum(finding.severity == severity for finding in self.findings)

    @property
    def num_instances(self) -> int:
        return sum(len(case.instances or ()) for case in self.cases)

    @property
    def errors(self) -> int:
        return self._number(Severity.ERROR)

    @property
    def doubtful(self) -> int:
        return self._number(Severity.DOUBTFUL)

    @property
    def notes(self) -> int:
        return self._number(Severity.NOTE)


class FindingGroup(NamedTuple):
    """The findings of one kind: with pictures, without, and how many more there are."""

    key: str
    kind: Kind
    pictured: list[Finding]
    listed: list[Finding]
    more: int

    @property
    def total(self) -> int:
        return len(self.pictured) + len(self.listed) + self.more


class Chip(NamedTuple):
    """What one case has of one class."""

    name: str
    number: int
    parts: tuple[str, ...]


class CaseCard(NamedTuple):
    """One case as the page lists it."""

    case: CaseReport
    size: str
    chips: list[Chip]
    kinds: str
    classes: str
    worst: str
    found: int
    pictures: list[Picture]


def render(report: Report, max_bytes: int) -> str:
    """The page as text.

    Args:
        report: what to show.
        max_bytes: what pictures may take; findings and batches come first, then cases with findings, then the others.
    """
    from jinja2 import Environment, StrictUndefined

    files = resources.files("nnunet_dsp.report")
    style, script, template = (
        files.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js", "page.html.j2")
    )
    groups = _groups(report.findings)
    left_out = _fit(report, groups, max_bytes)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["data_uri"] = _data_uri
    environment.filters["share"] = share
    environment.filters["grouped"] = lambda number: f"{number:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    environment.globals.update(marker=marker_number, status_words=STATUS_WORDS)
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    used = sorted({count.number for count in report.classes} | _drawn_numbers(report))
    return environment.from_string(template).render(
        report=report,
        groups=groups,
        cards=[_card(case, report.classes) for case in report.cases],
        statuses=[(s, n) for s in STATUSES if (n := sum(case.status == s for case in report.cases))],
        totals=_totals(report.classes),
        swatches=[_swatch(number) for number in used],
        style=style,
        script=script,
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        created=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        left_out=left_out,
        volumes=any(case.shape and case.shape[0] > 1 for case in report.cases),
    )


def share(value: float) -> str:
    """A share in percent, with as many digits as tell it from 0 and from 100."""
    if value <= 0 or value >= 1:
        return f"{value:.0%}"
    for digits in (0, 1, 2):
        text = f"{value:.{digits}%}"
        if 0 < float(text[:-1]) < 100 and (value > 0.05 or digits):
            return text
    return "under 0.01%" if value < 0.5 else "over 99.99%"


def _data_uri(data: bytes, media: str) -> str:
    return f"data:{media};base64,{base64.b64encode(data).decode('ascii')}"


def _groups(findings: Sequence[Finding]) -> list[FindingGroup]:
    groups = []
    for key, kind in KINDS.items():
        mine = [finding for finding in findings if finding.kind == key]
        if not mine:
            continue
        pictured = _from_many_cases([finding for finding in mine if finding.picture is not None])[:_PICTURED]
        chosen = set(map(id, pictured))
        rest = [finding for finding in mine if id(finding) not in chosen]
        groups.append(FindingGroup(key, kind, pictured, rest[:_LISTED], max(0, len(rest) - _LISTED)))
    return groups


def _from_many_cases(findings: Sequence[Finding]) -> list[Finding]:
    """The first of each case, then the second of each, and so on."""
    seen: Counter[str | None] = Counter()
    order = []
    for finding in findings:
        order.append(seen[finding.case])
        seen[finding.case] += 1
    return [finding for _, finding in sorted(zip(order, findings, strict=True), key=lambda pair: pair[0])]


def _fit(report: Report, groups: Sequence[FindingGroup], max_bytes: int) -> str:
    """Drop the pictures that do not fit, least needed first; in words, what was dropped."""
    left = max_bytes
    for batch in report.batches:
        kept = []
        for item in batch.items:
            left -= sum(p.num_bytes for p in (item.seen, item.mask, item.allowed) if p is not None)
            if left > 0:
                kept.append(item)
        batch.items[:] = kept
    for group in groups:
        for finding in group.pictured:
            left -= finding.picture.num_bytes if finding.picture is not None else 0
            if left <= 0:
                finding.picture = None
    dropped = 0
    for case in sorted(report.cases, key=lambda case: min((f.severity for f in case.findings), default=9)):
        left -= sum(picture.num_bytes for picture in case.pictures)
        if left <= 0 and case.pictures:
            case.pictures = []
            dropped += 1
    if not dropped:
        return ""
    return (
        f"The pictures of {dropped} of {len(report.cases)} cases, those with the fewest findings, are left out: "
        "the page would be too large (--max-megabytes)."
    )


def _card(case: CaseReport, classes: Sequence[ClassCounts]) -> CaseCard:
    said = case.said
    total = max(1, sum(case.voxels.values()))
    chips, numbers = [], []
    for count in classes:
        parts = []
        voxels = case.voxels.get(count.number, 0)
        if count.region and case.instances is not None:
            parts += _instances_in_words(case.instances)
            voxels = sum(case.instances)
        if voxels and count.number:
            parts.append(share(voxels / total))
        boxes = case.tight_boxes[count.name] + case.loose_boxes[count.name]
        for number, word, several, complete in (
            (case.points[count.name], "point", "points", said is not None and count.name in said.complete_points),
            (boxes, "box", "boxes", said is not None and count.name in said.complete_boxes),
        ):
            if number or complete:
                parts.append(f"{number or 'no'} {word if number == 1 else several}{' (all)' if complete else ''}")
        if case.loose_boxes[count.name]:
            parts.append(f"{case.loose_boxes[count.name]} loose")
        if said is not None:
            parts += ["present"] * (count.name in said.present) + ["absent"] * (count.name in said.absent)
        if parts:
            chips.append(Chip(count.name, count.number, tuple(parts)))
            numbers.append(count.number)
    kinds = ["mask"] * (case.status in (MASKED, PARTIAL))
    kinds += ["points"] * (case.points.total() > 0)
    kinds += ["boxes"] * (case.tight_boxes.total() + case.loose_boxes.total() > 0)
    kinds += ["tags"] * (said is not None and bool(said.present or said.absent))
    shape = case.shape[1:] if case.shape and case.shape[0] == 1 else case.shape
    worst = min((finding.severity for finding in case.findings), default=None)
    return CaseCard(
        case=case,
        size=" × ".join(map(str, shape)),
        chips=chips,
        kinds=" ".join(kinds),
        classes=" ".join(map(str, numbers)),
        worst="" if worst is None else worst.word,
        found=sum(finding.severity < Severity.NOTE for finding in case.findings),
        pictures=case.pictures,
    )


def _instances_in_words(sizes: Sequence[int]) -> list[str]:
    if not sizes:
        return []
    if len(sizes) == 1:
        return [f"1 instance of {sizes[0]} voxels"]
    return [f"{len(sizes)} instances of {sizes[0]} to {sizes[-1]} voxels"]


def _totals(classes: Sequence[ClassCounts]) -> dict[str, int]:
    totals: Counter[str] = Counter()
    for count in classes:
        for name in ("points", "tight_boxes", "loose_boxes", "present", "absent"):
            totals[name] += getattr(count, name)
    return dict(totals) or dict.fromkeys(("points", "tight_boxes", "loose_boxes", "present", "absent"), 0)


def _drawn_numbers(report: Report) -> set[int]:
    pictures = [p for case in report.cases for p in case.pictures]
    pictures += [f.picture for f in report.findings if f.picture is not None]
    pictures += [item.seen for batch in report.batches for item in batch.items]
    return {mark.label for picture in pictures for mark in picture.marks if mark.label >= 0}


def _swatch(number: int) -> dict[str, Any]:
    """A class's colour, the dark or light rim that sets it off, and how its masks are filled."""
    red, green, blue = rgb(number)
    bright = 0.2126 * red + 0.7152 * green + 0.0722 * blue > 110
    return {
        "number": number,
        "colour": class_colour(number) if number > 0 else "#FFFFFF",
        "rim": "#000000" if bright else "#FFFFFF",
        "hatch": hatch_number(number) if number > 0 else 0,
    }
