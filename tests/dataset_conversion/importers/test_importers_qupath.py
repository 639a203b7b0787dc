"""QuPath's GeoJSON, in the forms that QuPath 0.2 to 0.5 write."""

import json

import numpy as np
import pytest
import SimpleITK
from importer_oracle import covered, lies_on, painted, read, save_picture

from nnunet_dsp.annotations import AnnotationError
from nnunet_dsp.dataset_conversion.imported import BoxMark, PointMark, Region, Scribble
from nnunet_dsp.dataset_conversion.importers import qupath

CELL = [[31, 5], [47, 5], [47, 12], [31, 12], [31, 5]]


def feature(kind, coordinates, classification="cell", *, object_type="annotation", **geometry):
    if isinstance(classification, str):
        classification = {"name": classification, "color": [200, 0, 0]}
    return {
        "type": "Feature",
        "id": "6f3a9c5e-0b8e-4b1c-9d5e-2f6f8f6d1a11",
        "geometry": {"type": kind, "coordinates": coordinates, **geometry},
        "properties": {
            "objectType": object_type,
            **({} if classification is None else {"classification": classification}),
            "isLocked": False,
        },
    }


@pytest.fixture
def export(tmp_path):
    """Write field.geojson beside field.png and read it; returns the SourceImage."""

    def make(*features, options=(), bare=False, picture=None):
        save_picture(tmp_path / "field.png", picture)
        content = list(features) if bare else {"type": "FeatureCollection", "features": list(features)}
        (tmp_path / "field.geojson").write_text(json.dumps(content), encoding="utf-8")
        (image,) = read(qupath, tmp_path, *options)
        return image

    return make


@pytest.mark.parametrize("bare", [True, False])
def test_a_qupath_rectangle_is_a_box_that_touches_the_painted_cell(export, bare):
    (box,) = export(feature("Polygon", [CELL]), bare=bare).marks
    assert isinstance(box, BoxMark) and box.tight and lies_on(box, painted()[1]["cell"])


def test_a_qupath_rectangle_can_be_a_region_instead(export):
    (region,) = export(feature("Polygon", [CELL]), options=["--rectangles", "regions"]).marks
    assert isinstance(region, Region) and lies_on(region, painted()[1]["cell"])


@pytest.mark.parametrize(
    ("ring", "more"),
    [
        ([[31, 5], [47, 5], [47, 12], [40, 12], [31, 12], [31, 5]], {}),  # a point in the middle of a side
        ([[31, 5], [47, 6], [47, 12], [31, 12], [31, 5]], {}),  # not quite upright
        (CELL, {"isEllipse": True}),
    ],
)
def test_qupath_polygons_that_are_no_rectangles_are_regions(export, ring, more):
    (region,) = export(feature("Polygon", [ring], **more)).marks
    assert isinstance(region, Region)


def test_holes_in_qupath_polygons_and_parts_of_multipolygons_are_kept(export):
    hole = [[35, 7], [38, 7], [38, 10], [35, 10], [35, 7]]
    other = [[2, 30], [6, 30], [6, 38], [2, 38], [2, 30]]
    (region,) = export(feature("MultiPolygon", [[CELL, hole], [other]])).marks
    expected = painted()[1]["cell"].copy()
    expected[7:10, 35:38] = False
    expected[30:38, 2:6] = True
    assert (covered(region, (40, 60)) == expected).all()


def test_qupath_points_lie_on_the_pixels_that_were_clicked(export):
    image = export(
        feature("Point", [8.1, 20.1], "vessel"), feature("MultiPoint", [[14.9, 32.9], [8.2, 32.8]], "vessel")
    )
    assert len(image.marks) == 3 and all(isinstance(mark, PointMark) for mark in image.marks)
    assert all(lies_on(mark, painted()[1]["vessel"]) for mark in image.marks)


def test_a_qupath_line_is_a_scribble_along_the_painted_line(export):
    image = export(
        feature("LineString", [[3.2, 18.2], [30, 18.9], [54.8, 18.1]], "nerve"),
        feature("MultiLineString", [[[4, 18.5], [9, 18.5]], [[20, 18.5], [21, 18.5]]], "nerve"),
    )
    assert len(image.marks) == 3
    assert all(isinstance(mark, Scribble) and lies_on(mark, painted()[1]["nerve"]) for mark in image.marks)


@pytest.mark.parametrize(
    ("classification", "label", "base"),
    [
        ({"name": "Tumor", "colorRGB": -3670016}, "Tumor", "Tumor"),  # 0.2
        ({"name": "Tumor", "color": [200, 0, 0]}, "Tumor", "Tumor"),  # 0.3
        ({"name": "Tumor: Positive", "colorRGB": -377282}, "Tumor: Positive", "Tumor"),
        ({"names": ["Tumor", "Positive"], "color": [250, 62, 62]}, "Tumor: Positive", "Tumor"),  # 0.4
        ("Tumor", "Tumor", "Tumor"),
    ],
)
def test_qupath_classifications_are_read_in_every_form_they_have_had(export, classification, label, base):
    point = feature("Point", [1, 1], classification)
    assert export(point).marks[0].label == label
    assert export(point, options=["--base-class"]).marks[0].label == base


def test_unclassified_qupath_objects_are_left_out_and_told_or_named(export):
    points = [feature("Point", [1, 1], None), feature("Point", [2, 2], {"name": None}), feature("Point", [3, 3])]
    image = export(*points)
    assert [mark.label for mark in image.marks] == ["cell"]
    assert image.notes == ("left out: objects without a classification (--unclassified NAME keeps them)",) * 2
    assert [m.label for m in export(*points, options=["--unclassified", "other"]).marks] == ["other", "other", "cell"]


def test_detections_and_cells_count_and_tiles_do_not(export):
    cell = feature("Polygon", [[[1, 1], [5, 1], [4, 5], [1, 1]]], object_type="cell")
    cell["nucleusGeometry"] = {"type": "Polygon", "coordinates": [[[2, 2], [3, 2], [3, 3], [2, 2]]]}
    image = export(
        cell, feature("Polygon", [CELL], object_type="tile"), feature("Polygon", [CELL], object_type="tmaCore")
    )
    assert len(image.marks) == 1 and len(set(image.notes)) == 2


def test_measurements_that_are_no_numbers_do_not_matter(export, tmp_path):
    one = feature("Polygon", [CELL])
    one["properties"]["measurements"] = {"Area": 1.0, "Solidity": float("nan"), "Ratio": float("inf")}
    (box,) = export(one).marks
    assert isinstance(box, BoxMark)
    with pytest.raises(AnnotationError, match="expected a number, but got None"):
        export(feature("Point", [1, float("nan")]))


def test_objects_within_qupath_objects_count(export):
    outer = feature("Polygon", [CELL])
    outer["properties"]["childObjects"] = [feature("Point", [33.2, 6.1])]
    marks = export(outer).marks
    assert len(marks) == 2 and lies_on(marks[1], painted()[1]["cell"])


def test_downsampled_and_cropped_exports_are_placed_where_they_belong(export):
    # The picture was exported from (100, 200) on at a quarter of the slide's resolution
    slide = [[100 + 4 * x, 200 + 4 * y] for x, y in CELL]
    options = ["--downsample", "4", "--offset", "100", "200"]
    (box,) = export(feature("Polygon", [slide]), options=options).marks
    assert box.tight and lies_on(box, painted()[1]["cell"])
    (point,) = export(feature("Point", [100 + 4 * 8.1, 200 + 4 * 32.9], "vessel"), options=options).marks
    assert lies_on(point, painted()[1]["vessel"])


def test_annotations_outside_an_exported_part_are_left_out_and_those_across_its_edge_are_cut(export):
    image = export(
        feature("Point", [1, 1]),
        feature("Polygon", [[[90, 190], [120, 190], [120, 220], [90, 220], [90, 190]]]),
        feature("Polygon", [[[0, 0], [5, 0], [5, 5], [0, 5], [0, 0]]]),
        options=["--offset", "100", "200"],
    )
    (box,) = image.marks
    assert (box.start, box.stop, box.tight) == ((0, 0), (20, 20), False)
    assert len(image.notes) == 3


def test_tiles_that_qupath_exported_find_their_slide_by_their_names(tmp_path):
    picture, masks = painted()
    big = np.kron(picture, np.ones((2, 2), np.uint8))  # the slide: 80 x 120
    save_picture(tmp_path / "tiles" / "slide 1 [d=2,x=40,y=0,w=80,h=40].tif", big[0:40:2, 40:120:2])
    save_picture(tmp_path / "tiles" / "slide 1 [d=2,x=0,y=20,w=60,h=60].tif", big[20:80:2, 0:60:2])
    cell = [[2 * x, 2 * y] for x, y in CELL]
    content = {"type": "FeatureCollection", "features": [feature("Polygon", [cell])]}
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "slide 1.geojson").write_text(json.dumps(content))
    left, right = sorted(read(qupath, tmp_path / "json", images=tmp_path / "tiles"), key=lambda image: image.file.name)
    assert not left.marks  # the cell begins at x = 62
    assert lies_on(right.marks[0], masks["cell"][0:20, 20:60])


@pytest.mark.parametrize("tiles", [1, 2])
@pytest.mark.parametrize(
    ("name", "options"),
    [("slide_1", ()), ("slide_1_points", ()), ("slide_1.tif", ()), ("x", ("--image", "slide_1 [x="))],
)
def test_a_tile_keeps_its_place_whatever_the_geojson_file_is_called(tmp_path, tiles, name, options):
    files = [f"slide_1 [x={x},y=0,w=30,h=40].png" for x in (30, 0)[:tiles]]
    for file, x in zip(files, (30, 0), strict=False):
        save_picture(tmp_path / "tiles" / file, painted()[0][:, x : x + 30])
    save_picture(tmp_path / "tiles" / "other" / "slide.png")
    content = {"type": "FeatureCollection", "features": [feature("Point", [45.5, 8.5])]}
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / f"{name}.geojson").write_text(json.dumps(content))
    options = options and (options[0], files[0])
    found = {image.file.name: image for image in read(qupath, tmp_path / "json", *options, images=tmp_path / "tiles")}
    assert set(found) == set(files[:1] if options else files)
    (mark,) = found[files[0]].marks
    assert mark.at == (8.0, 15.0) and lies_on(mark, painted()[1]["cell"][:, 30:])


def test_a_part_that_is_no_tile_goes_by_the_longest_name(tmp_path):
    save_picture(tmp_path / "slide [x=30,y=0,w=60,h=40].png")
    save_picture(tmp_path / "slide_1.png")
    (tmp_path / "slide_1_points.geojson").write_text(json.dumps([feature("Point", [45.5, 8.5])]))
    (image,) = read(qupath, tmp_path)
    assert image.file.name == "slide_1.png" and lies_on(image.marks[0], painted()[1]["cell"])


def test_broken_objects_are_named_whichever_tile_they_would_be_on(tmp_path):
    for x in (0, 20):
        save_picture(tmp_path / f"slide [x={x},y=0,w=20,h=20].png", painted()[0][:20, :20])
    broken = feature("Polygon", [[[100, 5], [101, 6], ["x", 7]]])
    (tmp_path / "slide.geojson").write_text(json.dumps([feature("Point", [1, 1]), broken]))
    with pytest.raises(AnnotationError, match=r"slide.geojson: \[1\], point 2: expected a number, but got 'x'"):
        read(qupath, tmp_path)


def test_json_of_other_programs_does_not_matter_beside_geojson_and_archives_are_to_be_unpacked(export, tmp_path):
    (tmp_path / "dataset.json").write_text("{}")
    assert len(export(feature("Point", [1, 1])).marks) == 1
    (tmp_path / "all.zip").write_bytes(b"PK")
    with pytest.raises(AnnotationError, match="it is a .zip archive. Unpack it, and name the folder"):
        read(qupath, tmp_path / "all.zip")


@pytest.mark.parametrize("plane", [0, 3])
def test_qupath_shapes_lie_in_their_plane_of_a_stack(tmp_path, plane):
    volume = np.zeros((5, 40, 60), np.uint8)
    volume[plane] = painted()[0]
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(volume), str(tmp_path / "field.nrrd"))
    where = {"plane": {"c": -1, "z": plane, "t": 0}} if plane else {}
    cell, vessel = np.zeros((5, 40, 60), bool), np.zeros((5, 40, 60), bool)
    cell[plane], vessel[plane] = painted()[1]["cell"], painted()[1]["vessel"]
    features = [
        feature("Polygon", [CELL], **where),
        feature("Polygon", [[*CELL[:4], [31, 8], CELL[0]]], **where),
        feature("Point", [14.9, 20.1], "vessel", **where),
        feature("Point", [14.9, 20.1], "vessel", plane={"c": -1, "z": plane, "t": 2}),
    ]
    (tmp_path / "field.geojson").write_text(json.dumps(features))
    (image,) = read(qupath, tmp_path)
    assert [type(mark) for mark in image.marks] == [BoxMark, Region, PointMark]
    for mark, mask in zip(image.marks, (cell, cell, vessel), strict=True):
        assert lies_on(mark, mask)
    assert "left out: objects at later time points" in image.notes and image.incomplete == ("cell",)


def test_several_geojson_files_of_one_image_are_put_together(tmp_path):
    save_picture(tmp_path / "field.png")
    for name, label in (("field.geojson", "cell"), ("field_cells.geojson", "vessel")):
        (tmp_path / name).write_text(json.dumps([feature("Point", [1, 1], label)]))
    (image,) = read(qupath, tmp_path)
    assert {mark.label: mark.entry for mark in image.marks} == {
        "cell": "field.geojson: [0]",
        "vessel": "field_cells.geojson: [0]",
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"type": "Topology"}, "expected a FeatureCollection or a list"),
        ([{"type": "Point"}], r'\[0\]: expected an object with "type": "Feature"'),
        ([feature("Circle", [1, 2])], r"\[0\]: expected a geometry of GeoJSON .* but got 'Circle'"),
        ([feature("Point", [1])], r"expected point 0 as \[x, y\]"),
        ([feature("Point", "1,2")], "expected the coordinates of its Point, but got '1,2'"),
        ([feature("Polygon", [[[1, 2], [3, 4], [1, 2]]])], "needs three different points, but it has 2"),
        ([feature("Polygon", [3])], r"expected points \[\[x, y\], ...\], but got 3"),
        ([feature("Point", [1, 2], {"names": "Tumor"})], "expected the names of its classification"),
        ([feature("Point", [1, 2], 5)], "expected the name of its classification, but got 5"),
        ([feature("Point", [1, 2], plane={"z": 0.5})], r"plane.z: expected a whole number, but got 0.5"),
    ],
)
def test_what_cannot_be_read_in_a_geojson_file_is_named(tmp_path, content, message):
    save_picture(tmp_path / "field.png")
    (tmp_path / "field.geojson").write_text(json.dumps(content))
    with pytest.raises(AnnotationError, match=message) as caught:
        read(qupath, tmp_path)
    assert "field.geojson: " in str(caught.value)


def test_a_geojson_file_without_an_image_says_how_to_name_it(tmp_path):
    save_picture(tmp_path / "one.png")
    save_picture(tmp_path / "two.png")
    (tmp_path / "field.geojson").write_text("[]")
    with pytest.raises(AnnotationError, match="Call it after its image, such as one.geojson"):
        read(qupath, tmp_path)
    assert read(qupath, tmp_path, "--image", "two.png")[0].file == tmp_path / "two.png"


def test_a_downsampling_of_nothing_is_refused(export):
    with pytest.raises(ValueError, match="--downsample between"):
        export(options=["--downsample", "0"])
