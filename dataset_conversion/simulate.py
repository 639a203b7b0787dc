"""`nnunet_dsp simulate -d SRC -o DST ...`: a weakly annotated dataset from a fully annotated one, in any mixture.

    nnunet_dsp simulate -d 501 -o 502 --masks 3 --tags rest --points rest --boxes rest

keeps three masks and gives every other case tags, a point in each object and a box around each. Numbers instead of
`rest` deal the kinds out to different cases: `--masks 3 --points 20 --boxes 20`. Images are linked. The source's masks
are linked to labelsTr_evaluation, where nnU-Net does not look. Objects are connected components (8 neighbours in 2D,
26 in 3D) of the foreground classes.

    nnunet_dsp simulate -d 501 -o 503 --rectangle 64

annotates one rectangle of 64 x 64 voxels in every image and leaves the rest to be 'ignore'.

    nnunet_dsp simulate -d 601 -o 602 --instances 0.1

keeps a tenth of the instances of each image of an instance dataset (`nnunet_dsp convert instances`); all else is
'ignore'.

Classes that fill the image like a net (membranes) are not boxed unless --box-classes names them: a class is left out
where the union of its boxes covers more than half of the image in more than half of the boxed cases that show it.
"""

import argparse
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nnunet_dsp.annotations import Annotations, LabelNames, case_file, write_annotations
from nnunet_dsp.dataset_conversion import raw_dataset
from nnunet_dsp.dataset_conversion.arguments import add_making_arguments
from nnunet_dsp.dataset_conversion.instance_labels import write_sparse_dataset
from nnunet_dsp.dataset_conversion.mixture import KINDS, Count, assign
from nnunet_dsp.dataset_conversion.parallel import map_cases
from nnunet_dsp.dataset_conversion.raw_dataset import EVALUATION_FOLDER, RawCase, RawDataset
from nnunet_dsp.dataset_conversion.splits import SPLITS_FILE, Split, read_splits, split_masked
from nnunet_dsp.dataset_conversion.weak_labels import (
    TOO_MUCH,
    WeakOptions,
    annotate,
    box_coverage,
    rectangle,
    scribble,
)


def _count(text: str) -> Count:
    if text == "rest":
        return "rest"
    try:
        number = int(text)
    except ValueError:
        number = -1
    if number < 0:
        raise argparse.ArgumentTypeError(f"expected a number of cases or 'rest', but got {text!r}")
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "-d",
        dest="source",
        metavar="SRC",
        required=True,
        help="id or name of the source, a raw dataset with full masks",
    )
    parser.add_argument(
        "-o",
        dest="target",
        metavar="DST",
        required=True,
        help="the new dataset: an id, 1 to 999, or a full name such as Dataset502_VNCweak",
    )
    parser.add_argument("--name", help="name of the new dataset if DST is an id (default: that of the source + 'Weak')")
    which = parser.add_argument_group("how many cases get what (COUNT: a number of cases, or 'rest': all without mask)")
    which.add_argument("--masks", metavar="N", type=int, default=0, help="keep their mask (default: %(default)s)")
    which.add_argument(
        "--masked-cases", metavar="CASE", nargs="+", help="the cases that keep their mask, by name, instead of --masks"
    )
    which.add_argument(
        "--random-masks",
        action="store_true",
        help="draw the masked cases blindly (default: such that together they show every class, if possible)",
    )
    which.add_argument(
        "--masks-only",
        action="store_true",
        help="leave all cases without mask out, and the ignore label too: what nnU-Net alone would train on",
    )
    which.add_argument(
        "--tags",
        metavar="COUNT",
        type=_count,
        default=0,
        nargs="?",
        const="rest",
        help="image-level labels: which classes the image shows, and which not",
    )
    which.add_argument(
        "--points", metavar="COUNT", type=_count, default=0, nargs="?", const="rest", help="points inside the objects"
    )
    which.add_argument(
        "--boxes", metavar="COUNT", type=_count, default=0, nargs="?", const="rest", help="boxes around the objects"
    )
    which.add_argument(
        "--scribbles",
        metavar="COUNT",
        type=_count,
        default=0,
        nargs="?",
        const="rest",
        help="strokes in the objects and the background: a partial mask",
    )
    which.add_argument(
        "--rectangle",
        metavar="VOXELS",
        type=int,
        nargs="+",
        help="every case without mask gets one annotated rectangle of this size: one number for all axes, or y x, or "
        "z y x (1 64 64: part of one slice). Where no case keeps its mask, these are trained and validated on",
    )
    which.add_argument(
        "--instances",
        metavar="SHARE",
        type=float,
        help="keep this share of each image's instances, above 0 to 1, and nothing else; instance datasets only",
    )
    which.add_argument(
        "--keep-background",
        action="store_true",
        help="with --instances: background that the source annotates stays annotated",
    )
    which.add_argument("--unlabelled", metavar="N", type=int, default=0, help="get nothing, 'rest' or not")
    which.add_argument(
        "--same-cases",
        action="store_true",
        help="numbered kinds go to the same cases (default: to different ones, as far as they reach)",
    )
    how = parser.add_argument_group("how they are annotated")
    how.add_argument(
        "--share",
        metavar="P",
        type=float,
        default=1.0,
        help="probability of each object to be annotated, 0 to 1 (default: 1); below 1 nothing is complete",
    )
    how.add_argument(
        "--points-per-object",
        metavar="N",
        type=int,
        default=1,
        help="well inside each; of a class like a net, as many as it has pieces, anywhere on it (default: 1)",
    )
    how.add_argument(
        "--loosen",
        metavar="VOXELS",
        type=int,
        default=0,
        help="move each side of a box outwards by 0 to this many voxels; the boxes are then not tight (default: 0)",
    )
    how.add_argument(
        "--min-size",
        metavar="VOXELS",
        type=int,
        default=1,
        help="overlook smaller objects; their class is then not complete in this case (default: 1, overlook none)",
    )
    how.add_argument(
        "--complete",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="say that every object of a class has its box or point, where it has (default: yes)",
    )
    how.add_argument(
        "--tags-absent",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="tag what is not shown (default: yes)",
    )
    how.add_argument(
        "--classes", metavar="CLASS", nargs="+", help="the classes annotated weakly (default: all but background)"
    )
    for kind, plural, default in (
        ("tag", "tags", "--classes"),
        ("point", "points", "--classes"),
        ("box", "boxes", "--classes but for net-like ones"),
    ):
        how.add_argument(
            f"--{kind}-classes", metavar="CLASS", nargs="+", help=f"the classes with {plural} (default: {default})"
        )
    how.add_argument(
        "--mask-classes",
        metavar="CLASS",
        nargs="+",
        help="the masks show these classes only, all else is background, and mask_labels says so (default: all)",
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed, same dataset (default: %(default)s)")
    add_making_arguments(parser)


class _Job(NamedTuple):
    """What a worker needs for one case."""

    case: RawCase
    kinds: tuple[str, ...]
    label_file: Path  # where the new label goes
    reader_writer: Any
    labels: dict[str, int]
    ignore: int
    options: WeakOptions
    mask_classes: tuple[str, ...] | None
    seed: int


def _classes_shown(job: tuple[RawCase, Any, dict[str, int], int | None]) -> tuple[str, frozenset[str], bool]:
    """Case, classes it shows, and whether every voxel is annotated."""
    case, reader_writer, labels, ignore = job
    mask, _ = raw_dataset.read_label(reader_writer, case.label)
    values = set(np.unique(mask).tolist())
    unknown = sorted(values - set(labels.values()) - {ignore})
    if unknown:
        raise ValueError(f"{case.label}: value(s) {unknown} are no label of dataset.json, which has {labels}.")
    return case.name, frozenset(n for n, v in labels.items() if v in values), ignore not in values


def _annotate_case(job: _Job) -> tuple[str, Annotations, dict[str, float]]:
    """Write a case's label file; its name, its annotations, and how much of the image each class's boxes cover."""
    mask, properties = raw_dataset.read_label(job.reader_writer, job.case.label)
    if "mask" in job.kinds:
        if job.mask_classes is None:
            for file, name in raw_dataset.label_files(job.case.label, job.label_file.name):
                shutil.copyfile(file, job.label_file.parent / name)  # a link would let edits here change the source
            return job.case.name, Annotations(), {}
        kept = [job.labels[n] for n in job.mask_classes] + [job.ignore]
        raw_dataset.write_label(job.reader_writer, np.where(np.isin(mask, kept), mask, 0), job.label_file, properties)
        return job.case.name, Annotations(mask_labels=job.mask_classes), {}
    flat = mask[0] if mask.shape[0] == 1 else mask
    seed = (job.seed, *job.case.name.encode())
    label = np.full_like(flat, job.ignore)
    if "scribbles" in job.kinds:
        label = scribble(flat, job.labels, job.ignore, job.options, seed)
    if "rectangles" in job.kinds:
        partial, where = rectangle(flat, job.ignore, job.options.rectangle, seed)
        label[where] = partial[where]
    raw_dataset.write_label(job.reader_writer, label.reshape(mask.shape), job.label_file, properties)
    spacing = tuple(float(s) for s in properties["spacing"])[-flat.ndim :]
    annotations = annotate(flat, job.labels, job.kinds, job.options, seed, spacing)
    return job.case.name, annotations, box_coverage(annotations)


def _class_names(
    names: list[str] | None, default: tuple[str, ...], known: Mapping[str, int], option: str
) -> tuple[str, ...]:
    if names is None:
        return default
    unknown = [n for n in names if n not in known]
    if unknown:
        raise ValueError(f"{option}: unknown class(es) {', '.join(unknown)}. The dataset has {', '.join(known)}.")
    return tuple(n for n in known if n in names)


def _options(args: argparse.Namespace, labels: Mapping[str, int]) -> WeakOptions:
    if not 0 <= args.share <= 1:
        raise ValueError(f"--share: expected a number from 0 to 1, but got {args.share}.")
    for option, least in (("points_per_object", 1), ("loosen", 0), ("min_size", 1), ("seed", 0)):
        if getattr(args, option) < least:
            raise ValueError(
                f"--{option.replace('_', '-')}: expected {least} or more, but got {getattr(args, option)}."
            )
    if any(size < 1 for size in args.rectangle or ()):
        raise ValueError(f"--rectangle: expected sizes of 1 or more, but got {' '.join(map(str, args.rectangle))}.")
    foreground = _class_names(args.classes, tuple(n for n in labels if n != "background"), labels, "--classes")
    return WeakOptions(
        share=args.share,
        points_per_object=args.points_per_object,
        loosen=args.loosen,
        min_size=args.min_size,
        complete=args.complete,
        tags_absent=args.tags_absent,
        tag_classes=_class_names(args.tag_classes, foreground, labels, "--tag-classes"),
        point_classes=_class_names(args.point_classes, foreground, labels, "--point-classes"),
        box_classes=_class_names(args.box_classes, foreground, labels, "--box-classes"),
        scribble_classes=("background", *(n for n in foreground if n != "background")),
        rectangle=tuple(args.rectangle or ()),
    )


def net_like_classes(coverages: list[dict[str, float]]) -> dict[str, float]:
    """Classes whose boxes cover more than half of the image in more than half of the cases that show them.

    Args:
        coverages: for each boxed case what box_coverage() returned.

    Returns:
        The share of such cases, above 0.5, by class.
    """
    found = {}
    for name in {n for c in coverages for n in c}:
        shares = [c[name] for c in coverages if name in c]
        many = sum(s > TOO_MUCH for s in shares) / len(shares)
        if many > 0.5:
            found[name] = many
    return dict(sorted(found.items()))


def _without_boxes(annotations: Annotations, classes: Mapping[str, float]) -> Annotations:
    return replace(
        annotations,
        boxes=tuple(b for b in annotations.boxes if b.label not in classes),
        complete_boxes=tuple(n for n in annotations.complete_boxes if n not in classes),
    )


def _simulate_instances(args: argparse.Namespace, source: RawDataset) -> int:
    """A share of each image's instances; nothing else can be asked for at the same time."""
    if any(getattr(args, kind) for kind in (*KINDS, "unlabelled", "masks", "masked_cases", "masks_only")):
        raise ValueError("--instances makes a dataset of its own kind: leave --masks, --points and the like out.")
    target = raw_dataset.derived_dataset_folder(
        source.folder, args.target, args.name, "Weak", overwrite=args.overwrite
    )
    counted = write_sparse_dataset(
        source,
        target,
        args.instances,
        seed=args.seed,
        keep_background=args.keep_background,
        processes=args.num_processes,
        arguments=args,
    )
    kept, among = (sum(numbers) for numbers in zip(*counted.values(), strict=True))
    print(f"{target}\n  {len(counted)} cases, {kept} of {among} instances labelled, all else 'ignore'")
    print(f"Next: nnUNetv2_plan_and_preprocess -d {target.name[7:10]}, then docs/instances.md")
    return 0


def run(args: argparse.Namespace) -> int:
    source = raw_dataset.read_dataset(args.source)
    args.rectangles = "rest" if args.rectangle else 0
    if args.instances is not None:
        return _simulate_instances(args, source)
    if args.keep_background:
        raise ValueError("--keep-background belongs to --instances, which is missing.")
    labels = source.labels
    options = _options(args, labels)
    mask_classes = None
    if args.mask_classes is not None:
        names = _class_names(args.mask_classes, (), labels, "--mask-classes")
        mask_classes = tuple(n for n in names if n != "background")
    missing = [c.name for c in source.cases.values() if not c.label.is_file()]
    if args.masks_only and any(getattr(args, kind) for kind in (*KINDS, "unlabelled")):
        raise ValueError("--masks-only leaves out the cases without mask: there is nothing to give tags or the like.")
    if args.masks_only and not args.masks and not args.masked_cases:
        raise ValueError("--masks-only: no case would be left. Give --masks or --masked-cases.")
    if missing:
        raise ValueError(
            f"{source.folder}: simulate needs a mask for every case, but {len(missing)} have none: "
            f"{', '.join(missing[:10])}."
        )
    target = raw_dataset.derived_dataset_folder(
        source.folder, args.target, args.name, "Weak", overwrite=args.overwrite
    )
    reader_writer = source.reader_writer()
    kinds_of = _assign(args, source, reader_writer)
    everyone = list(source.cases)
    if args.masks_only:
        kinds_of = {name: kinds for name, kinds in kinds_of.items() if "mask" in kinds}
        source = replace(source, cases={name: source.cases[name] for name in kinds_of})
    ignore = max(labels.values()) + 1 if source.ignore_label is None else source.ignore_label

    with raw_dataset.building(target) as folder:
        (folder / "labelsTr").mkdir()
        jobs = [
            _Job(
                case=case,
                kinds=kinds_of[case.name],
                label_file=folder / "labelsTr" / f"{case.name}{source.file_ending}",
                reader_writer=reader_writer,
                labels=labels,
                ignore=ignore,
                options=options,
                mask_classes=mask_classes,
                seed=args.seed,
            )
            for case in source.cases.values()
        ]
        results = list(map_cases(_annotate_case, jobs, processes=args.num_processes, description="Annotating"))
        net_like = net_like_classes([c for _, _, c in results]) if args.box_classes is None else {}
        annotated = {name: _without_boxes(annotations, net_like) for name, annotations, _ in results}
        _link_source(source, folder)
        dataset_json = {k: v for k, v in source.json.items() if k != "dataset"}
        if not args.masks_only or mask_classes is not None:
            dataset_json["labels"] = {**source.json["labels"], "ignore": ignore}
        dataset_json |= {"numTraining": len(jobs), "name": target.name[len("Dataset000_") :]}
        raw_dataset.write_json(folder / "dataset.json", dataset_json)
        _write_annotations(folder / "annotationsTr", annotated, LabelNames.from_dataset_json(dataset_json))
        splits = _splits(source.folder / SPLITS_FILE, everyone, kinds_of)
        if splits:
            raw_dataset.write_json(folder / SPLITS_FILE, splits)
        summary = _summary(kinds_of, annotated)
        raw_dataset.write_record(
            folder,
            "nnunet_dsp simulate",
            vars(args),
            source=source.folder.name,
            seed=args.seed,
            summary=summary,
            not_boxed=sorted(net_like),
            options=asdict(options),
            assignment={name: list(kinds) for name, kinds in kinds_of.items()},
        )
    _report(target, summary, net_like, splits)
    return 0


def _assign(args: argparse.Namespace, source: RawDataset, reader_writer: Any) -> dict[str, tuple[str, ...]]:
    """Look at every mask, then deal out the annotations; ValueError where a mask cannot give what it is to give."""
    shown: dict[str, frozenset[str]] = {}
    partly = set()
    jobs = [(c, reader_writer, source.labels, source.ignore_label) for c in source.cases.values()]
    for name, classes, whole in map_cases(
        _classes_shown, jobs, processes=args.num_processes, description="Reading masks"
    ):
        shown[name] = classes - {"background"}
        if not whole:
            partly.add(name)
    kinds_of = assign(
        shown,
        masks=args.masks,
        kinds={k: getattr(args, k) for k in KINDS},
        unlabelled=args.unlabelled,
        masked_cases=args.masked_cases,
        same_cases=args.same_cases,
        cover=not args.random_masks,
        seed=args.seed,
    )
    unknown = sorted(n for n in partly if set(kinds_of[n]) & set(KINDS))
    if unknown:
        raise ValueError(
            f"{source.folder}: {len(unknown)} cases have voxels labelled 'ignore', so what they show is not known: "
            f"{', '.join(unknown[:10])}. Weak annotations are drawn from full masks only."
        )
    return kinds_of


def _link_source(source: RawDataset, folder: Path) -> None:
    """Link the source's images, its masks (for evaluation) and its test cases."""
    for name in ("imagesTr", EVALUATION_FOLDER):
        (folder / name).mkdir()
    for case in source.cases.values():
        raw_dataset.link_case_images(case, folder / "imagesTr", source.file_ending)
        for file, new_name in raw_dataset.label_files(case.label, f"{case.name}{source.file_ending}"):
            raw_dataset.link_file(file, folder / EVALUATION_FOLDER / new_name)
    for part in ("imagesTs", "labelsTs"):
        if (source.folder / part).is_dir():
            raw_dataset.link_folder(source.folder / part, folder / part)


def _write_annotations(folder: Path, annotated: Mapping[str, Annotations], labels: LabelNames) -> None:
    """One file for each case about which something is said."""
    folder.mkdir()
    for name, annotations in annotated.items():
        if not annotations.is_empty:
            write_annotations(case_file(folder, name), annotations, labels)


def _splits(file: Path, everyone: Collection[str], kinds_of: Mapping[str, tuple[str, ...]]) -> list[Split]:
    masked = [n for n, kinds in kinds_of.items() if "mask" in kinds]
    if not masked:  # a rectangle is part of a mask: enough to validate on where there is nothing better
        masked = [n for n, kinds in kinds_of.items() if "rectangles" in kinds]
    weak = [n for n in kinds_of if n not in set(masked)]
    return split_masked(masked, weak, read_splits(file, everyone) if file.is_file() else [])


def _summary(
    kinds_of: Mapping[str, tuple[str, ...]], annotated: Mapping[str, Annotations]
) -> dict[str, dict[str, int]]:
    """Cases and annotations of each kind."""

    def cases(kind: str) -> int:
        return sum(kind in kinds for kinds in kinds_of.values())

    return {
        "masks": {"cases": cases("mask")},
        "tags": {
            "cases": cases("tags"),
            "present": sum(len(a.present) for a in annotated.values()),
            "absent": sum(len(a.absent) for a in annotated.values()),
        },
        "points": {"cases": cases("points"), "points": sum(len(a.points) for a in annotated.values())},
        "boxes": {"cases": cases("boxes"), "boxes": sum(len(a.boxes) for a in annotated.values())},
        "scribbles": {"cases": cases("scribbles")},
        "rectangles": {"cases": cases("rectangles")},
        "nothing": {"cases": sum(not kinds for kinds in kinds_of.values())},
    }


def _report(
    target: Path, summary: Mapping[str, Mapping[str, int]], net_like: Mapping[str, float], splits: list[Split]
) -> None:
    print(f"{target}")
    for kind, numbers in summary.items():
        more = ", ".join(f"{v} {k}" for k, v in numbers.items() if k != "cases")
        print(f"  {kind:<10}{numbers['cases']:>5} cases" + (f"  ({more})" if more and numbers["cases"] else ""))
    for name, share in net_like.items():
        print(
            f"  {name} is not boxed: its boxes would cover more than half of the image in {share:.0%} of the cases "
            f"(--box-classes {name} boxes it all the same)."
        )
    if not splits:
        print("  There is no masked case, so there is nothing to validate on and no splits_final.json.")
    print(f"Next: nnunet_dsp prepare -d {target.name[7:10]}")
