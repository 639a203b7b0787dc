"""The datasets that the arms train on: which cases, what is said about them, and nnU-Net's preprocessing of them.

All of them come from the source's training cases, with the source's masks. They share one planning (of all these
cases with all their masks) so that arms differ in labels and trainer only.
"""

from __future__ import annotations

import filecmp
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_dsp.annotations import Annotations, LabelNames, case_file, write_annotations
from nnunet_dsp.benchmark.accuracy.annotators import CaseJob, deal, make_case, mask_counts, order_of_masks
from nnunet_dsp.benchmark.accuracy.arms import Data
from nnunet_dsp.benchmark.accuracy.cost import Counts, total
from nnunet_dsp.benchmark.accuracy.pretraining import (
    PROMPT_KEY,
    PretrainingFacts,
    link_pretraining,
    preprocess_pretraining,
)
from nnunet_dsp.benchmark.accuracy.source import SourceFacts
from nnunet_dsp.benchmark.accuracy.workplace import PLANS_BASE, Workplace, checksum, say, write_json
from nnunet_dsp.dataset_conversion import raw_dataset
from nnunet_dsp.dataset_conversion.fingerprint import FILE as FINGERPRINT
from nnunet_dsp.dataset_conversion.fingerprint import MARK, MARK_VERSION
from nnunet_dsp.dataset_conversion.parallel import map_cases
from nnunet_dsp.dataset_conversion.prepare import sync_annotations
from nnunet_dsp.dataset_conversion.raw_dataset import RawCase, RawDataset
from nnunet_dsp.plans import shrink_plans

COUNTS = "benchmark_counts.json"  # in a raw folder: what was annotated
READY = "benchmark_ready.json"  # in a preprocessed folder: it is complete
FULL = 1  # number of the dataset with all masks
PLANS = "Benchmark"  # the plans that every arm starts from


class Datasets:
    """Makes datasets in DIR, each once, whoever asks first.

    Args:
        place: DIR.
        facts: source.json.
        fixed: the configuration.
        numbers: dataset number by name of the data.
        predict: predicts images for pseudo-labels: (run id, folder of images, folder for the result, GPU).
        data_of: what a run trains on, by its id.
    """

    def __init__(
        self,
        place: Workplace,
        facts: SourceFacts,
        fixed: Mapping[str, Any],
        numbers: Mapping[str, int],
        predict: Callable[[str, Path, Path, str | None], None] | None = None,
        data_of: Callable[[str], Data] | None = None,
    ) -> None:
        self.place, self.facts, self.fixed, self.numbers = place, facts, fixed, numbers
        self.predict, self.data_of = predict, data_of

    def folder_name(self, data: Data) -> str:
        return f"Dataset{self.numbers[data.name]:03d}_{data.name}"

    def ready(self, data: Data) -> dict[str, Any] | None:
        """What the dataset's ready file says, None if it is not made yet."""
        file = self.place.preprocessed / self.folder_name(data) / READY
        return raw_dataset.read_json(file) if file.is_file() else None

    def counts(self, data: Data) -> Counts | None:
        """What was annotated in a dataset, None if it is not made yet."""
        content = self.ready(data)
        return None if content is None else Counts(**content["counts"])

    def make(self, data: Data, needs: str | None = None, gpu: str | None = None) -> str:
        """The name of the dataset, which is made and preprocessed if it is not yet, and anew if the run that predicts
        its pseudo-labels was trained anew.

        Args:
            needs: the run that predicts its pseudo-labels.
            gpu: on which it does; CUDA_VISIBLE_DEVICES.
        """
        name = self.folder_name(data)
        if not self._is_current(data, needs):
            with self.place.lock(name, f"Waiting for another process that makes {name}."):
                if not self._is_current(data, needs):
                    if self.ready(data) is not None:
                        self._forget(name, needs)
                    self._make(data, name, needs, gpu)
        return name

    def _is_current(self, data: Data, needs: str | None) -> bool:
        """Whether the dataset is there, and of predictions by the model that there is now, as far as it says."""
        ready = self.ready(data)
        if ready is None or needs is None or ready.get("first_model") is None:
            return ready is not None
        return bool(ready["first_model"] == self.place.model_checksum(needs))

    def _forget(self, name: str, needs: str | None) -> None:
        """Remove a dataset and the models trained on it; what says that it is ready goes last."""
        say(f"{name} holds predictions of an earlier training of {needs}. It is made anew, and its models are removed.")
        for folder in (self.place.results, self.place.raw, self.place.preprocessed):
            shutil.rmtree(folder / name, ignore_errors=True)

    # --- all masks, and planning

    def make_full(self, source: RawDataset, evaluation: Mapping[str, tuple[tuple[Path, ...], Path]]) -> None:
        """The dataset of all training cases with their masks, the evaluation cases, and the plans for every arm."""
        name = self.folder_name(Data("full"))
        target = self.place.raw / name
        if not target.is_dir():
            with raw_dataset.building(target) as folder:
                self._link_full(source, evaluation, folder, name)
        preprocessed = self.place.preprocessed / name
        if (preprocessed / READY).is_file():
            return
        shutil.rmtree(preprocessed, ignore_errors=True)
        processes, configuration = self.place.processes, self.fixed["configuration"]
        command = ["nnUNetv2_plan_and_preprocess", "-d", FULL, "-c", configuration, "-npfp", processes]
        command += ["-np", processes, "--verify_dataset_integrity", "-overwrite_plans_name", PLANS_BASE]
        command += ["-pl", self.fixed["planner"]] if self.fixed["planner"] else []
        say("Planning and preprocessing all training cases.")
        self.place.command(*command, log=self.place.folder / "log.txt")
        planned = raw_dataset.read_json(preprocessed / f"{PLANS_BASE}.json")
        if self._normalise_all(planned):
            write_json(preprocessed / f"{PLANS_BASE}.json", planned)
            command = ["nnUNetv2_preprocess", "-d", FULL, "-plans_name", PLANS_BASE, "-c", configuration]
            command += ["-np", processes]
            self.place.command(*command, log=self.place.folder / "log.txt")
        write_json(preprocessed / f"{PLANS}.json", self._plans(planned))
        counts = total(mask_counts(self.facts.objects[case]) for case in self.facts.training)
        self._write_ready(name, counts, list(self.facts.training))

    @staticmethod
    def _normalise_all(planned: dict[str, Any]) -> bool:
        """Have images normalised as a whole, not by what lies inside a head or body; whether that changes the plans.

        nnU-Net takes what lies inside from the label files, and finds all of it where they are `ignore` all over:
        weak cases would not look as masked ones do. So no arm normalises like that.
        """
        changed = False
        for configuration in planned["configurations"].values():
            if any(configuration.get("use_mask_for_norm", ())):
                configuration["use_mask_for_norm"] = [False] * len(configuration["use_mask_for_norm"])
                changed = True
        if changed:
            say("nnU-Net would normalise by what lies inside the head or body; here all arms normalise whole images.")
        return changed

    def _link_full(self, source: RawDataset, evaluation: Mapping[str, Any], folder: Path, name: str) -> None:
        for part in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
            (folder / part).mkdir()
        ending = source.file_ending
        for case in self.facts.training:
            raw_dataset.link_case_images(source.cases[case], folder / "imagesTr", ending)
            for file, new_name in raw_dataset.label_files(source.cases[case].label, f"{case}{ending}"):
                raw_dataset.link_file(file, folder / "labelsTr" / new_name)
        for case, (images, label) in evaluation.items():
            raw_dataset.link_case_images(RawCase(case, images, label), folder / "imagesTs", ending)
            for file, new_name in raw_dataset.label_files(label, f"{case}{ending}"):
                raw_dataset.link_file(file, folder / "labelsTs" / new_name)
        content = {key: value for key, value in source.json.items() if key != "dataset"}
        content |= {"numTraining": len(self.facts.training), "name": name.split("_", 1)[1]}
        raw_dataset.write_json(folder / "dataset.json", content)

    def _plans(self, planned: dict[str, Any]) -> dict[str, Any]:
        configuration = planned["configurations"].get(self.fixed["configuration"])
        if configuration is None:
            raise ValueError(
                f"-c {self.fixed['configuration']}: nnU-Net planned {', '.join(planned['configurations'])} for this "
                "dataset."
            )
        if configuration.get("previous_stage"):
            raise ValueError(f"-c {self.fixed['configuration']}: the benchmark does not train cascades.")
        if self.fixed["plans"] == "small":
            patch, features = self.fixed["patch"], self.fixed["features"]
            more = {} if features is None else {"features": tuple(features)}
            size = patch[0] if patch is not None and len(patch) == 1 else patch
            return shrink_plans(planned, PLANS, patch=size, batch_size=self.fixed["batch_size"], **more)
        return {**planned, "plans_name": PLANS}

    # --- parts of them

    def _make(self, data: Data, name: str, needs: str | None, gpu: str | None) -> None:
        say(f"Making {name}.")
        target = self.place.raw / name
        if needs is not None or not (target / "dataset.json").is_file():  # who predicted what is there is not known
            shutil.rmtree(target, ignore_errors=True)
            if data.source == "second":
                self._relabelled(name, needs, gpu)
            else:
                with raw_dataset.building(target) as folder:
                    counts = self._raw(data, folder, name, needs, gpu)
                    write_json(folder / COUNTS, asdict(counts))
        if data.source == "second":
            counts = self._first_data(needs)[1]
        else:
            counts = Counts(**raw_dataset.read_json(target / COUNTS))
        if data.source == "pretrain":
            preprocess_pretraining(self.place, name, FULL, (PLANS_BASE, PLANS), self.fixed["configuration"])
        else:
            self._preprocess(name)
        dataset = raw_dataset.read_dataset(target)
        self._write_ready(name, counts, list(dataset.cases), needs)

    def _raw(self, data: Data, folder: Path, name: str, needs: str | None, gpu: str | None) -> Counts:
        if data.source == "pretrain":
            link_pretraining(PretrainingFacts.read(self.place.pretraining_file), folder, name)
            return Counts()
        full = raw_dataset.read_dataset(self.place.raw / self.folder_name(Data("full")))
        reader_writer, ending = full.reader_writer(), full.file_ending
        ignore = max(self.facts.labels.values()) + 1 if self.facts.ignore is None else self.facts.ignore
        for part in ("imagesTr", "labelsTr"):
            (folder / part).mkdir()
        kinds_of = deal(data, self.facts.shown, self.facts.groups)
        counts = []
        jobs = []
        for case, kinds in kinds_of.items():
            if "mask" in kinds:
                for file, new_name in raw_dataset.label_files(full.cases[case].label, f"{case}{ending}"):
                    shutil.copyfile(file, folder / "labelsTr" / new_name)
                counts.append(mask_counts(self.facts.objects[case]))
            elif data.source in ("weak", "ignore"):
                jobs.append(
                    CaseJob(
                        full.cases[case],
                        folder / "labelsTr" / f"{case}{ending}",
                        kinds,
                        data.source,
                        reader_writer,
                        self.facts.labels,
                        ignore,
                        self.facts.weak_options(self.fixed),
                        data.seed,
                        self.fixed["point_radius"],
                    )
                )
        said: dict[str, Annotations] = {}
        for case, about_case, number, labelled in map_cases(
            make_case, jobs, processes=self.place.processes, description="Annotating"
        ):
            said[case] = about_case
            counts.append(number)
            if data.source == "ignore" and not labelled:  # nothing to learn from: nnU-Net would draw it all the same
                (folder / "labelsTr" / f"{case}{ending}").unlink()
                del kinds_of[case]
        for case in kinds_of:
            raw_dataset.link_case_images(full.cases[case], folder / "imagesTr", ending)
        if data.source == "pseudo":
            without = [case for case, kinds in kinds_of.items() if "mask" not in kinds]
            self._pseudo_labels(without, full, folder, needs, gpu)
        content = dict(full.json)
        if data.source in ("weak", "ignore"):
            content["labels"] = {**full.json["labels"], "ignore": ignore}
        content |= {"numTraining": len(kinds_of), "name": name.split("_", 1)[1]}
        if data.prompt_from:
            content[PROMPT_KEY] = self._prompt(data, kinds_of, full, folder)
        raw_dataset.write_json(folder / "dataset.json", content)
        if data.source == "weak":
            (folder / "annotationsTr").mkdir()
            known = LabelNames.from_dataset_json(content)
            for case, about_case in said.items():
                if not about_case.is_empty:
                    write_annotations(case_file(folder / "annotationsTr", case), about_case, known)
        raw_dataset.write_record(
            folder,
            "nnunet_dsp benchmark accuracy",
            asdict(data),
            source=self.facts.name,
            not_boxed=list(self.facts.not_boxed),
            assignment={case: list(kinds) for case, kinds in kinds_of.items()},
        )
        return total(counts)

    def _prompt(
        self, data: Data, kinds_of: Mapping[str, Collection[str]], full: RawDataset, folder: Path
    ) -> dict[str, Any]:
        """dataset.json's prompt: of a one-shot training's two cases the one that it is not trained on, or the rectangle
        that is labelled in it."""
        if data.prompt_from == "mask":
            return {"case": order_of_masks(self.facts.shown, data.seed, self.facts.groups)[1]}
        case = next(case for case, kinds in kinds_of.items() if "mask" not in kinds)
        label, _ = raw_dataset.read_label(full.reader_writer(), folder / "labelsTr" / f"{case}{full.file_ending}")
        known = np.nonzero((label[0] if label.shape[0] == 1 else label) <= max(self.facts.labels.values()))
        return {"case": case, "bbox": [[int(axis.min()), int(axis.max()) + 1] for axis in known]}

    def _first_data(self, needs: str | None) -> tuple[str, Counts]:
        """Dataset of the run whose predictions a second network learns, and what was annotated in it."""
        if needs is None or self.data_of is None:
            raise ValueError("There is no training whose predictions a second network could learn.")
        data = self.data_of(needs)
        return self.folder_name(data), self.counts(data) or Counts()

    def _relabelled(self, name: str, needs: str | None, gpu: str | None) -> None:
        """The first network labels its training images; what was annotated in them stays."""
        first = self._first_data(needs)[0]
        predicted = self.place.run_folder(needs or "") / "predicted_training"
        if self.predict is not None and needs is not None:
            shutil.rmtree(predicted, ignore_errors=True)
            self.predict(needs, self.place.raw / first / "imagesTr", predicted, gpu)
        command = ["nnunet_dsp", "pseudo-dataset", "-d", first, "-i", predicted, "-o", name]
        command += ["--num-processes", self.place.processes]
        self.place.command(*command, log=self.place.folder / "log.txt")
        shutil.rmtree(predicted, ignore_errors=True)

    def _pseudo_labels(
        self, cases: Sequence[str], full: RawDataset, folder: Path, needs: str | None, gpu: str | None
    ) -> None:
        """Predictions of the first round become the labels."""
        if self.predict is None or needs is None:
            raise ValueError(f"{folder}: there is no training that could predict its pseudo-labels.")
        images, predicted = folder / "to_predict", folder / "predicted"
        images.mkdir()
        for case in cases:
            raw_dataset.link_case_images(full.cases[case], images, full.file_ending)
        self.predict(needs, images, predicted, gpu)
        for case in cases:
            file = predicted / f"{case}{full.file_ending}"
            for path, new_name in raw_dataset.label_files(file, file.name):
                os.replace(path, folder / "labelsTr" / new_name)
        shutil.rmtree(images)
        shutil.rmtree(predicted)

    def _preprocess(self, name: str) -> None:
        raw, target = self.place.raw / name, self.place.preprocessed / name
        full = self.place.preprocessed / self.folder_name(Data("full"))
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        shutil.copyfile(raw / "dataset.json", target / "dataset.json")
        fingerprint = raw_dataset.read_json(full / FINGERPRINT)
        # of masks without ignore, so nnUNetTrainerDSP need not warn of nnU-Net #3055
        fingerprint[MARK] = {"ignore_excluded": True, "format": MARK_VERSION, "foreground": "masks"}
        write_json(target / FINGERPRINT, fingerprint)
        for plans in (PLANS_BASE, PLANS):
            content = raw_dataset.read_json(full / f"{plans}.json")
            write_json(target / f"{plans}.json", {**content, "dataset_name": name})
        sync_annotations(raw, target)
        configuration = self.fixed["configuration"]
        planned = raw_dataset.read_json(full / f"{PLANS_BASE}.json")
        data = planned["configurations"][configuration]["data_identifier"]
        if not self._link_equal(name, data):
            number = int(name[7:10])
            command = ["nnUNetv2_preprocess", "-d", number, "-plans_name", PLANS_BASE, "-c", configuration]
            self.place.command(*command, "-np", self.place.processes, log=self.place.folder / "log.txt")
            for file in (target / data).glob("*.b2nd"):  # the images are those of the full dataset: keep them once
                original = full / data / file.name
                if not file.name.endswith("_seg.b2nd") and original.is_file():
                    if filecmp.cmp(file, original, shallow=False):
                        _link_or_keep(original, file)

    def _link_equal(self, name: str, data: str) -> bool:
        """Take the preprocessed cases of a dataset that has the same labels for them; False where there is none."""
        mine = self._identity(name)
        for folder in sorted(self.place.preprocessed.iterdir()):
            if folder.name in (name, self._pretraining_name()) or not (folder / READY).is_file():
                continue
            other = raw_dataset.read_json(folder / READY)
            if other["classes"] != mine["classes"]:
                continue
            if any(other["labels"].get(case) != label for case, label in mine["labels"].items()):
                continue
            target = self.place.preprocessed / name
            ending = self.facts.file_ending
            for part, wanted in (
                (data, [f"{case}{end}" for case in mine["labels"] for end in (".b2nd", "_seg.b2nd", ".pkl")]),
                ("gt_segmentations", [f"{case}{ending}" for case in mine["labels"]]),
            ):
                if not all((folder / part / file).is_file() for file in wanted):
                    return False
                (target / part).mkdir(exist_ok=True)
                for file in wanted:
                    try:
                        os.link(folder / part / file, target / part / file)
                    except OSError:
                        shutil.copyfile(folder / part / file, target / part / file)
            return True
        return False

    def _pretraining_name(self) -> str | None:
        """Its cases may have names of this dataset's, but they are other images."""
        data = Data("pretrain")
        return self.folder_name(data) if data.name in self.numbers else None

    def _identity(self, name: str) -> dict[str, Any]:
        dataset = raw_dataset.read_dataset(self.place.raw / name)
        labels = {case.name: checksum(case.label) for case in dataset.cases.values()}
        return {"classes": dataset.json["labels"], "labels": labels}

    def _write_ready(self, name: str, counts: Counts, cases: list[str], needs: str | None = None) -> None:
        content = {**self._identity(name), "counts": asdict(counts), "cases": cases}
        if needs is not None:
            content["first_model"] = self.place.model_checksum(needs)
        write_json(self.place.preprocessed / name / READY, content)

    def base_plans(self, name: str) -> dict[str, Any]:
        """The plans that every arm of a dataset starts from."""
        return raw_dataset.read_json(self.place.preprocessed / name / f"{PLANS}.json")


def _link_or_keep(original: Path, file: Path) -> None:
    """Replace `file` by a hard link to the equal `original`, where the file system has them."""
    temporary = file.with_name(f".{file.name}.link")
    try:
        os.link(original, temporary)
    except OSError:
        return
    os.replace(temporary, file)


__all__ = ["Datasets"]
