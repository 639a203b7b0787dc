"""`nnunet_dsp import FORMAT SRC -d ID`: images and annotations of an annotation tool as a dataset for nnU-Net.

Each format is a module of importers/; all of them give the same typed marks (imported.py). Here the command line, the
plan of an import, and what the user is told; import_cases.py turns marks into annotations and masks, import_writing.py
writes.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType

from nnunet_dsp.annotations import AnnotationError, LabelNames
from nnunet_dsp.dataset_conversion import raw_dataset
from nnunet_dsp.dataset_conversion.arguments import add_processes_argument
from nnunet_dsp.dataset_conversion.image_files import ImageFolder, stem_of
from nnunet_dsp.dataset_conversion.image_store import Form, ImageInfo, check_fits, common_form, probe
from nnunet_dsp.dataset_conversion.import_cases import DEFAULT_WIDTH, KINDS, Options
from nnunet_dsp.dataset_conversion.import_classes import Classes, names_used, parse_claims, read_map, resolve
from nnunet_dsp.dataset_conversion.import_writing import (
    FOLDER,
    Done,
    Job,
    case_names,
    cases_by_image,
    copy_dataset,
    do_job,
    existing_case,
    write_history,
)
from nnunet_dsp.dataset_conversion.imported import SourceImage
from nnunet_dsp.dataset_conversion.importers import available_importers
from nnunet_dsp.dataset_conversion.parallel import map_cases
from nnunet_dsp.label_names import BACKGROUND, IGNORE

SHOWN = 12  # notes and problems printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One subcommand a format, each with the options of its own and those of all."""
    subparsers = parser.add_subparsers(dest="format", metavar="FORMAT", required=True)
    for name, module in available_importers().items():
        sub = subparsers.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            epilog=f"Example:\n  {module.EXAMPLE}\n\nTry it with --dry-run first: nothing is written then.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_common(sub)
        module.add_arguments(sub.add_argument_group(f"what {name} leaves unsaid"))
        sub.set_defaults(_importer=name)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", type=Path, help="the exported file or folder")
    parser.add_argument(
        "-d",
        dest="dataset",
        metavar="ID",
        required=True,
        help="id of the new dataset, 1 to 999; with --add of one there is",
    )
    parser.add_argument("--name", metavar="NAME", help="name of the new dataset (default: that of SRC)")
    parser.add_argument("--images", metavar="DIR", type=Path, help="the folder of the images (default: that of SRC)")
    parser.add_argument(
        "--dry-run", action="store_true", help="read everything, say what would be imported, and write nothing"
    )
    parser.add_argument("--add", action="store_true", help="add to the dataset, or annotate images that it has already")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a dataset that nnunet_dsp made before; with --add the annotations of cases that have some",
    )
    group = parser.add_argument_group("classes")
    group.add_argument(
        "--map",
        metavar="FILE",
        type=Path,
        help="table (name,class a line, or a JSON object) of what each name stands for; without a class it is left out",
    )
    group.add_argument(
        "--only-used",
        action="store_true",
        help="a new dataset has no class that the tool knows but nothing is marked with",
    )
    group = parser.add_argument_group("what annotation tools leave unsaid")
    group.add_argument(
        "--complete",
        metavar="KIND=A,B",
        action="append",
        help="in every annotated image every object of classes A and B carries a box (boxes=...) or a point "
        "(points=...), or the image was tagged if it shows the class (tags=...); KIND=all for all classes. May be "
        "given several times",
    )
    group.add_argument(
        "--mask-labels",
        metavar="A,B|all",
        help="regions and masks show every object of these classes, so that the rest of the image is background to "
        "them (default: what nobody drew on is unknown)",
    )
    group.add_argument(
        "--negatives",
        action="store_true",
        help="images without a single mark were looked at and show nothing: --complete and --mask-labels hold for "
        "them, too (default: nothing is known of them)",
    )
    group.add_argument(
        "--loose", metavar="PIXELS", type=float, default=0.0, help="boxes are too large by up to so much, so not tight"
    )
    group.add_argument(
        "--scribble-width",
        metavar="PIXELS",
        type=float,
        help=f"how wide lines are (default: as the tool says, else {DEFAULT_WIDTH:g})",
    )
    group.add_argument(
        "--drop-outside",
        action="store_true",
        help="leave out marks that lie wholly outside of their image (default: refuse)",
    )
    group = parser.add_argument_group("images")
    group.add_argument(
        "--unlabelled",
        action="store_true",
        help="also take the images of the folder that no annotation mentions; training uses them through pseudo-labels",
    )
    group.add_argument(
        "--exif",
        choices=("shown", "stored"),
        help="for photographs with an EXIF orientation: annotations count pixels as viewers show the image, or as the "
        "file stores it (default: what the stated width and height say)",
    )
    group.add_argument(
        "--spacing", metavar="S", type=float, nargs=3, help="voxel size of TIFF stacks along z, y, x, in any unit"
    )
    add_processes_argument(parser)


@dataclass
class Plan:
    """What is to be imported where. `target`: the dataset's folder; `existing`: the dataset that is added to."""

    target: Path
    existing: raw_dataset.RawDataset | None
    form: Form
    classes: Classes
    options: Options
    jobs: list[Job]
    notes: list[str] = field(default_factory=list)

    @property
    def labels(self) -> dict[str, int]:
        """Number by class, background first, without ignore."""
        return {name: self.options.names.index(name) for name in self.options.names.names}


def run(args: argparse.Namespace) -> int:
    """Import; returns the exit status.

    Raises:
        AnnotationError: annotations or images that cannot be used; nothing is written.
        ValueError, OSError: no such source or folder, or the dataset may not be written.
    """
    plan = make_plan(args, available_importers()[args._importer])
    if args.dry_run:
        results = _do(plan, None, args.num_processes, "Reading")
        _report(plan, results, args)
        print("Nothing was written (--dry-run).")
        return 0
    with raw_dataset.building(plan.target) as folder:
        if plan.existing is not None:
            copy_dataset(plan.existing.folder, folder)
        for name in ("imagesTr", "labelsTr", FOLDER):
            (folder / name).mkdir(exist_ok=True)
        results = _do(plan, folder, args.num_processes, "Importing")
        _write_dataset_json(plan, folder, results)
        _write_records(plan, folder, args)
    _report(plan, results, args)
    _print_next(plan)
    return 0


def _do(plan: Plan, folder: Path | None, processes: int, description: str) -> list[Done]:
    jobs = [replace(job, folder=folder) for job in plan.jobs]
    return list(map_cases(do_job, jobs, processes=processes, description=description))


def make_plan(args: argparse.Namespace, module: ModuleType) -> Plan:
    """Read the annotations and the headers of all images, and settle names, classes and the form of the images.

    Raises:
        As `run`.
    """
    from tqdm import tqdm

    if not args.source.exists():
        raise FileNotFoundError(f"There is no {args.source}. Name the exported file or folder.")
    root = args.images or (args.source if args.source.is_dir() else args.source.parent)
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder {root} (--images).")
    if args.loose < 0 or (args.scribble_width is not None and not 0 < args.scribble_width <= 1000):
        raise ValueError("--loose must be at least 0 and --scribble-width above 0, both in pixels.")
    if args.spacing is not None and not all(0 < s < 1e9 for s in args.spacing):
        raise ValueError(f"--spacing: expected three lengths above 0, but got {args.spacing}.")
    target, existing = _target(args)
    images = ImageFolder(root, shown=args.exif == "shown")
    sources = list(tqdm(module.read(args.source, args, images), desc="Reading annotations", unit=" images", delay=3))
    _refuse_doubles(sources)
    if args.unlabelled:
        mentioned = {image.file.resolve() for image in sources} | images.label_images
        sources += [
            SourceImage(path, stem_of(path), (), "")
            for path in images.files()
            if path.resolve() not in mentioned and path.resolve() != args.source.resolve()
        ]
    if not sources:
        raise AnnotationError(f"{args.source}: there is nothing to import, not a single image is mentioned.")

    used = names_used(sources)
    mapping = None if args.map is None else read_map(args.map)
    existing_names = None
    if existing is not None:
        existing_names = [name for name in existing.labels if name != BACKGROUND]
    classes = resolve(used, mapping=mapping, existing=existing_names, only_used=args.only_used)
    labels = {BACKGROUND: 0, **{name: number for number, name in enumerate(classes.names, start=1)}}
    if existing is not None:
        labels = existing.labels
    ignore = (
        existing.ignore_label
        if existing is not None and existing.ignore_label is not None
        else max(labels.values()) + 1
    )
    options = Options(
        target=classes.target,
        names=LabelNames.from_dataset_json({"labels": {**labels, IGNORE: ignore}}),
        ignore=ignore,
        claims=parse_claims(args.complete, args.mask_labels, classes.names, classes.target),
        negatives=args.negatives,
        drop_outside=args.drop_outside,
        loose=args.loose,
        scribble_width=args.scribble_width,
    )
    return _plan_images(args, root, target, existing, classes, options, sources)


def _target(args: argparse.Namespace) -> tuple[Path, raw_dataset.RawDataset | None]:
    """The dataset's folder, and the dataset where it is added to."""
    if args.add:
        dataset = raw_dataset.read_dataset(args.dataset)
        if "dataset" in dataset.json:
            raise ValueError(
                f"{dataset.folder / 'dataset.json'} lists its cases one by one, wherever they lie. --add needs a "
                "dataset whose images lie in imagesTr."
            )
        return dataset.folder, dataset
    number = re.fullmatch(r"(?:Dataset)?(\d{1,3})(?:_(.+))?", str(args.dataset))
    if number is None:
        raise ValueError(f"-d: expected the id of a new dataset, a number from 1 to 999, but got {args.dataset!r}.")
    name = args.name or number[2]
    if name is None:
        source = args.source.resolve()
        name = (
            re.sub(r"[^A-Za-z0-9_\-]+", "_", source.name if source.is_dir() else source.stem).strip("_") or "Imported"
        )
    root = raw_dataset.environment_folder("nnUNet_raw")
    there = sorted(root.glob(f"Dataset{int(number[1]):03d}_*"))
    if there and not args.overwrite:
        raise FileExistsError(
            f"{there[0]} exists already. Choose another id, pass --add to add to it, or --overwrite to replace it."
        )
    return raw_dataset.new_dataset_folder(int(number[1]), name, overwrite=args.overwrite), None


def _refuse_doubles(sources: Sequence[SourceImage]) -> None:
    seen: dict[Path, str] = {}
    for image in sources:
        if image.embedded is not None:
            continue
        path = image.file.resolve()
        if path in seen:
            raise AnnotationError(
                f"{image.source}: the image {image.file.name} is annotated twice, also in {seen[path]}. "
                "Import one of the two, or the second with --add."
            )
        seen[path] = image.source


def _refuse_doubled_cases(sources: Sequence[SourceImage], cases: Sequence[raw_dataset.RawCase | None]) -> None:
    seen: dict[str, SourceImage] = {}
    for image, case in zip(sources, cases, strict=True):
        if case is not None and seen.setdefault(case.name, image) is not image:
            raise AnnotationError(
                f"{image.source}: {image.file} and {seen[case.name].file} are both the case {case.name!r} of the "
                "dataset. Import one of the two, or the second with --add."
            )


def _plan_images(
    args: argparse.Namespace,
    root: Path,
    target: Path,
    existing: raw_dataset.RawDataset | None,
    classes: Classes,
    options: Options,
    sources: Sequence[SourceImage],
) -> Plan:
    """Read the headers, choose the images' common form, and make one job each."""
    from tqdm import tqdm

    infos = [probe(s.file, s.embedded) for s in tqdm(sources, desc="Looking at images", disable=len(sources) < 200)]
    imported = {} if existing is None else cases_by_image(existing)
    cases = [None if existing is None else existing_case(s, existing, root, imported) for s in sources]
    _refuse_doubled_cases(sources, cases)
    new = [(s.file, info) for s, info, case in zip(sources, infos, cases, strict=True) if case is None]
    notes: list[str] = []
    if existing is None:
        form, notes = common_form(new)
    else:
        form = _form_of(existing)
        for file, info in new:
            check_fits(file, info, form)
        if new and any(len(case.images) != 1 for case in existing.cases.values()):
            raise AnnotationError(
                f"{new[0][0]} is no image of {existing.folder.name}, and its cases have several image files each, one "
                "a channel. New images can only be added to datasets of one file a case."
            )
        attached = [case for case in cases if case is not None]
        if attached:
            notes.append(
                f"{len(attached)} images are cases of the dataset already: their annotations are added to these"
            )
    if form.family == "stack" and args.spacing is None and new:
        raise AnnotationError(
            f"{new[0][0]} is a TIFF stack, and TIFF states no voxel size that nnU-Net reads. Say it: --spacing Z Y X "
            "(for instance 3 1 1 if slices are three times as far apart as pixels)."
        )
    taken = list(existing.cases) if existing is not None else []
    free = [s for s, case in zip(sources, cases, strict=True) if case is None]
    names = iter(case_names(free, root, taken))
    jobs = []
    for source, info, case in zip(sources, infos, cases, strict=True):
        turned = case is None and _is_turned(source, info, args.exif)
        jobs.append(
            Job(
                source=source,
                info=info,
                shape=info.turned_shape if turned else info.shape,
                turned=turned,
                case=next(names) if case is None else case.name,
                form=form,
                options=options,
                folder=None,
                spacing=None if args.spacing is None else tuple(args.spacing),
                existing=case,
                overwrite=args.overwrite,
            )
        )
    for text, number in Counter(info.note for info in infos if info.note).items():
        notes.append(f"{number} image(s): {text}")
    number = sum(job.turned for job in jobs)
    if number:
        notes.append(f"{number} image(s) are turned as their EXIF orientation says, as viewers show them")
    notes += classes.renamed
    return Plan(target, existing, form, classes, options, jobs, notes)


def _is_turned(source: SourceImage, info: ImageInfo, wish: str | None) -> bool:
    """Whether the EXIF orientation is to be applied, so that annotations and voxels agree."""
    if info.orientation == 1:
        return False
    if wish is not None:
        return wish == "shown"
    stated = source.expected_shape
    if stated is not None and info.turned_shape != info.shape:
        if tuple(stated) == info.turned_shape:
            return True
        if tuple(stated) == info.shape:
            return False
    if not source.marks:
        return True
    raise AnnotationError(
        f"{source.file} carries an EXIF orientation ({info.orientation}), and nothing says whether its annotations "
        "count pixels as viewers show the image or as the file stores it. Say it: --exif shown (most tools) or --exif "
        "stored."
    )


def _form_of(dataset: raw_dataset.RawDataset) -> Form:
    """What the images of a dataset look like."""
    info = probe(next(iter(dataset.cases.values())).images[0])
    reader = dataset.json.get("overwrite_image_reader_writer")
    if reader in (None, "None"):
        reader = dataset.reader_writer().__name__
    return Form(len(info.shape), info.channels, dataset.file_ending, info.family, reader)


def _write_dataset_json(plan: Plan, folder: Path, results: Sequence[Done]) -> None:
    """dataset.json, with the ignore label declared where something is not annotated."""
    partial = any(done.unknown for done in results)
    if plan.existing is None:
        labels = {**plan.labels, **({IGNORE: plan.options.ignore} if partial else {})}
        more = {} if plan.form.reader is None else {"overwrite_image_reader_writer": plan.form.reader}
        raw_dataset.write_dataset_json(
            folder,
            channel_names=plan.form.channel_names,
            labels=labels,
            num_training=len(plan.jobs),
            file_ending=plan.form.ending,
            **more,
        )
        return
    content = dict(plan.existing.json)
    if partial and plan.existing.ignore_label is None:
        content["labels"] = {**content["labels"], IGNORE: plan.options.ignore}
    content["numTraining"] = len(plan.existing.cases) + sum(job.existing is None for job in plan.jobs)
    raw_dataset.write_json(folder / "dataset.json", content)


def _write_records(plan: Plan, folder: Path, args: argparse.Namespace) -> None:
    command = f"nnunet_dsp import {args._importer}"
    cases = {job.case: {"image": str(job.source.file), "annotations": job.source.source} for job in plan.jobs}
    write_history(
        folder, {"command": command, "source": str(args.source), "classes": dict(plan.classes.target), "cases": cases}
    )
    if plan.existing is None:
        raw_dataset.write_record(folder, command, vars(args))


def _report(plan: Plan, results: Sequence[Done], args: argparse.Namespace) -> None:
    """The table of what was understood, what changed, and what nobody said."""
    counts: Counter[tuple[str, str]] = Counter()
    images: Counter[str] = Counter()
    notes: dict[str, list[str]] = {}
    for said in results:
        counts.update(said.counts)
        images.update({name for name, _ in said.counts})
        for text, places in said.notes.items():
            notes.setdefault(text, []).extend(places)
    masked = sum(said.masked for said in results)
    weak = sum(not said.annotations.is_empty and not said.masked for said in results)
    print(
        f"{plan.target.name}: {len(results)} images ({plan.form.axes}D, {plan.form.channels} channel(s), "
        f"{plan.form.ending}): {masked} with a mask or part of one, {weak} with weak annotations only, "
        f"{len(results) - masked - weak} with nothing."
    )
    _print_table(plan, counts, images)
    for text in plan.notes:
        print(f"  {text}.")
    if notes:
        print("Changed or left out:")
    for text, places in sorted(notes.items(), key=lambda item: -len(item[1]))[:SHOWN]:
        first = next((place for place in places if place), "")
        print(f"  {len(places):6d} x {text}{f' (first: {first})' if first else ''}.")
    if len(notes) > SHOWN:
        print(f"  ... and {len(notes) - SHOWN} other kinds of changes.")
    _print_unsaid(plan, counts, results, args)
    problems = [text for said in results for text in said.problems]
    if problems:
        print(f"{len(problems)} contradiction(s), which `nnunet_dsp prepare` will refuse:", file=sys.stderr)
        for text in problems[:SHOWN]:
            print(f"  {text}", file=sys.stderr)
        if len(problems) > SHOWN:
            print(f"  ... and {len(problems) - SHOWN} more.", file=sys.stderr)


def _print_table(plan: Plan, counts: Counter[tuple[str, str]], images: Counter[str]) -> None:
    kinds = [kind for kind in KINDS if any(counts[name, kind] for name in plan.options.names.names)]
    names = [n for n in plan.options.names.names if n != BACKGROUND or any(counts[n, kind] for kind in kinds)]
    width = max(len("class"), *(len(name[:40]) for name in names))
    print(f"  {'class':{width}}  {'images':>8}" + "".join(f"  {kind:>9}" for kind in kinds))
    for name in names:
        cells = "".join(f"  {counts[name, kind]:9d}" for kind in kinds)
        print(f"  {name[:40]:{width}}  {images[name]:8d}{cells}")


def _print_unsaid(
    plan: Plan, counts: Counter[tuple[str, str]], results: Sequence[Done], args: argparse.Namespace
) -> None:
    """What the format does not say, and the flag that does."""
    claims, names = plan.options.claims, plan.classes.names
    totals = Counter({kind: sum(counts[name, kind] for name in plan.options.names.names) for kind in KINDS})
    some = ",".join(names[:2])
    unsaid = []
    if totals["boxes"] and not claims.boxes and not any(said.annotations.complete_boxes for said in results):
        unsaid.append(f"has every object of a class a box? Then it is nowhere else: --complete boxes={some}")
    if totals["boxes"] and not args.loose and any(box.tight for said in results for box in said.annotations.boxes):
        unsaid.append("boxes are taken to touch their objects on every side. If they do not: --loose 3")
    if totals["points"] and not claims.points and not any(said.annotations.complete_points for said in results):
        unsaid.append(f"has every object of a class a point? --complete points={some}")
    if totals["present"] and not totals["absent"] and not claims.tags:
        unsaid.append(f"is a class absent where it is not tagged? --complete tags={some}")
    stated = any(job.source.drawn is not None or job.source.mask_labels is not None for job in plan.jobs)
    if totals["regions"] and claims.mask_labels is None and not stated:
        unsaid.append(f"do the regions show every object? Else nothing is known outside of them: --mask-labels {some}")
    unmarked = sum(not said.marked for said in results)
    if unmarked and not args.negatives and (claims.boxes or claims.points or claims.tags or claims.mask_labels):
        unsaid.append(f"{unmarked} images have no mark at all. Were they looked at, and show nothing? --negatives")
    if unsaid:
        print("Not said by the annotations:")
        for text in unsaid:
            print(f"  {text}.")


def _print_next(plan: Plan) -> None:
    number = plan.target.name[7:10]
    configuration = "2d" if plan.form.axes == 2 else "3d_fullres"
    print(
        f"Written to {plan.target}. Next:\n"
        f"  nnunet_dsp check -d {number}\n"
        f"  nnunet_dsp prepare -d {number}\n"
        f"  nnUNetv2_plan_and_preprocess -d {number} -c {configuration}\n"
        f"  nnUNetv2_train {number} {configuration} 0 -tr nnUNetTrainerDSP"
    )
