"""Which windows become prompts, and what of them counts as known; on arrays, without nnU-Net."""

import json
import math

import numpy as np
import pytest
import torch

from nnunet_dsp.annotations import AnnotationError, Annotations, Box, LabelNames, Point
from nnunet_dsp.geometry import CaseFrame
from nnunet_dsp.patch_annotations import map_case
from nnunet_dsp.prompt_choice import (
    NOT_A_KEY,
    PromptRequest,
    PromptWindow,
    best_window,
    choose_windows,
    cut_prompt,
    known_labels,
    prompt_shape,
    raw_bounds,
    read_requests,
    requested_span,
    window_shape,
)
from nnunet_dsp.prompt_settings import PromptSettings
from nnunet_dsp.prompt_source import PromptSource

LABELS = LabelNames.from_dataset_json({"labels": {"background": 0, "cell": 1, "nucleus": 2, "ignore": 3}})


def frame(shape, transpose=(0, 1, 2), offset=(0, 0, 0), scale=(1, 1, 1)):
    return CaseFrame(tuple(transpose), np.asarray(offset, float), np.asarray(scale, float), np.asarray(shape))


# what is known -----------------------------------------------------------------------------------------------------


def test_masks_count_and_silence_does_not():
    segmentation = np.array([[[0, 1, 2, 3, -1]]])
    assert known_labels(segmentation, [0, 1, 2], 3).tolist() == [[[0, 1, 2, NOT_A_KEY, 0]]]
    assert known_labels(np.array([[[0, 2, 5]]]), [0, 2, 5], None).tolist() == [[[0, 1, 2]]], "rows, not values"


def said(shape, **what):
    return map_case(Annotations(**what), LABELS, frame(shape))


def test_points_are_keys_where_the_mask_is_silent_only():
    segmentation = np.full((1, 6, 6), 3)
    segmentation[0, 0] = 1
    points = (Point("nucleus", (3.4, 1.6)), Point("nucleus", (0, 2)))
    known = known_labels(segmentation, [0, 1, 2], 3, said((1, 6, 6), points=points))
    assert known[0, 3, 2] == 2 and known[0, 0, 2] == 1
    assert (known != NOT_A_KEY).sum() == 7


def test_outside_boxes_is_background_where_every_class_has_all_its_objects_boxed():
    segmentation = np.full((1, 8, 8), 3)
    boxes = (Box("cell", (2, 3), (5, 6)),)
    everything = said((1, 8, 8), boxes=boxes, complete_boxes=("cell", "nucleus"))
    complete = known_labels(segmentation, [0, 1, 2], 3, everything)
    expected = np.zeros((8, 8), int)
    expected[1:6, 2:7] = NOT_A_KEY  # a voxel more on each side: a border voxel is not sure
    inside, outside = complete[0, 2:5, 3:6], complete[0][expected == 0]
    assert (inside == NOT_A_KEY).all() and (outside == 0).all()
    partly = known_labels(segmentation, [0, 1, 2], 3, said((1, 8, 8), boxes=boxes, complete_boxes=("cell",)))
    assert (partly == NOT_A_KEY).all()


def test_background_of_a_mask_that_leaves_classes_out_is_no_key():
    segmentation = np.array([[[0, 0, 1, 1]]])
    known = known_labels(segmentation, [0, 1, 2], 3, said((1, 1, 4), mask_labels=("cell",)))
    assert known.tolist() == [[[NOT_A_KEY, NOT_A_KEY, 1, 1]]]


# choosing ----------------------------------------------------------------------------------------------------------


def naive_best(known, size, step, wanted):
    """Every window on the grid, with loops; the score from the docstring."""
    best = (-1.0, None)
    labels = range(known.max() + 1)
    starts = [range(0, n - s + 1, d) for n, s, d in zip(known.shape, size, step, strict=True)]
    count_of = {}
    for z in starts[0]:
        for y in starts[1]:
            for x in starts[2]:
                window = known[z : z + size[0], y : y + size[1], x : x + size[2]]
                count_of[z, y, x] = [int((window == c).sum()) for c in labels]
    most = [max(counts[c] for counts in count_of.values()) for c in labels]
    for (z, y, x), counts in count_of.items():
        total = sum(counts)
        if total == 0:
            continue
        shown = [c for c in labels if counts[c] >= max(1, min(16, most[c]))]
        entropy = -sum(n / total * math.log(n / total) for n in counts if n)
        borders = 0
        for i in np.ndindex(*size):
            here = known[z + i[0], y + i[1], x + i[2]]
            for a in range(3):
                j = [z + i[0], y + i[1], x + i[2]]
                j[a] += 1
                if j[a] < known.shape[a] and here != known[tuple(j)] and here >= 0 and known[tuple(j)] >= 0:
                    borders += 1
                    break
        voxels = math.prod(size)
        score = 10 * len(set(shown) & set(wanted)) + min(entropy, 0.75 * math.log(max(1, len(shown)))) * total / voxels
        score += borders / voxels + 1e-3 * total / voxels
        if score > best[0] + 1e-12:
            best = (score, (z, y, x))
    return best


@pytest.mark.parametrize(
    ("shape", "size", "step"), [((1, 24, 30), (1, 16, 16), (1, 2, 2)), ((9, 12, 8), (4, 8, 8), (1, 1, 1))]
)
def test_the_best_window_is_the_one_an_exhaustive_search_finds(shape, size, step):
    for seed in range(4):
        random = np.random.default_rng(seed)
        known = random.choice(np.array([-1, 0, 0, 0, 1, 2], np.int16), shape)
        known[:, : shape[1] // 2] = random.choice(np.array([-1, 0], np.int16))
        score, labels, start = best_window(known, size, [0, 1, 2])
        expected, where = naive_best(known, size, step, [0, 1, 2])
        assert score == pytest.approx(expected) and start == where
        assert labels <= {0, 1, 2}


def test_borders_decide_between_mixtures_that_are_even_enough():
    known = np.zeros((1, 16, 32), np.int16)
    known[0, :, 8:16] = 1  # half of the left window, in one piece
    known[0, ::3, 16:] = 1  # about a third of the right one, in lines
    assert best_window(known, (1, 16, 16), [0, 1])[2] == (0, 0, 16)


def test_a_few_stray_voxels_do_not_show_a_label():
    known = np.zeros((1, 16, 48), np.int16)
    known[0, ::2, :16] = 1
    known[0, 0, :4] = 2  # four voxels of the second label beside the stripes
    known[0, 4:12, 36:44] = 2  # sixty-four elsewhere
    _, labels, start = best_window(known, (1, 16, 16), [2])
    assert start[2] >= 24 and 2 in labels
    assert best_window(known[:, :, :32], (1, 16, 16), [2])[1] == {0, 1, 2}, "four are enough where there are no more"
    _, labels, start = best_window(known, (1, 16, 16), [1])
    assert start == (0, 0, 0) and labels == {0, 1}


def choose(cases, max_windows=4, window=8, given=()):
    patch = (16, 16)
    return choose_windows(
        list(cases), cases.__getitem__, lambda shape: window_shape(shape, patch, window), 3, max_windows, given
    )


def test_further_windows_come_only_for_labels_the_first_do_not_show():
    common = np.zeros((1, 32, 32), np.int16)
    common[0, 8:16, 8:16:2] = 1
    rare = np.zeros((1, 32, 32), np.int16)
    rare[0, 20:23, 20:28] = 2
    cases = {"a": common, "b": rare}
    windows = choose(cases)
    assert [w.case for w in windows] == ["a", "b"]
    assert (rare[windows[1].slices] == 2).sum() >= 16
    assert choose(cases) == windows, "not the same twice"
    assert len(choose({"a": common})) == 1
    assert len(choose(cases, max_windows=1)) == 1
    assert choose(cases, given=windows[:1]) == windows
    assert choose({"a": np.full((1, 9, 9), NOT_A_KEY, np.int16)}) == []


def test_a_window_is_never_beyond_the_patch_or_the_case():
    assert window_shape((1, 100, 40), (64, 64), 48) == (1, 48, 40)
    assert window_shape((1, 100, 100), (64, 32), 0) == (1, 64, 32)
    assert window_shape((5, 100, 100), (8, 64, 64), 48) == (5, 48, 48)


@pytest.mark.parametrize(
    ("patch", "strides", "window", "margin", "shape"),
    [
        ((192, 192), [[1, 1], [2, 2], [2, 2], [2, 2], [2, 2]], (1, 64, 64), 32, (128, 128)),
        ((192, 192), [[1, 1], [2, 2], [2, 2], [2, 2], [2, 2]], (1, 60, 70), 0, (64, 80)),
        ((512, 512), [[1, 1], *[[2, 2]] * 7], (1, 64, 64), 32, (512, 512)),  # four voxels at stride 128
        ((16, 64, 64), [[1, 1, 1], [1, 2, 2], [2, 2, 2]], (16, 32, 32), 8, (16, 48, 48)),
    ],
)
def test_prompts_suit_the_networks_strides(patch, strides, window, margin, shape):
    assert prompt_shape([PromptWindow("a", (0, 0, 0), window)], patch, strides, margin) == shape


def test_prompts_are_cut_with_their_surroundings_and_padded_with_zeros_where_the_case_ends():
    random = np.random.default_rng(0)
    image = random.normal(size=(2, 1, 20, 30)).astype(np.float32)
    known = random.integers(0, 3, (1, 20, 30)).astype(np.int16)
    window = PromptWindow("a", (0, 2, 10), (1, 8, 18))
    cut, labels = cut_prompt(image, known, window, (24, 16))
    assert cut.shape == (2, 24, 16) and labels.shape == (24, 16)
    assert (cut[:, :2] == 0).all() and (cut[:, 22:] == 0).all()
    assert np.array_equal(cut[:, 2:22], image[:, 0, :, 6:22])
    expected = np.full((24, 16), NOT_A_KEY)
    expected[4:10, 4:12] = known[0, 2:8, 10:18]
    assert np.array_equal(labels, expected)
    corner, corner_labels = cut_prompt(image, known, PromptWindow("a", (0, 0, 26), (1, 4, 30)), (8, 8))
    assert np.array_equal(corner, image[:, 0, :8, 22:]), "shifted into the case, not padded"
    assert (corner_labels[:4, 4:] == known[0, :4, 26:]).all()


# named in dataset.json ---------------------------------------------------------------------------------------------


def test_prompts_are_read_from_dataset_json():
    single = read_requests({"prompt": {"case": "a", "bbox": [[1, 5], [2, 9]]}}, ["a", "b"])
    assert [(r.case, r.start, r.stop) for r in single] == [("a", (1, 2), (5, 9))]
    several = read_requests({"prompt": [{"case": "b"}, {"case": "a"}]}, ["a", "b"])
    assert [(r.case, r.start) for r in several] == [("b", None), ("a", None)]
    assert read_requests({}, ["a"]) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("a", r'"prompt": expected \{"case"'),
        ({"case": "zz"}, "no training case 'zz'. There are: a, b"),
        ({"case": "a", "box": 1}, "unknown entry 'box'"),
        ([{"case": "a"}, {"case": "a", "bbox": [[5, 1], [2, 9]]}], r'"prompt"\[1\]: expected a bbox .* ascending'),
        ({"case": "a", "bbox": [[1, 5], [2, float("nan")]]}, "expected a bbox"),
        ({"case": "a", "bbox": [[0, True], [0, 1]]}, "expected a bbox"),
    ],
)
def test_prompts_that_cannot_be_are_refused_by_entry(given, message):
    with pytest.raises(AnnotationError, match=message):
        read_requests({"prompt": given}, ["a", "b"])


def test_a_named_window_moves_with_the_image():
    moved = frame((10, 30, 40), transpose=(2, 0, 1), offset=(4, 0, 10), scale=(1, 0.5, 2))
    request = PromptRequest("a", (20, 14, 4), (40, 20, 9), "dataset.json")  # raw (z, y, x)
    # case axis 0 is raw x, 1 raw z, 2 raw y
    span = requested_span(request, moved, 3)
    assert span == (slice(0, 5), slice(10, 20), slice(8, 20))
    window = PromptWindow("a", (0, 10, 8), (5, 20, 20))
    assert raw_bounds(window, moved) == [[20.0, 40.0], [14.0, 20.0], [4.0, 9.0]]
    flat = frame((1, 30, 40))
    assert requested_span(PromptRequest("a", (2, 3), (5, 9), "s"), flat, 2) == (slice(0, 1), slice(2, 5), slice(3, 9))
    with pytest.raises(AnnotationError, match="lies outside a, which has .1, 30, 40. voxels"):
        requested_span(PromptRequest("a", (50, 3), (60, 9), "s"), flat, 2)
    with pytest.raises(AnnotationError, match="needs three axes"):
        requested_span(PromptRequest("a", (2, 3), (5, 9), "s"), frame((8, 30, 40)), 2)


# the whole way -----------------------------------------------------------------------------------------------------


def source(cases, patch=(16, 16), strides=((1, 1), (2, 2)), **settings):
    def load(case):
        segmentation = cases[case]
        image = np.stack([segmentation * 10.0, segmentation + 1.0]).astype(np.float32)
        properties = {
            "shape_before_cropping": segmentation.shape,
            "shape_after_cropping_and_before_resampling": segmentation.shape,
            "bbox_used_for_cropping": [[0, n] for n in segmentation.shape],
        }
        return image, segmentation, properties

    return PromptSource(
        load, lambda case, shape: None, {0: "background", 1: "cell", 2: "nucleus"}, 3, [0, 1, 2], patch, strides,
        PromptSettings(**{"window": 8, "margin": 2, **settings}),
    )  # fmt: skip


def test_a_prompt_is_built_described_and_drawn(tmp_path):
    case = np.full((1, 40, 40), 3)
    case[0, 10:18, 20:28] = 0
    case[0, 12:16, 20:28] = 1
    made = source({"a": case})
    windows = made.choose([], [["a"]])
    prompt = made.build(windows)
    assert prompt.images.shape == (1, 2, 12, 12) and prompt.images.dtype == torch.float32
    assert prompt.missing == ("nucleus",)
    entry = prompt.description["windows"][0]
    assert entry["case"] == "a" and entry["voxels"] == {"background": 32, "cell": 32, "nucleus": 0}
    assert entry["bbox"] == [[10.0, 18.0], [20.0, 28.0]]
    again = made.choose(read_requests({"prompt": {"case": "a", "bbox": entry["bbox"]}}, ["a"]), [])
    assert again == windows, "what prompt.json says does not name the same prompt"
    made.show(prompt, tmp_path / "new")
    assert json.loads((tmp_path / "new" / "prompt.json").read_text()) == prompt.description
    assert (tmp_path / "new" / "prompt.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["prompt.json", "prompt.png"]


def test_a_named_window_larger_than_the_patch_is_cut_to_its_most_informative_part():
    case = np.zeros((1, 40, 40), int)
    case[0, 30:33, 2:12] = 1
    made = source({"a": case})
    (window,) = made.choose([PromptRequest("a", (8, 0), (40, 40), "s")], [])
    assert [b - a for a, b in zip(window.start, window.stop, strict=True)] == [1, 16, 16]
    assert (case[window.slices] == 1).sum() == 30
    (chosen,) = made.choose([PromptRequest("a", None, None, "s")], [])
    assert [b - a for a, b in zip(chosen.start, chosen.stop, strict=True)] == [1, 8, 8]


def test_labels_missing_in_the_first_group_of_cases_are_looked_for_in_the_next():
    first, second = np.zeros((1, 20, 20), int), np.zeros((1, 20, 20), int)
    first[0, 4:8] = 1
    second[0, 4:8] = 2
    second[0, 12:16] = 1
    windows = source({"a": first, "b": second}).choose([], [["a"], ["b"]])
    assert [w.case for w in windows] == ["a", "b"]
    with pytest.raises(ValueError, match="Nothing can serve as prompt: no voxel is annotated in c"):
        source({"c": np.full((1, 20, 20), 3)}).choose([], [["c"]])
    with pytest.raises(ValueError, match="no voxel is annotated there in c"):
        source({"c": np.full((1, 20, 20), 3)}).choose([PromptRequest("c", None, None, "dataset.json")], [])


def test_prompts_in_3d_keep_their_three_axes(tmp_path):
    case = np.zeros((12, 24, 24), int)
    case[4:6, 8:12, 8:12] = 1
    made = source({"a": case}, patch=(8, 16, 16), strides=((1, 1, 1), (2, 2, 2)))
    prompt = made.build(made.choose([], [["a"]]))
    assert prompt.images.shape == (1, 2, 8, 12, 12)
    assert len(prompt.description["windows"][0]["bbox"]) == 3
    made.show(prompt, tmp_path)
    assert (tmp_path / "prompt.png").is_file()
