"""The auxiliary label file and its checks: what goes in comes out, and whatever is wrong is named with its remedy."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import tempfile
from importlib import resources
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_dsp import annotation_checks
from nnunet_dsp import annotations as module
from nnunet_dsp.annotations import (
    AnnotationError,
    Annotations,
    Box,
    LabelNames,
    Point,
    annotations_from_dict,
    annotations_to_dict,
    case_file,
    check_against_image,
    find_contradictions,
    read_annotations,
    read_folder,
    write_annotations,
)

LABELS = LabelNames.from_dataset_json(
    {"labels": {"background": 0, "mitochondrion": 1, "synapse": 2, "membrane": 3, "ignore": 4}}
)
HEAD = {"format": "nnunet_dsp.annotations", "version": 1}
EVERYTHING = Annotations(
    shape=(64, 100, 80),
    present=("mitochondrion",),
    absent=("synapse",),
    points=(Point("mitochondrion", (4.0, 12.5, 79.0)), Point("background", (-0.5, 0.0, 0.0))),
    boxes=(Box("membrane", (0, 40, 40), (1, 41.5, 77)), Box("membrane", (3, 4, 5), (6, 7, 8), tight=False)),
    complete_points=("mitochondrion",),
    complete_boxes=("membrane", "synapse"),
    mask_labels=("mitochondrion", "membrane"),
)


def read(**entries):
    return annotations_from_dict({**HEAD, **entries}, source="case_012", labels=LABELS)


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


def save(folder: Path, content: str | bytes, name: str = "case_012.json") -> Path:
    folder = folder / "annotationsTr"
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# ------------------------------------------------------------------------------------------------ strategies


def subsets(names):
    return st.lists(st.sampled_from(names), unique=True).map(tuple) if names else st.just(())


@st.composite
def valid_annotations(draw, names=LABELS.names):
    """Annotations as the reader returns them: any axes, any mixture, coordinates whole or not."""
    axes = draw(st.sampled_from([2, 3]))
    size = draw(st.lists(st.integers(2, 40), min_size=axes, max_size=axes))

    def number(low, high):
        return draw(st.one_of(st.integers(math.ceil(low), math.floor(high)), st.floats(low, high)))

    absent = draw(subsets(names))
    others = [name for name in names if name not in absent]
    points, boxes = [], []
    if others:
        for label in draw(st.lists(st.sampled_from(others), max_size=4)):
            points.append(Point(label, tuple(float(number(-0.5, length - 0.5)) for length in size)))
        for label in draw(st.lists(st.sampled_from(others), max_size=4)):
            start = [float(number(0, length - 1)) for length in size]
            stop = [float(number(math.ceil(low) + 1, length)) for low, length in zip(start, size, strict=True)]
            boxes.append(Box(label, tuple(start), tuple(stop), draw(st.booleans())))
    return Annotations(
        shape=tuple(size) if draw(st.booleans()) else None,
        present=draw(subsets(others)),
        absent=absent,
        points=tuple(points),
        boxes=tuple(boxes),
        complete_points=draw(subsets(names)),
        complete_boxes=draw(subsets(names)),
        mask_labels=draw(st.none() | subsets([name for name in names if name != "background"])),
    )


JUNK = st.one_of(
    st.sampled_from(
        [None, True, False, -1, 0, 1, 4, 7, 1.0, 2.5, -0.5, -0.75, 1e12, 10**400, "", "ignore", "membrane", "nope", "1"]
    ),
    st.sampled_from(
        [[], {}, [1, 2], [1, 2, 3], [0, 1, 2, 3], ["membrane"], ["membrane", "membrane"], [[1]], {"at": 1}]
    ),
    st.integers(-3, 50),
    st.floats(-3, 50),
    st.text(max_size=3),
)


def places(node, path=()):
    yield path
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in entries:
        yield from places(child, (*path, key))


@st.composite
def documents(draw):
    """Valid files with up to two entries replaced, dropped or added."""
    document = annotations_to_dict(draw(valid_annotations()))
    for _ in range(draw(st.integers(0, 2))):
        path = draw(st.sampled_from(list(places(document))[1:]))
        parent = document
        for key in path[:-1]:
            parent = parent[key]
        action = draw(st.sampled_from(["replace", "replace", "drop", "add"]))
        if action == "replace":
            parent[path[-1]] = draw(JUNK)
        elif action == "drop":
            del parent[path[-1]]
        elif isinstance(parent, list):
            parent.append(draw(JUNK | st.just(parent[-1])))
        else:
            key = draw(st.sampled_from(["shape", "points", "boxes", "mask_labels", "tight", "labels", "present"]))
            parent[key] = draw(JUNK)
    return json.loads(json.dumps(document))


def is_consistent(document) -> bool:
    """Whether a document that obeys the schema also obeys the rules a schema cannot express."""
    number_of = {"background": 0, "mitochondrion": 1, "synapse": 2, "membrane": 3}
    points, boxes = document.get("points", []), document.get("boxes", [])
    tags, complete = document.get("image_level", {}), document.get("complete", {})
    marked = [entry["label"] for entry in points + boxes]
    named = [*tags.get("present", []), *tags.get("absent", []), *document.get("mask_labels", []), *marked]
    named += [*complete.get("points", []), *complete.get("boxes", [])]
    for label in named:
        if label not in number_of and not (not isinstance(label, str) and label in number_of.values()):
            return False

    def number(label):
        return number_of[label] if isinstance(label, str) else int(label)

    absent = {number(label) for label in tags.get("absent", [])}
    if absent & {number(label) for label in [*tags.get("present", []), *marked]}:
        return False
    lists = [entry["at"] for entry in points] + [entry[key] for entry in boxes for key in ("start", "stop")]
    if len({len(one) for one in [*lists, *([document["shape"]] if "shape" in document else [])]}) > 1:
        return False
    for entry in points:
        for value, length in zip(entry["at"], document.get("shape", entry["at"]), strict=True):
            if "shape" in document and value > length - 0.5:
                return False
    for entry in boxes:
        for low, high, length in zip(entry["start"], entry["stop"], document.get("shape", entry["stop"]), strict=True):
            if math.ceil(low) >= math.ceil(high) or high > length:
                return False
    return True


# --------------------------------------------------------------------------------------- writing and reading


@given(valid_annotations())
def test_what_is_written_is_read_back_the_same_with_the_same_bytes(annotations):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.json"
        write_annotations(path, annotations, LABELS)
        first = path.read_bytes()
        again = read_annotations(path, LABELS)
        assert again == annotations
        write_annotations(path, again)
        assert path.read_bytes() == first


@given(valid_annotations(names=["Zellkörper", "\n", '"', "背景", "a b", "background"]))
def test_any_text_can_be_the_name_of_a_class(annotations):
    with tempfile.TemporaryDirectory() as folder:
        write_annotations(Path(folder) / "case.json", annotations)
        assert read_annotations(Path(folder) / "case.json") == annotations


def test_the_file_holds_one_line_an_object_and_no_defaults(tmp_path):
    write_annotations(tmp_path / "a.json", EVERYTHING, LABELS)
    assert (
        (tmp_path / "a.json").read_text()
        == """{
  "format": "nnunet_dsp.annotations",
  "version": 1,
  "shape": [64, 100, 80],
  "image_level": {"present": ["mitochondrion"], "absent": ["synapse"]},
  "points": [
    {"label": "mitochondrion", "at": [4, 12.5, 79]},
    {"label": "background", "at": [-0.5, 0, 0]}
  ],
  "boxes": [
    {"label": "membrane", "start": [0, 40, 40], "stop": [1, 41.5, 77]},
    {"label": "membrane", "start": [3, 4, 5], "stop": [6, 7, 8], "tight": false}
  ],
  "complete": {"points": ["mitochondrion"], "boxes": ["membrane", "synapse"]},
  "mask_labels": ["mitochondrion", "membrane"]
}
"""
    )
    write_annotations(tmp_path / "b.json", Annotations(), LABELS)
    assert (tmp_path / "b.json").read_text() == '{\n  "format": "nnunet_dsp.annotations",\n  "version": 1\n}\n'


def test_names_stay_readable_in_the_file(tmp_path):
    write_annotations(tmp_path / "a.json", Annotations(present=("Zellkörper",)))
    assert '"Zellkörper"' in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_a_mask_in_which_nothing_was_drawn_differs_from_an_ordinary_mask(tmp_path):
    write_annotations(tmp_path / "a.json", Annotations(mask_labels=()))
    assert read_annotations(tmp_path / "a.json").mask_labels == ()
    assert read().mask_labels is None
    assert not Annotations(mask_labels=()).is_empty


def test_only_what_speaks_of_classes_makes_annotations_not_empty():
    assert Annotations().is_empty and Annotations(shape=(3, 4)).is_empty
    for name, default in annotations_to_dict(EVERYTHING).items():
        if name not in (*HEAD, "shape"):
            assert not read(**{name: default}).is_empty, name


def test_numbers_become_names_and_doubled_names_become_one():
    annotations = read(
        image_level={"present": [1, "mitochondrion", 3, 1.0], "absent": [2, 2]},
        points=[{"label": 0, "at": [1, 2]}],
        complete={"boxes": ["membrane", 3]},
        mask_labels=["background", 3],
    )
    assert annotations == Annotations(
        present=("mitochondrion", "membrane"),
        absent=("synapse",),
        points=(Point("background", (1, 2)),),
        complete_boxes=("membrane",),
        mask_labels=("membrane",),
    )


def test_numpy_values_and_doubled_names_are_written_plainly(tmp_path):
    annotations = Annotations(
        shape=tuple(np.array([20, 30])),
        present=("membrane", np.int64(3)),
        points=(Point(np.int64(1), tuple(np.array([3.0, 4.5], dtype=np.float32))),),
        boxes=(Box("membrane", tuple(np.arange(2)), tuple(np.arange(2) + 5), tight=np.bool_(True)),),
    )
    write_annotations(tmp_path / "a.json", annotations, LABELS)
    assert read_annotations(tmp_path / "a.json") == Annotations(
        shape=(20, 30),
        present=("membrane",),
        points=(Point("mitochondrion", (3, 4.5)),),
        boxes=(Box("membrane", (0, 1), (5, 6)),),
    )
    assert '"tight"' not in (tmp_path / "a.json").read_text()


def test_annotations_survive_pickling():
    assert pickle.loads(pickle.dumps(EVERYTHING)) == EVERYTHING
    assert pickle.loads(pickle.dumps(LABELS)).index("membrane") == 3


# ------------------------------------------------------------------------------------------------- the schema


@pytest.fixture(scope="module")
def schema():
    text = resources.files("nnunet_dsp.schemas").joinpath("annotations.schema.json").read_text(encoding="utf-8")
    jsonschema.Draft202012Validator.check_schema(json.loads(text))
    return jsonschema.Draft202012Validator(json.loads(text))


@settings(max_examples=400)
@given(document=documents())
def test_the_reader_accepts_what_obeys_schema_and_rules_and_nothing_else(schema, document):
    try:
        annotations_from_dict(document, source="case", labels=LABELS)
        accepted = True
    except AnnotationError:
        accepted = False
    assert accepted == (schema.is_valid(document) and is_consistent(document))


@pytest.mark.parametrize(
    ("entries", "accepted"),
    [
        ({"points": [{"label": "synapse", "at": [-0.5, 0]}]}, True),
        ({"points": [{"label": "synapse", "at": [-0.51, 0]}]}, False),
        ({"points": [{"label": "synapse", "at": [2**31 - 1, 0]}]}, True),
        ({"points": [{"label": "synapse", "at": [2**31, 0]}]}, False),
        ({"boxes": [{"label": "synapse", "start": [0, 0], "stop": [1, 0.5]}]}, True),
        ({"boxes": [{"label": "synapse", "start": [-0.25, 0], "stop": [1, 1]}]}, False),
        ({"boxes": [{"label": "synapse", "start": [0, 0], "stop": [1, 2**31]}]}, False),
        ({"shape": [1, 2**31 - 1]}, True),
        ({"shape": [1, 2**31]}, False),
        ({"shape": [1.0, 2]}, True),
        ({"version": 1.0}, True),
        ({"mask_labels": ["ignore"]}, False),
        ({"mask_labels": [""]}, False),
        ({"mask_labels": [1, 1.0]}, True),
        ({"mask_labels": [-1]}, False),
    ],
)
def test_schema_and_reader_draw_the_same_borders(schema, entries, accepted):
    assert schema.is_valid({**HEAD, **entries}) == accepted
    if accepted:
        read(**entries)
    else:
        with pytest.raises(AnnotationError, match=next(iter(entries))):
            read(**entries)


@given(annotations=valid_annotations())
def test_what_the_writer_writes_obeys_the_schema(schema, annotations):
    schema.validate(annotations_to_dict(annotations))


@given(document=st.recursive(JUNK, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner)))
def test_schema_and_reader_both_refuse_what_is_no_annotation_file(schema, document):
    assert not schema.is_valid(document)
    with pytest.raises(AnnotationError, match=r"^case: "):
        annotations_from_dict(document, source="case")


# --------------------------------------------------------------------------------------------------- messages

POINT = {"label": "synapse", "at": [1, 2]}
BOX = {"label": "synapse", "start": [1, 2], "stop": [3, 4]}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"format": "coco"},
            'expected "format": "nnunet_dsp.annotations", but got \'coco\'. Is this an annotation file?',
        ),
        (
            {"version": 2},
            'expected "version": 1, but got 2. A newer nnunet_dsp wrote it: pip install --upgrade nnunet-dsp.',
        ),
        ({"version": "1"}, "expected \"version\": 1, but got '1'."),
        ({"version": True}, 'expected "version": 1, but got true.'),
        ({"version": 0}, 'expected "version": 1, but got 0.'),
        (
            {"image_levels": {}},
            "the file has an unknown key 'image_levels', expected 'boxes', 'complete', 'format', 'image_level', "
            "'mask_labels', 'points', 'shape', 'version'. Did you mean 'image_level'?",
        ),
        (
            {"image_level": {"Abscent": []}},
            "image_level has an unknown key 'Abscent', expected 'absent', 'present'. Did you mean 'absent'?",
        ),
        (
            {"image_level": {"present": [1, True]}},
            "image_level.present[1] must be a label, the name of a class or its number, but got true.",
        ),
        (
            {"boxes": [{**BOX, "labels": 1}]},
            "boxes[0] has an unknown key 'labels', expected 'label', 'start', 'stop', 'tight'. Did you mean 'label'?",
        ),
        ({"image_level": []}, "image_level must be an object with 'absent', 'present', but got []."),
        (
            {"image_level": {"present": "synapse"}},
            "image_level.present must be a list of labels, but got 'synapse'. Write ['synapse'].",
        ),
        ({"complete": None}, "complete must be an object with 'boxes', 'points', but got null."),
        ({"mask_labels": None}, "mask_labels must be a list of labels, but got null."),
        ({"points": {}}, "points must be a list [...], but got an object."),
        ({"points": [POINT, 7]}, "points[1] must be an object with 'at', 'label', but got 7."),
        ({"points": [{"label": "synapse"}]}, "points[0] lacks the key 'at'. Add it."),
        (
            {"points": [{**POINT, "lable": 1}]},
            "points[0] has an unknown key 'lable', expected 'at', 'label'. Did you mean 'label'?",
        ),
        (
            {"points": [POINT, {**POINT, "at": [1]}]},
            "points[1].at must be a list of 2 or 3 numbers, [y, x] or [z, y, x], but got [1].",
        ),
        (
            {"points": [{**POINT, "at": [1, 2, 3, 4, 5]}]},
            "points[0].at must be a list of 2 or 3 numbers, [y, x] or [z, y, x], but got a list of 5 entries.",
        ),
        (
            {"points": [{**POINT, "at": {"y": 1}}]},
            "points[0].at must be a list of 2 or 3 numbers, [y, x] or [z, y, x], but got an object.",
        ),
        ({"points": [{**POINT, "at": [1, "2"]}]}, "points[0].at[1] must be a number, but got '2'."),
        ({"points": [{**POINT, "at": [True, 2]}]}, "points[0].at[0] must be a number, but got true."),
        ({"points": [{**POINT, "at": [1, None]}]}, "points[0].at[1] must be a number, but got null."),
        (
            {"points": [{**POINT, "at": [1, 10**400]}]},
            "points[0].at[1] must be a coordinate in voxels, but got a very large number.",
        ),
        (
            {"points": [{**POINT, "at": [1, float("nan")]}]},
            "points[0].at[1] must be a coordinate in voxels, but got nan.",
        ),
        (
            {"points": [{**POINT, "at": [1, -1]}]},
            "points[0] lies at (1, -1), outside the image (below zero). Coordinates are voxels in array order (y, x); "
            "were they written as (x, y)?",
        ),
        (
            {"points": [POINT, {**POINT, "at": [1, 2, 3]}]},
            "points[1] has 3 coordinates, but points[0] has 2. All entries of a file have one coordinate for each axis "
            "of the image: (y, x) in 2D, (z, y, x) in 3D.",
        ),
        (
            {"shape": [9, 9, 9], "boxes": [BOX]},
            "boxes[0] has 2 coordinates, but shape has 3. All entries of a file have one coordinate for each axis of "
            "the image: (y, x) in 2D, (z, y, x) in 3D.",
        ),
        (
            {"boxes": [{**BOX, "stop": [3, 4, 5]}]},
            "boxes[0] has 3 coordinates, but boxes[0] has 2. All entries of a file have one coordinate for each axis "
            "of the image: (y, x) in 2D, (z, y, x) in 3D.",
        ),
        (
            {"shape": [64, 512, 512], "points": [{**POINT, "at": [4, 5, 6]}, {**POINT, "at": [40, 512, 7]}]},
            "points[1] lies at (40, 512, 7), outside the image of shape (64, 512, 512). Coordinates are voxels in "
            "array order (z, y, x); were they written as (x, y, z)?",
        ),
        (
            {"shape": [64, 64], "boxes": [{**BOX, "stop": [64.5, 64]}]},
            "boxes[0] from (1, 2) to (64.5, 64) reaches outside the image of shape (64, 64). Coordinates are voxels "
            "in array order (y, x); were they written as (x, y)?",
        ),
        (
            {"boxes": [{**BOX, "start": [-0.25, 0]}]},
            "boxes[0] from (-0.25, 0) to (3, 4) reaches outside the image (below zero). Coordinates are voxels in "
            "array order (y, x); were they written as (x, y)?",
        ),
        (
            {"boxes": [BOX, {**BOX, "start": [1, 4]}]},
            "boxes[1] from (1, 4) to (3, 4) is empty: on each axis, at least one voxel v must satisfy start <= v < "
            "stop. Boxes are half-open, so stop is the first voxel after the object; was the last voxel of the object "
            "given?",
        ),
        (
            {"boxes": [{**BOX, "start": [2.25, 2], "stop": [2.75, 4]}]},
            "boxes[0] from (2.25, 2) to (2.75, 4) is empty: on each axis, at least one voxel v must satisfy start <= v "
            "< stop. Boxes are half-open, so stop is the first voxel after the object; was the last voxel of the "
            "object given?",
        ),
        ({"boxes": [{**BOX, "tight": 1}]}, "boxes[0].tight must be true or false, but got 1."),
        ({"boxes": [{"label": 1, "start": [1, 2]}]}, "boxes[0] lacks the key 'stop'. Add it."),
        (
            {"shape": [64, 0]},
            "shape must be 2 or 3 positive whole numbers, [y, x] or [z, y, x], but got [64, 0].",
        ),
        ({"shape": [True, 5]}, "shape must be 2 or 3 positive whole numbers, [y, x] or [z, y, x], but got [true, 5]."),
        ({"shape": [5]}, "shape must be 2 or 3 positive whole numbers, [y, x] or [z, y, x], but got [5]."),
        ({"shape": [5, 2.5]}, "shape must be 2 or 3 positive whole numbers, [y, x] or [z, y, x], but got [5, 2.5]."),
        (
            {"image_level": {"present": ["synapse", "mitochondria"]}},
            "image_level.present[1]: unknown label 'mitochondria', expected one of 'background' (0), 'mitochondrion' "
            "(1), 'synapse' (2), 'membrane' (3). Did you mean 'mitochondrion'?",
        ),
        (
            {"complete": {"points": ["nucleus"]}},
            "complete.points[0]: unknown label 'nucleus', expected one of 'background' (0), 'mitochondrion' (1), "
            "'synapse' (2), 'membrane' (3).",
        ),
        (
            {"mask_labels": [9]},
            "mask_labels[0]: unknown label 9, expected one of 'background' (0), 'mitochondrion' (1), 'synapse' (2), "
            "'membrane' (3).",
        ),
        (
            {"points": [{"label": "2", "at": [1, 2]}]},
            "points[0].label: unknown label '2', expected one of 'background' (0), 'mitochondrion' (1), 'synapse' (2), "
            "'membrane' (3). Numbers are written without quotes: 2.",
        ),
        (
            {"points": [{"label": True, "at": [1, 2]}]},
            "points[0].label must be a label, the name of a class or its number, but got true.",
        ),
        (
            {"points": [{"label": [1], "at": [1, 2]}]},
            "points[0].label must be a label, the name of a class or its number, but got [1].",
        ),
        (
            {"points": [{"label": "", "at": [1, 2]}]},
            "points[0].label must be a label, the name of a class or its number, but got ''.",
        ),
        (
            {"points": [{"label": "ignore", "at": [1, 2]}]},
            "points[0].label: label 'ignore' is nnU-Net's ignore label, which means that nobody looked; it cannot be "
            "annotated. Leave the entry out.",
        ),
        (
            {"complete": {"boxes": [4]}},
            "complete.boxes[0]: label 4 is nnU-Net's ignore label, which means that nobody looked; it cannot be "
            "annotated. Leave the entry out.",
        ),
        (
            {"mask_labels": ["\ud800"]},
            "mask_labels[0] is '\\ud800', which holds half a character (a lone surrogate). Correct the name.",
        ),
        (
            {"image_level": {"present": [2], "absent": ["synapse"]}},
            "'synapse' is listed as present and as absent in image_level. Keep one of the two, or neither if it is not "
            "known.",
        ),
        (
            {"image_level": {"absent": ["synapse"]}, "points": [{"label": 1, "at": [1, 2]}, POINT]},
            "points[1] marks 'synapse', which image_level lists as absent. Remove the point, or the class from "
            "image_level.absent.",
        ),
        (
            {"image_level": {"absent": [2]}, "boxes": [BOX]},
            "boxes[0] marks 'synapse', which image_level lists as absent. Remove the box, or the class from "
            "image_level.absent.",
        ),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_remedy(entries, message):
    with pytest.raises(AnnotationError, match=exactly(f"case_012: {message}")):
        read(**entries)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty. Remove it, or write at least format and version."),
        (" \n", "the file is empty. Remove it, or write at least format and version."),
        ("[]", "expected a JSON object {...}, but got []."),
        ("7", "expected a JSON object {...}, but got 7."),
        ("{}", 'expected "format": "nnunet_dsp.annotations", but it is missing. Is this an annotation file?'),
        ('{"format": "nnunet_dsp.annotations"}', 'expected "version": 1, but it is missing.'),
        (
            '{"format": "nnunet_dsp.annotations", "version": 1, "points": [], "points": []}',
            "the key 'points' stands twice in one object. Keep one of them.",
        ),
        ('{"a": NaN}', "NaN is no number in JSON, and no coordinate. Remove the entry or correct it."),
        ('{"a": [-Infinity]}', "-Infinity is no number in JSON, and no coordinate. Remove the entry or correct it."),
        (
            '{"format": "nnunet_dsp.annotations", "version": 1, "points": [{"label": "synapse", "at": [1, 1e999]}]}',
            "points[0].at[1] must be a coordinate in voxels, but got inf.",
        ),
        (
            '{"format": "nnunet_dsp.annotations",\n "version": 1, "points": [',
            "not valid JSON at line 2, column 27: Expecting value. The file seems to be cut off; copy it again.",
        ),
        (
            '{"format": "nnunet_',
            "not valid JSON at line 1, column 12: Unterminated string starting at. The file seems to be cut off; copy "
            "it again.",
        ),
        ("{'a': 1}", "not valid JSON at line 1, column 2: Expecting property name enclosed in double quotes."),
        ("[" * 200_000, "the JSON is nested too deeply for an annotation file."),
        (b'{"a": "\xff"}', "byte 7 is not UTF-8. Save the file as UTF-8."),
        (b"\xef\xbb\xbf{}", "the file starts with a byte order mark. Save it as UTF-8 without BOM."),
        ("{}".encode("utf-16"), "the file starts with a byte order mark. Save it as UTF-8 without BOM."),
    ],
)
def test_a_file_that_is_no_proper_json_gives_one_clear_error(tmp_path, content, message):
    path = save(tmp_path, content)
    with pytest.raises(AnnotationError, match=exactly(f"case_012 (annotationsTr/case_012.json): {message}")):
        read_annotations(path, LABELS)


def test_a_number_of_thousands_of_digits_is_refused(tmp_path):
    with pytest.raises(AnnotationError, match=r"^case_012 \(annotationsTr/case_012.json\): "):
        read_annotations(save(tmp_path, "[" + "9" * 100_000 + "]"))


def test_an_annotation_file_cut_off_anywhere_is_refused(tmp_path):
    write_annotations(tmp_path / "whole.json", EVERYTHING)
    text = (tmp_path / "whole.json").read_text().rstrip()
    for length in range(len(text)):
        path = save(tmp_path, text[:length])
        with pytest.raises(AnnotationError, match=r"cut off|is empty"):
            read_annotations(path)


@given(st.binary(max_size=200))
def test_no_bytes_do_anything_but_raise_an_annotation_error(data):
    with tempfile.TemporaryDirectory() as folder:
        path = save(Path(folder), data)
        with pytest.raises(AnnotationError):
            read_annotations(path)


def test_a_huge_file_is_refused_without_reading_it_all(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 2**20)
    with pytest.raises(
        AnnotationError, match=r"larger than 1 MiB, the limit for annotations. Dense annotations belong"
    ):
        read_annotations(save(tmp_path, " " * (2**20 + 1)))
    write_annotations(tmp_path / "a.json", Annotations())
    read_annotations(save(tmp_path, (tmp_path / "a.json").read_text().ljust(2**20)))


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"case\.json"):
        read_annotations(tmp_path / "case.json")
    (tmp_path / "case.json").mkdir()
    with pytest.raises(AnnotationError, match="expected a JSON file, but it is a folder or a device"):
        read_annotations(tmp_path / "case.json")


def test_numbers_need_the_labels_they_stand_for():
    document = {**HEAD, "mask_labels": ["anything", 3]}
    with pytest.raises(
        AnnotationError, match=r"mask_labels\[1\] is the number 3, .* Write the name of the class, or give"
    ):
        annotations_from_dict(document, source="case")
    assert annotations_from_dict({**HEAD, "mask_labels": ["anything"]}, source="case").mask_labels == ("anything",)
    with pytest.raises(AnnotationError, match=r"mask_labels\[0\]: label 'ignore' is nnU-Net's ignore label"):
        annotations_from_dict({**HEAD, "mask_labels": ["ignore"]}, source="case")


def test_long_and_unprintable_text_is_shortened_in_messages():
    with pytest.raises(AnnotationError) as error:
        read(image_level={"present": ["\x1b[31m" + "x" * 10_000]})
    assert "\x1b" not in str(error.value) and len(str(error.value)) < 300


# ----------------------------------------------------------------------------------------------------- writing


def test_nothing_is_written_that_the_reader_would_refuse(tmp_path):
    path = tmp_path / "annotationsTr" / "case_012.json"
    bad = Annotations(points=(Point("synapse", (1, 2)), Point("synapse", (float("inf"), 2))))
    with pytest.raises(
        AnnotationError, match=r"^case_012 \(annotationsTr/case_012.json\): points\[1\].at\[0\] must be"
    ):
        write_annotations(path, bad, LABELS)
    with pytest.raises(AnnotationError, match=r"points\[0\].label: unknown label 'nucleus'"):
        write_annotations(path, Annotations(points=(Point("nucleus", (1, 2)),)), LABELS)
    with pytest.raises(AnnotationError, match=r"points\[0\].at\[1\] must be a number, but got true"):
        write_annotations(path, Annotations(points=(Point("synapse", (1, True)),)), LABELS)
    assert not path.parent.exists()


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_an_exception_while_writing_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, broken):
    path = tmp_path / "case.json"
    write_annotations(path, EVERYTHING)
    before = path.read_bytes()

    def fail(*args):
        assert path.read_bytes() == before, "the file was touched before the new one was complete"
        raise KeyboardInterrupt

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(KeyboardInterrupt):
        write_annotations(path, Annotations())
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["case.json"]


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
def test_written_files_have_the_permissions_of_ordinary_files(tmp_path):
    write_annotations(tmp_path / "case.json", EVERYTHING)
    (tmp_path / "ordinary").write_text("")
    assert (tmp_path / "case.json").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_writing_through_a_link_changes_the_file_it_points_at(tmp_path):
    (tmp_path / "target.json").write_text("")
    (tmp_path / "case.json").symlink_to("target.json")
    write_annotations(tmp_path / "case.json", EVERYTHING)
    assert (tmp_path / "case.json").is_symlink()
    assert read_annotations(tmp_path / "target.json") == EVERYTHING


# ----------------------------------------------------------------------------------------------------- folders


def test_a_case_is_named_like_its_file():
    assert case_file("annotationsTr", "case_012") == Path("annotationsTr/case_012.json")
    assert case_file("annotationsTr", "v1.2..b") == Path("annotationsTr/v1.2..b.json")


@pytest.mark.parametrize("case", ["", ".", "..", "a/b", "../b", "/etc/passwd", "a\\b", "C:b", "a/", "a\0b"])
def test_a_case_name_that_leads_out_of_the_folder_is_refused(case):
    with pytest.raises(AnnotationError, match="Expected the name of a case, but got"):
        case_file("annotationsTr", case)


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_folder_gives_the_cases_that_have_a_file(tmp_path, jobs):
    for index, name in enumerate(["c", "a", "b.2"]):
        write_annotations(case_file(tmp_path, name), Annotations(shape=(index + 1, 5)), LABELS)
    (tmp_path / ".a.json.0123.tmp").write_text("half written")
    (tmp_path / ".hidden.json").write_text("not ours")
    (tmp_path / "notes.txt").write_text("by hand")
    found = read_folder(tmp_path, cases=iter(["a", "b.2", "c", "d"]), labels=LABELS, jobs=jobs)
    assert [(case, annotations.shape) for case, annotations in found.items()] == [
        ("a", (2, 5)),
        ("b.2", (3, 5)),
        ("c", (1, 5)),
    ]
    assert read_folder(tmp_path, jobs=jobs) == found


def test_a_folder_that_does_not_exist_holds_no_annotations(tmp_path):
    assert read_folder(tmp_path / "annotationsTr", cases=["a"]) == {}
    (tmp_path / "annotationsTr").write_text("")
    with pytest.raises(AnnotationError, match="expected a folder of annotation files, but it is a file"):
        read_folder(tmp_path / "annotationsTr")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("case_012_0000", "Annotation files carry the case's name without the channel number: case_012.json."),
        ("case-012", "Files are named after the case, <case>.json. Did you mean 'case_012'?"),
        ("other", "Files are named after the case, <case>.json."),
    ],
)
def test_a_file_without_a_case_is_named(tmp_path, name, hint):
    path = save(tmp_path, json.dumps(HEAD), f"{name}.json")
    message = f"{name} (annotationsTr/{name}.json): the dataset has no case '{name}'. {hint}"
    with pytest.raises(AnnotationError, match=exactly(message)):
        read_folder(path.parent, cases=["case_012", "scan_7"])


def test_a_file_ending_in_capitals_is_not_passed_over_in_silence(tmp_path):
    path = save(tmp_path, json.dumps(HEAD), "a.JSON")
    with pytest.raises(AnnotationError, match=r"the file name ends in \.JSON\. Rename it to a\.json\."):
        read_folder(path.parent)


@pytest.mark.parametrize("jobs", [1, 2])
def test_all_bad_files_of_a_folder_are_named_up_to_ten(tmp_path, jobs):
    for index in range(12):
        save(tmp_path, "{" if index else json.dumps(HEAD), f"case_{index:02}.json")
    with pytest.raises(AnnotationError) as error:
        read_folder(tmp_path / "annotationsTr", jobs=jobs)
    lines = str(error.value).splitlines()
    assert [line.split()[0] for line in lines] == [*(f"case_{index:02}" for index in range(1, 11)), "..."]
    assert lines[-1] == "... and 1 more files like these."


# ------------------------------------------------------------------------------------------------------ labels


def test_labels_are_ordered_by_their_numbers_without_ignore():
    labels = LabelNames.from_dataset_json({"b": 2, "background": 0, "ignore": 3, "a": [1]})
    assert labels.names == ("background", "a", "b") and labels.ignore_label == 3 and not labels.has_regions
    assert [labels.index(label) for label in ("background", "a", "b", 2, np.uint8(1), 1.0)] == [0, 1, 2, 2, 1, 1]
    assert labels.name(2) == "b"
    assert LabelNames.from_dataset_json({"labels": {"background": 0, "a": 1}}).ignore_label is None


@pytest.mark.parametrize("label", [True, None, "ignore", 3, 7, -1, "A", [1], 1.5])
def test_what_is_no_class_has_no_index(label):
    labels = LabelNames.from_dataset_json({"background": 0, "a": 1, "b": 2, "ignore": 3})
    with pytest.raises(AnnotationError, match=r"unknown label|ignore label"):
        labels.index(label)
    if not isinstance(label, (str, list)):
        with pytest.raises(AnnotationError, match=r"unknown label|ignore label"):
            labels.name(label)


def test_regions_are_refused_only_when_one_is_asked_for():
    labels = LabelNames.from_dataset_json({"background": 0, "whole": [1, 2], "core": 2, "ignore": 3})
    assert labels.has_regions and labels.names == ("background", "core", "whole")
    assert labels.index("core") == 2
    with pytest.raises(AnnotationError, match="label 'whole' is a region"):
        labels.index("whole")
    with pytest.raises(AnnotationError, match=r"points\[0\].label: label 'whole' is a region"):
        annotations_from_dict({**HEAD, "points": [{"label": "whole", "at": [1, 2]}]}, source="case", labels=labels)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"labels": [1, 2]}, "labels must be an object of names and numbers, but got [1, 2]."),
        ({"channel_names": {"0": "EM"}}, 'it lacks "labels". Add the classes: {"background": 0, ...}.'),
        ({"a": 1}, "labels must hold 'background' with the number 0, but it is missing."),
        ({"background": 1, "a": 0}, "labels must hold 'background' with the number 0, but got 1."),
        ({"background": [0, 1]}, "labels must hold 'background' with the number 0, but got [0, 1]."),
        ({"background": 0, "a": 2}, "labels must be numbered 0, 1, 2, ... without gaps or repeats, but got [0, 2]."),
        ({"background": 0, "a": 1, "b": 1}, "labels must be numbered 0, 1, 2, ... without gaps or repeats, but got "),
        ({"background": 0, "a": True}, "label 'a' must be a whole number from 0 or a list of them, but got true."),
        ({"background": 0, "a": []}, "label 'a' must be a whole number from 0 or a list of them, but got []."),
        ({"background": 0, "a": [[1]]}, "label 'a' must be a whole number from 0 or a list of them, but got a list of"),
        ({"background": 0, "a": 1, "ignore": 255}, "label 'ignore' must be the highest label (2), but got 255."),
        ({"background": 0, "a": 1, "ignore": [2, 3]}, "label 'ignore' must be one number, but got [2, 3]."),
        ({"0": "background", "1": "a"}, 'labels must map names to numbers ("background": 0), as nnU-Net v2 has them'),
    ],
)
def test_labels_that_nnunet_would_not_take_are_refused(labels, message):
    with pytest.raises(AnnotationError, match=re.escape(f"dataset.json: {message}")):
        LabelNames.from_dataset_json(labels)


# ------------------------------------------------------------------------------------------- against the image


def against_image(annotations, shape):
    check_against_image(annotations, shape, source="case_012", labels=LABELS)


@pytest.mark.parametrize(
    ("annotations", "shape"),
    [
        (EVERYTHING, (64, 100, 80)),
        (Annotations(shape=(9, 8), points=(Point("synapse", (8.5, 7.5)),)), (9, 8)),
        (Annotations(shape=(9, 8), boxes=(Box("synapse", (0, 0), (9, 8)),)), (1, 9, 8)),
        (Annotations(shape=(1, 9, 8), points=(Point("synapse", (0, 8, 7)),)), (9, 8)),
        (Annotations(boxes=(Box("synapse", (0, 0, 0), (1, 9, 8)),)), (9, 8)),
        (Annotations(present=("synapse",)), (5, 5, 5)),
    ],
)
def test_annotations_that_fit_their_image_pass(annotations, shape):
    against_image(annotations, shape)


@pytest.mark.parametrize(
    ("annotations", "shape", "message"),
    [
        (
            Annotations(points=(Point("synapse", (1, 2, 3)), Point("synapse", (40, 512, 7)))),
            (64, 512, 512),
            "points[1] lies at (40, 512, 7), outside the image of shape (64, 512, 512). Coordinates are voxels in "
            "array order (z, y, x); were they written as (x, y, z)?",
        ),
        (
            Annotations(points=(Point("synapse", (8.75, 2)),)),
            (1, 9, 8),
            "points[0] lies at (8.75, 2), outside the image of shape (9, 8). Coordinates are voxels in array order "
            "(y, x); were they written as (x, y)?",
        ),
        (
            Annotations(points=(Point("synapse", (1, 2, 2)),)),
            (9, 8),
            "points[0] lies at (1, 2, 2), outside the image of shape (1, 9, 8). Coordinates are voxels in array order "
            "(z, y, x); were they written as (x, y, z)?",
        ),
        (
            Annotations(boxes=(Box("synapse", (1, 2), (9, 9)),)),
            (9, 8),
            "boxes[0] from (1, 2) to (9, 9) reaches outside the image of shape (9, 8). Coordinates are voxels in "
            "array order (y, x); were they written as (x, y)?",
        ),
        (
            Annotations(points=(Point("synapse", (1, 2)),)),
            (5, 9, 8),
            "the annotations have 2 coordinates (y, x), but the image has the shape (5, 9, 8). Give every point and "
            "box one coordinate for each axis of the image.",
        ),
        (
            Annotations(shape=(8, 9)),
            (1, 9, 8),
            "the file says that the image has the shape (8, 9), but it has (1, 9, 8). Sizes are in array order (y, x); "
            "were they written as (x, y)?",
        ),
        (
            Annotations(shape=(8, 9, 5)),
            (8, 9, 6),
            "the file says that the image has the shape (8, 9, 5), but it has (8, 9, 6). Annotations are in the voxels "
            "of the image file, in array order; were they made on another image, or before it was resized or cropped?",
        ),
        (
            Annotations(complete_boxes=("synapse", "synaps")),
            (9, 8),
            "complete.boxes[1]: unknown label 'synaps', expected one of 'background' (0), 'mitochondrion' (1), "
            "'synapse' (2), 'membrane' (3). Did you mean 'synapse'?",
        ),
    ],
)
def test_annotations_that_do_not_fit_their_image_are_refused(annotations, shape, message):
    with pytest.raises(AnnotationError, match=exactly(f"case_012: {message}")):
        against_image(annotations, shape)


def test_a_shape_with_channels_is_the_callers_mistake():
    with pytest.raises(
        ValueError, match=r"Expected argument `shape` to have 2 or 3 axes \(no channels\), but got \(1, 2,"
    ):
        against_image(Annotations(), (1, 2, 3, 4))


# -------------------------------------------------------------------------------------------- against the mask

MASK = np.zeros((6, 8), dtype=np.uint8)
MASK[1:3, 1:4] = 1
MASK[4:6, 5:8] = 2


def contradictions(annotations, mask=MASK):
    return find_contradictions(annotations, mask, source="case_012", labels=LABELS)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32])
@pytest.mark.parametrize("shape", [(6, 8), (1, 6, 8)])
def test_annotations_that_agree_with_the_mask_give_no_sentence(dtype, shape):
    annotations = Annotations(
        shape=(6, 8),
        present=("mitochondrion", "synapse", "background"),
        absent=("membrane",),
        points=(Point("mitochondrion", (2.4, 0.6)), Point("background", (0, 0)), Point("synapse", (5.5, 7.5))),
        boxes=(Box("mitochondrion", (0.5, 1), (2.5, 4)), Box("synapse", (4, 5), (6, 8))),
        complete_points=("mitochondrion", "synapse"),
        complete_boxes=("mitochondrion", "synapse", "membrane"),
        mask_labels=("mitochondrion", "synapse"),
    )
    assert contradictions(annotations, MASK.reshape(shape).astype(dtype)) == []


MITO, SYNAPSE = Point("mitochondrion", (1, 1)), Point("synapse", (4, 5))


@pytest.mark.parametrize(
    ("annotations", "sentence"),
    [
        (
            Annotations(points=(MITO, Point("mitochondrion", (4, 5)), Point("synapse", (4, 6)))),
            "points[1] marks 'mitochondrion' at (4, 5), where the mask has 'synapse'. Move the point or correct the "
            "mask.",
        ),
        (
            Annotations(points=(MITO, Point("synapse", (3.75, 5)), Point("synapse", (3.25, 5)), SYNAPSE)),
            "points[2] marks 'synapse' at (3.25, 5), where the mask has 'background'. Move the point or correct the "
            "mask. If the mask's annotator did not draw 'synapse', name the classes that were drawn in mask_labels.",
        ),
        (
            Annotations(points=(MITO, SYNAPSE, Point("background", (5, 7)))),
            "points[2] marks 'background' at (5, 7), where the mask has 'synapse'. Move the point or correct the mask.",
        ),
        (
            Annotations(boxes=(Box("synapse", (3, 3), (6, 8)), Box("synapse", (3, 3), (4, 8)))),
            "boxes[1] from (3, 3) to (4, 8) holds no voxel of 'synapse', and the mask is complete inside it. Correct "
            "the box or the mask.",
        ),
        (
            Annotations(boxes=(Box("membrane", (0, 0), (6, 8)),)),
            "boxes[0] from (0, 0) to (6, 8) holds no voxel of 'membrane', and the mask is complete inside it. Correct "
            "the box or the mask.",
        ),
        (
            Annotations(present=("membrane",)),
            "image_level lists 'membrane' as present, but the mask is complete and has no voxel of it. Correct one of "
            "the two.",
        ),
        (
            Annotations(absent=("synapse",)),
            "image_level lists 'synapse' as absent, but the mask has 6 voxels of it. Correct one of the two.",
        ),
        (
            Annotations(mask_labels=("synapse",)),
            "the mask holds 6 voxels of 'mitochondrion', which mask_labels does not list. List it, or take these "
            "voxels out of the mask.",
        ),
        (
            Annotations(
                boxes=(Box("synapse", (4, 6), (6, 8)), Box("synapse", (5, 5), (6, 8))), complete_boxes=("synapse",)
            ),
            "the mask has 1 voxels of 'synapse' outside every box of 'synapse', but complete.boxes says that every "
            "object has one. Add or enlarge boxes, or take 'synapse' out of complete.boxes.",
        ),
        (
            Annotations(complete_boxes=("synapse",)),
            "the mask has 6 voxels of 'synapse' outside every box of 'synapse', but complete.boxes says that every "
            "object has one. Add or enlarge boxes, or take 'synapse' out of complete.boxes.",
        ),
        (
            Annotations(complete_points=("synapse",)),
            "complete.points says that every object of 'synapse' has a point, and there is none, but the mask has 6 "
            "voxels of it. Add the points or take 'synapse' out of complete.points.",
        ),
    ],
)
def test_what_contradicts_the_mask_is_said_in_one_sentence(annotations, sentence):
    assert contradictions(annotations) == [f"case_012: {sentence}"]


@pytest.mark.parametrize(
    ("annotations", "sentence"),
    [
        (
            Annotations(points=(Point("synapse", (1, 2)), Point("membrane", (1.25, 2)))),
            "points[0] and points[1] mark the voxel (1, 2) as 'synapse' and as 'membrane'. Remove one of them.",
        ),
        (
            Annotations(absent=("synapse",), points=(Point("synapse", (1, 2)),)),
            "points[0] marks 'synapse', which image_level lists as absent. Remove the point, or the class from "
            "image_level.absent.",
        ),
        (
            Annotations(present=("synapse",), complete_boxes=("synapse",)),
            "complete.boxes says that every object of 'synapse' has a box, and there is none, but image_level lists it "
            "as present. Add the boxes or take 'synapse' out of complete.boxes.",
        ),
        (
            Annotations(present=("synapse",), complete_points=("synapse",)),
            "complete.points says that every object of 'synapse' has a point, and there is none, but image_level lists "
            "it as present. Add the points or take 'synapse' out of complete.points.",
        ),
        (
            Annotations(
                points=(Point("synapse", (2, 3)), Point("synapse", (4, 3))),
                boxes=(Box("synapse", (2, 3), (4, 8)), Box("membrane", (0, 0), (9, 9))),
                complete_boxes=("synapse",),
            ),
            "points[1] marks 'synapse' outside every box of 'synapse', but complete.boxes says that every object has "
            "one. Add its box or take 'synapse' out of complete.boxes.",
        ),
        (
            Annotations(
                points=(Point("synapse", (2, 3)), Point("membrane", (4, 3))),
                boxes=(Box("synapse", (2, 3), (4, 8)), Box("synapse", (4, 3), (9, 9))),
                complete_points=("synapse",),
            ),
            "boxes[1] of 'synapse' holds no point of 'synapse', but complete.points says that every object has one. "
            "Add its point or take 'synapse' out of complete.points.",
        ),
    ],
)
def test_what_contradicts_itself_is_found_without_a_mask(annotations, sentence):
    assert contradictions(annotations, None) == [f"case_012: {sentence}"]


def test_ignore_voxels_contradict_nothing():
    everything = Annotations(
        present=("membrane",),
        points=(Point("membrane", (4, 5)), Point("mitochondrion", (0, 0))),
        boxes=(Box("membrane", (0, 0), (2, 2)),),
        complete_boxes=("synapse",),
    )
    assert contradictions(everything, np.full((6, 8), 4, dtype=np.uint8)) == []
    mask = MASK.copy()
    mask[1, 1] = 4
    assert contradictions(Annotations(boxes=(Box("membrane", (0, 0), (2, 3)),)), mask) == []
    assert contradictions(Annotations(present=("membrane",)), mask) == []
    assert len(find_contradictions(Annotations(), mask, source="", labels=LABELS, ignore_label=1)) == 1  # 4 is unknown


def test_background_of_a_partly_drawn_mask_says_nothing_about_the_other_classes():
    drawn = ("mitochondrion", "synapse")
    assert contradictions(Annotations(points=(Point("membrane", (0, 0)),), mask_labels=drawn)) == []
    assert contradictions(Annotations(boxes=(Box("membrane", (0, 0), (3, 3)),), mask_labels=drawn)) == []
    assert contradictions(Annotations(present=("membrane",), mask_labels=drawn)) == []
    inside = Box("membrane", (1, 1), (3, 4))  # nothing but mitochondrion there
    assert len(contradictions(Annotations(boxes=(inside,), mask_labels=drawn))) == 1
    assert len(contradictions(Annotations(points=(Point("membrane", (1, 1)),), mask_labels=drawn))) == 1


def test_points_with_reversed_axes_are_recognised():
    points = tuple(Point("synapse", (x, y)) for y, x in [(4, 5), (5, 5), (4, 4)])
    sentences = contradictions(Annotations(points=points))
    assert sentences[0] == (
        "case_012: 2 of 3 points lie in the mask of another class; with the axes reversed, 2 would agree with it. "
        "Coordinates are voxels in array order (y, x); were they written as (x, y)?"
    )
    volume = np.zeros((3, 5, 5), dtype=np.uint8)
    volume[0, 1, 2] = 3
    sentences = contradictions(Annotations(points=(Point("membrane", (2, 1, 0)),)), volume)
    assert "were they written as (x, y, z)?" in sentences[0]


def test_many_contradictions_of_a_kind_are_counted_not_listed():
    points = tuple(Point("synapse", (0, x)) for x in range(8)) + tuple(Point("synapse", (3, x)) for x in range(8))
    sentences = contradictions(Annotations(points=points))
    assert len(sentences) == 10
    assert sentences[-1] == "case_012: and 7 more of the same kind."


@pytest.mark.parametrize("value", [9, -1, 70_000])
def test_a_value_that_is_no_class_is_reported_with_its_count(value):
    mask = MASK.astype(np.int32)
    mask[0, :3] = value
    assert contradictions(Annotations(), mask) == [
        f"case_012: the mask holds the value {value} (3 voxels), which is no class of dataset.json. Correct the mask "
        "or the labels in dataset.json."
    ]


def test_masks_are_counted_in_pieces_without_losing_any(monkeypatch):
    monkeypatch.setattr(annotation_checks, "_CHUNK", 5)
    for mask in (MASK, MASK.T.copy().T, MASK.astype(np.float32)):
        assert "has 6 voxels of it" in contradictions(Annotations(absent=("synapse",)), mask)[0]


@pytest.mark.parametrize("value", [0.5, float("nan"), float("inf")])
def test_a_mask_that_holds_no_whole_numbers_is_refused(value):
    mask = MASK.astype(np.float32)
    mask[2, 2] = value
    with pytest.raises(
        AnnotationError, match=rf"case_012: the mask holds the value {value}, but expected whole numbers"
    ):
        contradictions(Annotations(), mask)


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(AnnotationError, match=r"shape \(8, 6\), but it has \(6, 8\)"):
        contradictions(Annotations(shape=(8, 6)))


@st.composite
def masks_with_boxes_and_points(draw):
    shape = draw(st.sampled_from([(5, 6), (1, 5, 6), (3, 4, 5)]))
    mask = np.array(draw(st.lists(st.integers(0, 4), min_size=math.prod(shape), max_size=math.prod(shape))))
    points, boxes = [], []
    for _ in range(draw(st.integers(0, 4))):
        at = tuple(draw(st.floats(-0.5, size - 0.5)) for size in shape)
        points.append(Point(draw(st.sampled_from(LABELS.names)), at))
    for _ in range(draw(st.integers(0, 4))):
        start = tuple(draw(st.floats(0, size - 1)) for size in shape)
        stop = tuple(draw(st.floats(math.ceil(low) + 0.5, size)) for low, size in zip(start, shape, strict=True))
        boxes.append(Box(draw(st.sampled_from(LABELS.names)), start, stop))
    annotations = Annotations(
        points=tuple(points),
        boxes=tuple(boxes),
        complete_boxes=draw(subsets(LABELS.names)),
        mask_labels=draw(st.none() | subsets(LABELS.names[1:])),
    )
    return annotations, mask.reshape(shape)


@settings(max_examples=200)
@given(masks_with_boxes_and_points())
def test_contradictions_with_the_mask_are_those_found_voxel_by_voxel(case):
    annotations, mask = case
    listed = LABELS.names if annotations.mask_labels is None else ("background", *annotations.mask_labels)
    expected = set()
    for index, point in enumerate(annotations.points):
        voxel = tuple(max(math.ceil(value - 0.5), 0) for value in point.at)
        compatible = {LABELS.index(point.label), 4} | ({0} if point.label not in listed else set())
        if mask[voxel] not in compatible:
            expected.add(("points", index))

    def is_inside(voxel, box):
        return all(low <= v < high for low, v, high in zip(box.start, voxel, box.stop, strict=True))

    voxels = list(np.ndindex(mask.shape))
    for index, box in enumerate(annotations.boxes):
        compatible = {LABELS.index(box.label), 4} | ({0} if box.label not in listed else set())
        if not any(mask[voxel] in compatible for voxel in voxels if is_inside(voxel, box)):
            expected.add(("boxes", index))
    for label in annotations.complete_boxes:
        own = [box for box in annotations.boxes if box.label == label]
        outside = 0
        for voxel in voxels:
            outside += mask[voxel] == LABELS.index(label) and not any(is_inside(voxel, box) for box in own)
        if outside and (mask != 4).any():
            expected.add((label, int(outside)))

    found = set()
    for sentence in contradictions(annotations, mask):
        if match := re.search(r"(points)\[(\d+)\] marks '\w+' at|(boxes)\[(\d+)\] from .* holds no voxel", sentence):
            kind, index = [group for group in match.groups() if group is not None]
            found.add((kind, int(index)))
        elif match := re.search(r"the mask has (\d+) voxels of '(\w+)' outside every box", sentence):
            found.add((match[2], int(match[1])))
    assert found == expected


@given(masks_with_boxes_and_points())
def test_annotations_taken_from_the_mask_itself_never_contradict_it(case):
    _, mask = case
    points, boxes, present, absent = [], [], [], []
    for label in LABELS.names:
        where = np.argwhere(mask == LABELS.index(label))
        (present if len(where) else absent if not (mask == 4).any() else []).append(label)
        if len(where):
            points.append(Point(label, tuple(where[len(where) // 2])))
            boxes.append(Box(label, tuple(where.min(axis=0)), tuple(where.max(axis=0) + 1)))
    annotations = Annotations(
        shape=mask.shape,
        present=tuple(present),
        absent=tuple(absent),
        points=tuple(points),
        boxes=tuple(boxes),
        complete_points=LABELS.names,
        complete_boxes=LABELS.names,
        mask_labels=LABELS.names[1:],
    )
    assert contradictions(annotations, mask) == []


# ---------------------------------------------------------------------------------------------- documentation


def test_the_examples_of_the_documentation_are_valid(schema):
    page = Path(__file__).parents[1] / "docs" / "annotation_file.md"
    if not page.exists():
        pytest.skip("docs/ is not part of this installation")
    examples = re.findall(r"```json\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(examples) >= 2
    for example in examples:
        schema.validate(json.loads(example))
        annotations_from_dict(json.loads(example), source="docs")
