"""From a preprocessed dataset to a prompt's tensors: reads cases, applies prompt_choice.py, describes the result."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nnunet_dsp.annotations import LabelNames
from nnunet_dsp.dataset_conversion.raw_dataset import read_json
from nnunet_dsp.geometry import CaseFrame
from nnunet_dsp.patch_annotations import CaseAnnotations
from nnunet_dsp.prompt_choice import (
    NOT_A_KEY,
    PROMPT_KEY,
    KnownLabels,
    PromptRequest,
    PromptWindow,
    choose_windows,
    cut_prompt,
    draw_prompt,
    known_labels,
    prompt_shape,
    raw_bounds,
    read_requests,
    requested_span,
    window_shape,
)
from nnunet_dsp.prompt_settings import PromptSettings
from nnunet_dsp.training_set import ANNOTATIONS_FOLDER, load_case_annotations

CASES_LOOKED_AT = 20
"""Cases in which a prompt is searched, where dataset.json names none: reading all of a large dataset takes minutes."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as PromptNetwork takes it, and what to say about it.

    Attributes:
        images: (P, channels, *S) float32. labels: (P, *S) int64, NOT_A_KEY where nothing is known.
        windows: where the images come from.
        description: for prompt.json: case, bbox as dataset.json takes it, voxels of each label.
        missing: names of the labels of which it shows nothing.
    """

    images: Tensor
    labels: Tensor
    windows: tuple[PromptWindow, ...]
    description: dict[str, Any]
    missing: tuple[str, ...]


@dataclass(frozen=True)
class PromptSource:
    """A preprocessed configuration, as far as prompts need it.

    Attributes:
        load: a case's image (channels, z, y, x), its segmentation (z, y, x) and its properties, as nnU-Net stored them.
        annotations: what annotationsTr says of a case, given its name and shape; None: nothing.
        label_names: by label value, ascending, without ignore.
        ignore_label: or None.
        transpose: the plans' transpose_forward.
        patch, strides: of the configuration.
    """

    load: Callable[[str], tuple[npt.NDArray[Any], npt.NDArray[Any], Mapping[str, Any]]]
    annotations: Callable[[str, Sequence[int]], CaseAnnotations | None]
    label_names: Mapping[int, str]
    ignore_label: int | None
    transpose: Sequence[int]
    patch: Sequence[int]
    strides: Sequence[Sequence[int]]
    settings: PromptSettings

    def known(self, case: str) -> tuple[KnownLabels, CaseFrame]:
        """What is known of each voxel of a case, and how its voxels lie in the image file."""
        _, segmentation, properties = self.load(case)
        frame = CaseFrame.from_properties(properties, self.transpose, segmentation.shape)
        annotations = self.annotations(case, segmentation.shape)
        return known_labels(segmentation, list(self.label_names), self.ignore_label, annotations), frame

    def choose(self, requests: Sequence[PromptRequest], groups: Sequence[Sequence[str]]) -> list[PromptWindow]:
        """The windows the user named, or else the most informative ones.

        Args:
            groups: where to look where nothing is named: the cases of the first group, and in those of the next for
                what is still missing then.

        Raises:
            ValueError: nothing is annotated there.
        """
        if requests:
            return [self._named(request) for request in requests]
        windows: list[PromptWindow] = []
        for cases in groups:
            windows = choose_windows(
                cases,
                lambda case: self.known(case)[0],
                lambda shape: window_shape(shape, self.patch, self.settings.window),
                len(self.label_names),
                self.settings.max_windows,
                windows,
            )
        if not windows:
            looked_at = [case for cases in groups for case in cases]
            raise ValueError(
                f"Nothing can serve as prompt: no voxel is annotated in {', '.join(looked_at[:5])}"
                f'{", ..." if len(looked_at) > 5 else ""}. Name another case in dataset.json under "{PROMPT_KEY}".'
            )
        return windows

    def _named(self, request: PromptRequest) -> PromptWindow:
        known, frame = self.known(request.case)
        span = requested_span(request, frame, len(self.patch))
        inside = known[span]
        # a named window is taken whole; what exceeds the patch cannot be embedded in one piece, so the most
        # informative part of that size is taken
        limit = self.settings.window if request.start is None else 0
        windows = choose_windows(
            [request.case],
            lambda _: inside,
            lambda shape: window_shape(shape, self.patch, limit),
            len(self.label_names),
            max_windows=1,
        )
        if not windows:
            raise ValueError(
                f"{request.source}: no voxel is annotated there in {request.case}. Annotate it, or name another window."
            )
        z, y, x = (s.start for s in span)
        (z0, y0, x0), (z1, y1, x1) = windows[0].start, windows[0].stop
        return PromptWindow(request.case, (z + z0, y + y0, x + x0), (z + z1, y + y1, x + x1))

    def build(self, windows: Sequence[PromptWindow]) -> Prompt:
        """Reads the windows, with what surrounds them."""
        shape = prompt_shape(windows, self.patch, self.strides, self.settings.margin)
        names = list(self.label_names.values())
        images, labels, entries = [], [], []
        total = np.zeros(len(names), np.int64)
        for window in windows:
            image, _, properties = self.load(window.case)
            known, frame = self.known(window.case)
            cut, cut_labels = cut_prompt(image, known, window, shape)
            count = np.bincount(cut_labels[cut_labels != NOT_A_KEY], minlength=len(names))
            flat_image = int(properties["shape_before_cropping"][list(self.transpose).index(0)]) == 1
            bbox = raw_bounds(window, frame)
            entries.append(
                {
                    "case": window.case,
                    "bbox": bbox[1:] if flat_image else bbox,
                    "preprocessed": [[a, b] for a, b in zip(window.start, window.stop, strict=True)],
                    "voxels": {name: int(n) for name, n in zip(names, count, strict=True)},
                }
            )
            images.append(cut)
            labels.append(cut_labels)
            total += count
        return Prompt(
            images=torch.from_numpy(np.stack(images)),
            labels=torch.from_numpy(np.stack(labels)),
            windows=tuple(windows),
            description={"windows": entries},
            missing=tuple(name for name, n in zip(names, total, strict=True) if n == 0),
        )

    def show(self, prompt: Prompt, folder: Path) -> None:
        """Writes prompt.json and prompt.png."""
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / ".prompt.json"
        temporary.write_text(json.dumps(prompt.description, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, folder / "prompt.json")
        titles = [window.case for window in prompt.windows]
        names = list(self.label_names.values())
        draw_prompt(prompt.images.numpy(), prompt.labels.numpy(), titles, names, folder / "prompt.png")


def requests_of(trainer: Any) -> list[PromptRequest]:
    """The prompts that dataset.json names, for one of nnU-Net's trainers whose dataset_class is known.

    The raw dataset's dataset.json counts, where there is one: preprocessing keeps an older copy.

    Raises:
        ValueError: that file is no JSON object, or its prompts cannot be (AnnotationError).
    """
    from nnunetv2.paths import nnUNet_raw

    cases = sorted(trainer.dataset_class.get_identifiers(trainer.preprocessed_dataset_folder))
    content = trainer.dataset_json
    if nnUNet_raw.is_set():
        file = Path(nnUNet_raw) / trainer.plans_manager.dataset_name / "dataset.json"
        if file.is_file():
            content = read_json(file)
    return read_requests(content, cases)


def source_of(trainer: Any, settings: PromptSettings) -> PromptSource:
    """The preprocessed configuration that one of nnU-Net's trainers works on; its dataset_class is known."""
    base, manager = Path(trainer.preprocessed_dataset_folder_base), trainer.label_manager
    folder = trainer.preprocessed_dataset_folder
    names = {v: n for n, v in trainer.dataset_json["labels"].items() if isinstance(v, int) and n != "ignore"}

    def load(case: str) -> tuple[Any, Any, Any]:
        image, segmentation, _, properties = trainer.dataset_class(folder, [case]).load_case(case)
        return image[:], segmentation[:][0], properties

    def annotations(case: str, shape: Sequence[int]) -> CaseAnnotations | None:
        if manager.has_regions or not (base / ANNOTATIONS_FOLDER / f"{case}.json").is_file():
            return None
        reader = trainer.plans_manager.image_reader_writer_class()
        mask = base / "gt_segmentations" / (case + trainer.dataset_json["file_ending"])
        return load_case_annotations(
            base / ANNOTATIONS_FOLDER,
            Path(folder),
            [case],
            trainer.dataset_class.get_identifiers(folder),
            lambda _: shape,
            LabelNames.from_dataset_json(trainer.dataset_json),
            trainer.plans_manager.transpose_forward,
            lambda _: reader.read_seg(str(mask))[0][0] if mask.is_file() else None,
        ).get(case)

    return PromptSource(
        load=load,
        annotations=annotations,
        label_names={int(label): names.get(int(label), str(label)) for label in manager.all_labels},
        ignore_label=manager.ignore_label,
        transpose=trainer.plans_manager.transpose_forward,
        patch=trainer.configuration_manager.patch_size,
        strides=trainer.configuration_manager.pool_op_kernel_sizes,
        settings=settings,
    )
