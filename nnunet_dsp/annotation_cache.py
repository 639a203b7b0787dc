"""What validating and mapping a dataset's annotations gave, kept for the next start of a training.

One file a preprocessed configuration, beside nnU-Net's folders, of plain arrays (no pickle). A case is taken from it
only if nothing it came from has changed since.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from nnunet_dsp import __version__
from nnunet_dsp.patch_annotations import CaseAnnotations

CACHE_FOLDER = "nnunet_dsp_cache"
_FORMAT = 2  # 1: boxes with fractions covered the space between these
_PER_CASE = ("shape", "tags", "complete_boxes", "listed")
_PER_POINT = ("points", "point_class")
_PER_BOX = ("boxes", "box_class", "box_tight")


def signature(files: Iterable[Path], settings: Any = None) -> str:
    """Changes whenever one of the files does, by size and time of change, or the settings do.

    Args:
        files: need not exist; annotation files (.json) count by their content.
        settings: anything that json can write.
    """
    digest = hashlib.sha256(json.dumps([_FORMAT, __version__, settings], sort_keys=True, default=str).encode())
    for file in files:
        digest.update(file.name.encode())
        if file.suffix == ".json":
            digest.update(file.read_bytes() if file.is_file() else b"-")
        else:
            try:
                about = file.stat()
                digest.update(f"{about.st_size} {about.st_mtime_ns}".encode())
            except OSError:
                digest.update(b"-")
    return digest.hexdigest()


def read_cache(file: Path) -> dict[str, tuple[str, CaseAnnotations]]:
    """Signature and annotations by case; empty where the file is missing, damaged or of another version."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        return dict(_unpack(arrays))
    except (OSError, ValueError, KeyError, EOFError, IndexError, TypeError):
        return {}
    except Exception as error:  # zipfile and zlib have errors of their own
        if type(error).__module__ in ("zipfile", "zlib"):
            return {}
        raise


def _unpack(arrays: Mapping[str, npt.NDArray[Any]]) -> Iterable[tuple[str, tuple[str, CaseAnnotations]]]:
    if int(arrays["format"]) != _FORMAT:
        return
    first_point = np.concatenate([[0], np.cumsum(arrays["point_count"])])
    first_box = np.concatenate([[0], np.cumsum(arrays["box_count"])])
    for i, case in enumerate(arrays["case"].tolist()):
        points, boxes = slice(first_point[i], first_point[i + 1]), slice(first_box[i], first_box[i + 1])
        fields = {name: arrays[name][i] for name in _PER_CASE}
        fields |= {name: arrays[name][points] for name in _PER_POINT}
        fields |= {name: arrays[name][boxes] for name in _PER_BOX}
        yield str(case), (str(arrays["signature"][i]), CaseAnnotations(**fields))


def write_cache(file: Path, cases: Mapping[str, tuple[str, CaseAnnotations]]) -> None:
    """Replace the file, in one step; a folder that cannot be written to stays without."""
    if not cases:
        return
    said = [annotations for _, annotations in cases.values()]

    def joined(name: str) -> npt.NDArray[Any]:
        return np.concatenate([getattr(annotations, name) for annotations in said])

    arrays: dict[str, Any] = {
        "format": np.int64(_FORMAT),
        "case": np.asarray(list(cases)),
        "signature": np.asarray([key for key, _ in cases.values()]),
        "point_count": np.asarray([len(annotations.points) for annotations in said]),
        "box_count": np.asarray([len(annotations.boxes) for annotations in said]),
        **{name: np.stack([getattr(annotations, name) for annotations in said]) for name in _PER_CASE},
        **{name: joined(name) for name in (*_PER_POINT, *_PER_BOX)},
    }
    _replace(file, lambda stream: np.savez(stream, **arrays))


def read_flags(file: Path) -> dict[str, tuple[str, bool]]:
    """Signature and flag by case, as write_flags() left them; empty where there are none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return {str(case): (str(key), bool(flag)) for case, (key, flag) in content.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def write_flags(file: Path, flags: Mapping[str, tuple[str, bool]]) -> None:
    """Replace the file, in one step; a folder that cannot be written to stays without."""
    _replace(file, lambda stream: stream.write(json.dumps(flags).encode()))


def _replace(file: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Several trainings may start at once, and a cluster may lend the folder read-only: neither is an error."""
    temporary: Path | None = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}.", delete=False) as stream:
            temporary = Path(stream.name)
            write(stream)
        os.replace(temporary, file)
    except OSError:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def known_cases(
    cached: Mapping[str, tuple[str, CaseAnnotations]], signatures: Mapping[str, str]
) -> dict[str, CaseAnnotations]:
    """Those of the cases whose signature is still the one they were stored with."""
    return {
        case: cached[case][1] for case, key in signatures.items() if case in cached and cached[case][0] == key
    }


__all__: Sequence[str] = [
    "CACHE_FOLDER",
    "known_cases",
    "read_cache",
    "read_flags",
    "signature",
    "write_cache",
    "write_flags",
]
