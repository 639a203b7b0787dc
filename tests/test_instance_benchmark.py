"""`nnunet_dsp benchmark instances` from call to report; only the commands that it starts are played."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from skimage.io import imread, imsave
from test_accuracy_runs import Played, rows_of

from nnunet_dsp.benchmark.accuracy import workplace
from nnunet_dsp.benchmark.instances import report
from nnunet_dsp.cli import main
from nnunet_dsp.dataset_conversion.instance_labels import region_labels
from nnunet_dsp.instances.predict_command import list_cases

SIDE, COUNT = 8, 4  # each image: a row of squares of equal size, so that every measure is known
IGNORE = region_labels("cell", 8)["ignore"]
FULL = "full__nnUNetTrainerCRAC_supervisedOnly__s0"
SUPERVISED = "i0p5_s0__nnUNetTrainerCRAC_supervisedOnly"
CRAC = "i0p5_s0__nnUNetTrainerCRAC"


def truth():
    labels = np.repeat(np.arange(1, COUNT + 1, dtype=np.uint8), SIDE)[None].repeat(SIDE, 0)
    return np.pad(labels, 2)


class PlayedInstances(Played):
    """Plays `instances predict` too: full labels find all, supervised joins all four squares, others join two."""

    def nnunet_dsp(self, place, words, on_line):
        assert words[1:3] == ["instances", "predict"]
        model, output = Path(self.value(words, "-m")), Path(self.value(words, "-o"))
        assert (model / "fold_all" / "checkpoint_final.pth").is_file()
        output.mkdir(exist_ok=True)
        channels = json.loads((place.raw / "Dataset001_full" / "dataset.json").read_text())["channel_names"]
        for case in list_cases(Path(self.value(words, "-i")), ".png", len(channels)):
            found = truth()
            if "full" not in model.parent.name:
                found[(found > 0) if "supervisedOnly" in model.name else np.isin(found, (1, 2))] = 1
            imsave(output / f"{case}.png", found, check_contrast=False)

    def predictions(self):
        return [call for call in self.calls if call[0] == "nnunet_dsp"]


@pytest.fixture
def source(tmp_path, monkeypatch):
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    folder = tmp_path / "raw" / "Dataset008_Squares"
    for part, numbers in (("Tr", range(3)), ("Ts", range(3, 5))):
        for kind in ("images", "labels"):
            (folder / (kind + part)).mkdir(parents=True)
        for number in numbers:
            noise = np.random.default_rng(number).integers(0, 60, truth().shape)
            image = (40 * truth() + noise).astype(np.uint8)
            imsave(folder / f"images{part}" / f"c{number}_0000.png", image, check_contrast=False)
            imsave(folder / f"labels{part}" / f"c{number}.png", truth(), check_contrast=False)
    content = {"channel_names": {"0": "EM"}, "labels": region_labels("cell", 8), "numTraining": 3}
    content |= {"file_ending": ".png", "regions_class_order": [1]}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def benchmark(source, tmp_path, capsys, monkeypatch, request):
    """Calls the command; returns status, stdout and stderr."""
    played = PlayedInstances()
    monkeypatch.setattr(workplace.Workplace, "command", lambda place, *words, **more: played(place, *words, **more))
    if "pictures" not in request.node.name:
        monkeypatch.setattr(report, "write_pictures", lambda *_: [])

    def call(*words, begin=True):
        start = ["benchmark", "instances", "-o", str(tmp_path / "out")]
        if begin:
            start += ["-d", "8", "--share", "0.5", "--seeds", "0", "--epochs", "3", "--device", "cpu"]
        status = main([*start, *map(str, words)])
        said = capsys.readouterr()
        return status, said.out, said.err

    call.folder, call.played = tmp_path / "out", played
    call.record = lambda run: json.loads((tmp_path / "out" / "runs" / run / "record.json").read_text())
    return call


def labels_of(folder, name):
    (raw,) = (folder / "nnUNet_raw").glob(f"Dataset*_{name}")
    return {file.stem: imread(file) for file in sorted((raw / "labelsTr").iterdir())}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (truth()[:-1], r"a label of the shape of its image, \(1, 12, 36\), but got \(1, 11, 36\)"),
        (np.where(truth() == 2, IGNORE + 1, truth()), rf"ids from 0 to {IGNORE}, .* but got 0 to {IGNORE + 1}"),
        (None, "cannot be read as a label file"),
    ],
)
def test_labels_of_test_cases_are_looked_at_before_anything_is_trained(benchmark, source, labels, message):
    file = source / "labelsTs" / "c4.png"
    if labels is None:
        file.write_bytes(file.read_bytes()[:60])
    else:
        imsave(file, labels, check_contrast=False)
    status, _, err = benchmark("--arms", "full")
    assert status == 1 and re.search(rf"c4\.png.*{message}", err)
    assert not benchmark.played.calls


def test_a_test_image_of_other_channels_is_refused_before_anything_is_trained(benchmark, source):
    file = source / "imagesTs" / "c4_0000.png"
    imsave(file, np.stack([imread(file)] * 3, -1), check_contrast=False)
    status, _, err = benchmark("--arms", "full")
    assert status == 1 and re.search(r"c4: expected the 1 channel\(s\) .* but got 3 from .*c4_0000\.png", err)
    assert not benchmark.played.calls


def test_every_arm_is_trained_once_and_the_report_holds_measures_and_pictures(benchmark):
    status, out, _ = benchmark("--arms", "full", "supervised", "crac")
    assert status == 0
    assert len(benchmark.played.of("train")) == 3
    table = {row["arm"]: row for row in rows_of(benchmark.folder / "table.csv")}
    def pairs(voxels):
        return voxels * (voxels - 1)

    area = SIDE**2
    predicted = {"full": 4 * pairs(area), "supervised": pairs(4 * area), "crac": pairs(2 * area) + 2 * pairs(area)}
    for arm, merged in (("full", 0.0), ("supervised", 2.0), ("crac", 0.5)):
        assert float(table[arm]["voi_merge"]) == pytest.approx(merged), arm  # of n equal squares in one: log2(n)
        right = 4 * pairs(area)  # of voxels in one true square, all in one predicted one
        assert float(table[arm]["arand"]) == pytest.approx(1 - 2 * right / (right + predicted[arm])), arm
    assert float(table["crac"]["ap_50"]) == pytest.approx(3 / 4), "of two joined squares one has an IoU of one half"
    text = (benchmark.folder / "report.md").read_text()
    assert "All 3 runs have finished" in text
    assert "| full | 1 | 1/1 | 12 of 12 | 0.000 |" in text
    assert "| crac | 0.5 | 1/1 | 6 of 12 |" in text
    assert "| crac | 0.5 | -66.5 % (1/1) | -75.0 % (1/1) |" in text, "against supervised"
    assert (benchmark.folder / "cases_0.5.png").stat().st_size > 1000
    assert len(rows_of(benchmark.folder / "per_case.csv")) == 6
    assert "0.604" in out


def test_a_share_keeps_whole_instances_the_same_for_every_arm_and_more_of_them_at_a_larger_share(benchmark):
    benchmark("--arms", "supervised", "crac", "--share", "0.25", "0.5", "--seeds", "0", "1")
    kept = {}
    for name in ("i0p25_s0", "i0p5_s0", "i0p25_s1", "i0p5_s1"):
        found = labels_of(benchmark.folder, name)
        assert list(found) == ["c0", "c1", "c2"]
        for case, labels in found.items():
            ids = set(np.unique(labels).tolist()) - {IGNORE}
            assert 0 not in ids, "background counts as not labelled"
            assert all((labels == value).sum() == SIDE**2 for value in ids), "instances are whole"
            kept[name, case] = ids
    for seed in (0, 1):
        for case in ("c0", "c1", "c2"):
            small, large = kept[f"i0p25_s{seed}", case], kept[f"i0p5_s{seed}", case]
            assert len(small) == 1 and len(large) == 2 and small < large
    assert any(kept["i0p5_s0", case] != kept["i0p5_s1", case] for case in ("c0", "c1", "c2")), "seeds choose"
    assert len(list((benchmark.folder / "nnUNet_raw").iterdir())) == 5, "arms of a seed share their dataset"
    assert benchmark.record(CRAC)["labelled"] == {"c0": [2, 4], "c1": [2, 4], "c2": [2, 4]}


def test_colour_pictures_in_one_file_are_trained_on_and_predicted_with_pictures(benchmark, source):
    for file in source.glob("images*/*.png"):
        imsave(file, np.stack([imread(file), imread(file) // 2, imread(file) // 3], -1), check_contrast=False)
    content = json.loads((source / "dataset.json").read_text())
    (source / "dataset.json").write_text(json.dumps({**content, "channel_names": {"0": "R", "1": "G", "2": "B"}}))
    status, out, err = benchmark("--arms", "full", "crac")
    assert status == 0, err
    assert len(benchmark.played.predictions()) == 2
    assert (benchmark.folder / "cases_0.5.png").stat().st_size > 1000


def test_the_report_names_every_call_that_its_rows_come_from(benchmark):
    benchmark("--arms", "supervised")
    benchmark("--arms", "crac", begin=False)
    text = (benchmark.folder / "report.md").read_text()
    first, second = (line for line in text.splitlines() if "benchmark instances -o" in line)
    assert "--arms supervised --share 0.5 --seeds 0" in first and "--arms crac --share 0.5 --seeds 0" in second


def test_background_stays_labelled_if_asked_for(benchmark):
    benchmark("--arms", "crac", "--keep-background")
    assert all((labels[:2] == 0).all() for labels in labels_of(benchmark.folder, "i0p5_s0").values())


def test_finished_runs_are_not_trained_again_and_another_decoder_only_predicts_anew(benchmark):
    benchmark("--arms", "full", "crac")
    benchmark.played.calls.clear()
    status, _, err = benchmark("--arms", "full", "crac", "supervised", begin=False)
    assert status == 0 and "3 runs, 2 of them finished, 1 to do" in err
    assert len(benchmark.played.of("train")) == 1 and len(benchmark.played.predictions()) == 1
    benchmark.played.calls.clear()
    assert "PARTIAL: 0 of 3" in benchmark("--report-only", "--decoder", "components", begin=False)[1]
    status, _, err = benchmark("--report-only", "--share", "0.3", begin=False)
    assert status == 1 and "is not --share 0.3. Leave it out" in err
    assert benchmark("--decoder", "components", begin=False)[0] == 0
    assert not benchmark.played.of("train") and len(benchmark.played.predictions()) == 3
    assert all("components" in call for call in benchmark.played.predictions())
    assert benchmark.record(CRAC)["evaluation"]["decoder"] == "components"


def test_an_interrupted_training_goes_on_from_its_checkpoint(benchmark):
    benchmark.played.fail["i0p5_s0"] = "saved"
    status, out, err = benchmark("--arms", "full", "crac")
    assert status == 1 and "out of luck" in err and "PARTIAL: 1 of 2" in out
    benchmark.played.calls.clear()
    assert benchmark(begin=False)[0] == 0
    (training,) = benchmark.played.of("train")
    assert "--c" in training
    assert benchmark.record(CRAC)["interruptions"] == 1


def test_options_reach_the_plans_and_the_optimiser_is_that_of_the_trainer(benchmark):
    wide = "wide=nnUNetTrainerCRAC:embedding_channels=32"
    benchmark("--arms", "wide", "full", "--arm", wide, "--optimizer", "sgd", "--lr", "0.02", "--seeds", "4")
    (training,) = (call for call in benchmark.played.of("train") if "full" not in call[1])
    plans = Played.value(training, "-p")
    content = json.loads((benchmark.folder / "nnUNet_preprocessed" / training[1] / f"{plans}.json").read_text())
    assert content["nnunet_dsp_crac"]["embedding_channels"] == 32
    assert content["nnunet_dsp_crac"]["optimizer"] == "sgd" and content["nnunet_dsp_crac"]["seed"] == 4
    schedule = content["nnunet_dsp_benchmark"]
    assert schedule["optimizer"] is None and schedule["initial_lr"] == 0.02 and schedule["seed"] == 4
    assert Played.value(training, "-tr") == "nnUNetTrainerCRAC_benchmark"
    assert benchmark("--arms", "wide", begin=False)[0] == 0, "an arm defined earlier is still known"


def test_the_plan_says_what_there_is_to_do_and_writes_nothing(benchmark):
    status, out, _ = benchmark("--plan")
    assert status == 0
    assert "3 training cases with 4 to 4 instances" in out and "2 cases to evaluate on" in out
    assert out.count("nnUNetTrainerCRAC") == 5
    assert not benchmark.folder.exists() and not benchmark.played.calls


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--arms", "crak"], "There is no arm 'crak'"),
        (["--share", "1"], "The arm `full` has all"),
        (["--share", "0"], "between 0 and 1"),
        (["--arm", "x=nnUNetTrainerDSP", "--arms", "x"], "expected a trainer named nnUNetTrainerCRAC"),
        (["--arm", "crac=nnUNetTrainerCRAC"], "belongs to one of the benchmark's own arms"),
        (["--arm", "x=nnUNetTrainerCRAC:embeding_channels=3", "--arms", "x"], "embeding_channels"),
        (["--epochs", "0"], "--epochs: expected 1 or more"),
        (["--jobs", "0"], "--jobs: expected 1 or more"),
        (["--min-size", "-1"], "--min-size: expected 0 or more"),
        (["--lr", "nan"], "--lr: expected a number above 0"),
        (["--threshold", "1"], "--threshold"),
        (["--step-size", "0.7"], "--step-size"),
        (["--patch", "32"], "goes with --plans small"),
        (["--time"], "--time goes with --plan"),
    ],
)
def test_what_cannot_be_meant_is_refused(benchmark, words, message):
    status, _, err = benchmark(*words)
    assert status == 1 and message in err
    assert not benchmark.folder.exists()


def test_another_configuration_a_changed_source_or_another_benchmarks_folder_is_refused(benchmark, source):
    benchmark("--arms", "full")
    status, _, err = benchmark("--keep-background", begin=False)
    assert status == 1 and "--keep-background: False there, True now" in err
    imsave(source / "labelsTr" / "c0.png", np.zeros_like(truth()), check_contrast=False)
    status, _, err = benchmark(begin=False)
    assert status == 1 and "c0.png has changed" in err
    (benchmark.folder / "benchmark.json").write_text(json.dumps({"format": 1, "fixed": {}}))
    assert "not written by this version of `nnunet_dsp benchmark instances`" in benchmark(begin=False)[2]


def test_a_dataset_of_classes_is_refused_and_sent_to_the_conversion(benchmark, source):
    content = json.loads((source / "dataset.json").read_text())
    (source / "dataset.json").write_text(json.dumps({**content, "labels": {"background": 0, "cell": 1}}))
    status, _, err = benchmark()
    assert status == 1 and "`nnunet_dsp convert instances` makes such a dataset" in err


def test_differences_are_taken_on_the_seeds_that_both_have():
    def line(arm, **values):
        records = {int(seed[1:]): {"means": {"arand": value}} for seed, value in values.items()}
        return report.Line(arm, 0.1, records, len(records))

    arm, full = line("crac", s0=0.3, s1=0.9), line("full", s0=0.2, s2=0.1)
    assert report.relative_difference(arm, full, "arand") == pytest.approx(0.5)
    assert report.better_seeds(arm, full, "arand") == (0, 1)
    assert np.isnan(report.relative_difference(arm, line("full", s2=0.1), "arand"))
    assert np.isnan(report.relative_difference(arm, line("full", s0=0.0), "arand")), "of nothing there is no share"
