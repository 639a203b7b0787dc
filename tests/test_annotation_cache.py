"""What a start of a training found is found again at the next, and only as long as nothing changed."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from batchgenerators.utilities.file_and_folder_operations import save_pickle

from nnunet_dsp import training_set
from nnunet_dsp.annotation_cache import read_cache, read_flags
from nnunet_dsp.annotations import AnnotationError, LabelNames
from nnunet_dsp.training_set import find_weak_cases, load_case_annotations

LABELS = LabelNames.from_dataset_json({"labels": {"background": 0, "cell": 1, "nucleus": 2, "ignore": 3}})
CASES = ("a", "b", "c")


def write(folder, case, **content):
    said = {"format": "nnunet_dsp.annotations", "version": 1, **content}
    (folder / "annotationsTr" / f"{case}.json").write_text(json.dumps(said))


@pytest.fixture
def dataset(tmp_path):
    (tmp_path / "annotationsTr").mkdir()
    (tmp_path / "stored").mkdir()
    for case in CASES:
        whole = {"shape_before_cropping": (1, 30, 40), "shape_after_cropping_and_before_resampling": (1, 30, 40)}
        found = {(-1, 0, 1, 2): [] if case == "c" else [[0, 0, 1, 1]]}
        box = {"bbox_used_for_cropping": [[0, 1], [0, 30], [0, 40]], "class_locations": found}
        save_pickle({**whole, **box}, str(tmp_path / "stored" / f"{case}.pkl"))
    write(tmp_path, "a", points=[{"label": "cell", "at": [3, 4]}, {"label": "nucleus", "at": [5, 6]}])
    write(tmp_path, "b", boxes=[{"label": "cell", "start": [1, 2], "stop": [9, 8], "tight": False}],
          complete={"boxes": ["cell"]})
    write(tmp_path, "c", image_level={"present": ["cell"], "absent": ["nucleus"]}, mask_labels=["cell"])
    return tmp_path


def load(folder, cases=CASES, labels=LABELS, mask_file=None, transpose=(0, 1, 2)):
    return load_case_annotations(
        folder / "annotationsTr",
        folder / "stored",
        list(cases),
        list(CASES),
        lambda case: (1, 30, 40),
        labels,
        transpose,
        lambda case: None,
        mask_file=mask_file,
        cache_file=folder / "cache" / "annotations.npz",
    )


def same(one, other):
    assert set(one) == set(other)
    for case in one:
        for name in one[case].__dataclass_fields__:
            ours, theirs = getattr(one[case], name), getattr(other[case], name)
            np.testing.assert_array_equal(ours, theirs)
            assert ours.dtype == theirs.dtype, name


@pytest.fixture
def mapped(monkeypatch):
    """The cases that are mapped, which is the work the cache saves."""
    counted = []
    work = training_set.map_case

    def counting(said, labels, frame):
        counted.append(len(said.points) + 10 * len(said.boxes))
        return work(said, labels, frame)

    monkeypatch.setattr(training_set, "map_case", counting)
    return counted


def test_the_next_start_maps_nothing_and_finds_the_same(dataset, mapped):
    first = load(dataset)
    assert len(mapped) == 3
    same(load(dataset), first)
    assert len(mapped) == 3


def test_a_changed_annotation_file_is_read_again_and_no_other(dataset, mapped):
    load(dataset)
    write(dataset, "a", points=[{"label": "cell", "at": [3, 4]}])
    assert len(load(dataset)["a"].points) == 1
    assert len(mapped) == 4


def test_a_case_preprocessed_anew_is_mapped_again(dataset, mapped):
    load(dataset)
    file = dataset / "stored" / "b.pkl"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    load(dataset)
    assert len(mapped) == 4


def test_a_changed_mask_is_validated_again(dataset, mapped):
    mask = dataset / "mask.png"
    mask.write_bytes(b"1")
    load(dataset, mask_file=lambda case: mask)
    mask.write_bytes(b"12")
    load(dataset, mask_file=lambda case: mask)
    assert len(mapped) == 6


def test_other_labels_or_another_orientation_map_everything_again(dataset, mapped):
    load(dataset)
    other = LabelNames.from_dataset_json({"labels": {"background": 0, "nucleus": 1, "cell": 2, "ignore": 3}})
    assert load(dataset)["b"].box_class.tolist() == [1]
    assert load(dataset, labels=other)["b"].box_class.tolist() == [2]
    load(dataset, transpose=(0, 2, 1))
    assert len(mapped) == 9


def test_each_fold_adds_its_cases(dataset, mapped):
    load(dataset, cases=("a",))
    load(dataset, cases=("b", "c"))
    same(load(dataset), load(dataset))
    assert len(mapped) == 3


def test_a_file_of_no_case_is_named_even_when_everything_is_known(dataset):
    load(dataset)
    write(dataset, "stranger")
    with pytest.raises(AnnotationError, match="stranger"):
        load(dataset)


@pytest.mark.parametrize("damage", [b"", b"no archive", None])
def test_a_damaged_file_is_made_anew(dataset, mapped, damage):
    first = load(dataset)
    file = dataset / "cache" / "annotations.npz"
    file.write_bytes(file.read_bytes()[:700] if damage is None else damage)
    assert read_cache(file) == {}
    same(load(dataset), first)
    assert len(mapped) == 6
    load(dataset)
    assert len(mapped) == 6


def test_a_folder_that_cannot_be_written_to_is_no_error(dataset):
    (dataset / "cache").write_text("a file where the folder would be")
    assert len(load(dataset)) == 3


def test_no_temporary_files_stay_behind(dataset):
    load(dataset)
    assert [path.name for path in (dataset / "cache").iterdir()] == ["annotations.npz"]


def test_weak_cases_are_found_once(dataset, monkeypatch):
    file = dataset / "cache" / "weak.json"
    key = (-1, 0, 1, 2)
    assert find_weak_cases(dataset / "stored", CASES, key, file) == ["c"]
    assert set(read_flags(file)) == set(CASES)
    monkeypatch.setattr(training_set, "load_pickle", lambda name: pytest.fail(f"read {name} again"))
    assert find_weak_cases(dataset / "stored", CASES, key, file) == ["c"]
    file.write_text('{"a": 3}')
    monkeypatch.undo()
    assert find_weak_cases(dataset / "stored", CASES, key, file) == ["c"]


def test_cases_preprocessed_before_the_ignore_label_was_declared_are_named(dataset):
    with pytest.raises(ValueError, match=r"a.pkl was preprocessed with other labels .* Run nnUNetv2_preprocess again"):
        find_weak_cases(dataset / "stored", CASES, (-1, 0, 1, 2, 3))
