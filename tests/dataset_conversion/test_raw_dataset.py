"""Finding datasets, refusing wrong targets, links, and leaving nothing half-written."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from nnunet_dsp.dataset_conversion import raw_dataset
from nnunet_dsp.dataset_conversion.parallel import default_num_processes, map_cases


def test_a_dataset_is_found_by_id_and_by_name(make_dataset):
    folder, masks = make_dataset(101)
    for given in (101, "101", "Dataset101_Full", folder):
        dataset = raw_dataset.read_dataset(given)
        assert dataset.folder == folder
        assert sorted(dataset.cases) == sorted(masks)
    assert raw_dataset.dataset_name("101") == "Dataset101_Full"


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("7", FileNotFoundError, r"no dataset with id 007 .*There are: Dataset101_Full"),
        ("Dataset101_Fool", FileNotFoundError, r"no dataset Dataset101_Fool"),
        ("Full", ValueError, "Expected a dataset id such as 501 or a name"),
    ],
)
def test_a_dataset_that_is_not_there_is_named(make_dataset, given, error, message):
    make_dataset(101)
    with pytest.raises(error, match=message):
        raw_dataset.read_dataset(given)


def test_missing_environment_is_said_with_the_line_that_mends_it(monkeypatch, tmp_path):
    monkeypatch.delenv("nnUNet_raw", raising=False)
    with pytest.raises(ValueError, match="nnUNet_raw is not set.*export nnUNet_raw="):
        raw_dataset.read_dataset("1")
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="mkdir -p"):
        raw_dataset.read_dataset("1")


def test_cases_are_those_that_nnunet_sees(make_dataset):
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    folder, _ = make_dataset(101, dim=3, channels=("T1", "T2"))
    shutil.copyfile(folder / "imagesTr" / "case_00_0000.nii.gz", folder / "imagesTr" / "odd_0001_0000.nii.gz")
    shutil.copyfile(folder / "imagesTr" / "case_00_0000.nii.gz", folder / "imagesTr" / "odd_0001_0001.nii.gz")
    (folder / "imagesTr" / "notes.txt").write_text("not an image")
    theirs = get_filenames_of_train_images_and_targets(str(folder))
    ours = raw_dataset.read_dataset(101).cases
    assert list(ours) == list(theirs)
    for name, files in theirs.items():
        assert [str(i) for i in ours[name].images] == files["images"] and str(ours[name].label) == files["label"]


def test_a_dataset_listed_in_dataset_json_is_read_as_nnunet_reads_it(make_dataset, nnunet):
    folder, _ = make_dataset(101)
    listed = nnunet / "Dataset102_Listed"
    listed.mkdir()
    content = json.loads((folder / "dataset.json").read_text())
    entry = {"images": ["../Dataset101_Full/imagesTr/case_03_0000.png"]}
    (listed / "dataset.json").write_text(json.dumps(content | {"dataset": {"mine": entry}, "numTraining": 1}))
    case = raw_dataset.read_dataset(102).cases["mine"]
    assert case.images[0].samefile(folder / "imagesTr" / "case_03_0000.png")
    assert case.label == listed / "labelsTr" / "mine.png"


def test_a_missing_channel_is_named(make_dataset):
    folder, _ = make_dataset(101, channels=("T1", "T2"))
    (folder / "imagesTr" / "case_02_0001.png").unlink()
    with pytest.raises(ValueError, match="case_02: expected 2 image files.*found 1"):
        raw_dataset.read_dataset(101)


def test_images_without_channel_number_and_a_malformed_dataset_json_are_named(make_dataset):
    folder, _ = make_dataset(101)
    (folder / "imagesTr" / "embryo.png").write_bytes(b"")
    with pytest.raises(ValueError, match="imagesTr: 1 image file.*such as embryo.png. Rename it to embryo_0000.png"):
        raw_dataset.read_dataset(101)
    (folder / "imagesTr" / "embryo.png").unlink()
    content = json.loads((folder / "dataset.json").read_text())
    for change, message in (
        ({"file_ending": "png"}, 'file_ending such as ".png", but got "png"'),
        ({"channel_names": ["EM"]}, 'expected channel_names of the form {"0": "NAME"}'),
    ):
        (folder / "dataset.json").write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=message):
            raw_dataset.read_dataset(101)


def test_regions_are_refused_by_name(make_dataset):
    make_dataset(101, labels={"background": 0, "whole": [1, 2], "core": 2})
    with pytest.raises(ValueError, match="label 'whole' is a region"):
        _ = raw_dataset.read_dataset(101).labels


def test_an_id_taken_by_another_name_is_refused_wherever_it_is_taken(make_dataset, nnunet):
    make_dataset(101)
    (nnunet.parent / "nnUNet_results" / "Dataset102_Old").mkdir()
    for number, other in ((101, "Dataset101_Full"), (102, "Dataset102_Old")):
        with pytest.raises(ValueError, match=f"The id {number} is taken: .*{other}"):
            raw_dataset.new_dataset_folder(number, "New")
    with pytest.raises(ValueError, match="from 1 to 999, but got 1000"):
        raw_dataset.new_dataset_folder(1000, "New")
    with pytest.raises(ValueError, match="letters, digits"):
        raw_dataset.new_dataset_folder(103, "../New")


def test_overwrite_replaces_only_what_our_commands_made(make_dataset, nnunet):
    folder, _ = make_dataset(101)
    with pytest.raises(FileExistsError, match="exists already.*--overwrite"):
        raw_dataset.new_dataset_folder(101, "Full")
    with pytest.raises(FileExistsError, match="was not made by nnunet_dsp"):
        raw_dataset.new_dataset_folder(101, "Full", overwrite=True)
    raw_dataset.write_record(folder, "a test", {})
    assert raw_dataset.new_dataset_folder(101, "Full", overwrite=True) == folder


def test_a_folder_appears_complete_or_not_at_all(nnunet):
    target = nnunet / "Dataset103_New"

    def fail():
        with raw_dataset.building(target) as folder:
            (folder / "half").write_text("written")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fail()
    assert list(nnunet.iterdir()) == []
    with raw_dataset.building(target) as folder:
        (folder / "file").write_text("old")
        assert not target.exists()
    assert [p.name for p in nnunet.iterdir()] == ["Dataset103_New"]
    with pytest.raises(RuntimeError, match="power cut"):
        fail()
    assert (target / "file").read_text() == "old"
    with raw_dataset.building(target) as folder:
        (folder / "file").write_text("new")
    assert (target / "file").read_text() == "new"
    assert [p.name for p in nnunet.iterdir()] == ["Dataset103_New"]


def test_nnunet_raw_can_be_moved_with_the_links_in_it(make_dataset, nnunet, tmp_path):
    folder, _ = make_dataset(101)
    image = folder / "imagesTr" / "case_00_0000.png"
    outside = tmp_path / "outside.png"
    shutil.copyfile(image, outside)
    with raw_dataset.building(nnunet / "Dataset102_Links") as new:
        raw_dataset.link_file(image, new / "inside.png")
        raw_dataset.link_file(outside, new / "outside.png")
        raw_dataset.link_file(new / "inside.png", new / "again.png")
        with pytest.raises(FileNotFoundError, match="nowhere.png is not a file"):
            raw_dataset.link_file(folder / "nowhere.png", new / "broken.png")
    links = nnunet / "Dataset102_Links"
    assert not (links / "inside.png").readlink().is_absolute()
    assert (links / "outside.png").readlink() == outside
    assert (links / "again.png").readlink() == (links / "inside.png").readlink(), "a link to a link"
    moved = nnunet.rename(tmp_path / "elsewhere")
    assert (moved / "Dataset102_Links" / "inside.png").read_bytes() == outside.read_bytes()


def test_without_symbolic_links_files_are_copied(make_dataset, nnunet, monkeypatch):
    folder, _ = make_dataset(101)

    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr("os.symlink", refuse)
    image = folder / "imagesTr" / "case_00_0000.png"
    raw_dataset.link_file(image, nnunet / "copy.png")
    assert not (nnunet / "copy.png").is_symlink()
    assert (nnunet / "copy.png").read_bytes() == image.read_bytes()


def test_json_is_replaced_whole_or_not(tmp_path):
    file = tmp_path / "x.json"
    raw_dataset.write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        raw_dataset.write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_a_label_that_is_no_label_is_named(make_dataset, read):
    folder, masks = make_dataset(101)
    dataset = raw_dataset.read_dataset(101)
    file = folder / "labelsTr" / "case_00.png"
    mask, _ = raw_dataset.read_label(dataset.reader_writer(), file)
    assert np.array_equal(mask[0], masks["case_00"]) and mask.dtype == np.int16
    file.write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"case_00\.png cannot be read as a label file"):
        raw_dataset.read_label(dataset.reader_writer(), file)
    from skimage import io

    io.imsave(file, np.zeros((8, 8, 3), np.uint8), check_contrast=False)
    with pytest.raises(ValueError, match=r"case_00\.png: expected one channel .* but got 3"):
        raw_dataset.read_label(dataset.reader_writer(), file)


def _square(value: int) -> int:
    return value * value


def test_cases_are_mapped_in_order_and_nnunets_own_setting_limits_the_workers(monkeypatch):
    assert list(map_cases(_square, range(5), processes=1, description="Squaring")) == [0, 1, 4, 9, 16]
    monkeypatch.setenv("nnUNet_def_n_proc", "3")
    assert default_num_processes() == 3


def test_the_record_keeps_plain_arguments_and_versions(tmp_path):
    raw_dataset.write_record(tmp_path, "a test", {"source": Path("x"), "_run": 1, "run": print, "n": [1]}, seed=3)
    record = json.loads((tmp_path / "nnunet_dsp_record.json").read_text())
    assert record["arguments"] == {"source": "x", "n": [1]}
    assert record["seed"] == 3 and "nnunetv2" in record["versions"]
