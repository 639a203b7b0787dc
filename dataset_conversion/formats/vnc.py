"""ssTEM of a Drosophila larva's ventral nerve cord: stack1 of github.com/unidesigner/groundtruth-drosophila-vnc.

Expects stack1/raw/*.tif and stack1/labels/*.png of the same size, one per section. The five membrane codes become one
class. --classes keeps some of the classes, say membrane to pre-train for another stack, and counts the rest as
background. Training and test are split by section, with sections in between that are used for neither, for neighbours
look alike.

Source: Gerhard et al., Segmented anisotropic ssTEM dataset of neural tissue, figshare 2013, doi
    10.6084/m9.figshare.856713.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nnunet_dsp.dataset_conversion import raw_dataset
from nnunet_dsp.dataset_conversion.blocks import block_majority, block_mean
from nnunet_dsp.dataset_conversion.parallel import map_cases
from nnunet_dsp.dataset_conversion.sections import add_section_arguments, choose_sections, find_pairs
from nnunet_dsp.dataset_conversion.splits import SPLITS_FILE, split_by_group

NAME = "vnc"
HELP = "ssTEM of a Drosophila ventral nerve cord, five classes (2D, PNG)"

LABELS = {"background": 0, "membrane": 1, "glia": 2, "mitochondrion": 3, "synapse": 4}  # background: intracellular
# membranes by orientation 0, 32, 64, 96, their junctions 128; glia or extracellular 159
CODES = {0: 1, 32: 1, 64: 1, 96: 1, 128: 1, 159: 2, 191: 3, 223: 4, 255: 0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", type=Path, help="the repository's folder, or its stack1")
    parser.add_argument(
        "-d", dest="dataset_id", metavar="ID", type=int, required=True, help="id of the new dataset, 1 to 999"
    )
    parser.add_argument("--name", default="VNC", help="name of the new dataset (default: %(default)s)")
    parser.add_argument(
        "--classes",
        metavar="CLASS",
        nargs="+",
        default=list(LABELS)[1:],
        help="classes to keep; what else there is becomes background (default: %(default)s)",
    )
    parser.add_argument(
        "--downsample",
        metavar="N",
        type=int,
        default=1,
        help="shrink N times along y and x first: mean of the image, majority of the labels (default: 1, not at all)",
    )
    parser.add_argument(
        "--crop",
        metavar="PIXELS",
        type=int,
        default=0,
        help="cut into squares of this many pixels, after shrinking; image-level labels say something from "
        "256 pixels down (default: 0, whole sections)",
    )
    add_section_arguments(parser)


def find_sections(source: Path) -> dict[int, tuple[Path, Path]]:
    """Raw image and label file of every section, by number.

    Raises:
        FileNotFoundError: not in the published form.
        ValueError: images and labels do not match one to one.
    """
    stack = source / "stack1" if (source / "stack1").is_dir() else source
    if not (stack / "raw").is_dir() or not (stack / "labels").is_dir():
        raise FileNotFoundError(
            f"{source}: expected the folders stack1/raw and stack1/labels (or raw and labels) in it."
        )
    return find_pairs(stack, ("raw", ".tif"), ("labels", ".png"))


def merge_codes(codes: np.ndarray, source: str) -> np.ndarray:
    """Published label codes, shape (y, x), to our labels, uint8; ValueError names `source` and the codes not known."""
    unknown = sorted(set(np.unique(codes).tolist()) - CODES.keys())
    if unknown:
        raise ValueError(f"{source}: unknown label code(s) {unknown}. Known are {sorted(CODES)}.")
    table = np.zeros(256, np.uint8)
    table[list(CODES)] = list(CODES.values())
    return table[codes]


def keep_classes(names: Sequence[str]) -> tuple[dict[str, int], np.ndarray]:
    """Labels of a dataset with these classes only, numbered in the order of LABELS; and a table from LABELS to them.

    Raises:
        ValueError: an unknown class, by name.
    """
    there = [name for name in LABELS if name != "background"]
    unknown = [name for name in names if name not in there]
    if unknown:
        raise ValueError(f"--classes: there is no class {', '.join(unknown)} to keep; there are {', '.join(there)}.")
    kept = {"background": 0}
    kept.update({name: number for number, name in enumerate((n for n in there if n in names), start=1)})
    return kept, np.array([kept.get(name, 0) for name in LABELS], np.uint8)


def _convert_section(job: tuple[int, Path, Path, Path, Path, int, int, np.ndarray]) -> tuple[int, list[str], list[int]]:
    from skimage import io

    number, raw_file, label_file, images, labels, downsample, crop, table = job
    image, codes = io.imread(raw_file), io.imread(label_file)
    if image.ndim != 2 or image.dtype != np.uint8 or image.shape != codes.shape or codes.dtype != np.uint8:
        raise ValueError(
            f"{raw_file} and {label_file}: expected two uint8 images of one shape (y, x), but got "
            f"{image.dtype} {image.shape} and {codes.dtype} {codes.shape}."
        )
    mask = block_majority(table[merge_codes(codes, str(label_file))], downsample, len(LABELS))
    image = block_mean(image, downsample)
    size = (crop, crop) if crop else image.shape
    if min(image.shape) < crop:
        raise ValueError(f"{raw_file}: a crop of {crop} pixels does not fit into {image.shape} pixels.")
    cases = []
    for y in range(image.shape[0] // size[0]):
        for x in range(image.shape[1] // size[1]):
            case = f"vnc_s{number:02d}_y{y}_x{x}" if crop else f"vnc_s{number:02d}"
            where = slice(y * size[0], (y + 1) * size[0]), slice(x * size[1], (x + 1) * size[1])
            io.imsave(images / f"{case}_0000.png", image[where], check_contrast=False)
            io.imsave(labels / f"{case}.png", mask[where], check_contrast=False)
            cases.append(case)
    return number, cases, [image.shape[0] % size[0], image.shape[1] % size[1]]


def run(args: argparse.Namespace) -> int:
    if args.downsample < 1 or args.crop < 0:
        raise ValueError(
            f"Expected --downsample of 1 or more and --crop of 0 or more, but got {args.downsample} and {args.crop}."
        )
    labels_kept, table = keep_classes(args.classes)
    sections = find_sections(args.source)
    train, test = choose_sections(list(sections), args.train_sections, args.test_sections, args.gap)
    target = raw_dataset.new_dataset_folder(args.dataset_id, args.name, overwrite=args.overwrite)
    with raw_dataset.building(target) as folder:
        jobs = []
        for part, numbers in (("Tr", train), ("Ts", test)):
            images, labels = folder / f"images{part}", folder / f"labels{part}"
            images.mkdir()
            labels.mkdir()
            jobs += [(n, *sections[n], images, labels, args.downsample, args.crop, table) for n in numbers]
        groups: dict[int, list[str]] = {}
        lost = [0, 0]  # rows and columns that fill no crop, at most
        for number, cases, rest in map_cases(
            _convert_section, jobs, processes=args.num_processes, description="Converting"
        ):
            groups[number] = cases
            lost = [max(pair) for pair in zip(lost, rest, strict=True)]
        training = {n: groups[n] for n in train}
        num_training = sum(map(len, training.values()))
        raw_dataset.write_dataset_json(
            folder,
            channel_names=["EM"],
            labels=labels_kept,
            num_training=num_training,
            file_ending=".png",
            licence="CC BY-NC-SA 3.0",
            reference="https://doi.org/10.6084/m9.figshare.856713",
            description="ssTEM of Drosophila ventral nerve cord; background: intracellular"
            + (", glia: or extracellular" if len(labels_kept) == len(LABELS) else ", or a class that was not kept"),
        )
        splits = split_by_group(training, gap=args.gap)
        if splits:
            raw_dataset.write_json(folder / SPLITS_FILE, splits)
        unused = sorted(set(sections) - set(train) - set(test))
        raw_dataset.write_record(
            folder, "nnunet_dsp convert vnc", vars(args), sections={"train": train, "unused": unused, "test": test}
        )
    if any(lost):
        print(f"The crops do not fill a section: {lost[0]} rows and {lost[1]} columns at its end are left out.")
    print(
        f"{target}: {num_training} training cases from sections {train}, "
        f"{sum(len(groups[n]) for n in test)} test cases from {test}, not used {unused}."
    )
    return 0
