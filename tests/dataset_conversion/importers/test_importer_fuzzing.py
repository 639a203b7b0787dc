"""Broken, cut off and nonsensical files for every importer: one clear message or an import, never anything else.

Each example starts from files in the tool's own form, which the seeds below hold, and changes some: bytes (cut,
doubled, overwritten), the structure (a value of a JSON tree, an attribute or element of an XML tree, a cell of a table
replaced by something that does not belong there), or everything (JSON from a grammar). What is run is the whole of
`nnunet_dsp import FORMAT`, up to writing; a few examples are written as well.

The suite takes 150 examples a format. NNUNET_DSP_FUZZ=10000 takes that many.
"""

import argparse
import contextlib
import functools
import json
import os
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import test_importers_cvat as cvat_files
import test_importers_labelme as labelme_files
import test_importers_qupath as qupath_files
import test_importers_slicer as slicer_files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from importer_oracle import PAINTED, painted, save_picture

from nnunet_dsp.annotations import AnnotationError
from nnunet_dsp.dataset_conversion import import_annotations
from nnunet_dsp.dataset_conversion.importers import available_importers

EXAMPLES = int(os.environ.get("NNUNET_DSP_FUZZ", "150"))
SECONDS = 5.0  # of processor time that one example may take; most take a few milliseconds

FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=EXAMPLES <= 1000,  # the suite is the same every time
    suppress_health_check=list(HealthCheck),
)


@dataclass(frozen=True)
class Seed:
    """Files that a tool might have written, by path, and how to import them.

    options: those that begin with "@" are paths. src: which file or folder is SRC; "" for the folder that holds all.
    """

    files: dict[str, bytes]
    options: tuple[str, ...] = ()
    src: str = ""


def json_bytes(content: object) -> bytes:
    return json.dumps(content).encode()


def cvat_seeds(_: Path) -> list[Seed]:
    shapes = [
        '<box label="cell" source="manual" xtl="31.00" ytl="5.00" xbr="47.00" ybr="12.00" rotation="12.5" z_order="0">'
        '<attribute name="stage">late</attribute></box>',
        '<points label="vessel" points="8.10,20.10;14.90,32.90" z_order="0"/>',
        '<polyline label="nerve" points="3.50,18.50;54.90,18.90" z_order="1"/>',
        '<polygon label="cell" points="31.00,5.00;47.00,5.00;47.00,12.00" z_order="0"/>',
        '<mask label="cell" rle="0, 2, 3, 1" left="4" top="2" width="3" height="2" z_order="0"/>',
        '<ellipse label="cell" cx="30.25" cy="18.75" rx="12.00" ry="3.50" rotation="30.00"/>',
        '<tag label="vessel" source="manual"/>',
    ]
    image = cvat_files.IMAGE.format(name="field.png", shapes="\n".join(shapes))
    return [Seed({"annotations.xml": f"{cvat_files.META}{image}</annotations>".encode()})]


def labelme_seeds(_: Path) -> list[Seed]:
    mask = labelme_files.base64_of(labelme_files.png(np.ones((3, 5), np.uint8)))
    shapes = [
        labelme_files.shape("rectangle", [[31.0, 5.0], [47.0, 12.0]]),
        labelme_files.shape("point", [[8.1, 20.1]], "vessel"),
        labelme_files.shape("linestrip", [[3.5, 18.2], [20, 18.5], [54.9, 18.9]], "nerve"),
        labelme_files.shape("polygon", [[31, 5], [47, 5], [47, 12]]),
        labelme_files.shape("circle", [[30.25, 18.75], [33.25, 22.75]]),
        labelme_files.shape("mask", [[28, 7], [32, 9]], mask=mask),
    ]
    content = {"version": "5.5.0", "flags": {"vessel": True}, "shapes": shapes, "imagePath": "field.png"}
    size = {"imageHeight": 40, "imageWidth": 60}
    inside = labelme_files.base64_of(labelme_files.png(painted()[0]))
    embedded = {**content, "imagePath": "other.png", "imageData": inside, **size}
    return [
        Seed({"field.json": json_bytes({**content, "imageData": None, **size})}),
        Seed({"other.json": json_bytes({**embedded, "shapes": shapes[:2]})}, ("--absent-flags",)),
    ]


def qupath_seeds(_: Path) -> list[Seed]:
    features = [
        qupath_files.feature("Polygon", [qupath_files.CELL], {"names": ["Tumor", "Positive"], "color": [1, 2, 3]}),
        qupath_files.feature("MultiPolygon", [[qupath_files.CELL], [[[2, 30], [6, 30], [6, 38], [2, 30]]]]),
        qupath_files.feature("MultiPoint", [[8.1, 20.1], [14.9, 32.9]], "vessel", plane={"c": -1, "z": 0, "t": 0}),
        qupath_files.feature("LineString", [[3.2, 18.2], [54.8, 18.1]], "nerve"),
        qupath_files.feature("Point", [1, 1], None),
    ]
    features[0]["properties"]["measurements"] = {"Solidity": float("nan")}
    collection = {"type": "FeatureCollection", "features": features}
    return [
        Seed({"field.geojson": json_bytes(collection)}, ("--unclassified", "other")),
        Seed({"field.geojson": json_bytes(features[1:4])}, ("--downsample", "0.5", "--offset", "1", "2")),
    ]


def napari_seeds(_: Path) -> list[Seed]:
    points = b"index,axis-0,axis-1,confidence,label\r\n0,19.6,7.6,0.5,vessel\r\n1,6.0,32.0,1.0,cell\r\n"
    corners = [(4.5, 30.5), (4.5, 46.5), (11.5, 46.5), (11.5, 30.5)]
    rows = ["index,shape-type,vertex-index,axis-0,axis-1"]
    for index, kind in enumerate(("rectangle", "ellipse", "polygon", "path")):
        rows += [f"{index},{kind},{number},{y},{x}" for number, (y, x) in enumerate(corners)]
    return [
        Seed({"field.csv": points}),
        Seed({"field_cell.csv": "\r\n".join(rows).encode()}),
        Seed({"field.csv": points, "field_cell.csv": "\n".join(rows).encode()}, ("--scale", "0.5", "2")),
    ]


def slicer_seeds(folder: Path) -> list[Seed]:
    volume = slicer_files.Volume(folder / "scan.nrrd", slicer_files.OBLIQUE)
    points = [slicer_files.point(volume.place(*at), "block-1") for at in [(2, 4, 7), (3, 6, 9), (3, 7, 12)]]
    roi = slicer_files.roi(volume, (2, 3, 6), (5, 9, 15), slicer_files.OBLIQUE, system="RAS", name="block")
    kinds = [slicer_files.markup(kind, points, name="block") for kind in ("Fiducial", "Curve", "ClosedCurve")]
    x, y, z = volume.place(3, 5, 9)
    table = (
        "# Markups fiducial file version = 4.11\n# CoordinateSystem = LPS\n"
        "# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID\n"
        f"vtkMRMLMarkupsFiducialNode_0,{x},{y},{z},0,0,0,1,1,1,0,block-1,,\n"
    )
    flat = [slicer_files.point(volume.place(*at)) for at in [(3, 4, 7), (3, 6, 9), (3, 7, 12)]]
    outline = slicer_files.markup("ClosedCurve", flat, name="block")
    content = {"@schema": f"{slicer_files.SCHEMA}markups-schema-v1.0.3.json#", "markups": [*kinds, roi]}
    image = {"scan.nrrd": (folder / "scan.nrrd").read_bytes()}
    return [
        Seed({"scan.mrk.json": json_bytes(content), **image}),
        Seed({"scan.mrk.json": json_bytes({"markups": [outline]}), **image}, ("--closed-curves", "regions")),
        Seed({"scan.fcsv": table.encode(), **image}),
    ]


def coco_seeds(_: Path) -> list[Seed]:
    box = [31, 5, 16, 7]
    polygon = [31, 5, 47, 5, 47, 12, 31, 12]
    runs = {"size": [40, 60], "counts": [40 * 31 + 5, 7, 40 * 60 - 40 * 31 - 12]}
    packed = {"size": [40, 60], "counts": "mV17lS1"}
    annotations = [
        {"id": 1, "image_id": 7, "category_id": 3, "bbox": box, "segmentation": [polygon], "area": 112, "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 3, "bbox": box, "segmentation": runs, "area": 7, "iscrowd": 1},
        {"id": 3, "image_id": 7, "category_id": 4, "keypoints": [8.2, 20.5, 2], "num_keypoints": 1},
        {"id": 4, "image_id": 7, "category_id": 4, "bbox": box, "segmentation": packed, "iscrowd": 0},
    ]
    categories = [{"id": 3, "name": "cell"}, {"id": 4, "name": "vessel", "keypoints": ["middle"]}]
    image = {"id": 7, "file_name": "field.png", "width": 60, "height": 40}
    content = {"info": {}, "images": [image], "annotations": annotations, "categories": categories}
    return [
        Seed({"instances.json": json_bytes(content)}),
        Seed({"instances.json": json_bytes({**content, "annotations": annotations[:3]})}),
    ]


def voc_seeds(_: Path) -> list[Seed]:
    item = (
        "<object><name>cell</name><pose>Unspecified</pose><truncated>1</truncated><difficult>0</difficult><bndbox>"
        "<xmin>32</xmin><ymin>6</ymin><xmax>47</xmax><ymax>12</ymax></bndbox></object>"
    )
    size = "<size><width>60</width><height>40</height><depth>1</depth></size>"
    text = f"<annotation><filename>field.png</filename>{size}<segmented>0</segmented>{item}{item}</annotation>"
    return [Seed({"field.xml": text.encode()})]


def yolo_seeds(_: Path) -> list[Seed]:
    detect = b"0 0.65 0.2125 0.2666 0.175\n1 0.19 0.66 0.1166 0.325\n"
    segment = b"0 0.51 0.12 0.78 0.12 0.78 0.3 0.51 0.3\n1 0.13 0.5 0.25 0.5 0.25 0.82\n"
    names = b"path: .\ntrain: images\nnames:\n  0: cell\n  1: vessel\n"
    picture = {"images/field.png": b"", "classes.txt": b"cell\nvessel\n"}
    return [
        Seed({**picture, "labels/field.txt": detect}),
        Seed({**picture, "labels/field.txt": segment, "data.yaml": names}),
    ]


def csv_seeds(_: Path) -> list[Seed]:
    return [
        Seed({"table.csv": b"image,cell,vessel\nfield.png,1,0\n"}, src="table.csv"),
        Seed({"table.csv": b"image,label\nfield.png,cell;vessel\n"}, src="table.csv"),
        Seed({"table.csv": b"image,x,y,label\nfield.png,32,6,cell\nfield.png,9,21,vessel\n"}, src="table.csv"),
        Seed({"table.tsv": b"image\txmin\tymin\txmax\tymax\tlabel\nfield.png\t31\t5\t47\t12\tcell\n"}, src="table.tsv"),
    ]


def label_image_seeds(_: Path) -> list[Seed]:
    mask = np.zeros((40, 60), np.uint8)
    for value, where in enumerate(PAINTED.values(), 1):
        mask[where] = value
    values = ",".join(f"{value}={name}" for value, name in enumerate(PAINTED, 1))
    stored = labelme_files.png(mask)
    table = b"0=background\n1=cell\n2=vessel\n3=nerve\n"
    return [
        Seed({"masks/field.png": stored}, ("--images", "@images", "--values", values), src="masks"),
        Seed(
            {"masks/field.png": stored, "table.txt": table}, ("--images", "@images", "--values", "@table.txt"), "masks"
        ),
    ]


SEEDS: dict[str, Callable[[Path], list[Seed]]] = {
    "coco": coco_seeds,
    "csv": csv_seeds,
    "cvat": cvat_seeds,
    "labelme": labelme_seeds,
    "labels": label_image_seeds,
    "napari": napari_seeds,
    "qupath": qupath_seeds,
    "slicer": slicer_seeds,
    "voc": voc_seeds,
    "yolo": yolo_seeds,
}


# what goes wrong with files

PATHS = [
    "../../etc/passwd",
    "/etc/passwd",
    "C:\\Windows\\win.ini",
    "\\\\host\\share",
    "../secret.png",
    "field.png",
    ".",
]
NO_NUMBERS = ["nan", "NaN", "inf", "1e999", "9" * 400, "1_000", "0x10", "1,5", "-1", "0", "-0.0", "1e-320", "99999999"]
NO_NAMES = ["", " ", "true", "None", "a\0b", "\ud83d", "é" * 300, "{}", "<x/>", "&lol;", "background", "ignore", "%s%n"]
WORDS = st.sampled_from(PATHS + NO_NUMBERS + NO_NAMES)
NUMBERS = st.one_of(
    st.sampled_from([0, -1, 1, 0.5, -0.5, 1e9, -1e9, 2**31, 2**63, 10**30, 1e300, 1e-300, float("nan"), float("inf")]),
    st.integers(-100, 100),
    st.floats(-100, 100),
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS, st.text(max_size=8))
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(["type", "shapes", "features", "markups", "images", "points", "label", "geometry", "x"]),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=12,
)
PLACES = st.integers(0, 10**6)
MARKS = [
    b"{",
    b"}",
    b'"',
    b"'",
    b",",
    b";",
    b"\t",
    b"\n",
    b"\r\n",
    b"\0",
    b"<",
    b"]]>",
    b"-",
    b"#",
    b"\\",
    b"../",
    b"NaN",
]
HARM = [
    b"[" * 3000,
    b"<a>" * 200,
    b"9" * 5000,
    b"1e400",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"&b;",
    b"<!DOCTYPE a [<!ENTITY b 'c'>]>",
]
TOKENS = st.one_of(st.binary(max_size=6), st.sampled_from(MARKS + HARM))


def mutate_bytes(data: bytes, kind: int, place: int, length: int, token: bytes) -> bytes:
    at = place % (len(data) + 1)
    end = min(len(data), at + length % 40 + 1)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + data[end:]
    if kind == 2:
        return data[:at] + token + data[at:]
    if kind == 3:
        return data[:at] + token + data[end:]
    if kind == 4:
        return data[:end] + data[at:]
    other = length % (len(data) + 1)
    return data[:at] + data[other : other + 40] + data[end:]


def json_nodes(tree: object) -> list[tuple[object, object]]:
    """Every place in a JSON tree, as its container and key."""
    found, todo = [], [tree]
    while todo:
        value = todo.pop()
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, child in items:
            found.append((value, key))
            todo.append(child)
    return found


def mutate_json(data: bytes, kind: int, place: int, value: object) -> bytes:
    tree = json.loads(data)
    nodes = json_nodes(tree)
    if not nodes:
        return json_bytes(value)
    container, key = nodes[place % len(nodes)]
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, list):
        container.insert(key, value)
    elif kind == 2 and isinstance(container, list):
        container.append(container[key])
    elif kind == 3 and isinstance(container, dict):
        container[str(value)[:20]] = container.pop(key)
    else:
        container[key] = value
    return json_bytes(tree)


def mutate_xml(data: bytes, kind: int, place: int, value: object) -> bytes:
    root = ElementTree.fromstring(data)
    elements = [(parent, child) for parent in root.iter() for child in parent]
    if not elements:
        return data
    parent, child = elements[place % len(elements)]
    text = "".join(c for c in str(value) if c.isprintable() and not 0xD800 <= ord(c) < 0xE000)
    attributes = sorted(child.attrib)
    if kind == 0:
        parent.remove(child)
    elif kind == 1:
        parent.append(child)
    elif kind == 2:
        child.tag = "".join(c for c in text if c.isascii() and c.isalpha()) or "x"
    elif kind == 3 and attributes:
        child.attrib.pop(attributes[place % len(attributes)])
    elif attributes:
        child.attrib[attributes[place % len(attributes)]] = text
    else:
        child.text = text
    return ElementTree.tostring(root, encoding="utf-8")


def mutate_table(data: bytes, kind: int, place: int, value: object) -> bytes:
    lines = data.decode().splitlines() or [""]
    row = place % len(lines)
    separator = max(",\t; ", key=lines[row].count)
    cells = lines[row].split(separator)
    column = place // len(lines) % len(cells)
    text = str(value)
    if kind == 0:
        del lines[row]
    elif kind == 1:
        lines.append(lines[row])
    elif kind == 2:
        del cells[column]
    elif kind == 3:
        cells.insert(column, text)
    else:
        cells[column] = text
    if kind > 1:
        lines[row] = separator.join(cells)
    return "\n".join(lines).encode("utf-8", "replace")


LEVELS = ["bytes"] * 3 + ["tree"] * 8 + ["grammar"]
EDITS = st.tuples(st.sampled_from(LEVELS), st.integers(0, 5), PLACES, PLACES)


def broken(name: str, data: bytes, edits: list, tokens: list, values: list) -> bytes:
    """A file after a few edits."""
    for (level, kind, place, length), token, value in zip(edits, tokens, values, strict=True):
        by_tree = None
        if level == "grammar" and name.endswith("json"):
            data = json_bytes(value)
        elif level != "bytes":
            by_tree = (
                mutate_json if name.endswith("json") else mutate_xml if name.endswith(".xml")
                else mutate_table if name.endswith((".csv", ".tsv", ".txt", ".fcsv", ".yaml")) else None
            )  # fmt: skip
        if by_tree is not None:
            with contextlib.suppress(ValueError, SyntaxError, RecursionError, LookupError):
                data = by_tree(data, kind, place, value)  # what is no tree any more is edited by bytes
                continue
        if level == "bytes" or by_tree is not None:
            data = mutate_bytes(data, kind, place, length, token)
    return data


# running an import


class Bench:
    """A folder with images, into which the examples of one format are written and from which they are imported."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.outside = folder
        self.folder = folder / "source"
        self.raw = folder / "nnUNet_raw"
        self.raw.mkdir()
        os.environ["nnUNet_raw"] = str(self.raw)
        for path in ("field.png", "images/field.png"):
            if not (name in ("labels", "yolo") and path == "field.png"):
                save_picture(self.folder / path)
        if name not in ("labels", "yolo"):
            (self.folder / "images" / "field.png").unlink()
        (folder / "secret.png").write_bytes(labelme_files.png(painted()[0]))
        (folder / "scratch").mkdir()
        self.seeds = SEEDS[name](folder / "scratch")
        self.listing = sorted(str(path) for path in folder.rglob("*") if self.folder not in path.parents)
        self.written: list[Path] = []
        parser = argparse.ArgumentParser()
        import_annotations.add_arguments(parser)
        self.parser = parser

    def put(self, files: dict[str, bytes]) -> None:
        for path in self.written:
            path.unlink(missing_ok=True)
        self.written = []
        for name, data in files.items():
            path = self.folder / name
            if name.startswith("images/"):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            self.written.append(path)

    def run(self, seed: Seed, *, write: bool) -> str | None:
        """Import what lies there; returns the message if it was refused, None if it went well."""
        options = [str(self.folder / o[1:]) if o.startswith("@") else o for o in seed.options]
        source = self.folder / seed.src if seed.src else self.folder
        arguments = [self.name, str(source), "-d", "77", "--name", "Fuzz", *options, "--num-processes", "1"]
        args = self.parser.parse_args(arguments + ([] if write else ["--dry-run"]))
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            try:
                import_annotations.run(args)
            except AnnotationError as error:
                return str(error)
            except OSError as error:  # a file name that the system refuses
                return str(error)
        return None


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    for name in ("nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.delenv(name, raising=False)
    return functools.partial(Bench, folder=tmp_path)


def check_message(message: str | None, at: Bench) -> None:
    """A refusal names the file (or the option, or the class) and is text that a person can read."""
    if message is None:
        return
    assert message.strip() and "Traceback" not in message and len(message) < 5000
    names = [str(at.folder), "field.png", "scan.nrrd", "--", "class", *(path.name for path in at.written)]
    assert any(name in message for name in names), message


def test_every_format_is_fuzzed():
    assert set(available_importers()) == set(SEEDS)


@pytest.mark.parametrize("name", sorted(SEEDS))
def test_the_seeds_are_files_that_can_be_imported(name, bench):
    at = bench(name)
    for seed in at.seeds:
        at.put(seed.files)
        assert at.run(seed, write=False) is None


@pytest.mark.timeout(7200 if EXAMPLES > 1000 else 300)
@pytest.mark.parametrize("name", sorted(SEEDS))
def test_a_broken_file_is_imported_or_refused_in_clear_words(name, bench):
    at = bench(name)
    refused = 0
    slowest = 0.0

    @FUZZ
    @given(
        st.integers(0, len(at.seeds) - 1),
        PLACES,
        st.lists(EDITS, min_size=1, max_size=2),
        st.lists(TOKENS, min_size=2, max_size=2),
        st.lists(TREES, min_size=2, max_size=2),
    )
    def example(number, which, edits, tokens, values):
        nonlocal refused, slowest
        seed = at.seeds[number]
        files = dict(seed.files)
        names = [n for n in sorted(files) if not n.startswith("images/") and n != "scan.nrrd"]
        chosen = names[which % len(names)]
        files[chosen] = broken(chosen, files[chosen], edits, tokens[: len(edits)], values[: len(edits)])
        at.put(files)
        begin = time.process_time()
        message = at.run(seed, write=False)
        slowest = max(slowest, time.process_time() - begin)
        check_message(message, at)
        refused += message is not None

    example()
    assert slowest < SECONDS
    # Most edits break something, some do not matter: if all were refused, nothing was tested beyond the first check
    assert 0.2 * EXAMPLES < refused < 0.99 * EXAMPLES
    assert sorted(str(p) for p in at.outside.rglob("*") if at.folder not in p.parents) == at.listing
    print(f"{name}: {refused} of {EXAMPLES} refused, slowest {slowest:.2f} s")


@pytest.mark.parametrize("name", sorted(SEEDS))
def test_what_is_written_of_a_broken_file_is_a_whole_dataset_or_nothing(name, bench):
    at = bench(name)
    random = np.random.default_rng(7)
    for number in range(6):
        seed = at.seeds[number % len(at.seeds)]
        files = dict(seed.files)
        chosen = next(n for n in sorted(files) if not n.startswith("images/"))
        if number:
            edit = ("tree", int(random.integers(4, 6)), int(random.integers(10**6)), 3)
            value = [7.5, "cell", "../../out", -3, 1e6][number % 5]
            files[chosen] = broken(chosen, files[chosen], [edit], [b""], [value])
        at.put(files)
        message = at.run(seed, write=True)
        check_message(message, at)
        there = sorted(path.name for path in at.raw.iterdir())
        if message is not None:
            assert there == []
        else:
            assert there == ["Dataset077_Fuzz"]
            dataset = at.raw / "Dataset077_Fuzz"
            assert {"dataset.json", "imagesTr", "labelsTr"} <= {path.name for path in dataset.iterdir()}
            for path in sorted(dataset.rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()
            dataset.rmdir()
    assert sorted(str(p) for p in at.outside.rglob("*") if at.folder not in p.parents) == at.listing
