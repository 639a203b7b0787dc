"""Which annotation files SRC holds, and which image each belongs to, for tools that do not write an image's name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from nnunet_dsp.dataset_conversion.image_files import stem_of
from nnunet_dsp.dataset_conversion.imported import ImageFolder, SourceImage, fail

MAX_FILES = 1_000_000
SEPARATORS = " _-.+"


def annotation_files(src: Path, endings: Sequence[str], what: str) -> list[Path]:
    """SRC itself if it is a file; else the files below it that end in one of `endings`, sorted.

    Hidden files and folders, and links that lead out of SRC, are passed over.

    Raises:
        AnnotationError: there is none, or more than a million.
    """
    if not src.is_dir():
        if src.suffix.lower() == ".zip":
            fail(src, "", "it is a .zip archive", "Unpack it, and name the folder.")
        return [src]
    real_root = os.path.realpath(src)
    found: list[Path] = []
    for folder, below, names in os.walk(src):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in names:
            path = Path(folder) / name
            if name.startswith(".") or not name.lower().endswith(tuple(endings)) or not path.is_file():
                continue
            if path.is_symlink() and os.path.commonpath([os.path.realpath(path), real_root]) != real_root:
                continue
            found.append(path)
            if len(found) > MAX_FILES:
                fail(src, "", f"the folder holds more than {MAX_FILES} annotation files", "Import it in parts.")
    if not found:
        fail(src, "", f"the folder holds no {what} ({', '.join('*' + ending for ending in endings)})")
    return sorted(found)


def each(files: Sequence[Path]) -> Iterator[Path]:
    """The files, with a progress bar if there are many."""
    from tqdm import tqdm

    yield from tqdm(files, desc="Reading annotations", disable=len(files) < 200)


class Pairing:
    """Finds the image of an annotation file by its name, or by the folder both lie in.

    In this order: the image that the user names; the image whose name (with or without ending) the file's name is, or
    begins with, up to a separator (the longest such name); the only image of the file's folder; the image that is
    called like the file's folder; the only image there is.
    """

    def __init__(self, images: ImageFolder, named: str | None = None) -> None:
        self.images = images
        self.named = named
        self._by_name: dict[str, list[Path]] = {}
        self._by_folder: dict[Path, list[Path]] = {}
        for path in images.files():
            for name in {path.name.lower(), stem_of(path).lower()}:
                self._by_name.setdefault(name, []).append(path)
            self._by_folder.setdefault(path.parent.resolve(), []).append(path)

    def find(self, file: Path, ending: str) -> tuple[Path, str]:
        """The image of `file`, and what is left of the file's name behind the image's.

        What is left is the name that the user gave to the layer or the markup: "liver" for scan7_liver.csv beside
        scan7.nii.gz, "" for scan7.csv. Where the folder decides, all of the file's name is left.

        Raises:
            AnnotationError: no image or several; says how to name files.
        """
        stem = file.name[: -len(ending)] if ending and file.name.lower().endswith(ending) else file.name
        if self.named is not None:
            image = self.images.find(self.named, "--image")
            return image, self._rest(stem, image)
        for name in beginnings(stem):
            found = self._by_name.get(name.lower(), [])
            if found:
                near = [path for path in found if path.parent.resolve() == file.parent.resolve()] or found
                if len(near) > 1:
                    self._ambiguous(file, near)
                return near[0], stem[len(name) :].strip(SEPARATORS)
        beside = self._by_folder.get(file.parent.resolve(), [])
        if len(beside) == 1:
            return beside[0], stem
        called = self._by_name.get(file.parent.name.lower(), [])
        if len(called) == 1:
            return called[0], stem
        if len(self.images.files()) == 1:
            return self.images.files()[0], stem
        return fail(
            file,
            "",
            f"no image in {self.images.root} is called like this file (or its beginning), nor like its folder",
            f"Call it after its image, such as {stem_of(self.images.files()[0])}{ending} or "
            f"{stem_of(self.images.files()[0])}_NAME{ending}, or name the image: --image FILE."
            if self.images.files()
            else "There is no image at all. Name the folder of the images: --images DIR.",
        )

    @staticmethod
    def _rest(stem: str, image: Path) -> str:
        for name in (image.name, stem_of(image)):
            if stem.lower().startswith(name.lower()) and stem[len(name) :][:1] in ("", *SEPARATORS):
                return stem[len(name) :].strip(SEPARATORS)
        return stem

    def _ambiguous(self, file: Path, found: Sequence[Path]) -> None:
        shown = ", ".join(str(path.relative_to(self.images.root)) for path in found[:4])
        fail(file, "", f"its image may be any of {shown}", "Name a folder that holds one of them: --images DIR.")


def merged(images: Iterable[SourceImage], src: Path) -> Iterator[SourceImage]:
    """One SourceImage an image: those of several annotation files (a layer or a markup each) put together.

    Entries of what was put together begin with their file, which is what messages need to name.
    """
    groups: dict[Path, list[SourceImage]] = {}
    for image in images:
        groups.setdefault(image.file, []).append(image)
    for group in groups.values():
        if len(group) == 1:
            yield group[0]
            continue
        names = [os.path.relpath(image.source, src) for image in group]
        yield replace(
            group[0],
            marks=tuple(
                replace(mark, entry=f"{name}: {mark.entry}")
                for image, name in zip(group, names, strict=True)
                for mark in image.marks
            ),
            source=str(src),
            notes=tuple(note for image in group for note in image.notes),
            incomplete=tuple(dict.fromkeys(name for image in group for name in image.incomplete)),
        )


def beginnings(stem: str) -> Iterator[str]:
    """A name, then what is left of it when it is cut at each separator, the longest first."""
    yield stem
    for position in range(len(stem) - 1, 0, -1):
        if stem[position] in SEPARATORS:
            yield stem[:position]
