"""Another dataset to pre-train on: whether it will do, and how it is brought into the benchmark's folder.

It is preprocessed by the plans of the benchmark's own dataset, moved there by nnU-Net's command, so that one network
fits both and the arms that start from scratch have the same plans as those that do not.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nnunet_dsp.benchmark.accuracy.workplace import Workplace, checksum
from nnunet_dsp.dataset_conversion import raw_dataset
from nnunet_dsp.dataset_conversion.raw_dataset import RawDataset

PROMPT_KEY = "prompt"  # in dataset.json: see docs/prompt.md


@dataclass(frozen=True)
class PretrainingFacts:
    """What pretraining.json holds: name and folder of the dataset, number of its cases, SHA-256 by file."""

    name: str
    folder: str
    cases: int
    checksums: dict[str, str]

    @classmethod
    def read(cls, file: Path) -> PretrainingFacts:
        return cls(**raw_dataset.read_json(file))


def look_at_pretraining(
    dataset: str,
    own: RawDataset,
    evaluation: Mapping[str, tuple[tuple[Path, ...], Path]],
    own_checksums: Mapping[str, str],
    *,
    with_checksums: bool = True,
) -> PretrainingFacts:
    """Whether weights of a training on another dataset are of use in this benchmark.

    Classes may differ in number and names: nnU-Net takes no last layers over, and a prompt network has none.

    Args:
        own: the benchmark's dataset.
        evaluation: image files and label of each of its evaluation cases.
        own_checksums: SHA-256 by file, relative to its folder.

    Raises:
        ValueError: it is the same dataset, has other channels, lacks masks, or holds an evaluation image.
    """
    other = raw_dataset.read_dataset(dataset)
    name = other.folder.name
    if other.folder.resolve() == own.folder.resolve():
        raise ValueError(f"--pretrain: {name} is the dataset that is benchmarked. Name another one.")
    channels, wanted = (len(each.json["channel_names"]) for each in (other, own))
    if channels != wanted:
        raise ValueError(
            f"--pretrain: {name} has {channels} image channel(s), and {own.folder.name} has {wanted}. Weights of one "
            "do not fit the other."
        )
    without = [case.name for case in other.cases.values() if not case.label.is_file()]
    if without:
        raise ValueError(f"--pretrain: {len(without)} cases of {name} have no mask: {', '.join(without[:10])}.")
    checksums: dict[str, str] = {}
    if with_checksums:
        files = {file for case in other.cases.values() for file in (*case.images, case.label)}
        bar = tqdm(sorted({other.folder / "dataset.json", *files}), desc="Checksums")
        checksums = {os.path.relpath(file, other.folder): checksum(file) for file in bar}
        _refuse_evaluation_images(other, checksums, own, evaluation, own_checksums)
    return PretrainingFacts(name, str(other.folder.resolve()), len(other.cases), checksums)


def _refuse_evaluation_images(
    other: RawDataset,
    checksums: Mapping[str, str],
    own: RawDataset,
    evaluation: Mapping[str, tuple[tuple[Path, ...], Path]],
    own_checksums: Mapping[str, str],
) -> None:
    case_of = {
        own_checksums.get(os.path.relpath(file, own.folder)): case
        for case, (images, _) in evaluation.items()
        for file in images
    }
    reader = other.reader_writer()()
    for case in other.cases.values():
        for file in case.images:
            same = case_of.get(checksums[os.path.relpath(file, other.folder)])
            if same is None:
                continue
            image = reader.read_images([str(file)])[0]
            if image.min() != image.max():  # empty images are alike everywhere
                raise ValueError(
                    f"--pretrain: {file} is the image of {same}, which the benchmark evaluates on. A network that was "
                    "trained on it proves nothing there."
                )


def link_pretraining(facts: PretrainingFacts, folder: Path, name: str) -> None:
    """Fill a raw dataset folder with links to the dataset's training cases."""
    source = raw_dataset.read_dataset(Path(facts.folder))
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir()
    for case in source.cases.values():
        raw_dataset.link_case_images(case, folder / "imagesTr", source.file_ending)
        for file, new_name in raw_dataset.label_files(case.label, f"{case.name}{source.file_ending}"):
            raw_dataset.link_file(file, folder / "labelsTr" / new_name)
    content: dict[str, Any] = {key: value for key, value in source.json.items() if key != "dataset"}
    content |= {"numTraining": len(source.cases), "name": name.split("_", 1)[1]}
    raw_dataset.write_json(folder / "dataset.json", content)


def preprocess_pretraining(
    place: Workplace, name: str, from_dataset: int, plans: Sequence[str], configuration: str
) -> None:
    """nnU-Net's own steps for weights that are to be handed over: fingerprint, plans moved there, preprocessing.

    Args:
        name: of the dataset, in DIR.
        from_dataset: number of the dataset that was planned.
        plans: names of its plans; the first ones preprocess.
    """
    target, number, log = place.preprocessed / name, int(name[7:10]), place.folder / "log.txt"
    shutil.rmtree(target, ignore_errors=True)
    command = ["nnUNetv2_extract_fingerprint", "-d", number, "--verify_dataset_integrity", "-np", place.processes]
    place.command(*command, log=log)
    shutil.copyfile(place.raw / name / "dataset.json", target / "dataset.json")
    for each in plans:
        moved = ["nnUNetv2_move_plans_between_datasets", "-s", from_dataset, "-t", number, "-sp", each, "-tp", each]
        place.command(*moved, log=log)
    command = ["nnUNetv2_preprocess", "-d", number, "-plans_name", plans[0], "-c", configuration]
    place.command(*command, "-np", place.processes, log=log)
