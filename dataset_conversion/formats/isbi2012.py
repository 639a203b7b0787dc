"""ssTEM of a Drosophila ventral nerve cord with its membranes: the training stack of the ISBI 2012 challenge.

Expects image/N.png and label/N.png of the same size, one pair per section, as github.com/zhixuhao/unet publishes them
(its data/membrane/train). Label values: 0 membrane, 255 cell. The membrane becomes the only foreground class.
Neighbouring sections look alike: sections in between training and test are used for neither.

Source: Arganda-Carreras et al., Crowdsourcing the creation of image segmentation algorithms for connectomics, Frontiers
    in Neuroanatomy 2015, doi 10.3389/fnana.2015.00142; images: Cardona et al., PLoS Biology 2010.
"""

import argparse
from pathlib import Path

import numpy as np

from nnunet_dsp.dataset_conversion import raw_dataset
from nnunet_dsp.dataset_conversion.parallel import map_cases
from nnunet_dsp.dataset_conversion.sections import add_section_arguments, choose_sections, find_pairs
from nnunet_dsp.dataset_conversion.splits import SPLITS_FILE, split_by_group

NAME = "isbi2012"
HELP = "ssTEM membranes of the ISBI 2012 challenge (2D, PNG)"

LABELS = {"background": 0, "membrane": 1}
MEMBRANE, CELL = 0, 255


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", type=Path, help="the folder that holds image/ and label/")
    parser.add_argument(
        "-d", dest="dataset_id", metavar="ID", type=int, required=True, help="id of the new dataset, 1 to 999"
    )
    parser.add_argument("--name", default="ISBI2012", help="name of the new dataset (default: %(default)s)")
    add_section_arguments(parser)


def find_sections(source: Path) -> dict[int, tuple[Path, Path]]:
    """Image and label file of every section, by number.

    Raises:
        FileNotFoundError: not in the published form.
        ValueError: images and labels do not match one to one.
    """
    if not (source / "image").is_dir() or not (source / "label").is_dir():
        raise FileNotFoundError(f"{source}: expected the folders image and label in it, with 0.png, 1.png, ...")
    return find_pairs(source, ("image", ".png"), ("label", ".png"))


def _convert_section(job: tuple[int, Path, Path, Path, Path]) -> str:
    from skimage import io

    number, image_file, label_file, images, labels = job
    image, codes = io.imread(image_file), io.imread(label_file)
    if image.ndim != 2 or image.dtype != np.uint8 or image.shape != codes.shape or codes.dtype != np.uint8:
        raise ValueError(
            f"{image_file} and {label_file}: expected two uint8 images of one shape (y, x), but got "
            f"{image.dtype} {image.shape} and {codes.dtype} {codes.shape}."
        )
    unknown = sorted(set(np.unique(codes).tolist()) - {MEMBRANE, CELL})
    if unknown:
        raise ValueError(
            f"{label_file}: unknown label value(s) {unknown[:10]}. Known are {MEMBRANE} (membrane) and {CELL} (cell). "
            "Was it resampled with interpolation, or saved as JPEG?"
        )
    case = f"isbi2012_s{number:02d}"
    mask = np.where(codes == MEMBRANE, LABELS["membrane"], LABELS["background"]).astype(np.uint8)
    io.imsave(images / f"{case}_0000.png", image, check_contrast=False)
    io.imsave(labels / f"{case}.png", mask, check_contrast=False)
    return case


def run(args: argparse.Namespace) -> int:
    sections = find_sections(args.source)
    train, test = choose_sections(list(sections), args.train_sections, args.test_sections, args.gap)
    target = raw_dataset.new_dataset_folder(args.dataset_id, args.name, overwrite=args.overwrite)
    with raw_dataset.building(target) as folder:
        jobs = []
        for part, numbers in (("Tr", train), ("Ts", test)):
            images, labels = folder / f"images{part}", folder / f"labels{part}"
            images.mkdir()
            labels.mkdir()
            jobs += [(n, *sections[n], images, labels) for n in numbers]
        cases = list(map_cases(_convert_section, jobs, processes=args.num_processes, description="Converting"))
        groups = {n: [case] for n, case in zip(train, cases, strict=False)}
        raw_dataset.write_dataset_json(
            folder,
            channel_names=["EM"],
            labels=LABELS,
            num_training=len(train),
            file_ending=".png",
            licence="see the ISBI 2012 challenge; this form by zhixuhao/unet, MIT",
            reference="https://doi.org/10.3389/fnana.2015.00142",
            description="ssTEM of Drosophila ventral nerve cord, 4 x 4 x 50 nm; background: cell",
        )
        splits = split_by_group(groups, gap=args.gap)
        if splits:
            raw_dataset.write_json(folder / SPLITS_FILE, splits)
        unused = sorted(set(sections) - set(train) - set(test))
        raw_dataset.write_record(
            folder, "nnunet_dsp convert isbi2012", vars(args), sections={"train": train, "unused": unused, "test": test}
        )
    print(f"{target}: {len(train)} training cases from sections {train}, {len(test)} test cases, not used {unused}.")
    return 0
