"""data.py: annotations beside masks, through nnU-Net's own loader, dataset and transforms."""

from __future__ import annotations

import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from skimage.measure import label as connected_components

from nnunet_dsp.annotations import AnnotationError, Annotations, Box, LabelNames, Point
from nnunet_dsp.batch import AnnotationBatch
from nnunet_dsp.data import DSPDataLoader, mask_components
from nnunet_dsp.geometry import CaseFrame, PatchMap, coordinate_channels
from nnunet_dsp.patch_annotations import ABSENT, PRESENT, UNKNOWN, annotate_patch, map_case
from nnunet_dsp.pseudo_labels import allowed_classes

LABELS = {"background": 0, "cell": 1, "nucleus": 2, "ignore": 3}
NAMES = LabelNames.from_dataset_json({"labels": LABELS})
IGNORE = 3
ANNOTATED = (-1, 0, 1, 2)


def frame(shape) -> CaseFrame:
    return CaseFrame((0, 1, 2), np.zeros(3), np.ones(3), np.asarray(shape))


def locations(seg):
    found = {c: np.argwhere(seg == c) for c in (1, 2)}
    found[ANNOTATED] = np.argwhere(seg != IGNORE)
    return {key: value if len(value) else [] for key, value in found.items()}


def save_case(folder, name, image, seg):
    shape = (1, *image.shape)
    nnUNetDatasetBlosc2.save_case(
        image[None].astype(np.float32),
        seg[None].astype(np.int16),
        {"class_locations": locations(seg[None])},
        str(folder / name),
        chunks=shape,
        blocks=shape,
    )


@pytest.fixture
def dataset(tmp_path):
    """Two masked and four weak 2D cases of 40 x 48 voxels; each voxel's intensity names its place."""
    shape = (1, 40, 48)
    image = np.arange(np.prod(shape)).reshape(shape)
    for name in ("masked_a", "masked_b"):
        seg = np.zeros(shape, np.int16)
        seg[0, 5:20, 8:30] = 1
        seg[0, 8:12, 10:14] = 2
        save_case(tmp_path, name, image, seg)
    for name in ("weak_a", "weak_b", "weak_c", "weak_d"):
        save_case(tmp_path, name, image, np.full(shape, IGNORE, np.int16))
    return nnUNetDatasetBlosc2(str(tmp_path))


WEAK = ["weak_a", "weak_b", "weak_c", "weak_d"]


def loader(dataset, annotations=None, batch_size=4, patch=(24, 24), crop=(32, 32), augment=False, **options):
    transforms = (
        nnUNetTrainer.get_training_transforms(patch, (-np.pi, np.pi), None, (0, 1), False, ignore_label=IGNORE)
        if augment
        else None
    )
    options = {"weak_cases": WEAK, "masked_fraction": 0.5, "num_classes": 3, "ignore_label": IGNORE, **options}
    return DSPDataLoader(
        dataset,
        batch_size,
        crop if augment else patch,
        patch,
        LabelManager(LABELS, None),
        oversample_foreground_percent=0.33,
        transforms=transforms,
        annotations=annotations or {},
        **options,
    )


def annotated(**kwargs) -> dict:
    said = Annotations(shape=(40, 48), **kwargs)
    return {case: map_case(said, NAMES, frame((1, 40, 48))) for case in WEAK}


@pytest.mark.parametrize(("fraction", "batch_size"), [(0.5, 4), (0.25, 4), (0.5, 3), (0.9, 2)])
def test_batches_hold_the_stated_share_of_masked_cases(dataset, fraction, batch_size):
    np.random.seed(0)
    drawn = loader(dataset, batch_size=batch_size, masked_fraction=fraction)
    masked = 0
    for _ in range(200):
        batch = next(drawn)
        kinds = ["masked" in key for key in batch["keys"]]
        assert kinds == sorted(kinds), "weak items come first"
        assert sum(kinds) == batch["num_masked"]
        assert abs(sum(kinds) - fraction * batch_size) < 1
        masked += sum(kinds)
    assert masked / (200 * batch_size) == pytest.approx(fraction, abs=0.05)


@pytest.mark.parametrize(("batch_size", "fraction", "shares"), [(2, 0.5, (1 / 2, 1 / 2)), (4, 0.25, (1 / 3, 1 / 2))])
def test_a_group_of_one_item_is_centred_on_foreground_as_often_as_one_of_two(dataset, batch_size, fraction, shares):
    drawn = loader(dataset, batch_size=batch_size, masked_fraction=fraction)
    np.random.seed(0)
    asked = []
    for _ in range(300):
        drawn._num_masked = drawn._draw_num_masked()
        asked.append([drawn.get_do_oversample(item) for item in range(batch_size)])
    weak, masked = np.split(np.asarray(asked), [int(batch_size * (1 - fraction))], axis=1)
    assert (weak.mean(), masked.mean()) == pytest.approx(shares, abs=0.07)


def test_annotations_far_from_a_partial_mask_are_seen_too(tmp_path):
    target = np.full((1, 96, 96), IGNORE, np.int16)
    target[0, :12, :12] = 0
    target[0, 4:8, 4:8] = 1
    save_case(tmp_path, "partly", np.zeros((1, 96, 96)), target)
    said = Annotations(shape=(96, 96), points=(Point("nucleus", (80, 80)),))
    drawn = loader(
        nnUNetDatasetBlosc2(str(tmp_path)), {"partly": map_case(said, NAMES, frame((1, 96, 96)))}, weak_cases=[]
    )
    np.random.seed(0)
    shown = sum(len(AnnotationBatch.from_list(next(drawn)["annotations"]).points) for _ in range(50))
    assert 15 <= shown <= 35, "one in four of 200 patches is centred on foreground, half of these on the point"


@pytest.mark.parametrize("workers", [1, 2])
def test_weak_cases_wait_for_the_warm_ups_last_batch_whoever_draws_it(dataset, workers):
    for worker in range(workers):
        for first in (0, 3):
            drawn = loader(dataset, masked_batches=7, num_workers=workers, first_batch=first)
            drawn.set_thread_id(worker)
            found = [next(drawn)["num_masked"] for _ in range(8)]
            numbers = range(first + worker, first + worker + 8 * workers, workers)
            assert found == [4 if number < 7 else 2 for number in numbers]


def test_without_masked_cases_there_is_no_warm_up_of_batches(dataset):
    dataset.identifiers = WEAK
    assert next(loader(dataset, masked_batches=7))["num_masked"] == 0


def test_a_dataset_without_weak_cases_loads_exactly_as_in_nnunet(dataset):
    everything = {"weak_cases": [], "batch_size": 3}
    dataset.identifiers = ["masked_a", "masked_b"]
    ours = loader(dataset, **everything)
    theirs = nnUNetDataLoader(
        dataset, 3, (24, 24), (24, 24), LabelManager(LABELS, None), oversample_foreground_percent=0.33
    )
    for seed in range(5):
        np.random.seed(seed)
        batch = next(ours)
        np.random.seed(seed)
        expected = next(theirs)
        assert list(batch["keys"]) == list(expected["keys"])
        torch.testing.assert_close(batch["data"], expected["data"])
        torch.testing.assert_close(batch["target"], expected["target"])
        assert batch["num_masked"] == 3


def test_weak_cases_are_drawn_without_a_warning_and_stay_ignored_even_where_padded(dataset):
    drawn = loader(dataset, patch=(56, 56), crop=(64, 64), augment=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(10):
            batch = next(drawn)
            weak = batch["target"][: 4 - batch["num_masked"]]
            assert (weak == IGNORE).all()
            outside = AnnotationBatch.from_list(batch["annotations"]).outside
            assert outside[: 4 - batch["num_masked"]].any(), "56 voxels of patch around 40 of image: padding"


def test_padding_that_the_augmentation_makes_inside_the_image_counts_for_nothing_either(tmp_path):
    shape = (1, 90, 90)
    save_case(tmp_path, "weak_a", np.ones(shape), np.full(shape, IGNORE, np.int16))
    drawn = loader(nnUNetDatasetBlosc2(str(tmp_path)), patch=(24, 24), crop=(24, 24), augment=True)
    spatial = nnUNetTrainer.get_training_transforms((24, 24), (-np.pi, np.pi), None, (0, 1), False).transforms[0]
    drawn._augment = ComposeTransforms([spatial])  # no noise, so that padding is what is 0
    np.random.seed(0)
    torch.manual_seed(0)
    padded = 0
    for _ in range(20):
        batch = next(drawn)
        blank = batch["data"][:, 0] == 0
        outside = AnnotationBatch.from_list(batch["annotations"]).outside
        assert not blank.any() or bool(outside[blank].all())
        padded += int(blank.any())
    assert padded > 5


def test_patches_are_centred_on_different_annotations_and_not_on_always_the_same_one(dataset):
    points = tuple(Point("cell", at) for at in ((5, 5), (5, 40), (35, 5), (35, 40)))
    drawn = loader(dataset, annotated(points=points), batch_size=6, masked_fraction=0.0, patch=(9, 9))
    np.random.seed(0)
    seen = Counter()
    for _ in range(60):
        batch = next(drawn)
        known = AnnotationBatch.from_list(batch["annotations"])
        corner = batch["data"][:, 0, 4, 4].long()
        for item in (known.points // 81).unique().tolist():
            seen[(int(corner[item]) // 48 // 20, int(corner[item]) % 48 // 24)] += 1
    assert len(seen) == 4, f"some annotations are never visited: {seen}"
    assert min(seen.values()) > 10


def test_points_and_boxes_arrive_at_the_voxels_that_show_them(dataset):
    """Intensity names the place: what the batch shows at a point must be what the image holds there."""
    points = (Point("cell", (12, 20)), Point("nucleus", (30, 33)))
    boxes = (Box("cell", (10, 16), (20, 26)), Box("nucleus", (28, 30), (36, 40), tight=False))
    drawn = loader(dataset, annotated(points=points, boxes=boxes), masked_fraction=0.0)
    values = {1: 12 * 48 + 20, 2: 30 * 48 + 33}
    found = 0
    for _ in range(20):
        batch = next(drawn)
        known = AnnotationBatch.from_list(batch["annotations"])
        flat = batch["data"][:, 0].reshape(-1)
        for voxel, label in zip(known.points.tolist(), known.point_class.tolist(), strict=True):
            assert flat[voxel] == values[label]
            found += 1
        for box in range(len(known.box_class)):
            shown = flat[known.box_voxels[known.box_of_voxel == box]].long()
            low, high = ((10, 16), (20, 26)) if known.box_class[box] == 1 else ((28, 30), (36, 40))
            rows, columns = shown // 48, shown % 48
            assert ((rows >= low[0]) & (rows < high[0]) & (columns >= low[1]) & (columns < high[1])).all()
            assert bool(known.box_tight[box]) == (known.box_class[box] == 1)
            found += 1
        lines = known.box_line[known.box_line >= 0].unique()
        assert lines.tolist() == list(range(len(known.line_box)))
    assert found > 40


def test_present_holds_only_where_the_patch_shows_everything_or_the_object_itself():
    said = Annotations(shape=(20, 20), present=("cell", "nucleus"), points=(Point("nucleus", (3, 3)),))
    case = map_case(said, NAMES, frame((1, 20, 20)))
    target = np.full((20, 20), IGNORE, np.int16)

    def tags(start, crop):
        patch = PatchMap(coordinate_channels((0, *start), crop, 2), (1, 20, 20))
        return annotate_patch(case, patch, target[: crop[0], : crop[1]]).tags.tolist()

    assert tags((0, 0), (20, 20)) == [UNKNOWN, PRESENT, PRESENT]
    assert tags((0, 0), (10, 10)) == [UNKNOWN, UNKNOWN, PRESENT]
    assert tags((8, 8), (12, 12)) == [UNKNOWN, UNKNOWN, UNKNOWN]


def test_a_point_that_preprocessing_cropped_off_shows_nothing_but_keeps_its_class_from_being_absent():
    said = Annotations(shape=(40, 48), points=(Point("nucleus", (2, 30)),), complete_points=("cell", "nucleus"))
    cropped = CaseFrame((0, 1, 2), np.array([0.0, 5, 0]), np.ones(3), np.array([1, 35, 48]))
    case = map_case(said, NAMES, cropped)
    assert len(case.points) == 0 and len(case.point_class) == 0
    assert case.tags.tolist() == [UNKNOWN, ABSENT, UNKNOWN]


def test_a_mask_that_shows_the_class_keeps_its_tag():
    case = map_case(Annotations(shape=(20, 20), present=("cell",)), NAMES, frame((1, 20, 20)))
    patch = PatchMap(coordinate_channels((0, 5, 5), (8, 8), 2), (1, 20, 20))
    target = np.zeros((8, 8), np.int16)
    assert annotate_patch(case, patch, target).tags[1] == UNKNOWN
    target[2, 2] = 1
    assert annotate_patch(case, patch, target).tags[1] == PRESENT


def test_absent_holds_in_every_crop_and_follows_from_complete_annotations_without_object():
    said = Annotations(
        shape=(20, 20), absent=("cell",), complete_boxes=("nucleus",), complete_points=("background",)
    )
    case = map_case(said, NAMES, frame((1, 20, 20)))
    assert case.tags.tolist() == [ABSENT, ABSENT, ABSENT]
    assert not case.needs_map


def test_one_slice_of_a_3d_box_promises_its_class_once_and_not_in_each_row():
    said = Annotations(shape=(9, 20, 20), boxes=(Box("cell", (2, 4, 5), (6, 10, 9)),))
    case = map_case(said, NAMES, frame((9, 20, 20)))
    target = np.full((20, 20), IGNORE, np.int16)
    inside = annotate_patch(case, PatchMap(coordinate_channels((3, 0, 0), (20, 20), 2), (9, 20, 20), 3), target)
    assert inside.box_num_lines == [1]
    assert (inside.box_lines[0][:, 0] == 0).all()
    assert (inside.box_lines[0][:, 1] == -1).all()
    beyond = annotate_patch(case, PatchMap(coordinate_channels((6, 0, 0), (20, 20), 2), (9, 20, 20), 6), target)
    assert len(beyond.box_class) == 0


def test_background_of_a_partial_mask_becomes_ignored_but_remembers_what_it_cannot_be(dataset):
    said = Annotations(shape=(40, 48), mask_labels=("cell",))
    case = map_case(said, NAMES, frame((1, 40, 48)))
    drawn = loader(dataset, {"masked_a": case}, masked_fraction=1.0, augment=True, patch=(24, 24), crop=(36, 36))
    checked = 0
    for _ in range(15):
        batch = next(drawn)
        known = AnnotationBatch.from_list(batch["annotations"])
        for item, key in enumerate(batch["keys"]):
            target = batch["target"][item, 0]
            if key == "masked_b":
                assert not (known.partial.numel() and known.partial[item].any())
                continue
            assert not (target == 0).logical_and(known.partial[item]).any()
            agreement = ((target == IGNORE) == known.partial[item]).float().mean()
            assert agreement > 0.9, "the borders may differ by nearest-neighbour sampling, the rest must not"
            allowed = allowed_classes(known, batch["target"], 3, (24, 24), IGNORE)[item]
            where = known.partial[item] & (target == IGNORE)
            assert allowed[0][where].all()
            assert not allowed[1][where].any(), "the annotator drew cells: what is left blank is no cell"
            assert allowed[2][where].all(), "nobody looked for nuclei"
            checked += 1
    assert checked > 3


def test_a_seeded_batch_depends_on_its_number_alone_not_on_the_workers(dataset):
    def draw(workers, thread, count, first=0):
        drawn = loader(
            dataset, annotated(present=("cell",)), augment=True, seed=7, num_workers=workers, first_batch=first
        )
        drawn.set_thread_id(thread)
        return [next(drawn) for _ in range(count)]

    alone = draw(1, 0, 6)
    dealt = [batch for pair in zip(draw(2, 0, 3), draw(2, 1, 3), strict=True) for batch in pair]
    resumed = draw(1, 0, 2, first=4)
    for expected, found in zip([*alone, *alone[4:]], [*dealt, *resumed], strict=True):
        assert expected["keys"] == found["keys"]
        torch.testing.assert_close(expected["data"], found["data"], rtol=0, atol=0)
    assert not torch.equal(alone[0]["data"], alone[1]["data"])


def test_components_are_numbered_through_the_batch_and_of_one_class_each(dataset):
    drawn = loader(dataset, with_components=True, patch=(40, 48))
    batch = next(drawn)
    ids, target = batch["components"], batch["target"][:, 0]
    assert (ids[: 4 - batch["num_masked"]] == 0).all()
    assert sorted(ids.unique().tolist()) == list(range(batch["num_components"] + 1))
    for number in range(1, batch["num_components"] + 1):
        assert len(target[ids == number].unique()) == 1
    expected = [
        connected_components(item.numpy(), background=-1, connectivity=1).max()
        for item in target[4 - batch["num_masked"] :]
    ]
    assert batch["num_components"] == sum(expected)


def test_touching_components_of_different_classes_stay_apart_and_ignore_is_none():
    target = np.array([[1, 1, 2], [3, 0, 2]])
    ids = mask_components(target, IGNORE)
    assert ids[1, 0] == 0
    assert len({ids[0, 0], ids[0, 2], ids[1, 1]}) == 3
    assert ids[0, 0] == ids[0, 1]


def test_a_transform_that_drops_the_coordinate_map_is_named(dataset):
    drawn = loader(dataset, annotated(points=(Point("cell", (5, 5)),)), masked_fraction=0.0)
    drawn._augment = lambda image, segmentation, **_: {"image": image, "segmentation": segmentation}
    with pytest.raises(RuntimeError, match="regression_target"):
        next(drawn)


def test_weak_cases_need_an_ignore_label(dataset):
    with pytest.raises(ValueError, match="without ignore label"):
        loader(dataset, ignore_label=None)


def test_a_partial_mask_needs_an_ignore_label_and_the_message_names_the_case(dataset):
    case = map_case(Annotations(shape=(40, 48), mask_labels=("cell",)), NAMES, frame((1, 40, 48)))
    with pytest.raises(AnnotationError, match="masked_a.*nnunet_dsp prepare"):
        loader(dataset, {"masked_a": case}, weak_cases=[], ignore_label=None)
