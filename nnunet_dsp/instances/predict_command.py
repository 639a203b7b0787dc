"""`nnunet_dsp instances predict -i IMAGES -o OUT -d ID -c CONFIGURATION`: instance label images, one per input image.

Affinities are predicted tile by tile, averaged over tiles and folds, and decoded into instances; each label image has
the name and the geometry of its input. What has more than --block-voxels voxels is decoded in overlapping blocks and
joined. Decoders: mutex (default; pip install nnunet-dsp[instances]), multicut ([multicut]), waterz ([waterz]),
components (needs nothing, but one leak joins two objects).
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
from pathlib import Path
from typing import Any

from nnunet_dsp.environment import with_our_folder
from nnunet_dsp.instances.decoders import EXTRA, REQUIRES, available

RECORD = "instances_predicted.json"
DEFAULT_BLOCK_VOXELS = 8_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("-i", dest="input", metavar="DIR", type=Path, required=True, help="images, named CASE_0000.ext")
    parser.add_argument("-o", dest="output", metavar="DIR", type=Path, required=True, help="where label images go")
    which = parser.add_argument_group("which model (as nnUNetv2_predict)")
    which.add_argument("-d", dest="dataset", metavar="ID", help="dataset id or name")
    which.add_argument("-c", dest="configuration", metavar="NAME", help="2d or 3d_fullres")
    which.add_argument("-tr", dest="trainer", default="nnUNetTrainerCRAC", help="trainer (default: %(default)s)")
    which.add_argument("-p", dest="plans", default="nnUNetPlans", help="plans (default: %(default)s)")
    which.add_argument("-m", dest="model", metavar="DIR", type=Path, help="the model's folder, instead of -d -c -tr -p")
    which.add_argument("-f", dest="folds", metavar="FOLD", nargs="+", help="folds to average (default: all trained)")
    which.add_argument("-chk", dest="checkpoint", default="checkpoint_final.pth", help="(default: %(default)s)")
    which.add_argument("-device", choices=("cuda", "cpu", "mps"), default="cuda", help="(default: %(default)s)")
    how = parser.add_argument_group("how affinities become instances")
    how.add_argument("--decoder", choices=tuple(REQUIRES), default="mutex", help="(default: %(default)s)")
    how.add_argument(
        "--affinities",
        choices=("implicit", "explicit", "average"),
        default="average",
        help="of the embedding's cosines, of the affinity network, or of both (default: %(default)s)",
    )
    how.add_argument(
        "--threshold",
        type=float,
        default=0.5,
        help="affinity from which two voxels rather belong together, 0 to 1 (default: %(default)s)",
    )
    how.add_argument(
        "--min-size",
        metavar="VOXELS",
        type=int,
        help="leave out smaller instances, in voxels of the network's grid (default: the size that all but 5 %% of the "
        "labelled training instances reach, but at most a quarter of their median)",
    )
    how.add_argument(
        "--no-foreground", action="store_true", help="decode everywhere, also where the network sees background"
    )
    how.add_argument(
        "--block-voxels",
        metavar="VOXELS",
        type=int,
        default=DEFAULT_BLOCK_VOXELS,
        help="decode larger images and volumes in blocks of this many voxels, at about 0.6 kB a voxel (default: "
        "%(default)s)",
    )
    how.add_argument("-step_size", type=float, default=0.5, help="step of the tiles, up to 0.5 (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace label images that are there already")


def list_cases(folder: Path, ending: str, channels: int) -> dict[str, list[str]]:
    """Image files by case, nnU-Net's rule: CASE_0000.ext, CASE_0001.ext, ..., or one file that holds all channels.

    How many channels a single file holds (three, if it is a colour picture) its reader alone knows.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
        ValueError: a case lacks a channel.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"-i: there is no folder {folder}.")
    cases: dict[str, list[str]] = {}
    for file in sorted(folder.iterdir()):
        match = re.fullmatch(r"(.+)_\d{4}" + re.escape(ending), file.name)
        if match and file.is_file():
            cases.setdefault(match[1], []).append(str(file))
    if not cases:
        raise FileNotFoundError(f"{folder} holds no image named like CASE_0000{ending}, which this model reads.")
    for case, files in cases.items():
        if len(files) not in (1, channels):
            raise ValueError(
                f"{case}: the model reads {channels} channel(s), CASE_0000{ending} and so on or one file with all of "
                f"them, but {folder} holds {len(files)} file(s) of this case."
            )
    return cases


def _model_folder(args: argparse.Namespace) -> Path:
    if args.model is not None:
        folder = args.model
    else:
        if not args.dataset or not args.configuration:
            raise ValueError("Give -d and -c (and -tr, -p if need be), or the model's folder with -m.")
        from nnunet_dsp.dataset_conversion.raw_dataset import dataset_name, environment_folder

        results = environment_folder("nnUNet_results")
        name = dataset_name(args.dataset, "nnUNet_results")
        folder = results / name / f"{args.trainer}__{args.plans}__{args.configuration}"
    if not (folder / "plans.json").is_file():
        raise FileNotFoundError(f"There is no trained model in {folder} (it holds no plans.json).")
    return Path(folder)


def _folds(args: argparse.Namespace, model: Path) -> tuple[str, ...]:
    if args.folds:
        folds = tuple(args.folds)
    else:
        found = sorted(p.name[len("fold_") :] for p in model.glob("fold_*") if (p / args.checkpoint).is_file())
        folds = tuple(f for f in found if f != "all") or tuple(found)
    missing = [f for f in folds if not (model / f"fold_{f}" / args.checkpoint).is_file()]
    if not folds or missing:
        raise FileNotFoundError(
            f"{model}: there is no {args.checkpoint} of fold {', '.join(missing) or '(none is trained)'}. Finish the "
            "training, or choose with -f and -chk."
        )
    return folds


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _why_unreadable(files: list[str], reader_writer: Any, channels: int) -> str:
    """Why nnU-Net's preprocessing stumbled over a case, where that is known better than by its own error."""
    try:
        image, _ = reader_writer().read_images(files)
    except Exception as error:
        return f"nnU-Net's reader says: {_one_line(error)}"
    return "" if image.shape[0] == channels else _wrong_channels(image.shape[0], channels)


def _wrong_channels(found: int, channels: int) -> str:
    remedy = "Is it a colour picture?" if found > channels else "Is a file missing, or is it a grey picture?"
    return f"the model reads {channels} channel(s), but got {found}. {remedy}"


def run(args: argparse.Namespace) -> int:
    """Predict every image of a folder."""
    if not available(args.decoder):
        package = {"multicut": "python-elf", "mutex": "mwatershed"}.get(args.decoder, args.decoder)
        raise ImportError(
            f"--decoder {args.decoder} needs the package {package}. Install it with "
            f"`pip install nnunet-dsp[{EXTRA[args.decoder]}]`, or choose --decoder components"
        )
    if not 0 < args.threshold < 1:
        raise ValueError(f"--threshold: expected a number between 0 and 1, but got {args.threshold}.")
    if (args.min_size is not None and args.min_size < 0) or args.block_voxels < 1:
        raise ValueError("--min-size and --block-voxels: expected whole numbers of at least 0 and 1.")
    model = _model_folder(args)
    folds = _folds(args, model)

    import numpy as np
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from tqdm import tqdm

    from nnunet_dsp.dataset_conversion.raw_dataset import write_json
    from nnunet_dsp.instances.label_facts import DEFAULT_MIN_SIZE
    from nnunet_dsp.instances.label_files import write_instances
    from nnunet_dsp.instances.network import CRACNetwork
    from nnunet_dsp.instances.predict import AffinityPredictor, DecoderOptions, segment, to_image_geometry
    from nnunet_dsp.instances.settings import CRACSettings

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("-device cuda: PyTorch sees no CUDA device. Use -device cpu.")
    device = torch.device(args.device)
    os.environ["nnUNet_extTrainer"] = with_our_folder(os.environ.get("nnUNet_extTrainer"))
    loader = nnUNetPredictor(device=device, allow_tqdm=False)
    try:
        loader.initialize_from_trained_model_folder(str(model), folds, args.checkpoint)
    except (RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:  # of torch, on a broken file
        raise ValueError(f"{model}: the model cannot be loaded: {_one_line(error)}") from error
    network = loader.network
    network = getattr(network, "_orig_mod", network)  # nnUNet_compile compiles it; what is compiled is one output only
    if not isinstance(network, CRACNetwork):
        raise ValueError(
            f"{model} was trained with {loader.trainer_name}, which predicts no instances. Train nnUNetTrainerCRAC, or "
            "name another model with -tr."
        )
    plans, configuration = loader.plans_manager, loader.configuration_manager
    dataset_json: dict[str, Any] = loader.dataset_json
    channels = len(dataset_json["channel_names"])
    cases = list_cases(args.input, dataset_json["file_ending"], channels)
    args.output.mkdir(parents=True, exist_ok=True)
    present = [c for c in cases if (args.output / f"{c}{dataset_json['file_ending']}").exists()]
    if present and not args.overwrite:
        raise FileExistsError(
            f"{args.output} holds label images of these cases already: {', '.join(present[:5])}. Choose another "
            "folder, or pass --overwrite."
        )
    predictor = AffinityPredictor(
        network,
        configuration.patch_size,
        device,
        parameters=loader.list_of_parameters,
        source=args.affinities,
        step_size=args.step_size,
    )
    min_size = args.min_size
    if min_size is None:
        learnt = CRACSettings.from_plans(plans.plans, strict=False).min_size
        min_size = DEFAULT_MIN_SIZE if learnt is None else learnt
    options = DecoderOptions(
        args.decoder, args.threshold, min_size, not args.no_foreground, args.block_voxels
    )
    reader_writer = plans.image_reader_writer_class
    counts: dict[str, int] = {}
    deepest = 1
    for case, files in tqdm(cases.items(), desc="Predicting instances"):
        preprocessor = configuration.preprocessor_class(verbose=False)
        try:
            image, _, properties = preprocessor.run_case(files, None, plans, configuration, dataset_json)
        except Exception as error:  # each of nnU-Net's readers has its own
            why = _why_unreadable(files, reader_writer, channels) or _one_line(error)
            raise ValueError(f"{case}: {', '.join(files)} cannot be used: {why}") from error
        if image.shape[0] != channels:  # fewer than the plans know do not disturb nnU-Net's preprocessing
            why = _wrong_channels(image.shape[0], channels)
            raise ValueError(f"{case}: {', '.join(files)} cannot be used: {why}")
        try:
            if not np.isfinite(image).all():
                raise ValueError(f"the image holds NaN or infinity ({', '.join(files)}).")
            labels = segment(predictor, torch.from_numpy(image), options)
            labels = to_image_geometry(labels, properties, plans.transpose_backward)
            write_instances(reader_writer, labels, args.output / f"{case}{dataset_json['file_ending']}", properties)
        except ValueError as error:
            raise ValueError(f"{case}: {error}") from error
        counts[case] = int(labels.max(initial=0))
        deepest = max(deepest, int(properties["shape_before_cropping"][0]))
    said = {
        "model": model.name, "folds": list(folds), "checkpoint": args.checkpoint, "affinities": args.affinities,
        "decoder": args.decoder, "threshold": args.threshold, "min_size": min_size,
        "foreground": not args.no_foreground, "instances": counts,
    }  # fmt: skip
    write_json(args.output / RECORD, said)
    print(f"{sum(counts.values())} instances of {min_size} voxels or more in {len(counts)} images: {args.output}")
    if predictor.dim == 2 and deepest > 1:
        print("The configuration is 2D: each slice was decoded by itself, and no id continues in the next slice.")
    if not bool(network.foreground_learnt) and not args.no_foreground:
        print("No background was labelled in the training set, so none was learnt: instances fill the images.")
    return 0
