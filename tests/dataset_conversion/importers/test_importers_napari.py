"""napari's CSV of points and shapes layers, in the form that napari's own writer gives."""

import csv

import numpy as np
import pytest
import SimpleITK
from importer_oracle import covered, lies_on, painted, read, save_picture

from nnunet_dsp.annotations import AnnotationError
from nnunet_dsp.dataset_conversion.imported import BoxMark, PointMark, RasterMask, Region, Scribble
from nnunet_dsp.dataset_conversion.importers import napari

SHAPE = (9, 12, 17)
OBJECT = (slice(2, 5), slice(3, 9), slice(6, 15))  # z, y, x


def write_points(path, points, **properties):
    """As napari_write_points does: index, axis-0, ..., then properties."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["index", *(f"axis-{n}" for n in range(len(points[0]))), *properties])
        for index, point in enumerate(points):
            writer.writerow([index, *map(float, point), *(column[index] for column in properties.values())])


def write_shapes(path, *shapes):
    """As napari_write_shapes does: shapes are (shape-type, vertices)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "shape-type", "vertex-index", *(f"axis-{n}" for n in range(len(shapes[0][1][0])))])
        for index, (kind, vertices) in enumerate(shapes):
            for number, vertex in enumerate(vertices):
                writer.writerow([index, kind, number, *map(float, vertex)])


@pytest.fixture
def picture(tmp_path):
    save_picture(tmp_path / "field.png")
    return tmp_path


@pytest.fixture
def volume(tmp_path):
    """A 3D image with a painted block; returns the folder and the block's mask."""
    mask = np.zeros(SHAPE, bool)
    mask[OBJECT] = True
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(mask.astype(np.uint8)), str(tmp_path / "scan.nii.gz"))
    return tmp_path, mask


def marks_of(folder, *options):
    (image,) = read(napari, folder, *options)
    return image.marks


def test_napari_points_lie_on_the_pixels_that_were_clicked(picture):
    # napari draws pixel i from i - 0.5 to i + 0.5
    write_points(picture / "field.csv", [(19.6, 7.6), (32.4, 14.4), (20, 8)])
    marks = marks_of(picture, "--label", "vessel")
    assert all(isinstance(mark, PointMark) and lies_on(mark, painted()[1]["vessel"]) for mark in marks)
    assert [mark.at for mark in marks] == [(19.6, 7.6), (32.4, 14.4), (20, 8)]


def test_napari_properties_name_the_class_of_each_point(picture):
    write_points(picture / "field.csv", [(1, 2), (3, 4)], confidence=[0.5, 1.0], label=["cell", "vessel"])
    assert [mark.label for mark in marks_of(picture)] == ["cell", "vessel"]
    write_points(picture / "field.csv", [(1, 2), (3, 4)], label=["cell", "vessel"], stage=[1.0, 2.0])
    assert [mark.label for mark in marks_of(picture, "--label-column", "stage")] == ["1", "2"]
    with pytest.raises(AnnotationError, match="line 1: there is no column 'species'"):
        marks_of(picture, "--label-column", "species")


def test_the_rest_of_a_napari_file_s_name_is_its_class(picture):
    write_points(picture / "field_cell.csv", [(6, 32)])
    write_points(picture / "field-vessel.csv", [(22, 9)])
    (image,) = read(napari, picture)
    assert {mark.label: mark.entry for mark in image.marks} == {
        "vessel": "field-vessel.csv: line 2",
        "cell": "field_cell.csv: line 2",
    }
    write_points(picture / "field.csv", [(6, 32)])
    with pytest.raises(AnnotationError, match="nothing says which class it is.*field_CLASS.csv"):
        read(napari, picture)


def test_a_folder_called_like_the_image_holds_its_napari_layers(tmp_path):
    for name in ("a", "b"):
        save_picture(tmp_path / "images" / f"{name}.png")
        write_points(tmp_path / "layers" / name / "cell.csv", [(6, 32)])
    found = read(napari, tmp_path / "layers", images=tmp_path / "images")
    assert [(image.name, image.marks[0].label) for image in found] == [("a", "cell"), ("b", "cell")]


def test_a_napari_rectangle_touches_the_painted_cell_on_every_side(picture):
    corners = [(4.5, 30.5), (4.5, 46.5), (11.5, 46.5), (11.5, 30.5)]
    for start in range(4):  # whichever corner it was drawn from, and either way round
        for turned in (corners[start:] + corners[:start], (corners[start:] + corners[:start])[::-1]):
            write_shapes(picture / "field_cell.csv", ("rectangle", turned))
            (box,) = marks_of(picture)
            assert isinstance(box, BoxMark) and box.tight and lies_on(box, painted()[1]["cell"])


def test_a_turned_napari_rectangle_becomes_the_loose_box_around_it(picture):
    write_shapes(picture / "field_cell.csv", ("rectangle", [(10, 20), (15, 25), (10, 30), (5, 25)]))
    (image,) = read(napari, picture)
    assert image.marks[0] == BoxMark("cell", (5.5, 20.5), (15.5, 30.5), False, "shape 0 (line 2)")
    assert "turned rectangles" in image.notes[0] and not image.incomplete


def test_napari_polygons_and_ellipses_are_regions(picture):
    polygon = [(4.5, 30.5), (4.5, 46.5), (11.5, 46.5), (11.5, 30.5)]
    ellipse = [(12.75, 17.75), (12.75, 41.75), (23.75, 41.75), (23.75, 17.75)]
    write_shapes(picture / "field_cell.csv", ("polygon", polygon), ("ellipse", ellipse))
    polygon, ellipse = marks_of(picture)
    assert isinstance(polygon, Region) and lies_on(polygon, painted()[1]["cell"])
    y, x = np.indices((40, 60))
    assert (covered(ellipse, (40, 60)) == (((x - 29.75) / 12) ** 2 + ((y - 18.25) / 5.5) ** 2 < 1)).all()


def test_napari_lines_and_paths_are_scribbles_along_the_painted_line(picture):
    write_shapes(
        picture / "field_nerve.csv",
        ("line", [(17.6, 2.6), (18.4, 54.4)]),
        ("path", [(18, 3), (18.4, 20), (17.6, 54)]),
    )
    marks = marks_of(picture)
    assert len(marks) == 2
    assert all(isinstance(mark, Scribble) and lies_on(mark, painted()[1]["nerve"]) for mark in marks)


def test_napari_points_and_lines_in_3d_are_in_array_order(volume):
    folder, mask = volume
    write_points(folder / "scan_block.csv", [(1.6, 2.6, 5.6), (4.4, 8.4, 14.4)])
    assert all(lies_on(point, mask) for point in marks_of(folder))
    write_shapes(folder / "scan_block.csv", ("path", [(1.6, 2.6, 5.6), (4.4, 8.4, 14.4)]))
    assert all(lies_on(line, mask) for line in marks_of(folder))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_flat_napari_shapes_lie_in_their_plane_of_a_volume(volume, axis):
    folder, mask = volume
    index = 4
    a, b = [n for n in range(3) if n != axis]
    (a0, a1), (b0, b1) = [(OBJECT[n].start - 0.5, OBJECT[n].stop - 0.5) for n in (a, b)]
    corners = [[float(index)] * 3 for _ in range(4)]
    for corner, (p, q) in zip(corners, [(a0, b0), (a0, b1), (a1, b1), (a1, b0)], strict=True):
        corner[a], corner[b] = p, q
    if axis == 2:
        index = 7
        for corner in corners:
            corner[2] = 7.0
    write_shapes(folder / "scan_block.csv", ("rectangle", corners), ("polygon", corners))
    (image,) = read(napari, folder)
    box, area = image.marks
    assert image.incomplete == ("block",)  # the rectangle says nothing of the other slices
    plane = np.zeros(SHAPE, bool)
    plane[tuple(index if n == axis else slice(None) for n in range(3))] = True
    assert box.tight and (covered(box, SHAPE) == (mask & plane)).all()
    assert isinstance(area, Region if axis == 0 else RasterMask) and (covered(area, SHAPE) == (mask & plane)).all()


def test_napari_layers_in_world_units_need_the_scale_of_each_axis(volume):
    folder, mask = volume
    write_points(folder / "scan_block.csv", [(1.6 * 3, 2.6 * 0.5, 5.6 * 0.25), (4.4 * 3, 8.4 * 0.5, 14.4 * 0.25)])
    assert all(lies_on(point, mask) for point in marks_of(folder, "--scale", "3", "0.5", "0.25"))
    with pytest.raises(AnnotationError, match="--scale with 3 numbers, one an axis, but got 2"):
        marks_of(folder, "--scale", "3", "0.5")
    with pytest.raises(ValueError, match="--scale to be positive"):
        marks_of(folder, "--scale", "0")


def test_napari_layers_with_other_axes_than_the_image_are_refused(volume, tmp_path):
    folder, _ = volume
    write_points(folder / "scan_block.csv", [(1, 2)])
    with pytest.raises(AnnotationError, match="2 axes, but the image scan.nii.gz has 3.*ndim=3"):
        marks_of(folder)
    write_points(folder / "scan_block.csv", [(1, 2, 3, 4)])
    with pytest.raises(AnnotationError, match="4 axes, but.*channels and time"):
        marks_of(folder)


@pytest.mark.parametrize("separator", [";", "\t"])
def test_napari_tables_that_went_through_a_spreadsheet_are_read(picture, separator):
    lines = ["index,axis-1,axis-0,label", "0,7.6,19.6,vessel", "", "1,14.4,32.4,vessel", ",,,"]
    text = "\r\n".join(lines).replace(",", separator)
    (picture / "field.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    marks = marks_of(picture)
    assert len(marks) == 2 and all(lies_on(mark, painted()[1]["vessel"]) for mark in marks)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("x,y\n1,2\n", "line 1: expected the columns axis-0, axis-1.*import csv"),
        ("axis-0,axis-2\n1,2\n", "expected the columns axis-0, axis-1"),
        ("axis-0,axis-1,axis-1\n1,2,3\n", "'axis-1' stands there twice"),
        ("axis-0,axis-1\n1,2\n3\n", "line 3: expected 2 cells, but got 1"),
        ("axis-0,axis-1\n1,inf\n", "line 2, axis-1: expected a number, but got 'inf'"),
        ("axis-0,axis-1,label\n1,2,\n", "line 2: the column 'label' is empty"),
        (
            "index,shape-type,vertex-index,axis-0,axis-1\n0,rectangle,0,1,2\n",
            "a rectangle has 4 vertices, but it has 1",
        ),
        (
            "index,shape-type,vertex-index,axis-0,axis-1\n0,blob,0,1,2\n",
            "expected a shape-type of napari, but got 'blob'",
        ),
        ("index,shape-type,vertex-index,axis-0,axis-1\n0,path,0,1,2\n0,path,2,1,3\n", "vertices 0 to 1, each once"),
        ("index,shape-type,vertex-index,axis-0,axis-1\n0,path,0,1,2\n0,line,1,1,3\n", "'line', 'path' at once"),
        (
            "index,shape-type,vertex-index,axis-0,axis-1\nx,path,0,1,2\n",
            "line 2, index: expected a number, but got 'x'",
        ),
        (
            "index,shape-type,vertex-index,axis-0,axis-1\n" + "".join(f"0,rectangle,{n},1,{n}\n" for n in range(4)),
            "the rectangle has no area",
        ),
    ],
)
def test_what_cannot_be_read_in_a_napari_layer_is_named(picture, text, message):
    (picture / "field.csv").write_text(text)
    with pytest.raises(AnnotationError, match=message) as caught:
        marks_of(picture, *([] if "label" in text else ["--label", "cell"]))
    assert "field.csv: " in str(caught.value)


def test_a_napari_area_across_the_slices_is_refused(volume):
    folder, _ = volume
    write_shapes(folder / "scan_block.csv", ("polygon", [(1, 2, 3), (2, 5, 9), (4, 9, 4)]))
    with pytest.raises(AnnotationError, match="lies across the slices"):
        marks_of(folder)
