"""`nnunet_dsp benchmark accuracy` from call to report; only nnU-Net's commands are played, by `Played`."""

from __future__ import annotations

import csv
import itertools
import json
import math
import shutil
import signal
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from skimage.io import imread, imsave

from nnunet_dsp.annotations import LabelNames, read_annotations
from nnunet_dsp.benchmark.accuracy import curves, report, workplace
from nnunet_dsp.benchmark.accuracy.annotators import order_of_masks
from nnunet_dsp.benchmark.accuracy.source import SourceFacts
from nnunet_dsp.cli import main

LABELS = {"background": 0, "cell": 1, "nucleus": 2}
SIZE = 24
MASKS = "m2_s0_masks__nnUNetTrainer"
FULL = "full__nnUNetTrainer__s0"
DSP = "m2_w4_s0_weak_tags-points-boxes__nnUNetTrainerDSP"
SELF = "m2_w4_s0_pseudo__nnUNetTrainer"
IGNORE = "m2_w4_s0_ignore_points-boxes__nnUNetTrainer"
NUMBERS = itertools.count()
WRONG_ROWS = {"full": 0, "weak": 1, "second": 2, "pseudo": 3, "ignore": 4, "masks": 6}
"""How many rows of a prediction are background, whatever they show: what an arm is worth here."""


def image_and_mask(number):
    random = np.random.default_rng(number)
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[4:12, 3 + number % 4 : 12] = 1
    mask[6:9, 7:10] = 2
    if number % 2:
        mask[15:21, 14:20] = 1
    return (mask * 80 + random.integers(0, 60, mask.shape)).astype(np.uint8), mask


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Six training cases and two test cases, every mask there."""
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    folder = tmp_path / "raw" / "Dataset007_Toy"
    for part, numbers in (("Tr", range(6)), ("Ts", range(6, 8))):
        for kind in ("images", "labels"):
            (folder / (kind + part)).mkdir(parents=True)
        for number in numbers:
            image, mask = image_and_mask(number)
            imsave(folder / f"images{part}" / f"toy_{number}_0000.png", image, check_contrast=False)
            imsave(folder / f"labels{part}" / f"toy_{number}.png", mask, check_contrast=False)
    content = {"channel_names": {"0": "EM"}, "labels": LABELS, "numTraining": 6, "file_ending": ".png"}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


class Played:
    """Plays nnU-Net's commands on files of the same names; `calls` are the ones made."""

    def __init__(self):
        self.calls = []
        self.gpus = []
        self.fail = {}
        self.use_mask_for_norm = [False]

    def __call__(self, place, *words, log, gpu=None, on_line=None, pid_file=None):
        words = [str(word) for word in words]
        self.calls.append(words)
        self.gpus.append((words[0].removeprefix("nnUNetv2_"), place.environment(gpu).get("CUDA_VISIBLE_DEVICES")))
        getattr(self, words[0].removeprefix("nnUNetv2_"))(place, words, on_line)
        return 1.0

    def of(self, command):
        return [call for call in self.calls if call[0] == f"nnUNetv2_{command}"]

    @staticmethod
    def value(words, flag):
        return words[words.index(flag) + 1]

    def plan_and_preprocess(self, place, words, on_line):
        folder = place.preprocessed / "Dataset001_full"
        folder.mkdir()
        raw = place.raw / "Dataset001_full"
        (folder / "dataset.json").write_bytes((raw / "dataset.json").read_bytes())
        (folder / "dataset_fingerprint.json").write_text("{}")
        plans = {"plans_name": "nnUNetPlansBenchmark", "dataset_name": raw.name, "configurations": {"2d": {
            "data_identifier": "nnUNetPlansBenchmark_2d", "patch_size": [16, 16], "batch_size": 2,
            "use_mask_for_norm": self.use_mask_for_norm}}}  # fmt: skip
        (folder / "nnUNetPlansBenchmark.json").write_text(json.dumps(plans))
        self._preprocess(raw, folder)

    def extract_fingerprint(self, place, words, on_line):
        (raw,) = place.raw.glob(f"Dataset{int(self.value(words, '-d')):03d}_*")
        (place.preprocessed / raw.name).mkdir()
        (place.preprocessed / raw.name / "dataset_fingerprint.json").write_text("{}")

    def move_plans_between_datasets(self, place, words, on_line):
        source, target = (
            next(place.raw.glob(f"Dataset{int(self.value(words, flag)):03d}_*")).name for flag in ("-s", "-t")
        )
        plans = json.loads((place.preprocessed / source / f"{self.value(words, '-sp')}.json").read_text())
        plans |= {"dataset_name": target, "plans_name": self.value(words, "-tp")}
        (place.preprocessed / target / f"{plans['plans_name']}.json").write_text(json.dumps(plans))

    def nnunet_dsp(self, place, words, on_line):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("nnUNet_raw", str(place.raw))
            assert main(words[1:]) == 0

    def preprocess(self, place, words, on_line):
        (raw,) = place.raw.glob(f"Dataset{int(self.value(words, '-d')):03d}_*")
        for part in ("nnUNetPlansBenchmark_2d", "gt_segmentations"):
            shutil.rmtree(place.preprocessed / raw.name / part, ignore_errors=True)
        self._preprocess(raw, place.preprocessed / raw.name)

    def _preprocess(self, raw, folder):
        for part in ("nnUNetPlansBenchmark_2d", "gt_segmentations"):
            (folder / part).mkdir()
        for label in (raw / "labelsTr").iterdir():
            case = folder / "nnUNetPlansBenchmark_2d" / label.stem
            case.with_suffix(".b2nd").write_bytes((raw / "imagesTr" / f"{label.stem}_0000.png").read_bytes())
            Path(f"{case}_seg.b2nd").write_bytes(label.read_bytes())
            case.with_suffix(".pkl").write_bytes(b"")
            (folder / "gt_segmentations" / label.name).write_bytes(label.read_bytes())

    def train(self, place, words, on_line):
        dataset, plans = words[1], self.value(words, "-p")
        content = json.loads((place.preprocessed / dataset / f"{plans}.json").read_text())
        assert content["dataset_name"] == dataset
        model = place.results / dataset / f"{self.value(words, '-tr')}__{plans}__2d"
        fold = model / "fold_all"
        assert "-pretrained_weights" not in words or Path(self.value(words, "-pretrained_weights")).is_file()
        if "--c" in words:
            assert "-pretrained_weights" not in words, "nnU-Net refuses both"
            assert any(zipfile.is_zipfile(file) for file in fold.glob("*.pth")), "there is nothing to continue"
        else:
            assert not fold.exists(), "a new training starts in a new folder"
        fold.mkdir(parents=True, exist_ok=True)
        (model / "plans.json").write_text(json.dumps(content))
        how = self.fail.pop(dataset.split("_", 1)[1], None)
        loss = "nan" if how == "nan" else "0.5"
        for epoch in range(content["nnunet_dsp_benchmark"]["num_epochs"]):
            for line in (f"2026: Epoch {epoch} ", f"2026: train_loss {loss}", "2026: Epoch time: 2.0 s"):
                if on_line is not None:
                    on_line(line + "\n")
            if how in ("broken", "saved"):
                if how == "broken":
                    (fold / "checkpoint_final.pth").write_bytes(b"PK\x03\x04 cut off")
                elif how == "saved":
                    self._checkpoint(fold / "checkpoint_latest.pth")
                raise OSError("`nnUNetv2_train` failed with exit status 1. Its output ended:\nout of luck")
        self._checkpoint(fold / "checkpoint_final.pth")

    @staticmethod
    def _checkpoint(file):
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("weights", str(next(NUMBERS)))

    def predict(self, place, words, on_line):
        dataset, output = self.value(words, "-d"), Path(self.value(words, "-o"))
        output.mkdir()
        rows = next((n for kind, n in WRONG_ROWS.items() if kind in dataset), None)
        model = place.results / dataset / f"{self.value(words, '-tr')}__{self.value(words, '-p')}__2d"
        (output / "plans.json").write_bytes((model / "plans.json").read_bytes())
        for image in Path(self.value(words, "-i")).iterdir():
            _, mask = image_and_mask(int(image.name.split("_")[1]))
            mask[4 : 4 + rows] = 0
            imsave(output / image.name.replace("_0000", ""), mask, check_contrast=False)

    def evaluate_folder(self, place, words, on_line):
        truth, predicted = Path(words[1]), Path(words[2])
        cases = []
        for file in sorted(predicted.glob("*.png")):
            a, b = imread(truth / file.name), imread(file)
            metrics = {}
            for value in (1, 2):
                tp, fp, fn = ((a == value) & (b == value), (a != value) & (b == value), (a == value) & (b != value))
                tp, fp, fn = int(tp.sum()), int(fp.sum()), int(fn.sum())
                found = tp + fp + fn > 0  # else nnU-Net says NaN
                metrics[str(value)] = {
                    "Dice": 2 * tp / (2 * tp + fp + fn) if found else math.nan,
                    "IoU": tp / (tp + fp + fn) if found else math.nan,
                }
                metrics[str(value)] |= {"TP": tp, "FP": fp, "FN": fn}
            cases.append({"prediction_file": str(file), "metrics": metrics})
        (predicted / "summary.json").write_text(json.dumps({"metric_per_case": cases}))


@pytest.fixture
def played(monkeypatch):
    played = Played()
    monkeypatch.setattr(workplace.Workplace, "command", lambda place, *words, **more: played(place, *words, **more))
    return played


@pytest.fixture(autouse=True)
def no_plots(request, monkeypatch):
    """Drawing takes a second a picture; three tests have them drawn."""
    drawn = ("test_every_arm_is_trained_once", "test_a_report_without_predictions", "test_a_picture")
    if not request.node.name.startswith(drawn):
        monkeypatch.setattr(report, "write_pictures", lambda *_: {})
        monkeypatch.setattr(curves, "_plot", lambda file, *_, **__: file.write_text("plot"))


@pytest.fixture
def benchmark(source, played, tmp_path, capsys):
    """Calls the command; returns status, stdout and stderr."""

    def call(*words, begin=True):
        start: list[str] = ["benchmark", "accuracy", "-o", str(tmp_path / "out")]
        if begin:
            start += ["-d", "7", "--masks", "2", "--seeds", "0", "--epochs", "3", "--device", "cpu"]
        status = main([*start, *map(str, words)])
        said = capsys.readouterr()
        return status, said.out, said.err

    call.folder = tmp_path / "out"
    call.source = source
    call.played = played
    call.record = lambda run: json.loads((tmp_path / "out" / "runs" / run / "record.json").read_text())
    call.trained = lambda: [call[1].split("_", 1)[1] for call in played.of("train")]
    call.raw = lambda name: next((tmp_path / "out" / "nnUNet_raw").glob(f"Dataset*_{name}"))
    return call


def rows_of(file):
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))


def truth_dice(kind):
    """Mean over classes of the mean over test cases of Dice, for an arm that misses these rows; by hand."""
    dice = []
    for value in (1, 2):
        cases = []
        for number in (6, 7):
            _, mask = image_and_mask(number)
            there = (mask == value).sum()
            found = there - (mask[4 : 4 + WRONG_ROWS[kind]] == value).sum()
            cases.append(2 * found / (there + found))
        dice.append(sum(cases) / 2)
    return sum(dice) / 2


def test_every_arm_is_trained_once_and_the_report_holds_what_came_out(benchmark):
    status, out, _ = benchmark("--arms", "masks", "full", "ignore", "selftrain", "dsp")
    assert status == 0
    assert sorted(benchmark.trained()) == sorted(
        ["m2_s0_masks", "full", "m2_w4_s0_ignore_points-boxes", "m2_w4_s0_pseudo", "m2_w4_s0_weak_tags-points-boxes"]
    )
    table = {row["arm"]: row for row in rows_of(benchmark.folder / "table.csv")}
    kinds = {"masks": "masks", "full": "full", "ignore": "ignore", "selftrain": "pseudo", "dsp": "weak"}
    for arm, kind in kinds.items():
        assert float(table[arm]["Dice"]) == pytest.approx(truth_dice(kind)), arm
        gap = (truth_dice(kind) - truth_dice("masks")) / (truth_dice("full") - truth_dice("masks"))
        assert float(table[arm]["gap_closed"]) == pytest.approx(gap), arm
    assert float(table["full"]["minutes"]) > float(table["dsp"]["minutes"]) > float(table["masks"]["minutes"])
    assert table["selftrain"]["minutes"] == table["masks"]["minutes"], "predictions cost no expert anything"
    text = (benchmark.folder / "report.md").read_text()
    assert "All 5 runs have finished" in text and "PARTIAL" not in text
    for name in ("cases_mixed_m2_w4.png", "curve_minutes.png", "per_case.csv", "results.csv", "tests.csv"):
        assert (benchmark.folder / name).stat().st_size > 0
    assert "dsp - masks" in text
    assert f"{truth_dice('weak'):.3f}" in out


def test_what_has_finished_is_not_trained_again(benchmark):
    benchmark("--arms", "masks", "dsp")
    before = benchmark.record(DSP)
    benchmark.played.calls.clear()
    status, out, err = benchmark("--arms", "masks", "dsp", "dsp-loss", begin=False)
    assert status == 0
    assert "3 runs, 2 of them finished, 1 to do" in err
    assert benchmark.trained() == ["m2_w4_s0_weak_tags-points-boxes"]
    plans = benchmark.record(f"{DSP}__dsp_weight=0.0")
    assert plans["options"]["dsp_weight"] == 0
    assert benchmark.record(DSP) == before
    assert "dsp-loss" in out and "masks" in out, "the report shows earlier arms too"


@pytest.mark.parametrize("planned", [[True], [False]])
def test_no_arm_normalises_by_what_label_files_leave_out(benchmark, planned):
    benchmark.played.use_mask_for_norm = planned
    assert benchmark("--arms", "full", "--seeds", "0")[0] == 0
    for name in ("nnUNetPlansBenchmark", "Benchmark"):
        plans = json.loads((benchmark.folder / f"nnUNet_preprocessed/Dataset001_full/{name}.json").read_text())
        assert plans["configurations"]["2d"]["use_mask_for_norm"] == [False]
    assert len(benchmark.played.of("preprocess")) == int(planned[0]), "once more, by the changed plans"


def test_a_bare_call_goes_on_with_what_was_asked_for(benchmark):
    benchmark.played.fail["m2_w4_s0_weak_tags-points-boxes"] = "saved"
    status, out, err = benchmark("--arms", "masks", "dsp")
    assert status == 1
    assert "1 run(s) failed" in err and "out of luck" in err
    assert "PARTIAL: 1 of 2 runs have finished" in out
    assert "PARTIAL" in (benchmark.folder / "report.md").read_text()
    benchmark.played.calls.clear()
    status, out, _ = benchmark(begin=False)
    assert status == 0 and "All 2 runs have finished" in out
    (training,) = benchmark.played.of("train")
    assert "--c" in training, "it goes on from its checkpoint"
    assert benchmark.record(DSP)["interruptions"] == 1


def test_a_checkpoint_that_was_cut_off_is_not_continued_from(benchmark):
    benchmark.played.fail["m2_s0_masks"] = "broken"
    assert benchmark("--arms", "masks")[0] == 1
    benchmark.played.calls.clear()
    assert benchmark(begin=False)[0] == 0
    (training,) = benchmark.played.of("train")
    assert "--c" not in training


def test_a_training_whose_loss_is_nan_fails_and_is_not_continued_from(benchmark):
    benchmark.played.fail["m2_s0_masks"] = "nan"
    status, _, err = benchmark("--arms", "masks")
    assert status == 1
    assert f"{MASKS}: the loss is nan" in err and "log.txt shows from which epoch on" in err
    assert not (benchmark.folder / "runs" / MASKS / "record.json").exists()
    benchmark.played.calls.clear()
    assert benchmark(begin=False)[0] == 0
    (training,) = benchmark.played.of("train")
    assert "--c" not in training


def test_a_training_that_a_killed_benchmark_left_behind_is_not_doubled(benchmark, monkeypatch):
    from nnunet_dsp.benchmark.accuracy import training

    monkeypatch.setattr(training, "still_running", lambda file: 4711)
    status, _, err = benchmark("--arms", "masks")
    assert status == 1
    assert "still runs as process 4711" in err
    assert not benchmark.played.of("train")


def test_another_configuration_in_the_same_folder_is_refused_and_told(benchmark):
    benchmark("--arms", "masks")
    status, _, err = benchmark("--epochs", "4", "--tta", "--arms", "masks", begin=False)
    assert status == 1
    assert "--epochs: 3 there, 4 now" in err and "--tta: False there, True now" in err
    assert benchmark("--arms", "masks", "--masks", "2")[0] == 0, "repeating what was given is no change"


def test_a_source_that_changed_is_refused(benchmark):
    benchmark("--arms", "masks")
    label = benchmark.source / "labelsTr" / "toy_3.png"
    mask = imread(label)
    mask[0, 0] = 1
    imsave(label, mask, check_contrast=False)
    status, _, err = benchmark(begin=False)
    assert status == 1
    assert "toy_3.png has changed since this benchmark began" in err


def test_the_users_folders_are_only_read(benchmark, tmp_path):
    def state():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if "out" not in path.parts}

    before = state()
    benchmark("--arms", "masks", "dsp", "ignore", "selftrain")
    assert state() == before


def test_defaults_that_changed_since_a_run_finished_are_refused(benchmark):
    benchmark("--arms", "dsp")
    file = benchmark.folder / "runs" / DSP / "record.json"
    record = json.loads(file.read_text())
    record["options"]["dsp_weight"] = 0.7
    file.write_text(json.dumps(record))
    status, _, err = benchmark(begin=False)
    assert status == 1
    assert "dsp_weight 0.7 there, 0." in err


def test_a_record_holds_what_is_needed_to_check_it(benchmark):
    benchmark("--arms", "dsp")
    record = benchmark.record(DSP)
    folder = benchmark.folder / "runs" / DSP
    for name, expected in record["checksums"].items():
        if name.startswith("predictions/"):
            assert workplace.checksum(folder / name) == expected
    assert {"checkpoint_final.pth", "plans.json", "predictions/toy_6.png"} <= set(record["checksums"])
    assert set(record["per_case"]) == {"toy_6", "toy_7"}
    assert set(record["per_case"]["toy_6"]["cell"]) >= {"Dice", "IoU", "NSD", "HD95"}
    assert record["seed"] == record["schedule"]["seed"] == record["options"]["seed"] == 0
    assert record["versions"]["nnunetv2"] and record["machine"]["device"] == "cpu" and record["code"]["sha256"]
    source = json.loads((benchmark.folder / "source.json").read_text())
    images = [f"images{part}/toy_{n}_0000.png" for part, ns in (("Tr", range(6)), ("Ts", (6, 7))) for n in ns]
    assert set(images) < set(source["checksums"])
    for name, expected in source["checksums"].items():
        assert workplace.checksum(benchmark.source / name) == expected


def test_arms_differ_in_labels_and_trainer_only(benchmark):
    benchmark("--arms", "masks", "full", "ignore", "dsp", "--optimizer", "adamw", "--lr", "0.01")
    seen = []
    for run in (MASKS, FULL, IGNORE, DSP):
        record = benchmark.record(run)
        file = benchmark.folder / "nnUNet_preprocessed" / record["dataset"] / f"{record['plans']}.json"
        plans = json.loads(file.read_text())
        assert plans.pop("dataset_name") == record["dataset"]
        assert plans.pop("plans_name") == record["plans"]
        assert (plans.pop("nnunet_dsp", None) is not None) == (run == DSP)
        seen.append(plans)
    assert all(plans == seen[0] for plans in seen)
    assert seen[0]["nnunet_dsp_benchmark"] == {
        "num_epochs": 3,
        "iterations_per_epoch": 250,
        "val_iterations": 1,
        "seed": 0,
        "optimizer": "adamw",
        "initial_lr": 0.01,
        "precision": "float32",
    }


def test_every_arm_sees_the_masks_of_the_same_cases(benchmark):
    benchmark("--arms", "masks", "ignore", "dsp")
    masked = [{c for c, kinds in benchmark.record(r)["cases"].items() if "mask" in kinds} for r in (MASKS, IGNORE, DSP)]
    assert masked[0] == masked[1] == masked[2]
    assert len(masked[0]) == 2
    for case in masked[0]:
        truth = (benchmark.source / "labelsTr" / f"{case}.png").read_bytes()
        for name in ("m2_s0_masks", "m2_w4_s0_ignore_points-boxes", "m2_w4_s0_weak_tags-points-boxes"):
            assert (benchmark.raw(name) / "labelsTr" / f"{case}.png").read_bytes() == truth


def test_cases_of_one_group_get_their_masks_together(benchmark):
    benchmark("--arms", "masks", "--masks", "3", "--seeds", "0", "1", "--group", "toy_(?=[0-2])|oy_(?=[3-5])")
    for seed in "01":
        record = benchmark.record(f"m3_s{seed}_masks__nnUNetTrainer")
        masked = {case for case, kinds in record["cases"].items() if "mask" in kinds}
        assert masked in ({"toy_0", "toy_1", "toy_2"}, {"toy_3", "toy_4", "toy_5"})
        assert masked == {file.stem for file in (benchmark.raw(f"m3_s{seed}_masks") / "labelsTr").iterdir()}


def test_the_ignore_arm_sees_the_points_and_boxes_that_dsp_sees(benchmark):
    benchmark("--arms", "ignore", "dsp")
    weak, painted = benchmark.raw("m2_w4_s0_weak_tags-points-boxes"), benchmark.raw("m2_w4_s0_ignore_points-boxes")
    names = LabelNames.from_dataset_json(json.loads((weak / "dataset.json").read_text()))
    files = sorted((weak / "annotationsTr").iterdir())
    assert len(files) == 4
    assert not (painted / "annotationsTr").exists()
    for file in files:
        said = read_annotations(file, names)
        assert said.present and said.points and said.boxes
        inside = np.zeros((SIZE, SIZE), bool)
        for box in said.boxes:
            inside[tuple(slice(int(a), int(b)) for a, b in zip(box.start, box.stop, strict=True))] = True
        expected = np.where(inside, 3, 0)
        for point in said.points:
            expected[tuple(map(int, point.at))] = LABELS[point.label]
        np.testing.assert_array_equal(imread(painted / "labelsTr" / f"{file.stem}.png"), expected)
        assert (imread(weak / "labelsTr" / f"{file.stem}.png") == 3).all()


def test_rectangles_and_scribbles_are_partial_masks_for_both(benchmark):
    benchmark("--arms", "ignore", "dsp", "--settings", "masks+rectangles+scribbles", "--rectangle", "8", "6")
    kinds = "scribbles-rectangles"
    weak, painted = (benchmark.raw(f"m2_w4_s0_{source}_{kinds}") / "labelsTr" for source in ("weak", "ignore"))
    cases = benchmark.record(f"m2_w4_s0_weak_{kinds}__nnUNetTrainerDSP")["cases"]
    for case in [case for case, given in cases.items() if "mask" not in given]:
        label = imread(weak / f"{case}.png")
        truth = imread(benchmark.source / "labelsTr" / f"{case}.png")
        drawn = label != 3
        np.testing.assert_array_equal(label[drawn], truth[drawn])
        windows = np.lib.stride_tricks.sliding_window_view(drawn, (8, 6))
        assert windows.all(axis=(2, 3)).any(), "a rectangle of this size is whole"
        assert 48 < drawn.sum() < drawn.size
        assert (weak / f"{case}.png").read_bytes() == (painted / f"{case}.png").read_bytes()
    counts = benchmark.record(f"m2_w4_s0_weak_{kinds}__nnUNetTrainerDSP")["counts"]
    assert counts["rectangle_images"] == counts["scribble_images"] == 4


def test_self_training_learns_from_what_the_masks_arm_predicts_for_the_other_images(benchmark):
    benchmark("--arms", "selftrain")
    assert benchmark.trained() == ["m2_s0_masks", "m2_w4_s0_pseudo"], "the masks arm comes first"
    dataset = benchmark.raw("m2_w4_s0_pseudo")
    assert "ignore" not in json.loads((dataset / "dataset.json").read_text())["labels"]
    for case, kinds in benchmark.record(SELF)["cases"].items():
        _, mask = image_and_mask(int(case.split("_")[1]))
        if "mask" not in kinds:
            mask[4 : 4 + WRONG_ROWS["masks"]] = 0
        np.testing.assert_array_equal(imread(dataset / "labelsTr" / f"{case}.png"), mask)
    assert len(list((dataset / "imagesTr").iterdir())) == 6
    assert sorted(path.name for path in dataset.iterdir() if path.is_dir()) == ["imagesTr", "labelsTr"]


def test_datasets_with_the_same_masks_are_preprocessed_once(benchmark):
    benchmark("--arms", "masks", "dsp", "dsp:points", "dsp:unlabelled")
    assert len(benchmark.played.of("preprocess")) == 1, "masks has those of full, the dsp arms have one another's"
    weak, points = (
        benchmark.folder / "nnUNet_preprocessed" / benchmark.raw(f"m2_w4_s0_weak_{kinds}").name
        for kinds in ("tags-points-boxes", "points")
    )
    files = sorted(path.relative_to(weak) for path in weak.rglob("*") if path.suffix in (".b2nd", ".pkl"))
    assert len(files) == 18
    for file in files:
        assert (weak / file).read_bytes() == (points / file).read_bytes()
    assert "boxes" not in json.loads(next((points / "annotationsTr").iterdir()).read_text())
    full = next((benchmark.folder / "nnUNet_preprocessed").glob("Dataset001*"))
    data = "nnUNetPlansBenchmark_2d"
    assert (weak / data / "toy_0.b2nd").samefile(full / data / "toy_0.b2nd"), "images are kept once"


def test_what_is_trained_on_is_preprocessed_from_the_labels_of_its_own_dataset(benchmark):
    benchmark("--arms", "masks", "full", "selftrain", "dsp", "ignore")
    datasets = sorted((benchmark.folder / "nnUNet_raw").iterdir())
    assert len(datasets) == 5
    for raw in datasets:
        folder = benchmark.folder / "nnUNet_preprocessed" / raw.name
        labels = sorted((raw / "labelsTr").iterdir())
        assert len(list((folder / "nnUNetPlansBenchmark_2d").glob("*.pkl"))) == len(labels)
        for label in labels:
            stored = folder / "nnUNetPlansBenchmark_2d" / f"{label.stem}_seg.b2nd"
            assert stored.read_bytes() == label.read_bytes(), f"{raw.name}: {label.name}"
            assert (folder / "gt_segmentations" / label.name).read_bytes() == label.read_bytes()


def test_a_run_can_be_done_by_its_own_command(benchmark):
    status, out, err = benchmark("--arms", "selftrain", "masks", "dsp", "--commands")
    assert status == 0
    lines = out.strip().splitlines()
    assert len(lines) == 3, "nothing but commands on stdout"
    assert lines[-1].endswith(f"--run {SELF}"), "what needs another run comes last"
    assert not benchmark.played.of("train")
    assert benchmark("--run", SELF, begin=False)[0] == 0
    assert benchmark.trained() == ["m2_s0_masks", "m2_w4_s0_pseudo"], "what it needs is done on the way"
    assert benchmark("--run", MASKS, begin=False)[0] == 0
    assert len(benchmark.trained()) == 2
    _, out, _ = benchmark("--report-only", begin=False)
    assert "PARTIAL: 2 of 3 runs" in out
    status, _, err = benchmark("--run", "nonsense", begin=False)
    assert status == 1 and "knows no run 'nonsense'" in err


def test_a_run_by_its_own_command_says_its_dice_though_it_is_0(benchmark, monkeypatch):
    monkeypatch.setitem(WRONG_ROWS, "masks", SIZE)
    assert benchmark("--arms", "masks", "--commands")[0] == 0
    assert f"{MASKS}: mean Dice 0.000" in benchmark("--run", MASKS, begin=False)[1]


def test_the_plan_says_what_there_is_to_do_and_writes_nothing(benchmark):
    status, out, _ = benchmark("--arms", "masks", "dsp:scribbles", "--plan")
    assert status == 0
    assert MASKS in out and "time unknown" in out
    assert "Left out: dsp:scribbles in mixed with 2 masks: the setting has no scribbles" in out
    assert not benchmark.folder.exists()


def test_the_plan_knows_the_time_of_what_has_finished(benchmark):
    benchmark("--arms", "masks")
    file = benchmark.folder / "runs" / MASKS / "record.json"
    record = json.loads(file.read_text())
    record["seconds"] |= {"train": 3000, "predict": 500, "evaluate": 100}
    file.write_text(json.dumps(record))
    _, out, _ = benchmark("--arms", "masks", "full", "dsp", "--seeds", "0", "1", "--plan", begin=False)
    assert out.count("   1 h") == 3, "each vanilla run as long as the finished one"
    assert "About 5 h, 2 of them guessed by the others" in out


def test_seeds_counts_and_spread(benchmark):
    benchmark("--arms", "masks", "full", "--masks", "1", "3", "--seeds", "0", "1")
    trained = benchmark.trained()
    assert trained.count("full") == 2 and len(trained) == 6
    rows = rows_of(benchmark.folder / "results.csv")
    means = [row for row in rows if row["class"] == "mean"]
    assert {(row["arm"], row["masks"], row["seed"]) for row in means} == {
        (arm, masks, seed) for arm in ("masks", "full") for masks in "13" for seed in "01"
    }
    (line,) = [r for r in rows_of(benchmark.folder / "table.csv") if (r["arm"], r["masks"]) == ("masks", "3")]
    assert (line["runs"], float(line["Dice_sd"])) == ("2", 0.0), "both seeds are played alike"
    assert (benchmark.folder / "curve_masks.png").is_file()


def test_a_curve_never_mixes_counts_of_the_other_kind(benchmark, monkeypatch):
    drawn = {}
    monkeypatch.setattr(curves, "_plot", lambda file, curves, *_, **__: drawn.update({file.stem: curves}))

    def xs(name):
        return {curve.label: [x for x, *_ in curve.points] for curve in drawn[name]}

    benchmark("--arms", "masks", "dsp", "full", "--masks", "1", "2", "--weak", "1", "3")
    dsp = {"dsp, 1 other cases": [1, 2], "dsp, 3 other cases": [1, 2]}
    assert xs("curve_masks") == {"masks": [1, 2], **dsp, "full": [1, 2]}
    dsp = {"dsp, 1 masks": [1, 3], "dsp, 2 masks": [1, 3]}
    assert xs("curve_weak") == {"masks, 1 masks": [1, 3], "masks, 2 masks": [1, 3], **dsp, "full": [1, 3]}
    assert list(xs("curve_minutes")) == ["masks", "dsp, 1 other cases", "dsp, 3 other cases", "full"]
    assert len(xs("curve_minutes")["full"]) == 1, "it costs the same at all counts"


def test_all_other_cases_are_one_count_though_their_number_changes_with_the_masks(benchmark, monkeypatch):
    drawn = {}
    monkeypatch.setattr(curves, "_plot", lambda file, curves, *_, **__: drawn.update({file.stem: curves}))
    benchmark("--arms", "dsp", "--masks", "1", "2", "3")
    assert [(curve.label, [x for x, *_ in curve.points]) for curve in drawn["curve_masks"]] == [("dsp", [1, 2, 3])]
    assert set(drawn) == {"curve_masks", "curve_minutes"}, "no mask count has two weak counts"
    benchmark("--weak", "1", begin=False)
    assert {curve.label: [x for x, *_ in curve.points] for curve in drawn["curve_masks"]} == {
        "dsp, 1 other cases": [1, 2, 3],
        "dsp, all other cases": [1, 2, 3],
    }
    assert [curve.label for curve in drawn["curve_weak"]] == ["dsp, 1 masks", "dsp, 2 masks", "dsp, 3 masks"]


def test_a_rectangle_of_other_axes_is_refused_before_anything_is_made(benchmark):
    words = ("--arms", "masks", "dsp", "--settings", "masks+rectangles")
    for more in (("--plan",), ()):
        status, _, err = benchmark(*words, "--rectangle", "8", "8", "8", *more)
        assert status == 1 and "--rectangle: expected one number or 2, one for each axis of the images" in err
        assert not benchmark.played.calls
    assert benchmark(*words, "--rectangle", "8", "8")[0] == 0, "the folder is not spoilt"


def test_an_unknown_setting_of_an_arm_is_refused_before_anything_is_written(benchmark):
    for words in (("--plan",), ()):
        arm = "weaker=nnUNetTrainerDSP:dsp_wieght=0.01"
        status, _, err = benchmark("--arm", arm, "--arms", "masks", "weaker", *words)
        assert status == 1 and "arm `weaker`: Unknown setting `dsp_wieght`" in err
        assert not (benchmark.folder / "benchmark.json").exists()


def test_an_arm_that_has_not_been_trained_can_be_defined_anew(benchmark):
    mine, other = (f"mine=nnUNetTrainerDSP:dsp_weight={weight}" for weight in (0.1, 0.2))
    assert benchmark("--arm", mine, "--arms", "masks", "mine", "mine:second", "--commands")[0] == 0
    status, out, _ = benchmark("--arm", other, "--arms", "masks", "mine", begin=False)
    assert status == 0 and "All 2 runs have finished" in out, "the rows of the earlier definition are gone"
    assert benchmark.record(f"{DSP}__dsp_weight=0.2")
    report = (benchmark.folder / "report.md").read_text()
    assert f"--arm {other}" in report and mine not in report
    status, _, err = benchmark("--arm", mine, begin=False)
    assert status == 1 and f"another arm of this name already, {other}" in err


def test_a_folder_without_a_training_may_be_removed_to_begin_anew(benchmark):
    benchmark("--arms", "masks", "--commands")
    _, _, err = benchmark("--epochs", "4", begin=False)
    assert f"Nothing has been trained there, so you can remove {benchmark.folder}." in err
    benchmark("--arms", "masks")
    _, _, err = benchmark("--epochs", "4", begin=False)
    assert "Nothing has been trained" not in err


def test_an_arm_that_the_setting_has_nothing_for_is_left_out_and_that_is_said(benchmark):
    said = "Left out: dsp:scribbles in mixed with 2 masks: the setting has no scribbles."
    status, out, err = benchmark("--arms", "masks", "dsp:scribbles", "--commands")
    assert status == 0 and said in err and "Left out" not in out
    status, _, err = benchmark(begin=False)
    assert status == 0 and said in err
    assert said in (benchmark.folder / "report.md").read_text()
    benchmark("--report-only", begin=False)
    assert said in (benchmark.folder / "report.md").read_text()


@pytest.mark.parametrize("words", [(), ("--plan",), ("--commands",)])
def test_a_call_that_leaves_nothing_to_train_is_refused(benchmark, words):
    status, _, err = benchmark("--arms", "dsp:scribbles", *words)
    assert status == 1
    assert "Nothing is left to train.\nLeft out: dsp:scribbles in mixed with 2 masks: the setting has no" in err
    assert not (benchmark.folder / "benchmark.json").exists()


@pytest.mark.parametrize("words", [(), ("--group", "toy_(?=[0-2])|oy_(?=[3-5])")])
def test_the_report_names_the_masked_cases_in_the_order_in_which_they_get_their_mask(benchmark, words):
    benchmark("--arms", "masks", "--masks", "4", "--seeds", "0", "1", "2", *words)
    text = (benchmark.folder / "report.md").read_text()
    facts = SourceFacts.read(benchmark.folder / "source.json")
    for seed in (0, 1, 2):
        order = ", ".join(order_of_masks(facts.shown, seed, facts.groups)[:4])
        assert f"- seed {seed}, masked cases in the order in which they get their mask: {order}\n" in text


def test_only_commands_are_on_stdout_whatever_the_reader_prints(source, played, tmp_path, capfd, monkeypatch):
    import tifffile

    shutil.rmtree(source)
    for part, numbers in (("Tr", range(4)), ("Ts", range(4, 6))):
        for kind in ("images", "labels"):
            (source / (kind + part)).mkdir(parents=True)
        for number in numbers:  # without a spacing file, of which nnU-Net's reader prints a warning
            image, mask = (np.stack([array] * 5) for array in image_and_mask(number))
            tifffile.imwrite(source / f"images{part}" / f"toy_{number}_0000.tif", image)
            tifffile.imwrite(source / f"labels{part}" / f"toy_{number}.tif", mask)
    content = {"channel_names": {"0": "EM"}, "labels": LABELS, "numTraining": 4, "file_ending": ".tif"}
    (source / "dataset.json").write_text(json.dumps(content))
    monkeypatch.setattr(Played, "_preprocess", lambda *_: None)
    words = ["-d", "7", "-o", str(tmp_path / "out"), "--arms", "masks", "dsp", "--masks", "2", "--seeds", "0"]
    words += ["--device", "cpu", "--commands", "--num-processes"]
    for processes in ("1", "2"):
        assert main(["benchmark", "accuracy", *words, processes]) == 0
        said = capfd.readouterr()
        assert [line.split()[-2:] for line in said.out.splitlines()] == [
            ["--run", MASKS],
            ["--run", "m2_w2_s0_weak_tags-points-boxes__nnUNetTrainerDSP"],
        ]
        assert "spacing" in said.err
        shutil.rmtree(tmp_path / "out")


def gpus_of(played):
    return [(command, gpu) for command, gpu in played.gpus if command in ("train", "predict")]


def test_a_run_and_the_predictions_it_learns_from_are_made_on_its_gpu(benchmark, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    words = ("--settings", "masks+points", "--arms", "selftrain", "ignore:second", "--commands")
    _, out, _ = benchmark(*words, "--gpus", "3")
    for line in out.splitlines():
        assert benchmark("--run", line.split()[-1], "--gpus", "3", begin=False)[0] == 0
    made = gpus_of(benchmark.played)
    assert made.count(("train", "3")) == 4 and made.count(("predict", "3")) == 6 and len(made) == 10


@pytest.mark.parametrize("jobs", [(), ("--jobs", "1"), ("--jobs", "3")])
def test_the_trainings_take_turns_on_the_gpus(benchmark, monkeypatch, jobs):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert benchmark("--arms", "masks", "full", "dsp", "ignore", "--gpus", "2", "3", *jobs)[0] == 0
    made = gpus_of(benchmark.played)
    assert {gpu for command, gpu in made if command == "train"} == {"2", "3"}
    if jobs == ("--jobs", "1"):
        assert made == [(command, gpu) for gpu in "2323" for command in ("train", "predict")]


def test_there_is_a_training_on_each_gpu_at_a_time_unless_said_otherwise(benchmark):
    both = threading.Barrier(2, timeout=60)
    train = benchmark.played.train
    benchmark.played.train = lambda *words: (both.wait(), train(*words))
    assert benchmark("--arms", "masks", "full", "--gpus", "2", "3")[0] == 0, "neither waits for the other one's end"


def test_of_two_first_calls_the_later_is_held_to_what_the_earlier_began(benchmark, monkeypatch):
    lock, calls = workplace.Workplace.lock, []

    def after_another_call(place, name, waiting=""):
        if name == "setup" and not calls:
            calls.append(name)
            assert benchmark("--arms", "masks", "full", "--masks", "1")[0] == 0
        return lock(place, name, waiting)

    monkeypatch.setattr(workplace.Workplace, "lock", after_another_call)
    status, _, err = benchmark("--arms", "dsp", "--epochs", "7")
    assert status == 1 and "--epochs: 3 there, 7 now" in err
    calls.clear()
    shutil.rmtree(benchmark.folder)
    assert benchmark("--arms", "dsp")[0] == 0
    report = (benchmark.folder / "report.md").read_text()
    assert "--arms masks full --masks 1 " in report and "--arms dsp --masks 2 " in report


def test_ctrl_c_ends_a_call_that_waits_for_a_run_of_another_process(benchmark, monkeypatch):
    from filelock import FileLock

    from nnunet_dsp.benchmark.accuracy import benchmark as command

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    assert benchmark("--arms", "masks", "--commands")[0] == 0
    monkeypatch.setattr(command, "wait", interrupted)
    other = FileLock(benchmark.folder / "locks" / f"{MASKS}.lock", thread_local=False)
    other.acquire()
    end = threading.Timer(30, other.release)
    end.start()
    status, _, err = benchmark(begin=False)
    assert status == 130 and f"Waiting for another process that works on {MASKS}" in err
    assert other.is_locked, "the other process still has it"
    assert not benchmark.played.of("train")
    end.cancel()
    other.release()


@pytest.mark.parametrize("words", [(), ("--commands",), ("--plan", "--time")])
def test_a_sigterm_ends_the_commands_that_prepare_the_data_too(benchmark, monkeypatch, words):
    handlers = {}

    def noting(name):
        play = getattr(benchmark.played, name)

        def command(*args):
            handlers[name] = signal.getsignal(signal.SIGTERM)
            return play(*args)

        monkeypatch.setattr(benchmark.played, name, command)

    noting("plan_and_preprocess")
    noting("train")
    (benchmark.folder / "timing").mkdir(parents=True)  # real commands make it
    before = signal.getsignal(signal.SIGTERM)
    assert benchmark("--arms", "masks", *words)[0] == 0
    assert set(handlers) == {"plan_and_preprocess", *(() if "--commands" in words else ("train",))}
    for handler in handlers.values():
        with pytest.raises(KeyboardInterrupt):
            handler(signal.SIGTERM, None)
    assert signal.getsignal(signal.SIGTERM) is before


def train_anew(benchmark, run):
    """Removes a run and its model, as docs/accuracy.md says."""
    record = benchmark.record(run)
    shutil.rmtree(benchmark.folder / "runs" / run)
    for model in (benchmark.folder / "nnUNet_results" / record["dataset"]).glob(f"*__{record['plans']}__2d"):
        shutil.rmtree(model)


@pytest.mark.parametrize(
    ("arms", "first", "second"),
    [
        (("masks", "selftrain"), MASKS, SELF),
        (("dsp", "dsp:second"), DSP, "m2_w4_s0_second_tags-points-boxes_nnUNetTrainerDSP__nnUNetTrainer"),
    ],
)
def test_what_learned_from_a_training_that_is_done_anew_is_refused_and_then_learns_from_the_new_one(
    benchmark, arms, first, second
):
    assert benchmark("--arms", *arms)[0] == 0
    before = benchmark.record(second)
    train_anew(benchmark, first)
    benchmark.played.calls.clear()
    status, _, err = benchmark(begin=False)
    assert status == 1 and f"{second} builds on an earlier training of {first}." in err
    assert f"Remove their folders from {benchmark.folder / 'runs'}" in err and not benchmark.trained()
    assert benchmark("--run", first, begin=False)[0] == 0
    status, _, err = benchmark("--run", second, begin=False)
    assert status == 1 and f"{second} builds on an earlier training of {first}." in err
    benchmark("--report-only", begin=False)
    assert f"**{second} builds on an earlier" in (benchmark.folder / "report.md").read_text()
    shutil.rmtree(benchmark.folder / "runs" / second)
    benchmark.played.calls.clear()
    status, _, err = benchmark(begin=False)
    assert status == 0 and "holds predictions of an earlier training" in err
    (training,) = benchmark.played.of("train")
    assert "--c" not in training, "its model is not continued from"
    assert len(benchmark.played.of("predict")) == 2, "its training images, and the test cases"
    assert benchmark.record(second)["built_on"][first] != before["built_on"][first]
    assert "earlier training" not in (benchmark.folder / "report.md").read_text()


def test_second_rounds_of_earlier_versions_are_taken_as_they_are(benchmark):
    assert benchmark("--arms", "masks", "selftrain")[0] == 0
    ready = benchmark.folder / "nnUNet_preprocessed" / benchmark.raw("m2_w4_s0_pseudo").name / "benchmark_ready.json"
    for file, key in ((benchmark.folder / "runs" / SELF / "record.json", "built_on"), (ready, "first_model")):
        content = json.loads(file.read_text())
        del content[key]
        file.write_text(json.dumps(content))
    train_anew(benchmark, MASKS)
    benchmark.played.calls.clear()
    assert benchmark(begin=False)[0] == 0
    assert benchmark.trained() == ["m2_s0_masks"]


def test_that_no_weak_cases_are_left_is_said(benchmark):
    _, _, err = benchmark("--arms", "masks", "dsp", "--masks", "6", "--commands")
    assert "--masks 6: every training case keeps its mask, so no weak annotations are left." in err
    _, _, err = benchmark("--masks", "5", "--commands", begin=False)
    assert "no weak annotations" not in err


def test_a_test_mask_that_does_not_fit_is_refused_before_anything_is_trained(benchmark):
    label = benchmark.source / "labelsTs" / "toy_7.png"
    mask = imread(label)
    for wrong, message in ((mask[:, 1:], "the shape of its image, (1, 24, 24), but got (1, 24, 23)"), (mask * 5, "[5")):
        imsave(label, wrong, check_contrast=False)
        status, _, err = benchmark("--arms", "masks")
        assert status == 1 and "toy_7.png" in err and message in err
        assert not benchmark.played.calls


@pytest.mark.parametrize(
    ("name", "channels", "found"), [("toy_6_0000.png", 3, "toy_6_0000.png"), ("toy_6_0001.png", 1, "toy_6_0001.png")]
)
def test_a_test_image_of_other_channels_is_refused_before_anything_is_trained(benchmark, name, channels, found):
    image = image_and_mask(6)[0]
    image = np.stack([image] * channels, -1) if channels > 1 else image
    imsave(benchmark.source / "imagesTs" / name, image, check_contrast=False)
    status, _, err = benchmark("--arms", "masks")
    assert status == 1
    assert "toy_6: expected the 1 channel(s) that dataset.json names, but got" in err and found in err
    assert not benchmark.played.calls


def test_a_class_that_is_called_as_the_mean_is_refused(benchmark):
    file = benchmark.source / "dataset.json"
    file.write_text(file.read_text().replace("nucleus", "mean"))
    status, _, err = benchmark("--arms", "masks")
    assert status == 1 and "a class is called 'mean', as records and tables call the mean" in err
    assert not benchmark.played.calls


def test_a_report_without_predictions_has_no_pictures_of_them(benchmark):
    benchmark("--arms", "masks", "dsp")
    text = (benchmark.folder / "report.md").read_text()
    shutil.rmtree(benchmark.folder / "runs" / DSP / "predictions")
    status, _, err = benchmark("--report-only", begin=False)
    assert status == 0 and f"cases_mixed_m2_w4.png is not drawn, for predictions are gone of {DSP}." in err
    picture = "![best, median and worst case](cases_mixed_m2_w4.png)\n\n"
    assert (benchmark.folder / "report.md").read_text() == text.replace(picture, "") != text


def test_a_picture_says_where_nothing_is_shown_and_nothing_predicted(benchmark, monkeypatch):
    drawn = []
    monkeypatch.setattr("nnunet_dsp.pictures.comparison", lambda rows, *_, **__: drawn.extend(rows))
    monkeypatch.setitem(WRONG_ROWS, "masks", SIZE)  # it predicts nothing
    imsave(benchmark.source / "labelsTs" / "toy_7.png", np.zeros((SIZE, SIZE), np.uint8), check_contrast=False)
    benchmark("--arms", "masks", "dsp")
    (row,) = (row for row in drawn if any(name.endswith("toy_7") for name in row))
    assert row["masks"]["caption"] == "no class shown or predicted"
    assert row["dsp"]["caption"] == "mean Dice 0.000"


def test_a_class_that_is_only_predicted_is_named_where_arms_differ_in_it():
    def line(arm, *false_positives):
        found = {"TP": 0, "FN": 0, "Dice": None}
        cases = {
            f"case_{number}": {"cell": {"TP": 5, "FN": 1, "FP": 2, "Dice": 0.8}, "nucleus": {**found, "FP": wrong}}
            for number, wrong in enumerate(false_positives)
        }
        return report.Line(arm, report.Place("mixed", 2, 4), {0: {"per_case": cases}} if cases else {}, 1)

    lines = {each.arm: each for each in (line("masks", 0, 7), line("dsp", 0, 0), line("full"))}
    assert report.predicted_only(lines, ("cell", "nucleus")) == {"nucleus": ["masks"]}
    both = {**lines, "dsp": line("dsp", 3, 0)}
    assert report.predicted_only(both, ("cell", "nucleus")) == {}, "it counts alike for both"
    with_seeds = {name: report.Line(name, each.place, {**each.records}, 3) for name, each in both.items()}
    with_seeds["masks"].records |= {1: line("masks", 1, 0).records[0]}
    with_seeds["dsp"].records |= {1: line("dsp", 0, 0).records[0], 2: line("dsp", 0, 4).records[0]}
    named = {"nucleus": ["masks", "dsp with seed 0 and 2"]}
    assert report.predicted_only(with_seeds, ("cell", "nucleus")) == named, "in one run of dsp it does not count"


def test_the_report_says_which_arms_a_class_counts_for_that_no_test_case_shows(benchmark):
    for number in (6, 7):
        _, mask = image_and_mask(number)
        imsave(benchmark.source / "labelsTs" / f"toy_{number}.png", np.minimum(mask, 1), check_contrast=False)
    benchmark("--arms", "masks", "full")
    said = "No test case shows nucleus. In the mean of arms that predict it, it counts as 0 (full); in that of others"
    assert said in (benchmark.folder / "report.md").read_text()


def test_a_trainer_of_another_name_gets_the_schedule_too(benchmark, tmp_path, monkeypatch):
    text = "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer as Base\nclass {}(Base): pass\n"
    for name, folder in (("nnUNetTrainerMine", tmp_path / "mine"), ("Aside", tmp_path / "aside")):
        folder.mkdir()
        (folder / f"{name}.py").write_text(text.format(name))
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path / "mine"))
    status, _, err = benchmark("--arm", "mine=Aside@masks:rate=0.5", "--arms", "mine")
    assert status == 1 and "--arm: nnU-Net finds no trainer Aside" in err
    assert not benchmark.played.calls and not list((benchmark.folder / "trainers").iterdir())
    status, _, _ = benchmark("--arm", "mine=nnUNetTrainerMine@masks:rate=0.5", "--arms", "mine")
    assert status == 0
    (training,) = benchmark.played.of("train")
    assert Played.value(training, "-tr") == "nnUNetTrainerMine_benchmark"
    module = (benchmark.folder / "trainers" / "nnUNetTrainerMine_benchmark.py").read_text()
    assert "class nnUNetTrainerMine_benchmark(BenchmarkSchedule, Trainer)" in module
    record = benchmark.record("m2_s0_masks__nnUNetTrainerMine__rate=0.5")
    assert record["options"] == {"rate": 0.5}
    assert benchmark(begin=False)[0] == 0, "the arm is remembered"


def test_runs_side_by_side_give_what_they_give_alone(benchmark):
    arms = ("masks", "full", "selftrain", "dsp", "dsp:points", "ignore")
    status, _, _ = benchmark("--arms", *arms, "--jobs", "3")
    assert status == 0
    table = {row["arm"]: float(row["Dice"]) for row in rows_of(benchmark.folder / "table.csv")}
    assert table["selftrain"] == pytest.approx(truth_dice("pseudo"))
    assert len(benchmark.trained()) == 6


def test_a_run_whose_first_round_failed_is_not_tried(benchmark):
    benchmark.played.fail["m2_s0_masks"] = "saved"
    status, _, err = benchmark("--arms", "selftrain", "full")
    assert status == 1
    assert f"{MASKS}, whose predictions it needs, failed" in err
    assert "m2_w4_s0_pseudo" not in benchmark.trained()
    assert "full" in benchmark.trained(), "the others go on"


# --- pre-training


@pytest.fixture
def other(source):
    """Another dataset: three cases, with one class of another name."""
    folder = source.parent / "Dataset008_Other"
    for kind in ("images", "labels"):
        (folder / f"{kind}Tr").mkdir(parents=True)
    for number in range(20, 23):
        image, mask = image_and_mask(number)
        imsave(folder / "imagesTr" / f"toy_{number - 20}_0000.png", image, check_contrast=False)
        imsave(folder / "labelsTr" / f"toy_{number - 20}.png", (mask > 0).astype(np.uint8), check_contrast=False)
    content = {"channel_names": {"0": "LM"}, "labels": {"background": 0, "membrane": 1}}
    content |= {"numTraining": 3, "file_ending": ".png"}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def test_pretrained_arms_start_from_one_training_on_the_other_dataset(benchmark, other):
    arms = ("masks", "masks:pretrained", "full:pretrained", "prompt:oneshot:pretrained")
    words = ("--pretrain", "8", "--pretrain-epochs", "2", "--arms", *arms, "--seeds", "0", "1")
    status, out, _ = benchmark(*words)
    assert status == 0 and "All 8 runs have finished" in out
    assert benchmark.trained()[-1] != "pretrain" and benchmark.trained().count("pretrain") == 2
    started = {}
    for words in benchmark.played.of("train"):
        weights = Played.value(words, "-pretrained_weights") if "-pretrained_weights" in words else None
        started[words[1].split("_", 1)[1], Played.value(words, "-tr"), Played.value(words, "-p")] = weights
    assert sum(weights is not None for weights in started.values()) == 6
    for (dataset, trainer, plans), weights in started.items():
        assert (weights is None) == ("pretrained" not in plans), dataset
        wanted = "nnUNetTrainerPrompt_benchmark__" if "Prompt" in trainer else "nnUNetTrainer_benchmark__"
        assert weights is None or f"_pretrain/{wanted}" in weights
    raw = benchmark.raw("pretrain")
    assert {(raw / "labelsTr" / f"toy_{n}.png").read_bytes() for n in range(3)} == {
        file.read_bytes() for file in (other / "labelsTr").iterdir()
    }
    files = [
        benchmark.folder / "nnUNet_preprocessed" / name / "Benchmark.json" for name in (raw.name, "Dataset001_full")
    ]
    moved, planned = (json.loads(file.read_text()) for file in files)
    assert moved == {**planned, "dataset_name": raw.name}, "the plans are those of the benchmark's dataset"
    record = benchmark.record(f"{MASKS}__pretrained")
    before = benchmark.record(record["pretrained"])
    assert (before["schedule"]["num_epochs"], record["schedule"]["num_epochs"]) == (2, 3)
    assert before["per_case"] == {} and not (benchmark.folder / "runs" / record["pretrained"] / "predictions").exists()
    report = (benchmark.folder / "report.md").read_text()
    assert "all masks of Dataset008_Other by the plans of this dataset, 2 epochs" in report
    assert "`pretrain__nnUNetTrainer` | - |" in report, "what was pre-trained stands among the runs"
    assert {row["arm"] for row in rows_of(benchmark.folder / "table.csv")} == set(arms)
    pairs = {(row["first"], row["second"]) for row in rows_of(benchmark.folder / "tests.csv")}
    assert ("prompt:oneshot:pretrained", "masks:pretrained") in pairs
    benchmark.played.calls.clear()
    assert benchmark(begin=False)[0] == 0 and not benchmark.trained(), "the next call knows it all"


def test_an_interrupted_pretrained_run_continues_from_its_checkpoint_or_starts_from_the_weights_again(benchmark, other):
    for how, flag in (("saved", "--c"), ("broken", "-pretrained_weights")):
        benchmark.played.fail["full"] = how
        arm = {"saved": "full:pretrained", "broken": "dsp:pretrained"}[how]
        words = ("--masks", "6", "--weak", "rest") if how == "broken" else ()
        assert benchmark("--pretrain", "8", "--arms", arm, *words)[0] == 1
        benchmark.played.calls.clear()
        assert benchmark(begin=False)[0] == 0
        (training,) = [words for words in benchmark.played.of("train") if words[1] == "Dataset001_full"]
        assert flag in training


def test_pre_training_that_fails_keeps_its_arms_from_being_tried(benchmark, other):
    benchmark.played.fail["pretrain"] = "saved"
    status, _, err = benchmark("--pretrain", "8", "--arms", "masks:pretrained", "selftrain:pretrained", "full")
    assert status == 1
    assert "pretrain__nnUNetTrainer, whose weights it needs, failed" in err
    assert set(benchmark.trained()) == {"pretrain", "full"}


def test_pre_training_can_be_asked_for_later_but_not_changed(benchmark, other):
    assert benchmark("--arms", "masks")[0] == 0
    status, _, err = benchmark("--arms", "masks", "masks:pretrained", begin=False)
    assert status == 1 and "pre-trained on what? Name a dataset with masks: --pretrain DATASET" in err
    status, out, _ = benchmark("--arms", "masks:pretrained", "--pretrain", "8", "--plan", begin=False)
    assert status == 0 and f"{MASKS}__pretrained, after pretrain__nnUNetTrainer " in out
    _, out, _ = benchmark("--arms", "masks:pretrained", "--pretrain", "Dataset008_Other", "--commands", begin=False)
    assert [line.split()[-1] for line in out.splitlines()] == ["pretrain__nnUNetTrainer", f"{MASKS}__pretrained"]
    label = other / "labelsTr" / "toy_1.png"
    content = label.read_bytes()
    imsave(label, np.zeros((SIZE, SIZE), np.uint8), check_contrast=False)
    status, _, err = benchmark(begin=False)
    assert status == 1 and "toy_1.png has changed since this benchmark began" in err
    label.write_bytes(content)
    assert benchmark("--run", f"{MASKS}__pretrained", begin=False)[0] == 0
    assert benchmark.trained() == ["m2_s0_masks", "pretrain", "m2_s0_masks"]
    status, _, err = benchmark("--pretrain", "8", "--pretrain-epochs", "9", begin=False)
    assert status == 1 and "--pretrain-epochs: not given there, 9 now" in err
    label.unlink()
    assert benchmark("--arms", "prompt:oneshot:pretrained", begin=False)[0] == 0, "it is preprocessed in DIR by now"


@pytest.mark.parametrize(
    ("spoil", "dataset", "message"),
    [
        (lambda other, own: None, "7", "Dataset007_Toy is the dataset that is benchmarked"),
        (lambda other, own: None, "9", "no dataset with id 009"),
        (
            lambda other, own: (other / "labelsTr" / "toy_1.png").unlink(),
            "8",
            "1 cases of Dataset008_Other have no mask",
        ),
        (
            lambda other, own: (other / "imagesTr" / "toy_1_0000.png").write_bytes(
                (own / "imagesTs" / "toy_7_0000.png").read_bytes()
            ),
            "8",
            "toy_1_0000.png is the image of toy_7, which the benchmark evaluates on",
        ),
        (
            lambda other, own: (other / "dataset.json").write_text(
                (other / "dataset.json").read_text().replace('{"0": "LM"}', '{"0": "R", "1": "G", "2": "B"}')
            ),
            "8",
            "has 3 image channel(s), and Dataset007_Toy has 1",
        ),
    ],
)
def test_a_dataset_that_is_no_use_for_pre_training_is_refused(benchmark, other, spoil, dataset, message):
    spoil(other, benchmark.source)
    status, _, err = benchmark("--pretrain", dataset, "--arms", "masks:pretrained")
    assert status == 1
    assert message in err
    assert not benchmark.trained()


# --- prompts and second networks


def test_one_shot_has_one_mask_and_the_rectangle_of_another_case_as_prompt(benchmark):
    words = (
        "--settings",
        "masks+rectangles",
        "--rectangle",
        "8",
        "--masks",
        "1",
        "3",
        "--arms",
        "masks",
        "prompt:oneshot",
    )
    assert benchmark(*words)[0] == 0
    folder = benchmark.raw("m1_w1_s0_ignore_rectangles_prompt-rectangle")
    record = benchmark.record("m1_w1_s0_ignore_rectangles_prompt-rectangle__nnUNetTrainerPromptOneShot")
    (trained,) = (case for case, kinds in record["cases"].items() if kinds == ["mask"])
    (prompt,) = (case for case, kinds in record["cases"].items() if kinds == ["rectangles"])
    masked = benchmark.record("m1_s0_masks__nnUNetTrainer")["cases"]
    assert list(masked) == [trained], "vanilla nnU-Net trains on the same case"
    named = json.loads((folder / "dataset.json").read_text())["prompt"]
    (y0, y1), (x0, x1) = named["bbox"]
    assert named["case"] == prompt and (imread(folder / "labelsTr" / f"{prompt}.png")[y0:y1, x0:x1] != 3).sum() == 64
    assert (y1 - y0, x1 - x0) == (8, 8)
    assert (imread(folder / "labelsTr" / f"{trained}.png") != 3).all()
    assert (imread(folder / "labelsTr" / f"{prompt}.png") != 3).sum() == 64
    assert benchmark.trained().count(folder.name.split("_", 1)[1]) == 1, "further masks change nothing"
    benchmark("--settings", "masks+points", "--masks", "2", begin=False)
    record = benchmark.record("m2_s0_masks_prompt-mask__nnUNetTrainerPromptOneShot")
    named = json.loads((benchmark.raw("m2_s0_masks_prompt-mask") / "dataset.json").read_text())["prompt"]["case"]
    assert set(record["cases"]) == {trained, named} and named != trained


def test_rectangles_alone_are_a_setting_and_second_networks_learn_what_the_first_predict(benchmark):
    words = ("--settings", "masks+rectangles", "--rectangle", "8", "--masks", "0", "--weak", "4")
    arms = ("ignore", "prompt:partial", "dsp", "prompt:partial:second", "ignore:second")
    status, out, _ = benchmark(*words, "--arms", *arms, "masks")
    assert status == 0 and "All 5 runs have finished" in out
    first = benchmark.raw("m0_w4_s0_ignore_rectangles")
    cases = sorted(file.stem for file in (first / "labelsTr").iterdir())
    assert len(cases) == 4
    for trainer in ("nnUNetTrainer", "nnUNetTrainerPrompt"):
        second = benchmark.raw(f"m0_w4_s0_second_rectangles_{trainer}")
        assert "ignore" not in json.loads((second / "dataset.json").read_text())["labels"]
        for case in cases:
            annotated = imread(first / "labelsTr" / f"{case}.png")
            _, predicted = image_and_mask(int(case.split("_")[1]))
            predicted[4 : 4 + WRONG_ROWS["ignore"]] = 0
            expected = np.where(annotated == 3, predicted, annotated)
            np.testing.assert_array_equal(imread(second / "labelsTr" / f"{case}.png"), expected)
    table = {row["arm"]: row for row in rows_of(benchmark.folder / "table.csv")}
    assert set(table) == set(arms) and len({row["minutes"] for row in table.values()}) == 1
    assert float(table["prompt:partial:second"]["Dice"]) == pytest.approx(truth_dice("second"))
    pairs = {(row["first"], row["second"]) for row in rows_of(benchmark.folder / "tests.csv")}
    assert {("prompt:partial:second", "ignore"), ("prompt:partial:second", "ignore:second")} <= pairs
    assert "in each of two rounds" in (benchmark.folder / "report.md").read_text()
    assert not list((benchmark.folder / "runs").rglob("predicted_training"))


def test_the_report_follows_the_prices(benchmark):
    benchmark("--arms", "masks")
    benchmark("--report-only", "--cost", "mask=15min/image", begin=False)
    (line,) = rows_of(benchmark.folder / "table.csv")
    assert float(line["minutes"]) == pytest.approx(30)


def test_the_report_names_every_call_that_its_rows_come_from(benchmark):
    def commands():
        text = (benchmark.folder / "report.md").read_text()
        return [line.strip() for line in text.splitlines() if "benchmark accuracy -o" in line]

    benchmark("--arms", "masks", "--seeds", "0")
    benchmark("--arms", "masks", "--seeds", "1", begin=False)
    first, second = commands()
    assert "--arms masks --masks 2 --seeds 0 " in first and "--arms masks --masks 2 --seeds 1 " in second
    benchmark("--arms", "masks", "full", "--seeds", "0", "1", begin=False)
    (command,) = commands()
    assert "--arms masks full --masks 2 --seeds 0 1 " in command, "it asks for what both asked for"
    benchmark("--arms", "masks", "--seeds", "0", begin=False)
    benchmark("--report-only", "--seeds", "1", begin=False)
    assert commands() == [command], "nothing new was asked for"


def test_a_name_stands_for_one_arm_only(benchmark):
    mine, other = (f"mine=nnUNetTrainerDSP:dsp_weight={weight}" for weight in (0.1, 0.2))
    status, _, err = benchmark("--arm", mine, "--arm", other, "--arms", "mine", "--seeds", "0")
    assert status == 1 and f"--arm {other}: there is another arm of this name already, {mine}." in err
    assert benchmark("--arm", mine, "--arms", "mine", "--seeds", "0")[0] == 0
    status, _, err = benchmark("--arm", other, "--arms", "mine", "--seeds", "1", begin=False)
    assert status == 1 and f"{mine}. Give one of them another name" in err
    report = (benchmark.folder / "report.md").read_text()
    assert benchmark("--arm", mine, "--arms", "mine", "--seeds", "0", begin=False)[0] == 0
    assert (benchmark.folder / "report.md").read_text() == report


@pytest.mark.parametrize(
    "words", [("--seeds", "0", "7"), ("--arms", "masks", "dsp"), ("--masks", "1"), ("--weak", "rest", "1")]
)
def test_a_report_of_what_was_never_asked_for_is_refused(benchmark, words):
    benchmark("--arms", "masks", "--seeds", "0", "1")
    benchmark("--arms", "masks", "--seeds", "0", begin=False)
    assert benchmark("--report-only", "--seeds", "0", "1", begin=False)[0] == 0, "asked for earlier"
    status, out, err = benchmark("--report-only", *words, begin=False)
    assert status == 1 and not out
    assert f"is not {words[0]} {words[-1]}. Leave it out" in err


def test_a_dataset_without_all_its_masks_is_refused_before_anything_is_made(benchmark):
    (benchmark.source / "labelsTr" / "toy_2.png").unlink()
    status, _, err = benchmark("--arms", "masks")
    assert status == 1
    assert "needs a mask for every training case, but 1 have none: toy_2" in err
    assert not (benchmark.folder / "benchmark.json").exists()


def test_test_images_without_a_mask_are_refused(benchmark):
    (benchmark.source / "labelsTs" / "toy_7.png").unlink()
    status, _, err = benchmark("--arms", "masks")
    assert status == 1
    assert "1 of 2 have none: toy_7" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--patch", "16"), "--patch goes with --plans small"),
        (("--plans", "small", "--features", "4", "8"), "--features: expected three numbers or more"),
        (("--share", "2"), "--share: expected a number from 0 to 1"),
        (("--step-size", "0"), "--step-size: expected"),
        (("--jobs", "0"), "--jobs: expected 1 or more"),
        (("--threads", "0"), "--threads: expected 1 or more"),
        (("--tolerance", "-1"), "--tolerance: expected 0 or more"),
        (("--tolerance", "nan"), "--tolerance: expected 0 or more, but got nan"),
        (("--val-share", "0.2"), "--val-share goes with --evaluate-on val"),
        (("--group", "toy_["), "--group: 'toy_[' is no regular expression: unterminated character set"),
        (("--masks", "-1"), "--masks: expected numbers of 0 or more, but got -1"),
        (("--lr", "nan"), "--lr: expected a number above 0"),
        (("--seeds", "-1"), "--seeds: expected whole numbers of 0 or more"),
        (("--plans", "small", "--patch", "16", "0"), "--patch: expected numbers of 1 or more, but got 16 0"),
        (("--arms", "dsq"), "no arm 'dsq'"),
        (("--settings", "mixd"), "no setting 'mixd'"),
        (("--masks", "9"), "--masks: expected 0 to 6"),
        (("--time",), "--time goes with --plan"),
        (("--cost", "mask=3"), "--cost"),
        (("--box-classes", "axon"), "unknown class"),
    ],
)
def test_what_cannot_be_meant_is_refused(benchmark, words, message):
    status, _, err = benchmark(*words)
    assert status == 1
    assert message in err


def test_a_device_that_is_not_there_is_refused_before_the_data_is_prepared(benchmark, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, _, err = benchmark("--arms", "masks", "--device", "cuda")
    assert status == 1
    assert "PyTorch finds no such device" in err
    assert not benchmark.folder.exists()
    assert benchmark("--arms", "masks", "--device", "cuda", "--commands")[0] == 0, "a login node needs no GPU"


def test_a_folder_without_a_benchmark_cannot_be_reported(benchmark):
    status, _, err = benchmark("--report-only", begin=False)
    assert status == 1 and "holds no benchmark" in err
    status, _, err = benchmark("--arms", "masks", begin=False)
    assert status == 1 and "-d is missing" in err


def test_a_folder_of_another_benchmark_is_refused(benchmark):
    benchmark.folder.mkdir()
    (benchmark.folder / "benchmark.json").write_text(json.dumps({"format": 1, "benchmark": "instances", "fixed": {}}))
    status, _, err = benchmark("--arms", "masks")
    assert status == 1 and "belongs to `nnunet_dsp benchmark instances`" in err
    assert [file.name for file in benchmark.folder.iterdir()] == ["benchmark.json"]
