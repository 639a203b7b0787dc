"""pictures.py and the demonstration's table: that what is drawn is what was said, where it was said."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from nnunet_dsp.annotations import Annotations, Box, Point
from nnunet_dsp.benchmark.demo import case_dice, dice_table
from nnunet_dsp.pictures import class_colour, comparison, draw_annotations, overlay

NAMES = ("background", "cell", "nucleus")


def test_an_overlay_tints_each_class_in_its_colour_and_leaves_background_grey():
    image = np.linspace(0, 100, 64).reshape(8, 8)
    mask = np.zeros((8, 8), int)
    mask[2, 3], mask[5, 6] = 1, 2
    drawn = overlay(image, mask).astype(float)
    grey = overlay(image, None).astype(float)
    for (y, x), label in (((2, 3), 1), ((5, 6), 2)):
        expected = 0.45 * grey[y, x] + 0.55 * 255 * np.asarray(to_rgb(class_colour(label)))
        np.testing.assert_allclose(drawn[y, x], expected, atol=1.5)
    untouched = mask == 0
    np.testing.assert_array_equal(drawn[untouched], grey[untouched])


def test_ignored_voxels_are_hatched_and_not_coloured():
    drawn = overlay(np.tile(np.arange(16), (16, 1)), np.full((16, 16), 3), ignore_label=3)
    assert (drawn[..., 0] == drawn[..., 1]).all()
    assert (drawn != overlay(np.tile(np.arange(16), (16, 1)), None)).any()


def drawn_on(said, **options):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    axes.imshow(np.zeros((40, 60)))
    draw_annotations(axes, said, NAMES, **options)
    plt.close(figure)
    return axes


def test_boxes_and_points_are_drawn_at_y_and_x_and_not_the_other_way_round():
    said = Annotations(points=(Point("cell", (7, 31)),), boxes=(Box("nucleus", (3, 20), (9, 50), tight=False),))
    axes = drawn_on(said)
    (line,) = axes.lines
    assert (line.get_xdata()[0], line.get_ydata()[0]) == (31, 7)
    (box,) = axes.patches
    assert box.get_xy() == (19.5, 2.5)
    assert (box.get_width(), box.get_height()) == (30, 6)
    assert box.get_linestyle() == "--", "a loose box is dashed"


def test_of_a_volume_only_what_lies_in_the_slice_is_drawn():
    said = Annotations(
        points=(Point("cell", (2, 7, 31)), Point("cell", (5, 8, 30))),
        boxes=(Box("cell", (2, 3, 20), (5, 9, 50)),),
    )
    assert (len(drawn_on(said, slice_index=2).lines), len(drawn_on(said, slice_index=2).patches)) == (1, 1)
    assert (len(drawn_on(said, slice_index=5).lines), len(drawn_on(said, slice_index=5).patches)) == (1, 0)


def test_a_comparison_is_one_picture_and_leaves_nothing_beside_it(tmp_path):
    image = np.random.default_rng(0).normal(size=(20, 20))
    said = Annotations(present=("cell",), absent=("nucleus",))
    rows = [{"image": {"image": image, "annotations": said}, "truth": {"image": image, "mask": image.astype(int) > 0}}]
    comparison(rows, NAMES, tmp_path / "picture.png", title="t")
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]
    assert Image.open(tmp_path / "picture.png").size[0] > 300


SUMMARY = {
    "mean": {"1": {"Dice": 0.25}, "2": {"Dice": 0.75}},
    "foreground_mean": {"Dice": 0.5},
    "metric_per_case": [
        {"prediction_file": "/x/case_1.png", "metrics": {"1": {"Dice": 0.2}, "2": {"Dice": float("nan")}}},
        {"prediction_file": "/x/case_12.png", "metrics": {"1": {"Dice": 0.4}, "2": {"Dice": 0.6}}},
    ],
}


def test_the_table_has_a_row_for_each_class_and_a_column_for_each_model():
    other = {"mean": {"1": {"Dice": 0.5}, "2": {"Dice": 0.9}}, "foreground_mean": {"Dice": 0.7}}
    lines = dice_table({"A": SUMMARY, "B": other}, {"background": 0, "cell": 1, "nucleus": 2}).splitlines()
    assert lines[0].split()[-2:] == ["A", "B"]
    assert [line.split() for line in lines[2:]] == [
        ["cell", "0.250", "0.500"],
        ["nucleus", "0.750", "0.900"],
        ["mean", "0.500", "0.700"],
    ]


def test_a_cases_dice_is_the_mean_over_the_classes_it_shows():
    assert case_dice(SUMMARY, "case_1") == pytest.approx(0.2)
    assert case_dice(SUMMARY, "case_12") == pytest.approx(0.5)
    with pytest.raises(ValueError, match="case_3"):
        case_dice(SUMMARY, "case_3")
