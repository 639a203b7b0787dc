"""LabelMe's JSON, in the form that LabelMe 5 (and 3, and 6) writes."""

import base64
import io
import json

import numpy as np
import pytest
from importer_oracle import covered, lies_on, painted, read, save_picture
from PIL import Image

from nnunet_dsp.annotations import AnnotationError
from nnunet_dsp.dataset_conversion.imported import BoxMark, PointMark, RasterMask, Region, Scribble, Tag
from nnunet_dsp.dataset_conversion.importers import labelme

NOISE = np.random.default_rng(0).integers(0, 255, (3, 40)).astype(np.uint8)


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def base64_of(data):
    return base64.b64encode(data).decode()


def shape(kind, points, label="cell", **more):
    return {
        "label": label,
        "points": points,
        "group_id": None,
        "description": "",
        "shape_type": kind,
        "flags": {},
        "mask": None,
        **more,
    }


@pytest.fixture
def annotated(tmp_path):
    """Write field.json beside field.png and read it; returns the SourceImage."""

    def make(*shapes, options=(), picture=True, **more):
        if picture:
            save_picture(tmp_path / "field.png")
        content = {
            "version": "5.5.0",
            "flags": {},
            "shapes": list(shapes),
            "imagePath": "field.png",
            "imageData": None,
            "imageHeight": 40,
            "imageWidth": 60,
            **more,
        }
        (tmp_path / "field.json").write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
        (image,) = read(labelme, tmp_path, *options)
        return image

    return make


@pytest.mark.parametrize(
    "corners", [[[31, 5], [47, 12]], [[47, 12], [31, 5]], [[31, 12], [47, 5]], [[47, 5], [31, 12]]]
)
def test_a_labelme_rectangle_is_the_same_box_whichever_corner_came_first(annotated, corners):
    (box,) = annotated(shape("rectangle", [[float(x), float(y)] for x, y in corners])).marks
    assert isinstance(box, BoxMark) and box.tight and lies_on(box, painted()[1]["cell"])


def test_labelme_points_lie_on_the_pixels_that_were_clicked(annotated):
    image = annotated(shape("point", [[8.1, 20.1]], "vessel"), shape("point", [[14.9, 32.9]], "vessel"))
    assert all(isinstance(mark, PointMark) and lies_on(mark, painted()[1]["vessel"]) for mark in image.marks)
    assert len(image.marks) == 2 and image.expected_shape == (40, 60) and image.name == "field"


@pytest.mark.parametrize(
    ("kind", "points"), [("line", [[3.5, 18.2], [54.9, 18.9]]), ("linestrip", [[3.1, 18.9], [20, 18.1], [54.9, 18.5]])]
)
def test_labelme_lines_are_scribbles_along_the_painted_line(annotated, kind, points):
    (line,) = annotated(shape(kind, points, "nerve")).marks
    assert isinstance(line, Scribble) and lies_on(line, painted()[1]["nerve"])
    assert line.vertices[0] == pytest.approx((points[0][1] - 0.5, points[0][0] - 0.5))


@pytest.mark.parametrize("kind", ["polygon", None, "absent"])
def test_a_labelme_polygon_fills_exactly_the_painted_cell(annotated, kind):
    polygon = shape(kind, [[31, 5], [47, 5], [47, 12], [31, 12]])
    if kind == "absent":  # LabelMe 3
        polygon = {"label": "cell", "line_color": None, "fill_color": None, "points": polygon["points"]}
    (region,) = annotated(polygon).marks
    assert isinstance(region, Region) and lies_on(region, painted()[1]["cell"])


def test_a_labelme_circle_is_given_by_its_centre_and_a_point_on_its_rim(annotated):
    (region,) = annotated(shape("circle", [[30.25, 18.75], [33.25, 22.75]])).marks
    y, x = np.indices((40, 60)) + 0.5
    assert (covered(region, (40, 60)) == ((x - 30.25) ** 2 + (y - 18.75) ** 2 < 25)).all()


@pytest.mark.parametrize("colours", ["grey", "bool", "rgba"])
def test_a_labelme_mask_covers_exactly_its_pixels(annotated, colours):
    brush = np.zeros((40, 60), bool)
    brush[7, 30:41] = brush[8, 28:33] = brush[9, 43] = True
    cut = brush[7:10, 28:44]
    stored = {
        "grey": cut.astype(np.uint8) * 255,
        "bool": cut,
        "rgba": np.dstack([cut * 255] * 3 + [np.full(cut.shape, 255)]).astype(np.uint8),
    }[colours]
    (mask,) = annotated(shape("mask", [[28.0, 7.0], [43.0, 9.0]], mask=base64_of(png(stored)))).marks
    assert isinstance(mask, RasterMask) and mask.label == "cell"
    assert (covered(mask, brush.shape) == brush).all()


def test_a_labelme_mask_with_fractional_corners_keeps_its_own_size(annotated):
    stored = np.ones((3, 16), np.uint8)
    (mask,) = annotated(shape("mask", [[27.6, 7.2], [43.4, 9.4]], mask=base64_of(png(stored)))).marks
    assert mask.offset == (7, 28) and mask.load().shape == (3, 16)


def test_labelme_flags_that_are_set_are_tags_and_others_say_nothing(annotated):
    flags = {"tumour": True, "vessel": False}
    assert annotated(flags=flags).marks == (Tag("tumour", True, "flags, 'tumour'"),)
    image = annotated(flags=flags, options=["--absent-flags"])
    assert image.marks[1] == Tag("vessel", False, "flags, 'vessel'")


def test_flags_of_single_labelme_shapes_are_left_out_and_told(annotated):
    image = annotated(shape("point", [[1, 1]], flags={"occluded": True, "difficult": False}))
    assert image.notes == ("left out: flags of single shapes ('occluded')",)


def test_a_turned_labelme_rectangle_becomes_the_loose_box_around_it(annotated):
    turned = shape("oriented_rectangle", [[30, 5], [40, 15], [35, 20], [25, 10]])
    upright = shape("oriented_rectangle", [[31, 5], [47, 5], [47, 12], [31, 12]])
    image = annotated(turned, upright)
    assert not image.marks[0].tight and (image.marks[0].start, image.marks[0].stop) == ((5, 25), (20, 40))
    assert image.marks[1].tight and lies_on(image.marks[1], painted()[1]["cell"])
    assert len(image.notes) == 1


def test_the_image_within_a_labelme_file_is_used_only_where_there_is_no_other(annotated, tmp_path):
    inside = png(painted()[0])
    image = annotated(shape("point", [[1, 1]]), imageData=base64_of(inside))
    assert image.embedded is None and image.file == tmp_path / "field.png"
    image = annotated(shape("point", [[1, 1]]), imageData=base64_of(inside), imagePath="..\\pictures\\deep.png")
    assert image.embedded == inside and image.name == "deep"


def test_labelme_images_are_looked_for_from_the_json_file_on(tmp_path):
    for folder in ("one", "two"):
        save_picture(tmp_path / folder / "pictures" / "x.png")
        (tmp_path / folder / "labels").mkdir()
        content = {"shapes": [], "imagePath": "..\\pictures\\x.png", "imageData": None}
        (tmp_path / folder / "labels" / "x.json").write_text(json.dumps(content))
    files = [image.file.relative_to(tmp_path).as_posix() for image in read(labelme, tmp_path)]
    assert files == ["one/pictures/x.png", "two/pictures/x.png"]


def test_labelme_never_reaches_for_images_outside_the_folder(annotated, tmp_path):
    (tmp_path.parent / "secret.png").write_bytes(png(painted()[0]))
    for path in ("../secret.png", str(tmp_path.parent / "secret.png"), "C:\\secret.png", "a\0b.png", ".."):
        with pytest.raises(AnnotationError, match="imagePath"):
            annotated(shape("point", [[1, 1]]), imagePath=path)
    (tmp_path.parent / "secret.png").unlink()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (shape("rectangle", [[1, 2]]), r"shapes\[0\]: a rectangle has 2 points, but it has 1"),
        (shape("polygon", [[1, 2], [2, 3]]), "needs three points"),
        (shape("polygon", [[1, 2], [2, "x"], [3, 4]]), "point 1: expected a number, but got 'x'"),
        (shape("polygon", [[1, 2], [2], [3, 4]]), r"expected point 1 as \[x, y\]"),
        (shape("point", []), r"expected points \[\[x, y\], ...\]"),
        (shape("star", [[1, 2]]), "expected a shape_type of LabelMe, but got 'star'"),
        (shape("point", [[1, 2]], ""), "expected a label"),
        (shape("circle", [[1, 2], [1, 2]]), "radius is 0"),
        (shape("mask", [[1, 2], [3, 4]]), "expected its mask as PNG"),
        (shape("mask", [[1, 2], [3, 4]], mask="!!!"), "is not base64"),
        (shape("mask", [[1, 2], [3, 4]], mask=base64_of(b"GIF89a")), "is no PNG image"),
        (
            shape("mask", [[1, 2], [3, 4]], mask=base64_of(png(np.ones((2, 2), np.uint8)))),
            "2 x 2 pixels, but its points",
        ),
        (shape("mask", [[1, 2], [40, 4]], mask=base64_of(png(NOISE)[:-60])), "PNG image is damaged"),
        ("point", r"shapes\[0\]: expected an object"),
    ],
)
def test_what_cannot_be_read_in_a_labelme_file_is_named(annotated, content, message):
    with pytest.raises(AnnotationError, match=message) as caught:
        annotated(content)
    assert "field.json: shapes[0]" in str(caught.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"shapes": {}}, "shapes: expected a list"),
        ({"flags": ["tumour"]}, "flags: expected an object"),
        ({"flags": {"tumour": 1}}, "expected true or false, but got 1"),
        ({"imagePath": 5}, "imagePath: expected the name"),
        ({"imagePath": None}, "names no image, and carries none"),
        ({"imagePath": "gone.png"}, "no image 'gone.png'.*--images DIR"),
        ({"imagePath": "gone.png", "imageData": "???"}, "imageData: it is not base64"),
        ({"imageHeight": "tall"}, "imageHeight and imageWidth: expected a number"),
    ],
)
def test_what_is_wrong_with_a_labelme_file_as_a_whole_is_named(annotated, more, message):
    with pytest.raises(AnnotationError, match=message):
        annotated(**more)


def test_coco_given_to_labelme_is_recognised(tmp_path):
    (tmp_path / "a.json").write_text('{"images": [], "annotations": []}')
    with pytest.raises(AnnotationError, match="It looks like COCO"):
        read(labelme, tmp_path)
    with pytest.raises(AnnotationError, match=r"holds no LabelMe file \(\*.json\)"):
        read(labelme, save_picture(tmp_path / "other" / "a.png").parent)
