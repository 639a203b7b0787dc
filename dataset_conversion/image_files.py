"""Image files beside annotations: finding them by the name a tool wrote down, and their geometry, without their voxels.

Reading, converting and writing voxels belongs in image_store.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnunet_dsp.annotations import AnnotationError

ENDINGS = (
    ".nii.gz", ".nii", ".nrrd", ".mha", ".png", ".tif", ".tiff", ".bmp", ".jpg", ".jpeg",
)  # fmt: skip
"""Of images that can be imported, lower case; longer ones first where one ends in another."""

MAX_FILES = 1_000_000
IMAGE_FOLDERS = frozenset(
    ("images", "image", "imagestr", "img", "imgs", "jpegimages", "photos", "pictures", "raw", "data")
)
"""Folders that say only that images lie in them, lower case: names leave them out, or have another of them."""
LABEL_FOLDERS = frozenset((
    "annotation", "annotations", "groundtruth", "ground_truth", "gt", "label", "labels", "labelstr", "manual", "mask",
    "masks", "scribble", "scribbles", "seg", "segmentation", "truth",
))  # fmt: skip
"""Folders of annotations, whose names do not matter to where the image lies, lower case."""


def ending_of(path: Path | str) -> str | None:
    """The image ending of a file name, lower case (".nii.gz", ".png"); None: not an image we read."""
    name = os.path.basename(str(path)).lower()
    return next((ending for ending in ENDINGS if name.endswith(ending) and len(name) > len(ending)), None)


def stem_of(path: Path | str) -> str:
    """The file name without folder and image ending."""
    name = os.path.basename(str(path))
    ending = ending_of(name)
    return name[: -len(ending)] if ending else name


@dataclass(frozen=True)
class Geometry:
    """Where the voxels of an image lie in the world, as ITK has it (millimetres, LPS).

    shape: voxels, (z, y, x) or (y, x). The others count x first, as ITK: origin of the first voxel's centre, spacing,
    direction as a matrix whose columns are the axes.
    """

    shape: tuple[int, ...]
    origin: tuple[float, ...]
    spacing: tuple[float, ...]
    direction: np.ndarray

    def to_voxels(self, points: np.ndarray) -> np.ndarray:
        """World points (N, D), x first, LPS, mm, as continuous voxel indices (N, D) in array order (centres)."""
        matrix = np.asarray(self.direction, np.float64) * np.asarray(self.spacing, np.float64)
        offset = np.atleast_2d(np.asarray(points, np.float64)) - np.asarray(self.origin, np.float64)
        return np.linalg.solve(matrix, offset.T).T[:, ::-1]


class ImageFolder:
    """The images that annotations may name: those of one folder and its subfolders, and nothing outside of it.

    shown: annotations count pixels as viewers show images with an EXIF orientation, which decides what shape() says.
    label_images: the files in it that an importer read as annotations, so that they are no images to train on.
    """

    def __init__(self, root: Path, *, shown: bool = False) -> None:
        self.root = root
        self.shown = shown
        self.label_images: set[Path] = set()
        self._files: list[Path] | None = None
        self._links_out: dict[str, Path] = {}
        self._by_name: dict[str, list[Path]] = {}
        self._by_stem: dict[str, list[Path]] = {}
        self._folders: set[str] = set()
        self._root_name = ""

    def files(self) -> list[Path]:
        """Every image file, sorted by path; hidden files and folders are passed over.

        Raises:
            AnnotationError: more than a million files.
        """
        if self._files is None:
            files: list[Path] = []
            for path in self._walk():
                if len(files) >= MAX_FILES:
                    raise AnnotationError(f"{self.root} holds more than {MAX_FILES} images. Name a smaller folder.")
                files.append(path)
            self._files = sorted(files)
            self._root_name = self.root.resolve().name.lower()
            for path in self._files:
                self._by_name.setdefault(path.name.lower(), []).append(path)
                self._by_stem.setdefault(stem_of(path).lower(), []).append(path)
                self._folders.update(self._folders_of(path))
        return self._files

    def _walk(self) -> Iterator[Path]:
        real_root = os.path.realpath(self.root)
        for folder, below, names in os.walk(self.root):
            below[:] = sorted(b for b in below if not b.startswith("."))
            for name in names:
                path = Path(folder) / name
                if name.startswith(".") or ending_of(name) is None or not path.is_file():
                    continue
                real = os.path.realpath(path)
                if path.is_symlink() and os.path.commonpath([real, real_root]) != real_root:
                    self._links_out[name.lower()] = Path(real)
                    continue
                yield path

    def find(self, name: str, source: str | os.PathLike[str], entry: str = "", near: Path | None = None) -> Path:
        """The image that an annotation file calls `name`.

        Tried in this order: the path below `near` (a folder below the root) and below the root; the path's last parts
        in any subfolder; a file of that stem with another image ending (tools annotate a JPEG of a TIFF). An absolute
        path or one with ".." counts by its last parts only: tools write down where the file lay on the annotator's
        computer. Folders that are nowhere below the root may be missing, but an image in another folder than the one
        that is named is another image: p2/s1.png is not p1/s1.png.

        Raises:
            AnnotationError: no such image, or several.
        """
        self.files()
        parts = [part for part in str(name).replace("\\", "/").split("/") if part not in ("", ".", "..")]
        if not parts or "\0" in name:
            raise AnnotationError(f"{_where(source, entry)}expected the file name of an image, but got {name[:100]!r}.")
        if parts == [p for p in str(name).split("/") if p != "."]:
            for folder in (near, self.root):
                if folder is not None and folder.joinpath(*parts) in self._by_name.get(parts[-1].lower(), ()):
                    return folder.joinpath(*parts)
        last = parts[-1]
        called = self._by_name.get(last.lower(), [])
        exact = [path for path in called if path.name == last]
        choices = (exact, called, *(self._by_stem.get(stem.lower(), []) for stem in (last, stem_of(last))))
        elsewhere = next((paths for paths in choices if paths), [])
        absolute = re.match(r"[/\\]|[A-Za-z]:", str(name)) is not None
        agreeing = ([path for path in paths if self._may_be(path, parts[:-1], absolute)] for paths in choices)
        found = next((paths for paths in agreeing if paths), [])
        if len(found) > 1 and near is not None and len(parts) == 1:
            found = [path for path in found if path.parent == near] or found
        if len(found) > 1:  # the folders it names decide
            for count in range(1, len(parts)):
                narrower = [
                    p
                    for p in found
                    if [q.lower() for q in p.parts[-1 - count : -1]] == [q.lower() for q in parts[-1 - count : -1]]
                ]
                if not narrower:
                    break
                found = narrower
        if not found and elsewhere:
            other = elsewhere[0].relative_to(self.root)
            raise AnnotationError(
                f"{_where(source, entry)}there is no image {name[:200]!r} in {self.root}; {other} lies in another "
                f"folder. Correct the folder, or name that of the images: --images {elsewhere[0].parent}"
            )
        if not found and last.lower() in self._links_out:
            raise AnnotationError(
                f"{_where(source, entry)}the image {name[:200]!r} is a link that leads out of {self.root}: not "
                f"followed. Name the folder of the images themselves: --images {self._links_out[last.lower()].parent}"
            )
        if not found:
            raise AnnotationError(
                f"{_where(source, entry)}there is no image {name[:200]!r} in {self.root}. "
                "Name the folder of the images: --images DIR."
            )
        if len(found) > 1:
            shown = ", ".join(str(p.relative_to(self.root)) for p in found[:4])
            raise AnnotationError(
                f"{_where(source, entry)}the image {name[:200]!r} may be any of {shown}. Name a folder that holds one."
            )
        return found[0]

    def _folders_of(self, path: Path) -> list[str]:
        """Names of the folders below the root in which a file lies, lower case."""
        return [part.lower() for part in path.relative_to(self.root).parts[:-1]]

    def _may_be(self, path: Path, folders: Sequence[str], absolute: bool) -> bool:
        """Whether an image may be the one that is named with these folders; `absolute`: from another computer's root.

        Not if a folder it names exists but is none of the image's, nor if the image lies in a folder it does not name.
        """
        named, has = [folder.lower() for folder in folders], self._folders_of(path)
        if not named or named[-1 - len(has) :] == [self._root_name, *has]:
            return True
        if self._root_name in named and self._root_name not in self._folders:
            named = named[len(named) - named[::-1].index(self._root_name) :]
        if any(folder in self._folders and folder not in (*has, *LABEL_FOLDERS) for folder in named):
            return False
        shared = [folder for folder in has if folder in named]
        if all(folder in named or folder in IMAGE_FOLDERS for folder in has):
            return _ends_with([folder for folder in named if folder in has], shared)
        if absolute:  # its first folders are those of another computer
            return has[-1] == named[-1] if named else False
        return bool(named) and _ends_with(has, named)

    def shape(self, path: Path) -> tuple[int, ...]:
        """Spatial shape of an image, (y, x) or (z, y, x), from its header, in which annotations of it count."""
        from nnunet_dsp.dataset_conversion.image_store import probe

        info = probe(path)
        return info.turned_shape if self.shown else info.shape

    def read_geometry(self, path: Path) -> Geometry:
        """Shape and place of an image in the world, from its header, by SimpleITK.

        Raises:
            AnnotationError: the file cannot be read.
        """
        import SimpleITK

        reader = SimpleITK.ImageFileReader()
        reader.SetFileName(str(path))
        try:
            reader.ReadImageInformation()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1][:300]
            raise AnnotationError(f"{path}: the image cannot be read: {reason}") from None
        size = reader.GetSize()
        dim = len(size)
        return Geometry(
            tuple(int(s) for s in size[::-1]),
            tuple(reader.GetOrigin()),
            tuple(reader.GetSpacing()),
            np.asarray(reader.GetDirection(), np.float64).reshape(dim, dim),
        )


def _ends_with(folders: Sequence[str], last: Sequence[str]) -> bool:
    return len(last) <= len(folders) and list(folders[len(folders) - len(last) :]) == list(last)


def _where(source: str | os.PathLike[str], entry: str) -> str:
    return f"{source}: {entry}: " if entry else f"{source}: "
