"""`nnunet_dsp check` on instance datasets: what is counted, what is drawn, what is doubtful."""

from __future__ import annotations

import argparse
import io
import json

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image
from skimage.io import imsave

from nnunet_dsp import check
from nnunet_dsp.dataset_conversion.instance_labels import MOST_IDS, region_labels
from nnunet_dsp.report.drawing import IGNORED, colour_instances, encode_layer

NAME = "Dataset009_Cells"
IGNORE = region_labels("cell", 300)["ignore"]


def cells():
    """Ids 1, 2 (touching), 300; background above, everything right of column 40 unlabelled."""
    labels = np.zeros((48, 64), np.uint16)
    labels[10:20, 5:15], labels[10:20, 15:25], labels[30:44, 5:30] = 1, 2, 300
    labels[:, 40:] = IGNORE
    return labels


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    folder = tmp_path / "nnUNet_raw" / NAME
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    monkeypatch.setenv("nnUNet_raw", str(folder.parent))

    def add(case, labels, ending=".png"):
        noise = np.random.default_rng(len(case)).integers(0, 60, labels.shape, np.uint8)
        noise.flat[0] = sum(map(ord, case)) % 60  # no image twice
        for part, name, array in (("imagesTr", f"{case}_0000", noise), ("labelsTr", case, labels.astype(np.uint16))):
            file = folder / part / f"{name}{ending}"
            if labels.ndim == 3:
                sitk.WriteImage(sitk.GetImageFromArray(array), file)
            else:
                imsave(file, array, check_contrast=False)
        content = {"channel_names": {"0": "EM"}, "labels": region_labels("cell", 300), "regions_class_order": [1]}
        content |= {"numTraining": len(list((folder / "labelsTr").iterdir())), "file_ending": ending}
        (folder / "dataset.json").write_text(json.dumps(content))

    add.folder = folder
    return add


def options(*arguments):
    parser = argparse.ArgumentParser()
    check.add_arguments(parser)
    return parser.parse_args(["-d", "9", "--num-processes", "1", *map(str, arguments)])


def look(dataset):
    return check.check(dataset.folder, options())


def kinds(report):
    return [finding.kind for finding in report.findings]


def layer_of(picture):
    return np.asarray(Image.open(io.BytesIO(picture.layer)).convert("RGBA"))


def test_instances_are_counted_and_the_page_and_json_say_so(dataset, tmp_path, capsys):
    dataset("one", cells())
    dataset("another", np.where(cells() == 300, 0, cells()))
    assert check.run(options("-o", tmp_path, "--json", tmp_path / "check.json")) == 0
    said = capsys.readouterr().out
    assert "5 labelled instances, 2 to 3 in a case" in said and "points" not in said
    page = (tmp_path / f"{NAME}_check.html").read_text(encoding="utf-8")
    assert "3 instances of 100 to 350 voxels" in page and "2 instances of 100 to 100 voxels" in page
    assert "each in a colour of its own" in page and "a tight box" not in page
    cases = {case["case"]: case for case in json.loads((tmp_path / "check.json").read_text())["cases"]}
    assert cases["one"]["instances"] == 3 and cases["another"]["instances"] == 2
    assert cases["one"]["status"] == "partly masked"


def test_every_instance_has_its_own_colour_background_is_clear_and_what_nobody_labelled_striped(dataset):
    dataset("one", cells())
    (case,) = look(dataset).cases
    assert case.pictures[0].description.endswith("3 labelled instances")
    drawn = layer_of(case.pictures[0])
    step = drawn.shape[0] / 48
    assert drawn.shape[1] / 64 == step

    def at(y, x):
        return tuple(drawn[int((y + 0.5) * step), int((x + 0.5) * step)].tolist())

    colours = {at(15, 8), at(15, 20), at(40, 10)}
    assert len(colours) == 3 and all(colour[3] > 0 for colour in colours)
    assert at(12, 8) == at(18, 8), "one colour in all of it"
    assert at(3, 3)[3] == 0
    right = drawn[:, int(41 * step) :, 3]
    assert (right > 0).any() and (right == 0).any()
    assert tuple(drawn[int(15.5 * step), int(15 * step)][:3]) == (0, 0, 0), "a dark line where two touch"


def test_hundreds_of_instances_fit_into_a_layer_and_neighbours_differ():
    ids = np.arange(1, 40 * 40 + 1).reshape(40, 40).repeat(4, 0).repeat(4, 1)
    codes, colours = colour_instances(ids)
    drawn = np.asarray(Image.open(io.BytesIO(encode_layer(codes, colours))).convert("RGBA"))[2::4, 2::4]
    for one, other in ((drawn[1:], drawn[:-1]), (drawn[:, 1:], drawn[:, :-1])):
        assert (one != other).any(-1).all()
    assert (codes[np.isin(codes, list(colours))] != IGNORED).all()


def test_volumes_are_shown_at_slices_with_instances(dataset):
    labels = np.zeros((30, 12, 12), np.uint16)
    labels[10:20, 2:6, 2:6] = 1
    dataset("volume", labels, ".nii.gz")
    (case,) = check.check(dataset.folder, options("--slices", 3)).cases
    places = [int(picture.caption.split()[1]) for picture in case.pictures]
    assert len(places) == 3 and all(10 <= place < 20 for place in places) and len(set(places)) == 3
    assert case.hidden == "3 of 10 slices with instances are shown."


def test_a_dataset_without_faults_has_no_findings(dataset):
    dataset("one", cells())
    dataset("another", cells())
    assert [finding.text for finding in look(dataset).findings] == []


def test_an_id_in_two_pieces_and_specks_are_found_with_a_picture(dataset):
    labels = cells()
    labels[1:3, 30:36] = 300
    labels[25, 20] = 7
    dataset("one", labels)
    dataset("another", cells())
    report = look(dataset)
    assert kinds(report) == ["pieces", "speck"]
    assert "1 of 4 instances lie in pieces that do not touch, such as id 300 in 2 pieces" in report.findings[0].text
    assert "1 instance(s) of one or two voxels, such as id 7" in report.findings[1].text
    assert all(finding.picture is not None for finding in report.findings)


def test_instances_that_touch_by_a_corner_only_are_in_pieces(dataset):
    labels = np.zeros((20, 20), np.uint16)
    labels[2:6, 2:6] = labels[6:10, 6:10] = 1
    dataset("one", labels)
    dataset("another", cells())
    assert kinds(look(dataset)) == ["pieces"]


def test_labels_without_background_are_noted(dataset):
    labels = cells()
    labels[labels == 0] = IGNORE
    dataset("one", labels)
    dataset("another", labels)
    report = look(dataset)
    assert kinds(report) == ["no-background"] and report.errors == report.doubtful == 0


def test_more_ids_than_nnunet_stores_are_an_error(dataset):
    dataset("one", cells())
    content = json.loads((dataset.folder / "dataset.json").read_text())
    number = MOST_IDS + 1
    content["labels"] = {"background": 0, "cell": list(range(1, number + 1)), "ignore": number + 1}
    (dataset.folder / "dataset.json").write_text(json.dumps(content))
    report = look(dataset)
    assert "dataset" in kinds(report) and report.errors
    assert "leaves 32766 instances an image" in report.findings[0].text


def test_values_that_are_no_ids_are_nnunets_error(dataset):
    dataset("one", np.where(cells() == 2, 400, cells()))
    report = look(dataset)
    assert kinds(report)[0] == "integrity" and "400" in report.findings[0].text
