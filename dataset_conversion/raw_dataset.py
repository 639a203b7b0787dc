"""Raw nnU-Net datasets on disk: finding, reading, linking, and writing them so that nothing half-written is left.

What is in the labels, and what becomes of it, belongs in the other modules.
"""

import copy
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_dsp.dataset_conversion.array_files import check_whole

RECORD = "nnunet_dsp_record.json"
EVALUATION_FOLDER = "labelsTr_evaluation"  # nnU-Net does not know the folder, so it never trains on what is in it
FOLDER_VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


def environment_folder(variable: str) -> Path:
    """The folder that one of nnU-Net's three environment variables names.

    Raises:
        ValueError: the variable is not set.
        FileNotFoundError: the folder does not exist.
    """
    value = os.environ.get(variable)
    if not value:
        raise ValueError(
            f"{variable} is not set. nnU-Net needs it; in this shell: export {variable}=/path/to/{variable}"
        )
    folder = Path(value)
    if not folder.is_dir():
        raise FileNotFoundError(f"{variable} is set to {value}, but there is no such folder. Make it: mkdir -p {value}")
    return folder


def dataset_name(dataset: str | int, variable: str = "nnUNet_raw") -> str:
    """Full name ("Dataset501_VNC") of a dataset given by id or by name, as it stands in the folder of `variable`.

    Raises:
        FileNotFoundError: there is no such dataset.
        ValueError: neither an id nor a name, or several datasets have this id.
    """
    root = environment_folder(variable)
    text = str(dataset)
    if re.fullmatch(r"Dataset\d{3}_.+", text):
        if not (root / text).is_dir():
            raise FileNotFoundError(f"There is no dataset {text} in {variable} ({root}).{_known(root)}")
        return text
    if not text.isdigit():
        raise ValueError(f"Expected a dataset id such as 501 or a name such as Dataset501_VNC, but got {text!r}.")
    found = sorted(p.name for p in root.glob(f"Dataset{int(text):03d}_*") if p.is_dir())
    if not found:
        raise FileNotFoundError(f"There is no dataset with id {int(text):03d} in {variable} ({root}).{_known(root)}")
    if len(found) > 1:
        raise ValueError(f"Several datasets in {variable} have the id {int(text):03d}: {', '.join(found)}. Rename one.")
    return found[0]


def _known(root: Path) -> str:
    names = sorted(p.name for p in root.glob("Dataset*") if p.is_dir())
    return (
        f" There are: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}."
        if names
        else " It holds no dataset."
    )


def new_dataset_folder(dataset_id: int, name: str, *, overwrite: bool = False) -> Path:
    """Where a new raw dataset goes, after checking that it may.

    Args:
        dataset_id: 1 to 999.
        name: letters, digits, `_` and `-`; the folder becomes DatasetXXX_name.
        overwrite: allow a folder that is there already, if one of our commands made it.

    Raises:
        ValueError: id or name unfit, or the id belongs to a dataset of another name in any of nnU-Net's three folders.
        FileExistsError: the dataset exists and `overwrite` is false, or it was not made by nnunet_dsp.
    """
    root = environment_folder("nnUNet_raw")
    if not 1 <= dataset_id <= 999:
        raise ValueError(f"Expected a dataset id from 1 to 999, but got {dataset_id}.")
    if not re.fullmatch(r"[A-Za-z0-9_\-]+", name):
        raise ValueError(f"Expected a dataset name of letters, digits, '_' and '-', but got {name!r}.")
    target = root / f"Dataset{dataset_id:03d}_{name}"
    for variable in FOLDER_VARIABLES:
        if os.environ.get(variable):
            for other in Path(os.environ[variable]).glob(f"Dataset{dataset_id:03d}_*"):
                if other.name != target.name:
                    raise ValueError(
                        f"The id {dataset_id:03d} is taken: {other} exists, and nnU-Net accepts one name per id. "
                        f"Choose another id, or the name {other.name.split('_', 1)[1]}."
                    )
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists already. Choose another id, or pass --overwrite to replace it.")
    if target.exists() and not (target / RECORD).is_file():
        raise FileExistsError(
            f"{target} was not made by nnunet_dsp (it holds no {RECORD}), so --overwrite leaves it alone."
        )
    return target


def derived_dataset_folder(source: Path, given: str, name: str | None, suffix: str, *, overwrite: bool) -> Path:
    """Where a dataset that is derived from another one goes.

    Args:
        source: the other one's folder.
        given: what the user gave as -o: an id, or a name such as Dataset502_Cells.
        name: and as --name; without any, the source's name and `suffix`.
        overwrite: as in new_dataset_folder().

    Raises:
        ValueError: as there, or it is the source itself, or `given` and `name` disagree.
        FileExistsError: as there.
    """
    number = given
    if given.startswith("Dataset") and given[7:10].isdigit() and given[10:11] == "_":
        number, own = given[7:10], given[11:]
        if name not in (None, own):
            raise ValueError(f"-o {given} and --name {name} disagree. Give one of them.")
        name = own
    name = name or source.name.split("_", 1)[-1] + suffix
    if not number.isdigit():
        raise ValueError(f"-o: expected an id such as 502 or a name such as Dataset502_{name}, but got {given!r}.")
    target = new_dataset_folder(int(number), name, overwrite=overwrite)
    if target.resolve() == source.resolve():
        raise ValueError(
            f"-d and -o are the same dataset, {target.name}. The source is never changed; choose another id."
        )
    return target


@contextmanager
def building(target: Path) -> Iterator[Path]:
    """Build a folder under another name and give it its own only when it is complete.

    Yields a new, empty, hidden folder beside `target` (relative links made in it stay right). If the block ends well
    it replaces `target`; if it raises, the folder is removed and `target` is as it was.
    """
    working = Path(tempfile.mkdtemp(prefix=f".{target.name}.building-", dir=target.parent))
    working.chmod(0o755)  # mkdtemp is private to the user; a dataset is not
    try:
        yield working
        if target.exists():
            previous = Path(tempfile.mkdtemp(prefix=f".{target.name}.previous-", dir=target.parent))
            os.rename(target, previous / target.name)
            try:
                os.rename(working, target)
            except OSError:
                os.rename(previous / target.name, target)
                raise
            finally:
                shutil.rmtree(previous, ignore_errors=True)
            stale = Path(os.environ.get("nnUNet_preprocessed", "")) / target.name
            if os.environ.get("nnUNet_preprocessed") and stale.exists():
                print(f"{stale} was made from the dataset that is now replaced. Remove it before you plan again.")
        else:
            os.rename(working, target)
    finally:
        shutil.rmtree(working, ignore_errors=True)


@dataclass(frozen=True)
class RawCase:
    """One training case: its image files (one per channel) and where its label file is, or would be."""

    name: str
    images: tuple[Path, ...]
    label: Path


@dataclass(frozen=True)
class RawDataset:
    """A raw dataset as nnU-Net sees it: its folder, its dataset.json and its training cases by name."""

    folder: Path
    json: dict[str, Any]
    cases: dict[str, RawCase]

    @property
    def file_ending(self) -> str:
        """ ".png", ".nii.gz", ...: the same for images and labels."""
        return str(self.json["file_ending"])

    @property
    def labels(self) -> dict[str, int]:
        """Label values by name, background first, without the ignore label.

        Raises:
            ValueError: the dataset has regions, or values that are not whole numbers.
        """
        labels: dict[str, int] = {}
        for name, value in self.json["labels"].items():
            if name == "ignore":
                continue
            if isinstance(value, (list, tuple)):
                if len(value) != 1:
                    raise ValueError(
                        f"{self.folder / 'dataset.json'}: label {name!r} is a region {list(value)}. Weak "
                        "annotations need "
                        "plain labels, one whole number each."
                    )
                value = value[0]
            labels[name] = int(value)
        return dict(sorted(labels.items(), key=lambda item: item[1]))

    @property
    def ignore_label(self) -> int | None:
        """Value of nnU-Net's ignore label, None where the dataset has none."""
        value = self.json["labels"].get("ignore")
        return None if value is None else int(value)

    def reader_writer(self) -> Any:
        """The class (not an instance) with which nnU-Net reads this dataset's images and writes its labels."""
        from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

        example = str(next(iter(self.cases.values())).images[0])
        try:
            return determine_reader_writer_from_dataset_json(self.json, example, verbose=False)
        except RuntimeError as error:
            raise ValueError(f"{self.folder}: nnU-Net finds no reader for {example}: {error}") from error


def read_dataset(dataset: str | int | Path) -> RawDataset:
    """Read dataset.json and list the training cases, by nnU-Net's own rules.

    Args:
        dataset: id or name of a dataset in nnUNet_raw, or (as a Path) its folder.

    Raises:
        FileNotFoundError: no such dataset, no dataset.json, or no training images.
        ValueError: dataset.json cannot be read or lacks what nnU-Net needs.
    """
    folder = dataset if isinstance(dataset, Path) else environment_folder("nnUNet_raw") / dataset_name(dataset)
    content = read_json(folder / "dataset.json")
    missing = [key for key in ("channel_names", "labels", "file_ending", "numTraining") if key not in content]
    if missing:
        raise ValueError(
            f"{folder / 'dataset.json'} lacks {', '.join(missing)}, without which nnU-Net cannot read the dataset."
        )
    if "dataset" not in content and not (folder / "imagesTr").is_dir():
        raise FileNotFoundError(f"{folder} holds no folder imagesTr.")
    if problems := layout_problems(folder, content):
        raise ValueError(f"{folder}: {' '.join(problems)}")
    cases = _listed_cases(folder, content) if "dataset" in content else _cases_in_folder(folder, content["file_ending"])
    if not cases:
        raise FileNotFoundError(f"{folder / 'imagesTr'} holds no image named like CASE_0000{content['file_ending']}.")
    channels = len(content["channel_names"])
    one_file = all(len(case.images) == 1 for case in cases.values())  # a colour picture holds all channels
    for case in cases.values():
        if len(case.images) != channels and not one_file:
            raise ValueError(
                f"{case.name}: expected {channels} image files, CASE_0000{content['file_ending']} and so on, "
                "one for each of "
                f"dataset.json's channel_names, but found {len(case.images)} in {folder / 'imagesTr'}."
            )
    return RawDataset(folder, content, cases)


def layout_problems(folder: Path, content: Mapping[str, Any]) -> list[str]:
    """What nnU-Net would stumble over before it reads an image, a sentence or two each.

    Args:
        folder: of the raw dataset.
        content: its dataset.json, with at least "channel_names" and "file_ending".
    """
    problems = []
    if not isinstance(content["channel_names"], dict):
        problems.append('dataset.json: expected channel_names of the form {"0": "NAME"}, but got another.')
    ending = content["file_ending"]
    if not isinstance(ending, str) or not ending.startswith("."):
        problems.append(f'dataset.json: expected a file_ending such as ".png", but got {json.dumps(ending)}.')
    elif "dataset" not in content:
        channel = re.compile(rf"_\d\d\d\d{re.escape(ending)}$")
        files = sorted(file.name for file in (folder / "imagesTr").iterdir() if file.is_file())
        without = [name for name in files if name.endswith(ending) and not channel.search(name)]
        if without:
            stem = without[0].removesuffix(ending)
            problems.append(
                f"imagesTr: {len(without)} image file(s) lack the number of their channel, such as {without[0]}. "
                f"Rename it to {stem}_0000{ending}."
            )
    return problems


def _listed_cases(folder: Path, content: dict[str, Any]) -> dict[str, RawCase]:
    """The cases that dataset.json lists under "dataset", which may lie anywhere."""
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    listing = copy.deepcopy(content)  # nnU-Net writes absolute paths into what it is given
    for name, files in listing["dataset"].items():
        files.setdefault("label", str(Path("labelsTr") / f"{name}{content['file_ending']}"))
    files_of = get_filenames_of_train_images_and_targets(str(folder), listing)
    return {n: RawCase(n, tuple(Path(i) for i in f["images"]), Path(f["label"])) for n, f in files_of.items()}


def _cases_in_folder(folder: Path, ending: str) -> dict[str, RawCase]:
    """The cases of imagesTr, by nnU-Net's rule; its own function starts twelve processes for it."""
    images: dict[str, list[Path]] = {}
    for file in sorted((folder / "imagesTr").iterdir()):
        if file.name.endswith(ending) and file.is_file():
            case = file.name[: -len(ending) - len("_0000")]
            found = images.setdefault(case, [])
            if re.fullmatch(re.escape(case) + r"_\d\d\d\d" + re.escape(ending), file.name):
                found.append(file)
    return {n: RawCase(n, tuple(files), folder / "labelsTr" / f"{n}{ending}") for n, files in sorted(images.items())}


def read_label(reader_writer: Any, path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """Read a label file with nnU-Net's reader.

    Args:
        reader_writer: the class that RawDataset.reader_writer() returned.
        path: the label file.

    Returns:
        The labels, shape (z, y, x) with z = 1 for 2D images, int16 or int32, and the reader's properties (spacing and
        geometry).

    Raises:
        ValueError: the file cannot be read, or holds values that are not whole numbers.
    """
    try:
        check_whole(path)
        array, properties = reader_writer().read_seg(str(path))
    except Exception as error:  # each of nnU-Net's readers has its own; a data error whatever the type
        raise ValueError(f"{path} cannot be read as a label file: {error}") from error
    values = np.rint(array[0])
    if array.shape[0] != 1 or not np.array_equal(values, array[0]):
        raise ValueError(
            f"{path}: expected one channel of whole numbers, the labels, but got {array.shape[0]} channel(s), "
            f"values from {array.min()} to {array.max()}. Was it saved as RGB, or resampled with interpolation?"
        )
    return values.astype(np.int16 if values.max(initial=0) < 2**15 else np.int32), properties


def write_label(reader_writer: Any, labels: np.ndarray, path: Path, properties: dict[str, Any]) -> None:
    """Write labels, shape (z, y, x), integer, in the geometry of `properties`, as uint8 (uint16 above 254)."""
    # nnU-Net casts to uint8 where the maximum is below 255, whatever it is given
    reader_writer().write_seg(labels, str(path), properties)


def link_file(source: Path, destination: Path) -> None:
    """Make `destination` stand for `source`: a symbolic link, or a copy where the file system knows no links.

    A file below the same nnUNet_raw is linked by relative path, so that nnUNet_raw can be moved as a whole; any other
    by absolute path. Links are resolved first: the new one points at the file itself, not at another dataset's link.
    """
    real, parent = Path(os.path.realpath(source)), Path(os.path.realpath(destination.parent))
    if not real.is_file():
        raise FileNotFoundError(
            f"{source} is not a file" + (f" (a broken link to {real})." if source.is_symlink() else ".")
        )
    root = os.environ.get("nnUNet_raw")
    together = bool(root) and all(Path(os.path.realpath(str(root))) in p.parents for p in (real, parent))
    try:
        os.symlink(os.path.relpath(real, parent) if together else real, destination)
    except (OSError, NotImplementedError):
        shutil.copyfile(real, destination)


def link_folder(source: Path, destination: Path) -> int:
    """Link every file of `source` into the folder `destination` (made if need be); returns how many."""
    destination.mkdir(parents=True, exist_ok=True)
    files = sorted(p for p in source.iterdir() if p.is_file() and not p.name.startswith("."))
    for file in files:
        link_file(file, destination / file.name)
    return len(files)


def link_case_images(case: RawCase, destination: Path, file_ending: str) -> None:
    """Link a case's images into `destination` under the names nnU-Net expects, and the .json of a 3D tif."""
    for channel, image in enumerate(case.images):
        link_file(image, destination / f"{case.name}_{channel:04d}{file_ending}")
    sidecar = case.images[0].parent / f"{case.images[0].name[: -len('_0000' + file_ending)]}.json"
    if file_ending.startswith(".tif") and sidecar.is_file():
        link_file(sidecar, destination / f"{case.name}.json")


def label_files(label: Path, new_name: str) -> list[tuple[Path, str]]:
    """A label file and, for a 3D tif, its .json with the spacing: each as it is and as it is to be called."""
    files = [(label, new_name)]
    sidecar = label.with_suffix(".json")
    if label.suffix in (".tif", ".tiff") and sidecar.is_file():
        files.append((sidecar, Path(new_name).with_suffix(".json").name))
    return files


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; FileNotFoundError or ValueError name the file."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, but got {type(content).__name__}.")
    return content


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically: a reader sees the old file or the whole new one."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path with the same ending in the same folder; it replaces `path` if the block ends well."""
    handle, name = tempfile.mkstemp(prefix=".writing-", suffix=f"-{path.name}", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_dataset_json(
    folder: Path,
    *,
    channel_names: Sequence[str],
    labels: Mapping[str, int],
    num_training: int,
    file_ending: str,
    **more: Any,
) -> None:
    """Write dataset.json as nnU-Net wants it. `more`: licence, reference, description and the like."""
    content = {
        "channel_names": {str(i): name for i, name in enumerate(channel_names)},
        "labels": dict(labels),
        "numTraining": num_training,
        "file_ending": file_ending,
        "name": re.sub(r"^\.?Dataset\d{3}_|\.building-.*$", "", folder.name),
        "converted_by": "nnunet_dsp",
        **more,
    }
    write_json(folder / "dataset.json", content)


def write_record(folder: Path, command: str, arguments: Mapping[str, Any], **more: Any) -> None:
    """Write down how a dataset was made: command, arguments, versions, and what `more` holds (seed, assignment)."""
    versions = {"python": platform.python_version()}
    for package in ("nnunet-dsp", "nnunetv2", "numpy", "scipy", "scikit-image", "connected-components-3d", "SimpleITK"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    plain = {k: _plain(v) for k, v in arguments.items() if not k.startswith("_") and not callable(v)}
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    write_json(
        folder / RECORD, {"command": command, "created": created, "arguments": plain, "versions": versions, **more}
    )


def _plain(value: Any) -> Any:
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else str(value)
