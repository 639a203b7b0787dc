"""report/batches.py: what the pictures of a training batch show is what the trainer's own loader hands over."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from PIL import Image

from nnunet_dsp.annotations import AnnotationError
from nnunet_dsp.batch import AnnotationBatch
from nnunet_dsp.report.batches import SIZE, BatchOptions, choose_configuration, draw_batches
from nnunet_dsp.trainers import nnUNetTrainerDSP

NAME = "Dataset001_Tiny"
SEED = 5
COLOURS = {1: (0xE6, 0x9F, 0x00), 2: (0x56, 0xB4, 0xE9)}  # Okabe and Ito's orange and sky blue
BACKGROUND_ONLY = (43, 43, 51)


@pytest.fixture
def planned(tiny):
    """The tiny dataset with plans and dataset.json on disk, as nnU-Net's planning leaves them."""
    plans = tiny.trainer(nnUNetTrainer).plans_manager.plans
    (tiny.base / "nnUNetPlans.json").write_text(json.dumps(plans))
    return tiny


def draw(dataset, batches=2, trainer="nnUNetTrainerDSP", fold=0):
    options = BatchOptions(batches, "nnUNetPlans", dataset.configuration, fold, trainer, SEED)
    return draw_batches(NAME, options)


def own_batches(dataset, number):
    """The batches that training itself gets with the same seed once the warm-up, a quarter of it, is over."""
    trainer = dataset.trainer(nnUNetTrainerDSP, settings={"seed": SEED})
    trainer._set_batch_size_and_oversample()
    trainer.num_iterations_per_epoch = 250
    trainer.current_epoch = trainer.num_epochs // 4
    loader, _ = trainer.get_dataloaders()
    return [next(loader) for _ in range(number)]


def layer_of(picture) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture.layer)).convert("RGBA")).astype(int)


def test_the_batches_are_those_that_training_with_this_seed_gets(planned):
    reports, notes = draw(planned, batches=4)
    masks = weak = 0
    for report, batch in zip(reports, own_batches(planned, 4), strict=True):
        target = (batch["target"][0] if isinstance(batch["target"], list) else batch["target"]).numpy()
        said = AnnotationBatch.from_list(batch["annotations"])
        assert [item.case for item in report.items] == [str(key) for key in batch["keys"]]
        for number, item in enumerate(report.items):
            assert item.masked == (number >= len(report.items) - batch["num_masked"])
            points = [mark for mark in item.seen.marks if mark.shape == "point"]
            mine = (said.points // 256 == number).numpy()
            places = np.stack(np.unravel_index(said.points.numpy()[mine] % 256, (16, 16)), axis=1)
            expected = sorted((x * SIZE / 16 + SIZE / 32, y * SIZE / 16 + SIZE / 32) for y, x in places)
            np.testing.assert_allclose(sorted(mark.at for mark in points), expected)
            boxes = [mark for mark in item.seen.marks if mark.shape == "outline"]
            assert len(boxes) == int((said.box_item == number).sum())
            if item.masked:
                masks += 1
                layer = layer_of(item.mask) if item.mask.layer else np.zeros((16, 16, 4), int)
                for label, colour in COLOURS.items():
                    np.testing.assert_array_equal(
                        (layer[..., :3] == colour).all(-1) & (layer[..., 3] > 0), target[number, 0] == label
                    )
            else:
                weak += 1
                assert item.mask is None
    assert masks and weak
    assert any("Training on" in line for line in notes)


def test_what_the_filter_allows_is_shown_in_colour_and_counted(planned):
    """By hand: a weak case says nucleus boxes are complete, so outside them a voxel is background or cell."""
    reports, _ = draw(planned, batches=6)
    seen = 0
    for item in (item for report in reports for item in report.items):
        assert sum(part for _, part in item.sets) == pytest.approx(1, abs=1e-6)
        layer = layer_of(item.allowed)
        if item.masked:
            assert {words for words, _ in item.sets} <= {"only background", "only cell", "only nucleus"}
            assert {tuple(c) for c in layer[..., :3].reshape(-1, 3).tolist()} <= {*COLOURS.values(), BACKGROUND_ONLY}
            continue
        if not item.case.startswith("weak"):
            assert {words for words, _ in item.sets} == {"any class"}
            continue
        assert {words for words, _ in item.sets} <= {
            "background or cell", "any class", "only nucleus", "only background", "only cell",
        }  # fmt: skip
        for mark in item.seen.marks:
            if mark.shape == "point":
                x, y = (int(value * 16 / SIZE) for value in mark.at)
                colour = COLOURS.get(mark.label, BACKGROUND_ONLY)
                assert tuple(layer[y, x, :3].tolist()) == colour
                seen += 1
    assert seen


def test_boxes_show_their_lines_where_these_count(planned):
    """Inside a box drawn whole each row and column counts, so its voxels have one of the two tints of its class."""
    reports, _ = draw(planned, batches=6)
    tints = 0
    for item in (item for report in reports for item in report.items):
        outlines = [mark for mark in item.seen.marks if mark.shape == "outline"]
        if not outlines:
            continue
        layer = layer_of(item.seen)
        shown = {(*pixel[:3], pixel[3] > 0) for pixel in layer.reshape(-1, 4).tolist()}
        for mark in outlines:
            assert (*COLOURS[mark.label], True) in shown or (128, 128, 128, True) in shown
            tints += (*COLOURS[mark.label], True) in shown
            assert "lines count" in mark.title
    assert tints


def test_classes_are_named_by_their_numbers_however_dataset_json_orders_them(planned):
    planned.dataset_json["labels"] = {"background": 0, "nucleus": 2, "cell": 1, "ignore": 3}
    planned.trainer(nnUNetTrainer)  # writes dataset.json
    reports, _ = draw(planned, batches=6)
    titles = {mark.label: mark.title for report in reports for item in report.items for mark in item.seen.marks}
    assert "nucleus" in titles[2]
    words = {words for report in reports for item in report.items for words, _ in item.sets}
    assert "background or cell" in words, "outside the complete boxes of nuclei"
    assert "background or nucleus" not in words


@pytest.mark.parametrize("tiny", [3], indirect=True)
def test_volumes_are_shown_in_the_slice_where_annotations_lie(planned):
    reports, _ = draw(planned, batches=4)
    weak = [item for report in reports for item in report.items if item.case.startswith("weak")]
    assert weak
    assert all(item.facts[0].startswith("slice ") and item.facts[0].endswith("of 0 to 15") for item in weak)
    assert any(mark.shape == "outline" for item in weak for mark in item.seen.marks)


def test_nnunets_own_trainer_can_be_looked_at_too(planned):
    reports, _ = draw(planned, batches=1, trainer="nnUNetTrainer", fold="all")
    assert len(reports[0].items) == 2
    assert "0 points, 0 boxes" in reports[0].summary


def test_nothing_is_written_into_nnunets_folders(planned, tmp_path):
    def contents():
        return {str(p): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    (planned.base / "splits_final.json").unlink(missing_ok=True)
    before = contents()
    draw(planned, batches=1)
    assert contents() == before


def test_what_would_stop_the_training_stops_the_drawing_with_the_same_words(planned):
    said = {"format": "nnunet_dsp.annotations", "version": 1, "points": [planned.point("nucleus", 20, 20)]}
    (planned.base / "annotationsTr" / "masked_0.json").write_text(json.dumps(said))
    with pytest.raises(AnnotationError, match=r"masked_0 .*points\[0\] marks 'nucleus'"):
        draw(planned, fold="all")


def test_unknown_trainers_and_configurations_are_named(planned):
    with pytest.raises(ValueError, match="finds no trainer 'nnUNetTrainerSDP'"):
        draw(planned, trainer="nnUNetTrainerSDP")
    with pytest.raises(ValueError, match="no configuration '3d_lowres', but: 2d"):
        draw_batches(NAME, BatchOptions(1, "nnUNetPlans", "3d_lowres", 0, "nnUNetTrainerDSP", 0))
    assert choose_configuration(NAME, "nnUNetPlans") == "2d"
    with pytest.raises(FileNotFoundError, match="There are: nnUNetPlans"):
        choose_configuration(NAME, "Plans")
