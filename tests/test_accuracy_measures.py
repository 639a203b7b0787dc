"""benchmark/accuracy/measures.py against loops, and against values worked out by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nnunet_dsp.benchmark.accuracy.curves import Point, write_curves
from nnunet_dsp.benchmark.accuracy.measures import (
    SurfaceJob,
    case_means,
    class_means,
    gap_closed,
    holm,
    mean,
    measure_case,
    paired_test,
    spread,
    surface_measures,
)


def surface_by_loops(mask):
    """Voxels of the mask with a face neighbour that is not in it, or is no voxel."""
    found = []
    for at in itertools.product(*map(range, mask.shape)):
        if not mask[at]:
            continue
        for axis, step in itertools.product(range(mask.ndim), (-1, 1)):
            beside = list(at)
            beside[axis] += step
            if not 0 <= beside[axis] < mask.shape[axis] or not mask[tuple(beside)]:
                found.append(at)
                break
    return found


def distances_by_loops(start, end, spacing):
    return [
        min(math.sqrt(sum(((a - b) * s) ** 2 for a, b, s in zip(p, q, spacing, strict=True))) for q in end)
        for p in start
    ]


def percentile_by_hand(values, share):
    values = sorted(values)
    at = share * (len(values) - 1)
    low = math.floor(at)
    high = min(low + 1, len(values) - 1)
    return values[low] + (at - low) * (values[high] - values[low])


SHAPES = st.sampled_from([(7, 6), (4, 5, 3)])


@given(st.data())
def test_surface_measures_agree_with_loops(data):
    shape = data.draw(SHAPES)
    masks = [data.draw(hnp.arrays(bool, shape)) for _ in range(2)]
    spacing = data.draw(st.sampled_from([(1.0,) * len(shape), (3.0, 0.5, 1.5)[: len(shape)]]))
    tolerance = data.draw(st.sampled_from([0.0, 0.75, 1.0, 2.1]))
    nsd, hd95 = surface_measures(*masks, spacing, tolerance)
    if not masks[0].any() and not masks[1].any():
        assert math.isnan(nsd) and math.isnan(hd95)
        return
    if not masks[0].any() or not masks[1].any():
        assert nsd == 0
        assert hd95 == pytest.approx(math.sqrt(sum((n * s) ** 2 for n, s in zip(shape, spacing, strict=True))))
        return
    surfaces = [surface_by_loops(mask) for mask in masks]
    there = distances_by_loops(surfaces[0], surfaces[1], spacing)
    back = distances_by_loops(surfaces[1], surfaces[0], spacing)
    near = [d <= tolerance + 1e-9 for d in (*there, *back)]
    assert nsd == pytest.approx(sum(near) / len(near))
    assert hd95 == pytest.approx(max(percentile_by_hand(there, 0.95), percentile_by_hand(back, 0.95)))


def test_a_square_moved_by_two_voxels_is_two_voxels_away():
    reference = np.zeros((20, 20), bool)
    reference[5:10, 5:10] = True
    moved = np.roll(reference, 2, axis=1)
    assert surface_measures(reference, reference, (1, 1), 0) == (1.0, 0.0)
    assert surface_measures(reference, moved, (1, 0.25), 0.5) == (1.0, 0.5)
    assert surface_measures(reference, moved, (1, 1), 2).hd95 == 2


def test_a_volume_is_measured_in_its_own_spacing_and_without_its_ignored_voxels(tmp_path):
    import SimpleITK as sitk
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    truth = np.zeros((6, 10, 12), np.uint8)
    truth[2:4, 2:6, 3:8] = 1
    predicted = np.roll(truth, 1, axis=0)
    truth[:, :, 0] = 3
    predicted[:, :, 0] = 2
    files = []
    for name, array in (("truth", truth), ("predicted", predicted)):
        image = sitk.GetImageFromArray(array)
        image.SetSpacing((0.5, 0.5, 4.0))  # x, y, z
        files.append(tmp_path / f"{name}.nii.gz")
        sitk.WriteImage(image, str(files[-1]))
    labels = {"background": 0, "cell": 1, "nucleus": 2}
    case, found = measure_case(SurfaceJob("a", *files, SimpleITKIO, labels, 3, 1.0))
    assert case == "a"
    assert found["cell"].hd95 == pytest.approx(4.0), "one slice off"
    assert found["cell"].nsd == pytest.approx(0.5), "of two slices one overlaps"
    assert math.isnan(found["nucleus"].nsd), "it is predicted only where nobody looked"
    assert measure_case(SurfaceJob("a", *files, SimpleITKIO, labels, 3, None))[1]["cell"].nsd == found["cell"].nsd
    assert measure_case(SurfaceJob("a", *files, SimpleITKIO, labels, 3, 4.0))[1]["cell"].nsd == 1


def test_masks_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="same shape"):
        surface_measures(np.ones((2, 2), bool), np.ones((2, 3), bool), (1, 1), 1)


def test_means_leave_out_what_could_not_be_measured_as_nnunet_does():
    per_case = {
        "a": {"cell": {"Dice": 0.8}, "nucleus": {"Dice": None}},
        "b": {"cell": {"Dice": 0.4}, "nucleus": {"Dice": 0.1}},
    }
    assert class_means(per_case, "Dice") == {"cell": pytest.approx(0.6), "nucleus": 0.1}
    assert case_means(per_case, "Dice") == {"a": 0.8, "b": pytest.approx(0.25)}
    assert math.isnan(mean([])) and math.isnan(mean([math.nan]))


def test_the_spread_is_the_sample_standard_deviation():
    assert spread([0.5, 0.7, 0.9]) == pytest.approx(0.2)
    assert math.isnan(spread([0.5]))


@pytest.mark.parametrize(("arm", "expected"), [(0.6, 0.0), (0.8, 1.0), (0.75, 0.75), (0.5, -0.5), (0.9, 1.5)])
def test_the_gap_closed_runs_from_the_masks_arm_to_the_ceiling(arm, expected):
    assert gap_closed(arm, 0.6, 0.8) == pytest.approx(expected)


def test_there_is_no_gap_where_the_ceiling_is_not_above_the_masks_arm():
    assert math.isnan(gap_closed(0.7, 0.8, 0.8))
    assert math.isnan(gap_closed(0.7, 0.8, 0.6))


def signed_rank_p(differences):
    """Exact two-sided p of the signed-rank statistic, over all ways to sign distinct absolute differences."""
    ranks = [1 + sum(abs(b) < abs(a) for b in differences) for a in differences]
    observed = sum(rank for rank, d in zip(ranks, differences, strict=True) if d > 0)
    sums = [sum(r for r, sign in zip(ranks, signs, strict=True) if sign) for signs in
            itertools.product((0, 1), repeat=len(ranks))]  # fmt: skip
    below, above = (sum(map(test, sums)) / len(sums) for test in (observed.__ge__, observed.__le__))
    return min(1.0, 2 * min(below, above))


def test_the_paired_test_averages_seeds_within_a_case_and_ranks_the_cases():
    first = {"a": [0.9, 0.7], "b": [0.6, 0.6], "c": [0.3, 0.5], "d": [0.9, 0.9], "e": [0.55, 0.65]}
    second = {"a": [0.5, 0.5], "b": [0.5, 0.5], "c": [0.5, 0.52], "d": [0.7, 0.7], "f": [0.1, 0.1], "e": [0.5, 0.4]}
    result = paired_test(first, second)
    differences = [0.3, 0.1, -0.11, 0.2, 0.15]
    assert result.cases == 5
    assert result.difference == pytest.approx(sum(differences) / 5)
    assert result.p == pytest.approx(signed_rank_p(differences))


def test_equal_arms_do_not_differ_and_arms_without_common_cases_cannot_be_compared():
    assert paired_test({"a": [0.5], "b": [0.6]}, {"a": [0.5], "b": [0.6]}).p == 1
    assert paired_test({"a": [0.5]}, {"b": [0.5]}).cases == 0


def test_holms_correction_is_that_of_his_paper():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    corrected = holm([0.2, math.nan, 0.9])
    assert corrected[0] == pytest.approx(0.4) and math.isnan(corrected[1]) and corrected[2] == pytest.approx(0.9)


# --- curves


def test_no_two_arms_are_drawn_alike(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    styles = {}
    draw = Axes.errorbar

    def errorbar(axes, *values, label, color, marker, **more):
        styles[label] = color, marker
        return draw(axes, *values, label=label, color=color, marker=marker, **more)

    monkeypatch.setattr(Axes, "errorbar", errorbar)
    points = [Point("mixed", 1, 3, f"arm {n}", 5.0 + n, n / 20, 0.01, 1, frozenset({f"run {n}"})) for n in range(20)]
    assert write_curves(tmp_path, points, 4) == ["curve_minutes.png"]
    assert len(styles) == len(set(styles.values())) == 20
