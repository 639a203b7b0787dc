"""A preprocessed nnU-Net dataset, made by hand, small enough to train on in a unit test; e2e runs the real commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

CPU = torch.device("cpu")
LABELS = {"background": 0, "cell": 1, "nucleus": 2, "ignore": 3}
NAME = "Dataset001_Tiny"


def plans(dim: int, normalisation: str = "ZScoreNormalization") -> dict:
    convolution = {2: "torch.nn.modules.conv.Conv2d", 3: "torch.nn.modules.conv.Conv3d"}[dim]
    norm = {2: "torch.nn.modules.instancenorm.InstanceNorm2d", 3: "torch.nn.modules.instancenorm.InstanceNorm3d"}[dim]
    architecture = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": 3,
            "features_per_stage": [4, 6, 8],
            "conv_op": convolution,
            "kernel_sizes": [[3] * dim] * 3,
            "strides": [[1] * dim, [2] * dim, [2] * dim],
            "n_conv_per_stage": [1, 1, 1],
            "n_conv_per_stage_decoder": [1, 1],
            "conv_bias": True,
            "norm_op": norm,
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    resampling = {f"resampling_fn_{kind}": "resample_data_or_seg_to_shape" for kind in ("data", "seg", "probabilities")}
    options = {f"resampling_fn_{kind}_kwargs": {"is_seg": kind == "seg"} for kind in ("data", "seg", "probabilities")}
    name = "2d" if dim == 2 else "3d_fullres"
    return {
        "dataset_name": NAME,
        "plans_name": "nnUNetPlans",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": {"mean": 1.0, "std": 1.0}},
        "configurations": {
            name: {
                "data_identifier": f"nnUNetPlans_{name}",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": 2,
                "patch_size": [16] * dim,
                "spacing": [1.0] * dim,
                "normalization_schemes": [normalisation],
                "use_mask_for_norm": [False],
                "architecture": architecture,
                "batch_dice": dim == 2,
                **resampling,
                **options,
            }
        },
        "continue_training": False,
    }


class Tiny:
    """The dataset's folder and its parts."""

    def __init__(self, root: Path, dim: int) -> None:
        self.dim = dim
        self.base = root / "preprocessed" / NAME
        self.folder = self.base / ("nnUNetPlans_2d" if dim == 2 else "nnUNetPlans_3d_fullres")
        self.configuration = "2d" if dim == 2 else "3d_fullres"
        self.shape = (1, 24, 24) if dim == 2 else (20, 24, 24)
        self.dataset_json = {
            "channel_names": {"0": "EM"},
            "labels": dict(LABELS),
            "file_ending": ".nii.gz",
            "numTraining": 0,
        }
        for folder in (self.folder, self.base / "gt_segmentations", self.base / "annotationsTr"):
            folder.mkdir(parents=True)
        (self.base / "dataset_fingerprint.json").write_text("{}")

    def add(self, case: str, weak: bool, said: dict | None = None, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        truth = np.zeros(self.shape, np.int16)
        truth[..., 4:16, 5:18] = 1
        truth[..., 6:10, 7:12] = 2
        image = truth + rng.normal(0, 0.3, self.shape)
        seg = np.full(self.shape, 3, np.int16) if weak else truth
        found = {c: np.argwhere(seg[None] == c) for c in (1, 2)}
        found[(-1, 0, 1, 2, 3)] = np.argwhere(seg[None] != 3)
        found[(-1, 0, 1, 2)] = np.argwhere(seg[None] != 3)
        properties = {
            "class_locations": {key: value if len(value) else [] for key, value in found.items()},
            "shape_before_cropping": self.shape,
            "bbox_used_for_cropping": [[0, size] for size in self.shape],
            "shape_after_cropping_and_before_resampling": self.shape,
            "spacing": [1.0, 1.0, 1.0],
            "sitk_stuff": {"spacing": (1.0,) * 3, "origin": (0.0,) * 3, "direction": tuple(np.eye(3).ravel())},
        }
        blocks = (1, *self.shape)
        nnUNetDatasetBlosc2.save_case(
            image[None].astype(np.float32), seg[None], properties, str(self.folder / case), chunks=blocks, blocks=blocks
        )
        sitk.WriteImage(sitk.GetImageFromArray(seg.astype(np.uint8)), self.base / "gt_segmentations" / f"{case}.nii.gz")
        if said is not None:
            said = {"format": "nnunet_dsp.annotations", "version": 1, **said}
            (self.base / "annotationsTr" / f"{case}.json").write_text(json.dumps(said))

    def trainer(self, trainer_class, fold=0, settings=None, iterations=2, **plans_changes):
        """A trainer on this dataset, on the CPU, with few iterations an epoch."""
        (self.base / "dataset.json").write_text(json.dumps(self.dataset_json))
        chosen = plans(self.dim) | plans_changes
        if settings is not None:
            chosen["nnunet_dsp"] = settings
        trainer = trainer_class(chosen, self.configuration, fold, json.loads(json.dumps(self.dataset_json)), CPU)
        trainer.num_iterations_per_epoch = iterations
        trainer.num_val_iterations_per_epoch = 1
        return trainer

    def point(self, label: str, y: float, x: float) -> dict:
        return {"label": label, "at": [y, x] if self.dim == 2 else [10, y, x]}

    def box(self, label: str, start: tuple[int, int], stop: tuple[int, int], tight: bool = True) -> dict:
        low, high = ([], []) if self.dim == 2 else ([7], [13])
        return {"label": label, "start": [*low, *start], "stop": [*high, *stop], "tight": tight}


@pytest.fixture
def tiny(tmp_path, monkeypatch, request):
    """Four masked cases, two with annotations only (tags, points, boxes), one unlabelled; 2D unless parametrised."""
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    monkeypatch.delenv("nnUNet_dsp_seed", raising=False)
    dataset = Tiny(tmp_path, getattr(request, "param", 2))
    for number in range(4):
        dataset.add(f"masked_{number}", weak=False, seed=number)
    for number in range(2):
        said = {
            "image_level": {"present": ["cell", "nucleus"]},
            "points": [dataset.point("nucleus", 8, 9), dataset.point("background", 20, 20)],
            "boxes": [dataset.box("cell", (4, 5), (16, 18)), dataset.box("nucleus", (6, 7), (10, 12))],
            "complete": {"boxes": ["nucleus"]},
        }
        dataset.add(f"weak_{number}", weak=True, said=said, seed=10 + number)
    dataset.add("unlabelled", weak=True, seed=20)
    return dataset
