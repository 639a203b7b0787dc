"""Instance label images on disk: writing them with nnU-Net's writers, without losing ids."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_dsp.instances.decoders import Labels

MOST_INSTANCES = 65534  # nnU-Net's writers store at most 16 bits


def write_instances(reader_writer: Any, labels: Labels, file: Path, properties: dict[str, Any]) -> None:
    """Write labels as nnU-Net writes a segmentation of this image; nothing half-written is left.

    Args:
        reader_writer: nnU-Net's reader and writer class.
        labels: (z, y, x), consecutive ids.
        file: with the dataset's ending.
        properties: what the reader returned with the image (its geometry).

    Raises:
        ValueError: more ids than the format holds.
    """
    highest = int(labels.max(initial=0))
    if highest > MOST_INSTANCES:
        raise ValueError(
            f"{file.name}: {highest} instances were found, but nnU-Net's writers hold at most {MOST_INSTANCES}. Remove "
            "small ones with --min-size; so many usually mean that the network has not learnt yet."
        )
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=file.parent) as folder:
        temporary = Path(folder) / file.name
        reader_writer().write_seg(labels, str(temporary), properties)
        if highest > 255:  # one of nnU-Net's writers (SimpleITKIOWithReorient) has 8 bits only and does not say so
            back, _ = reader_writer().read_seg(str(temporary))
            if int(np.max(back)) != highest:
                raise ValueError(
                    f"{file.name}: nnU-Net's {reader_writer.__name__} cannot store {highest} instances. Use another "
                    "reader (overwrite_image_reader_writer in dataset.json), for instance SimpleITKIO."
                )
        for written in sorted(Path(folder).iterdir()):  # a 3D tif comes with a .json
            os.replace(written, file.parent / written.name)


__all__ = ["MOST_INSTANCES", "write_instances"]
