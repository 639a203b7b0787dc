"""The fingerprint is that of the masked voxels, and plans made from another one are recognised."""

import json

import numpy as np
import pytest
from skimage import io

from nnunet_dsp.annotations import Annotations, Box, Point
from nnunet_dsp.dataset_conversion import raw_dataset
from nnunet_dsp.dataset_conversion.fingerprint import (
    INTENSITIES,
    annotated_voxels,
    fingerprint_is_contaminated,
    write_fingerprint,
)

LABELS = {"background": 0, "membrane": 1, "mitochondrion": 2, "synapse": 3, "ignore": 4}


@pytest.fixture
def weak_dataset(make_dataset, nnunet):
    """Four cases: one masked, one partly, two not at all. Returns dataset, its nnUNet_preprocessed folder, masks."""
    folder, masks = make_dataset(101, cases=4, channels=("CT", "other"), labels=LABELS)
    masks["case_01"][:, 20:] = 4
    masks["case_02"][:] = masks["case_03"][:] = 4
    for case, mask in masks.items():
        io.imsave(folder / "labelsTr" / f"{case}.png", mask, check_contrast=False)
    return raw_dataset.read_dataset(101), nnunet.parent / "nnUNet_preprocessed" / "Dataset101_Full", masks


def by_hand(dataset, foreground, channel):
    """What nnU-Net's documentation says it computes: equally many voxels drawn from each case, then all together."""
    drawn = []
    for name, case in dataset.cases.items():
        image = io.imread(case.images[channel]).astype(np.float32)
        inside = foreground[name]
        if inside.any():
            state = np.random.RandomState(1234)
            for _ in range(channel):  # the channels draw one after the other
                state.choice(np.zeros(inside.sum()), 10_000, replace=True)
            drawn.append(state.choice(image[inside], 10_000, replace=True))
    values = np.concatenate(drawn)
    return {
        "mean": values.mean(),
        "median": np.percentile(values, 50),
        "std": values.std(),
        "min": values.min(),
        "max": values.max(),
        "percentile_99_5": np.percentile(values, 99.5),
        "percentile_00_5": np.percentile(values, 0.5),
    }


@pytest.fixture
def few_samples(monkeypatch):
    """10 000 voxels a case instead of 25 million; the datasets here have four."""
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

    original = DatasetFingerprintExtractor.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.num_foreground_voxels_for_intensitystats = 10_000 * len(self.dataset)

    monkeypatch.setattr(DatasetFingerprintExtractor, "__init__", init)


@pytest.mark.slow
@pytest.mark.usefixtures("few_samples")
def test_intensities_are_those_of_the_masked_voxels_and_not_nnunets(weak_dataset):
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

    dataset, folder, masks = weak_dataset
    assert write_fingerprint(dataset, folder, {}) == ("masks", True)
    ours = json.loads((folder / "dataset_fingerprint.json").read_text())
    foreground = {c: (m > 0) & (m != 4) for c, m in masks.items()}
    for channel in range(2):
        assert ours[INTENSITIES][str(channel)] == pytest.approx(by_hand(dataset, foreground, channel), rel=1e-6)
    assert ours["nnunet_dsp"]["ignore_excluded"] is True
    assert [p.name for p in folder.iterdir()] == ["dataset_fingerprint.json"], "temporary labels are left behind"

    # nnU-Net takes it as it is ...
    extractor = DatasetFingerprintExtractor("Dataset101_Full", 1)
    assert extractor.run(overwrite_existing=False) == ours
    # ... and makes another one itself, the same but for the intensities
    theirs = json.loads(json.dumps(extractor.run(overwrite_existing=True), default=lambda o: np.asarray(o).tolist()))
    assert abs(theirs[INTENSITIES]["0"]["mean"] - ours[INTENSITIES]["0"]["mean"]) > 10
    for key in ("spacings", "shapes_after_crop", "median_relative_size_after_cropping"):
        assert theirs[key] == ours[key]


@pytest.mark.slow
@pytest.mark.usefixtures("few_samples")
def test_without_masks_the_annotated_voxels_count_and_without_those_all(weak_dataset):
    dataset, folder, masks = weak_dataset
    for case, mask in masks.items():
        mask[:] = 4
        mask[0, :5] = 0  # background says nothing about the foreground's intensities
        io.imsave(dataset.folder / "labelsTr" / f"{case}.png", mask, check_contrast=False)
    boxes = (Box("synapse", (3.0, 4.0), (9.0, 12.0)), Box("background", (0.0, 0.0), (40.0, 48.0)))
    annotations = {"case_02": Annotations(shape=(40, 48), points=(Point("membrane", (20.0, 30.0)),), boxes=boxes)}
    foreground = {c: np.zeros(m.shape, bool) for c, m in masks.items()}
    foreground["case_02"][3:9, 4:12] = foreground["case_02"][20, 30] = True
    assert write_fingerprint(dataset, folder, annotations) == ("annotations", True)
    ours = json.loads((folder / "dataset_fingerprint.json").read_text())
    assert ours[INTENSITIES]["0"] == pytest.approx(by_hand(dataset, foreground, 0), rel=1e-6)

    assert write_fingerprint(dataset, folder, annotations) == ("annotations", False), "nothing has changed"
    assert write_fingerprint(dataset, folder, {}) == ("everything", True), "the annotations have"
    everything = {c: np.ones(m.shape, bool) for c, m in masks.items()}
    ours = json.loads((folder / "dataset_fingerprint.json").read_text())
    assert ours[INTENSITIES]["0"] == pytest.approx(by_hand(dataset, everything, 0), rel=1e-6)


def test_annotated_voxels_in_2d_and_3d():
    flat = Annotations(points=(Point("a", (2.4, 3.6)), Point("background", (0.0, 0.0))))
    assert [tuple(map(int, v)) for v in np.argwhere(annotated_voxels(flat, (1, 5, 5)))] == [(0, 2, 4)]
    deep = Annotations(boxes=(Box("a", (1.0, 0.5, 2.0), (3.0, 2.0, 4.0)),))
    expected = np.zeros((4, 5, 6), bool)
    expected[1:3, 1:2, 2:4] = True
    assert np.array_equal(annotated_voxels(deep, (4, 5, 6)), expected)
    assert not annotated_voxels(None, (1, 2, 2)).any()


def plans(intensities, *schemes):
    return {INTENSITIES: intensities, "configurations": {"2d": {"normalization_schemes": list(schemes)}}}


def test_contaminated_plans_are_recognised(tmp_path):
    right, wrong = {"0": {"mean": 90.0, "std": 4.0}}, {"0": {"mean": 40.0, "std": 4.0}}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": LABELS}))
    ct = plans(right, "ZScoreNormalization", "CTNormalization")
    assert fingerprint_is_contaminated(ct, tmp_path), "there is no fingerprint of ours at all"

    mark = {"ignore_excluded": True, "version": "0", "format": 1, "foreground": "masks", "inputs": ""}
    file = tmp_path / "dataset_fingerprint.json"
    file.write_text(json.dumps({INTENSITIES: right}))
    assert fingerprint_is_contaminated(ct, tmp_path), "the fingerprint is nnU-Net's own"
    file.write_text(json.dumps({INTENSITIES: right, "nnunet_dsp": mark}))
    assert not fingerprint_is_contaminated(ct, tmp_path)
    assert fingerprint_is_contaminated(plans(wrong, "CTNormalization"), tmp_path), "the plans are older"
    assert fingerprint_is_contaminated(plans(wrong, "SomebodysNormalization"), tmp_path), "it may use intensities"
    assert not fingerprint_is_contaminated(plans(wrong, "ZScoreNormalization"), tmp_path), "each image alone"

    without_ignore = {"labels": {k: v for k, v in LABELS.items() if k != "ignore"}}
    assert not fingerprint_is_contaminated(plans(wrong, "CTNormalization"), tmp_path, without_ignore)
