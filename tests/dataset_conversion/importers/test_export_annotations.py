"""`nnunet_dsp export`: what goes out comes back the same."""

import argparse
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from importer_oracle import save_picture
from PIL import Image
from skimage import io

from nnunet_dsp.annotations import (
    AnnotationError,
    Annotations,
    Box,
    LabelNames,
    Point,
    annotations_from_dict,
    annotations_to_dict,
    read_annotations,
    write_annotations,
)
from nnunet_dsp.dataset_conversion import export_annotations, import_annotations
from nnunet_dsp.dataset_conversion.export_annotations import ExportedCase, to_coco, to_csv
from nnunet_dsp.dataset_conversion.image_files import ImageFolder
from nnunet_dsp.dataset_conversion.import_cases import Options, said_of
from nnunet_dsp.dataset_conversion.importers import coco, csv_tables

SHAPE = (9, 13)
CLASSES = ("cell", "vessel", "Zelle, groß")
LABELS = LabelNames.from_dataset_json({"background": 0, **{n: i for i, n in enumerate(CLASSES, start=1)}, "ignore": 4})
NAMES = st.sampled_from(CLASSES)


def spots(shape):
    """Positions in an image: whole voxels, and places between them."""
    return st.tuples(*(st.one_of(st.integers(0, s - 1), st.floats(-0.5, s - 0.5, width=32)) for s in shape)).map(
        lambda at: tuple(float(v) for v in at)
    )


@st.composite
def annotations(draw, shape):
    boxes = []
    for _ in range(draw(st.integers(0, 3))):
        start = [draw(st.integers(0, s - 1)) for s in shape]
        stop = [draw(st.integers(a + 1, s)) for a, s in zip(start, shape, strict=True)]
        boxes.append(Box(draw(NAMES), tuple(map(float, start)), tuple(map(float, stop)), draw(st.booleans())))
    present = tuple(draw(st.lists(NAMES, unique=True)))
    marked = {b.label for b in boxes} | set(present)
    absent = tuple(draw(st.lists(NAMES.filter(lambda n: n not in marked), unique=True))) if len(marked) < 3 else ()
    names = NAMES.filter(lambda n: n not in absent) if len(absent) < 3 else st.just("background")
    points = tuple(Point(draw(names), draw(spots(shape))) for _ in range(draw(st.integers(0, 3))))
    return Annotations(
        shape=shape,
        present=present,
        absent=absent,
        points=points,
        boxes=tuple(boxes),
        complete_points=tuple(draw(st.lists(NAMES, unique=True))),
        complete_boxes=tuple(draw(st.lists(NAMES, unique=True))),
    )


def masks(shape):
    return st.lists(st.integers(0, 4), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]).map(
        lambda v: np.array(v, np.uint8).reshape(shape)
    )


def back(module, text, folder, shape, name):
    """What importing an export says of its one image."""
    (folder / name).write_text(text, encoding="utf-8")
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    (image,) = module.read(folder / name, parser.parse_args([]), ImageFolder(folder))
    return said_of(image, shape, Options({n: n for n in (*CLASSES, "background")}, LABELS, 4))


def same(one, two):
    """Whether two annotations say the same; lists of classes have no order."""
    one, two = (annotations_to_dict(annotations_from_dict(annotations_to_dict(a), source="")) for a in (one, two))
    for said in (one, two):
        for group in ("image_level", "complete"):
            said[group] = {key: sorted(names) for key, names in said.get(group, {}).items()}
        if "mask_labels" in said:
            said["mask_labels"] = sorted(said["mask_labels"])
    return one == two


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    save_picture(folder / "a.png", np.zeros(SHAPE, np.uint8))
    Image.fromarray(np.zeros(SHAPE, np.uint8)).save(folder / "b.png")
    import SimpleITK

    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(np.zeros((4, *SHAPE), np.uint8)), str(folder / "v.mha"))
    return folder


EXAMPLES = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])


@EXAMPLES
@given(said=st.one_of(annotations(SHAPE), annotations((4, *SHAPE))))
def test_a_csv_export_comes_back_the_same_in_2d_and_3d(folder, said):
    file = "a.png" if len(said.shape) == 2 else "v.mha"
    text = to_csv([ExportedCase("a", file, said.shape, said)], LABELS, 4)
    assert same(back(csv_tables, text, folder, said.shape, "t.csv").annotations, said)


@EXAMPLES
@given(said=annotations(SHAPE))
def test_a_coco_export_comes_back_the_same(folder, said):
    text = to_coco([ExportedCase("a", "a.png", SHAPE, said)], LABELS, 4)
    found = back(coco, text, folder, SHAPE, "c.json").annotations
    for one, two in zip(found.points, said.points, strict=True):
        assert one.label == two.label and one.at == pytest.approx(two.at, abs=1e-6)
        assert np.ceil(np.subtract(one.at, 0.5)).tolist() == np.ceil(np.subtract(two.at, 0.5)).tolist()  # the voxel
    without = [Annotations(**{k: v for k, v in vars_of(a).items() if k != "points"}) for a in (found, said)]
    assert same(*without)


def vars_of(said):
    return {name: getattr(said, name) for name in Annotations.__dataclass_fields__}


@EXAMPLES
@given(mask=masks(SHAPE), complete=st.booleans(), drawn=st.lists(NAMES, unique=True))
def test_masks_come_back_through_coco(folder, mask, complete, drawn):
    if complete:  # no voxel is unknown
        mask[mask == 4] = 0
    for value, name in enumerate(CLASSES, start=1):
        if drawn and name not in drawn:  # a mask of some classes holds only these
            mask[mask == value] = 0
    said = Annotations(shape=SHAPE, mask_labels=tuple(drawn) or None)
    text = to_coco([ExportedCase("a", "a.png", SHAPE, said, mask)], LABELS, 4)
    found = back(coco, text, folder, SHAPE, "c.json")
    if (mask == 4).all():
        assert found.label is None
        return
    np.testing.assert_array_equal(found.label, mask)
    everything = said.mask_labels is None or set(drawn) == set(CLASSES)
    assert set(found.annotations.mask_labels or CLASSES) == set(CLASSES if everything else drawn)


def test_datasets_go_out_and_come_back_by_command(make_dataset, nnunet, call, tmp_path, capsys):
    folder, masks = make_dataset(101, cases=3)
    labels = LabelNames.from_dataset_json(json.loads((folder / "dataset.json").read_text()))
    said = Annotations(shape=(40, 48), present=("membrane",), points=(Point("membrane", (0, 7)),))
    write_annotations(folder / "annotationsTr" / "case_01.json", said, labels)
    for name in ("coco", "csv"):
        output = tmp_path / f"out.{name}"
        options = (name, "-d", 101, "-o", output)
        parser = argparse.ArgumentParser()
        export_annotations.add_arguments(parser)
        assert export_annotations.run(parser.parse_args([*map(str, options)])) == 0
        with pytest.raises(FileExistsError, match="--overwrite"):
            export_annotations.run(parser.parse_args([*map(str, options)]))
        out = capsys.readouterr().out
        assert f"nnunet_dsp import {name} {output}" in out and ("Masks" in out) == (name == "csv")
        target = ("-d", 102, "--name", "Back", "--overwrite", "--images", folder / "imagesTr")
        assert call(import_annotations, name, output, *target) == 0
        new = nnunet / "Dataset102_Back"
        assert read_annotations(new / "annotationsTr" / "case_01.json") == said
        assert [p.name for p in sorted((new / "imagesTr").iterdir())] == [f"case_0{i}_0000.png" for i in range(3)]
        for case, mask in masks.items():
            assert name == "csv" or (io.imread(new / "labelsTr" / f"{case}.png") == mask).all()


@pytest.mark.parametrize("name", ["coco", "csv"])
def test_the_command_that_an_export_prints_reads_linked_images_too(make_dataset, nnunet, call, tmp_path, capsys, name):
    """`simulate` links images, and `import` follows no links out of the folder of images."""
    source, _ = make_dataset(101, cases=2)
    folder, _ = make_dataset(102, cases=2, name="Linked")
    for file in (folder / "imagesTr").iterdir():
        file.unlink()
        file.symlink_to(source / "imagesTr" / file.name)
    write_annotations(folder / "annotationsTr" / "case_01.json", Annotations(points=(Point("membrane", (0, 7)),)))
    output = tmp_path / f"out.{name}"
    parser = argparse.ArgumentParser()
    export_annotations.add_arguments(parser)
    assert export_annotations.run(parser.parse_args([name, "-d", "102", "-o", str(output)])) == 0
    back = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Back again: "))
    arguments = back.removeprefix("Back again: nnunet_dsp import ").replace("NEW_ID", "103").split()
    assert call(import_annotations, *arguments, "--name", "Back") == 0
    assert len(list((nnunet / "Dataset103_Back" / "imagesTr").iterdir())) == 2
    with pytest.raises(AnnotationError, match=rf"is a link that leads out of .* --images {source / 'imagesTr'}"):
        call(import_annotations, name, output, "--images", folder / "imagesTr", "-d", 104, "--name", "Links")


def test_coco_refuses_volumes_and_names_what_holds_them():
    case = ExportedCase("v", "v.mha", (4, *SHAPE), Annotations())
    with pytest.raises(ValueError, match="v is a 3D image, and COCO is 2D: nnunet_dsp export csv"):
        to_coco([case], LABELS, 4)
