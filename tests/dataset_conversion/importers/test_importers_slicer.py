"""3D Slicer's .mrk.json and .fcsv, in the forms that Slicer 4.10 to 5.6 write.

SimpleITK says where a voxel lies in the patient (LPS, mm); volumes are oblique and their voxels no cubes, so that
mixed-up axes, signs, spacings and corners fail.
"""

import json

import numpy as np
import pytest
import SimpleITK
from importer_oracle import covered, lies_on, read

from nnunet_dsp.annotations import AnnotationError
from nnunet_dsp.dataset_conversion.imported import BoxMark, PointMark, RasterMask, Region, Scribble
from nnunet_dsp.dataset_conversion.importers import slicer

SHAPE = (9, 12, 17)  # z, y, x
OBJECT = (slice(2, 5), slice(3, 9), slice(6, 15))
UPRIGHT = np.diag([1.0, 1, 1])
FLIPPED = np.diag([-1.0, 1, -1])
SCHEMA = "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/Resources/Schema/"


def rotation(x, y, z):
    """Degrees about the axes, one after the other."""
    matrix = np.eye(3)
    for axis, degrees in enumerate((x, y, z)):
        c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
        turn = np.eye(3)
        a, b = [n for n in range(3) if n != axis]
        turn[a, a], turn[a, b], turn[b, a], turn[b, b] = c, -s, s, c
        matrix = turn @ matrix
    return matrix


OBLIQUE = rotation(17, -8, 25)


class Volume:
    """A volume with a painted block, its file, and where its voxels lie in the patient."""

    def __init__(self, file, direction):
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file = file
        self.folder = file.parent
        self.mask = np.zeros(SHAPE, bool)
        self.mask[OBJECT] = True
        self.image = SimpleITK.GetImageFromArray(self.mask.astype(np.uint8))
        self.image.SetSpacing((0.7, 1.1, 2.5))
        self.image.SetOrigin((-81.5, 33.25, 127.0))
        self.image.SetDirection(direction.ravel().tolist())
        SimpleITK.WriteImage(self.image, str(file))
        self.direction = direction

    def place(self, *zyx, system="LPS"):
        """Millimetres of a voxel position (centres, array order)."""
        at = np.array(self.image.TransformContinuousIndexToPhysicalPoint([float(v) for v in zyx[::-1]]))
        return (at * [-1, -1, 1] if system == "RAS" else at).tolist()


@pytest.fixture(params=["upright", "flipped", "oblique"])
def volume(request, tmp_path):
    direction = {"upright": UPRIGHT, "flipped": FLIPPED, "oblique": OBLIQUE}[request.param]
    return Volume(tmp_path / "scan.nii.gz", direction)


@pytest.fixture
def plain(tmp_path):
    return Volume(tmp_path / "scan.nrrd", UPRIGHT)


def point(position, label="", number=1, **more):
    return {
        "id": str(number),
        "label": label,
        "description": "",
        "associatedNodeID": "vtkMRMLScalarVolumeNode1",
        "position": position,
        "orientation": [-1.0, -0.0, -0.0, -0.0, -1.0, -0.0, 0.0, 0.0, 1.0],
        "selected": True,
        "locked": False,
        "visibility": True,
        "positionStatus": "defined",
        **more,
    }


def markup(kind, points=(), *, system="LPS", **more):
    return {
        "type": kind,
        "coordinateSystem": system,
        "coordinateUnits": "mm",
        "locked": False,
        "fixedNumberOfControlPoints": False,
        "labelFormat": "%N-%d",
        "lastUsedControlPointNumber": len(points),
        "controlPoints": list(points),
        "measurements": [],
        "display": {"visibility": True, "opacity": 1.0, "color": [0.4, 1.0, 1.0]},
        **more,
    }


def save(path, *markups):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"@schema": f"{SCHEMA}markups-schema-v1.0.3.json#", "markups": list(markups)}, indent=4))


def roi(volume, start, stop, axes, *, system="LPS", **more):
    """As Slicer writes an ROI: voxels start <= v < stop, its axes (columns) in LPS, x first."""
    middle = [(a + b - 1) / 2 for a, b in zip(start, stop, strict=True)]
    size = [(b - a) * s for a, b, s in zip(start[::-1], stop[::-1], volume.image.GetSpacing(), strict=True)]
    orientation = np.diag([-1, -1, 1]) @ axes if system == "RAS" else axes
    center = volume.place(*middle, system=system)
    return markup(
        "ROI",
        [point(center, "R-1")],
        system=system,
        roiType="Box",
        center=center,
        orientation=orientation.ravel().tolist(),
        size=size,
        insideOut=False,
        **more,
    )


def marks_of(folder, *options):
    (image,) = read(slicer, folder, *options)
    return image.marks


@pytest.mark.parametrize("system", ["LPS", "RAS"])
def test_slicer_points_lie_on_the_voxels_that_were_clicked(volume, system):
    clicks = [(1.6, 2.6, 5.6), (4.4, 8.4, 14.4), (3, 5, 9)]  # two of them in opposite corners of the block
    save(
        volume.folder / "scan.mrk.json",
        markup("Fiducial", [point(volume.place(*at, system=system), "block-1") for at in clicks], system=system),
    )
    marks = marks_of(volume.folder)
    assert [mark.label for mark in marks] == ["block"] * 3
    for mark, at in zip(marks, clicks, strict=True):
        assert isinstance(mark, PointMark) and mark.at == pytest.approx(at, abs=1e-4) and lies_on(mark, volume.mask)


@pytest.mark.parametrize(
    ("header", "system"),
    [
        ("# CoordinateSystem = 0\n", "RAS"),
        ("# CoordinateSystem = 1\n", "LPS"),
        ("# CoordinateSystem = LPS\n", "LPS"),
        ("# CoordinateSystem = RAS\n", "RAS"),
        ("", "RAS"),
        ("# CoordinateSystem = 1,,,,\r\n", "LPS"),
    ],
)
def test_fcsv_points_lie_on_the_voxels_that_were_clicked_whatever_the_header_calls_the_axes(volume, header, system):
    lines = ["# Markups fiducial file version = 4.11\n", header]
    lines.append("# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID\n")
    for number, at in enumerate([(1.6, 2.6, 5.6), (4.4, 8.4, 14.4)]):
        x, y, z = volume.place(*at, system=system)
        lines.append(f'vtkMRMLMarkupsFiducialNode_{number},{x:.6f},{y:.6f},{z:.6f},0,0,0,1,1,1,0,"big, block",a,b\n')
    (volume.folder / "scan.fcsv").write_text("".join(lines))
    marks = marks_of(volume.folder)
    assert len(marks) == 2 and all(lies_on(mark, volume.mask) and mark.label == "big, block" for mark in marks)


@pytest.mark.parametrize("system", ["LPS", "RAS"])
def test_a_slicer_roi_along_the_volume_s_axes_touches_the_block_on_every_side(volume, system):
    start, stop = [s.start for s in OBJECT], [s.stop for s in OBJECT]
    save(volume.folder / "scan_block.mrk.json", roi(volume, start, stop, volume.direction, system=system))
    (box,) = marks_of(volume.folder)
    assert isinstance(box, BoxMark) and box.tight and box.label == "block"
    assert box.start == pytest.approx(start, abs=1e-3) and box.stop == pytest.approx(stop, abs=1e-3)


def test_a_slicer_roi_is_the_same_box_with_its_axes_in_another_order(plain):
    start, stop = [s.start for s in OBJECT], [s.stop for s in OBJECT]
    turned = roi(plain, start, stop, np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]]))
    turned["size"] = [turned["size"][1], turned["size"][2], turned["size"][0]]
    save(plain.folder / "scan_block.mrk.json", turned)
    (box,) = marks_of(plain.folder)
    assert box.tight and box.start == pytest.approx(start) and box.stop == pytest.approx(stop)


@pytest.mark.parametrize("system", ["LPS", "RAS"])
def test_a_turned_slicer_roi_becomes_the_loose_box_around_it(tmp_path, system):
    volume = Volume(tmp_path / "scan.nrrd", OBLIQUE)
    turned = roi(volume, (3, 4, 6), (5, 8, 12), OBLIQUE @ rotation(0, 0, 30), system=system)
    save(volume.folder / "scan_block.mrk.json", turned)
    (image,) = read(slicer, volume.folder)
    (box,) = image.marks
    # In the volume's own axes and millimetres: half sizes 6 x 0.7 / 2 and 4 x 1.1 / 2, turned by 30 degrees about z
    c, s = np.cos(np.pi / 6), np.sin(np.pi / 6)
    half_x, half_y = 2.1 * c + 2.2 * s, 2.1 * s + 2.2 * c
    assert not box.tight and "turned against the image" in image.notes[0]
    assert box.start == pytest.approx((3, 6 - half_y / 1.1, 9 - half_x / 0.7), abs=1e-4)
    assert box.stop == pytest.approx((5, 6 + half_y / 1.1, 9 + half_x / 0.7), abs=1e-4)


def test_a_slicer_roi_along_the_patient_s_axes_is_loose_in_an_oblique_volume(tmp_path):
    volume = Volume(tmp_path / "scan.nrrd", OBLIQUE)
    save(volume.folder / "scan_block.mrk.json", roi(volume, (3, 4, 6), (5, 8, 12), np.eye(3)))
    (box,) = marks_of(volume.folder)
    assert not box.tight and box.start < (3, 4, 6) and box.stop > (5, 8, 12)


def test_a_slicer_roi_written_by_hand_has_its_centre_in_its_control_point(plain):
    start, stop = [s.start for s in OBJECT], [s.stop for s in OBJECT]
    written = roi(plain, start, stop, np.eye(3))
    del written["center"], written["orientation"]
    save(plain.folder / "scan_block.mrk.json", written)
    (box,) = marks_of(plain.folder)
    assert box.tight and box.start == pytest.approx(start)


@pytest.mark.parametrize("kind", ["Line", "Curve", "ClosedCurve"])
def test_slicer_lines_and_curves_are_scribbles_through_their_control_points(volume, kind):
    corners = [(2, 3, 6), (4, 8, 14)] if kind == "Line" else [(2, 4, 7), (3, 6, 9), (3, 7, 12), (4, 5, 13)]
    points = [point(volume.place(*at), "L-1") for at in corners]
    save(volume.folder / "scan_block.mrk.json", markup(kind, points))
    (line,) = marks_of(volume.folder, "--straight-curves")
    assert isinstance(line, Scribble) and line.width is None
    expected = [*corners, corners[0]] if kind == "ClosedCurve" else corners
    assert np.allclose(line.vertices, expected, atol=1e-4) and lies_on(line, volume.mask)


def test_slicer_curves_are_splines_as_slicer_draws_them(plain):
    corners = [(2, 4, 7), (3, 6, 9), (3, 7, 12), (4, 5, 13)]
    points = [point(plain.place(*at)) for at in corners]
    save(plain.folder / "scan_a.mrk.json", markup("Curve", points))
    save(plain.folder / "scan_b.mrk.json", markup("ClosedCurve", points))
    opened, closed = (np.array(mark.vertices) for mark in marks_of(plain.folder))
    assert len(opened) == 31 and len(closed) == 41
    for curve in (opened, closed):
        assert np.allclose(curve[0:31:10], corners, atol=1e-6)  # through every control point, ten samples between two
        assert np.abs(np.diff(curve, 2, axis=0)).max() < 0.2  # and without corners
    assert np.allclose(opened[1] - opened[0], 0, atol=0.1)  # no slope at an open end
    assert np.allclose(closed[0], closed[-1]) and np.allclose(closed[1] - closed[0], closed[0] - closed[-2], atol=0.2)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_closed_slicer_curves_can_outline_an_area_in_one_slice(tmp_path, axis):
    volume = Volume(tmp_path / "scan.nrrd", OBLIQUE)
    index = OBJECT[axis].start + 1
    a, b = [n for n in range(3) if n != axis]
    (a0, a1), (b0, b1) = [(OBJECT[n].start - 0.5, OBJECT[n].stop - 0.5) for n in (a, b)]
    corners = []
    for p, q in [(a0, b0), (a0, b1), (a1, b1), (a1, b0)]:
        corner = [float(index)] * 3
        corner[a], corner[b] = p + 0.01, q + 0.01
        corners.append(corner)
    points = [point(volume.place(*at)) for at in corners]
    save(volume.folder / "scan_block.mrk.json", markup("ClosedCurve", points))
    (area,) = marks_of(volume.folder, "--closed-curves", "regions", "--straight-curves")
    expected = np.zeros(SHAPE, bool)
    expected[tuple(index if n == axis else slice(None) for n in range(3))] = True
    assert isinstance(area, Region if axis == 0 else RasterMask)
    assert (covered(area, SHAPE) == (expected & volume.mask)).all()


def test_a_closed_slicer_curve_across_the_slices_outlines_nothing(plain):
    points = [point(plain.place(*at)) for at in [(2, 3, 6), (4, 8, 8), (3, 3, 14)]]
    save(plain.folder / "scan_block.mrk.json", markup("ClosedCurve", points))
    with pytest.raises(AnnotationError, match="lies across the slices"):
        marks_of(plain.folder, "--closed-curves", "regions")


def test_slicer_points_that_were_never_placed_are_left_out_and_told(plain):
    unplaced = [point([0.0, 0, 0], positionStatus=status) for status in ("undefined", "preview")]
    del unplaced[0]["position"]
    save(plain.folder / "scan_block.mrk.json", markup("Fiducial", [point(plain.place(3, 4, 7)), *unplaced]))
    save(plain.folder / "scan_angle.mrk.json", markup("Angle", [point(plain.place(3, 4, 7))]))
    (image,) = read(slicer, plain.folder)
    assert len(image.marks) == 1
    assert image.notes == (
        "left out: markups of type 'Angle'",
        *["left out: control points that were never placed"] * 2,
    )


@pytest.mark.parametrize(
    ("file", "name", "label", "options", "expected"),
    [
        ("scan", None, "liver-12", [], "liver"),
        ("scan", None, "liver", [], "liver"),
        ("scan", None, "F-1", [], "F"),  # nothing better is known, and refused by name later on
        ("scan_liver", None, "F-1", [], "liver"),
        ("scan_liver", None, "MarkupsFiducial_2-3", [], "liver"),
        ("scan_liver", None, "", [], "liver"),
        ("scan", "liver_2", "F-1", [], "liver"),
        ("scan_liver", None, "spleen-1", [], "spleen"),
        ("scan_liver", None, "spleen-1", ["--label-from", "point"], "spleen-1"),
        ("scan_liver_2", None, "spleen-1", ["--label-from", "markup"], "liver_2"),
        ("scan_liver", None, "spleen-1", ["--label", "kidney"], "kidney"),
    ],
)
def test_the_class_of_a_slicer_point_is_what_a_person_wrote(plain, file, name, label, options, expected):
    named = {} if name is None else {"name": name}
    save(plain.folder / f"{file}.mrk.json", markup("Fiducial", [point(plain.place(3, 4, 7), label)], **named))
    assert [mark.label for mark in marks_of(plain.folder, *options)] == [expected]


def test_slicer_markups_in_a_folder_belong_to_the_volume_in_it(tmp_path):
    for name in ("a", "b"):
        volume = Volume(tmp_path / name / f"{name}_ct.nii.gz", UPRIGHT)
        save(tmp_path / name / "liver.mrk.json", markup("Fiducial", [point(volume.place(3, 4, 7), "F-1")]))
        save(tmp_path / name / "R_1.mrk.json", roi(volume, (2, 3, 6), (5, 9, 15), np.eye(3)))
    for image in read(slicer, tmp_path):
        assert image.file.parent.name == image.name[0]
        assert {mark.label for mark in image.marks} == {"liver", "R"}


@pytest.mark.parametrize("unit", ["um", ["um", "UCUM", "micrometer"]])
def test_slicer_coordinates_in_micrometres_are_converted(plain, unit):
    at = [1000 * v for v in plain.place(3, 4, 7)]
    save(plain.folder / "scan_block.mrk.json", markup("Fiducial", [point(at)], coordinateUnits=unit))
    assert marks_of(plain.folder)[0].at == pytest.approx((3, 4, 7))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"markups": 5}, "markups: expected the list of markups that 3D Slicer writes, but got 5"),
        ([1], "markups: expected the list"),
        ({"markups": [{"type": 3}]}, r"markups\[0\]: expected the type of the markup, but got 3"),
        ({"markups": [markup("Fiducial", system="IJK")]}, "expected LPS or RAS .* but got 'IJK'.*voxel indices"),
        ({"markups": [markup("Fiducial", coordinateUnits="inch")]}, "coordinateUnits: expected coordinates in mm"),
        (
            {"markups": [markup("Fiducial", [point([1, 2])])]},
            r"controlPoints\[0\].position: expected a list of 3 numbers",
        ),
        ({"markups": [markup("Fiducial", [point([1, 2, None])])]}, "expected a number, but got None"),
        ({"markups": [markup("Fiducial", [3])]}, r"controlPoints\[0\]: expected an object, but got 3"),
        ({"markups": [markup("ROI", center=[0, 0, 0])]}, "the ROI lacks its size"),
        ({"markups": [markup("ROI", center=[0, 0, 0], size=[1, 0, 1])]}, "size: expected sizes above 0"),
        ({"markups": [markup("ROI", size=[1, 1, 1])]}, "center: expected a list of 3 numbers, but got null"),
        ({"markups": [markup("ROI", center=[0, 0, 0], size=[1, 1, 1], orientation=[0] * 9)]}, "it is no rotation"),
    ],
)
def test_what_cannot_be_read_in_a_markup_is_named(plain, content, message):
    (plain.folder / "scan_block.mrk.json").write_text(json.dumps(content))
    with pytest.raises(AnnotationError, match=message) as caught:
        marks_of(plain.folder)
    assert "scan_block.mrk.json: markups" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("F-1,1,2,3,1,1\n", "line 1: the file does not begin with '# Markups fiducial file version"),
        ("# Markups fiducial file version = 4.11\n# CoordinateSystem = 2\n", "line 2: expected LPS or RAS"),
        ("# Markups fiducial file version = 4.11\nid,1,2,x\n", "line 2, z: expected a number, but got 'x'"),
        ("# Markups fiducial file version = 4.11\nid,1,2\n", "line 2: expected at least 4 cells, but got 3"),
        ("# Markups fiducial file version = 4.11\n# columns = id,x\nid,1\n", "line 3: expected the columns x, y and z"),
    ],
)
def test_what_cannot_be_read_in_an_fcsv_file_is_named(plain, text, message):
    (plain.folder / "scan_block.fcsv").write_text(text)
    with pytest.raises(AnnotationError, match=message):
        marks_of(plain.folder)
