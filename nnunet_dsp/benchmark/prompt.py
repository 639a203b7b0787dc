"""`nnunet_dsp benchmark prompt`: a training step and a prediction of the prompt network against nnU-Net's.

Both steps are forward, nnU-Net's loss (the vanilla one with deep supervision, as it trains), backward and optimiser, on
the same random 2D patches; loading is not part of them. The prompt is one 64 x 64 window with a margin of 32.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_dsp.benchmark.timing import (
    Row,
    add_timing_arguments,
    check_timing_arguments,
    median_ratio,
    metadata_of_run,
    peak_bytes,
    report,
    time_in_turn,
)
from nnunet_dsp.prompt import PromptNetwork
from nnunet_dsp.prompt_settings import PromptSettings

TIME_LIMIT = 1.5
MEMORY_LIMIT = 1.5
WINDOW, MARGIN = 64, 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_timing_arguments(parser, repeats=9)
    parser.add_argument("--patch", type=int, default=192, help="edge of the patches in voxels (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="patches in a batch (default: %(default)s)")
    parser.add_argument("--classes", type=int, default=2, help="background included (default: %(default)s)")
    parser.add_argument("--keys", type=int, default=1024, help="keys drawn in each step (default: %(default)s)")
    parser.add_argument(
        "--features",
        type=int,
        nargs="+",
        default=[16, 32, 64, 128, 192],
        help="channels of each stage; nnU-Net plans 32 64 128 256 512 512 for this patch (default: %(default)s)",
    )


def make_network(features: list[int], classes: int, deep_supervision: bool) -> nn.Module:
    """nnU-Net's plain 2D U-Net as its planner configures it, but for the width."""
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    stages = len(features)
    return PlainConvUNet(
        input_channels=1,
        n_stages=stages,
        features_per_stage=features,
        conv_op=nn.Conv2d,
        kernel_sizes=[[3, 3]] * stages,
        strides=[[1, 1]] + [[2, 2]] * (stages - 1),
        n_conv_per_stage=[2] * stages,
        num_classes=classes,
        n_conv_per_stage_decoder=[2] * (stages - 1),
        conv_bias=True,
        norm_op=nn.InstanceNorm2d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=deep_supervision,
    )


def make_steps(args: argparse.Namespace, device: torch.device) -> dict[str, Callable[[], Any]]:
    """The training steps by name; the first is nnU-Net's."""
    from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
    from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

    generator = torch.Generator().manual_seed(args.seed)
    image = torch.randn(args.batch, 1, args.patch, args.patch, generator=generator).to(device)
    target = torch.randint(0, args.classes, (args.batch, 1, args.patch, args.patch), generator=generator).to(device)
    loss = DC_and_CE_loss(
        {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False},
        {},
        weight_ce=1,
        weight_dice=1,
        ignore_label=None,
        dice_class=MemoryEfficientSoftDiceLoss,
    )
    outputs = len(args.features) - 1
    weights = [2.0**-level for level in range(outputs - 1)] + [0.0]
    targets = [target[:, :, :: 2**level, :: 2**level] for level in range(outputs)]
    vanilla = make_network(args.features, args.classes, True).to(device)
    steps: dict[str, Callable[[], Any]] = {
        "nnU-Net": make_step(vanilla, DeepSupervisionWrapper(loss, weights), image, targets, device)
    }
    for name, groups in ((f"prompt, {args.keys} keys", 0), (f"prompt, {args.keys} keys, one group", 1)):
        steps[name] = make_step(prompt_network(args, groups, device), loss, image, target, device)
    return steps


def prompt_network(args: argparse.Namespace, groups: int, device: torch.device) -> PromptNetwork:
    generator = torch.Generator().manual_seed(args.seed)
    edge = min(args.patch, WINDOW + 2 * MARGIN)
    label = torch.full((1, edge, edge), -1)
    inside = slice(max(0, edge // 2 - WINDOW // 2), edge // 2 + WINDOW // 2)
    label[:, inside, inside] = torch.randint(0, args.classes, label[:, inside, inside].shape, generator=generator)
    network = PromptNetwork(
        make_network(args.features, args.classes, False),
        args.classes,
        PromptSettings(max_keys=args.keys, max_keys_prediction=args.keys, key_groups=groups),
    )
    network.set_prompt(torch.randn(1, 1, edge, edge, generator=generator), label)
    return network.to(device)


def make_step(
    network: nn.Module, loss: nn.Module, image: Tensor, target: Any, device: torch.device
) -> Callable[[], None]:
    optimizer = torch.optim.SGD(network.parameters(), 1e-2, momentum=0.99, nesterov=True, weight_decay=3e-5)
    cuda = device.type == "cuda"

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, enabled=cuda):
            value = loss(network(image), target)
        value.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 12)
        optimizer.step()

    return step


def make_predictions(args: argparse.Namespace, device: torch.device) -> dict[str, Callable[[], Any]]:
    """One patch through each network, as at prediction; the prompt's keys are cached by the warm-up."""
    image = torch.randn(1, 1, args.patch, args.patch).to(device)

    def predict(network: nn.Module) -> Callable[[], Any]:
        network.eval()

        @torch.inference_mode()
        def run() -> None:
            with torch.autocast(device.type, enabled=device.type == "cuda"):
                network(image)

        return run

    return {
        "nnU-Net": predict(make_network(args.features, args.classes, False).to(device)),
        "prompt": predict(prompt_network(args, 0, device)),
    }


def run(args: argparse.Namespace) -> int:
    device = check_timing_arguments(args)
    total = 2 ** (len(args.features) - 1)
    if args.patch % total or args.patch < 4 * total or min(args.keys, args.batch) < 1 or args.classes < 2:
        raise ValueError(
            f"Expected --patch to be a multiple of {total} (the network's stride) of at least {4 * total}, --keys and "
            f"--batch of at least 1 and --classes of at least 2, but got {args.patch}, {args.keys}, {args.batch} and "
            f"{args.classes}."
        )
    torch.manual_seed(args.seed)
    rows: list[Row] = []
    steps = make_steps(args, device)
    timings = time_in_turn(steps, device, warmup=args.warmup, repeats=args.repeats)
    peaks = {name: peak_bytes(step, device) for name, step in steps.items()}
    first = next(iter(steps))
    for name in steps:
        limited = name == f"prompt, {args.keys} keys"
        row = Row(f"step, {name}", timings[name].median, timings[name].iqr, peaks[name])
        if name != first:
            ratio = median_ratio(timings[name], timings[first])
            row = replace(row, baseline=first, ratio=ratio, limit=TIME_LIMIT if limited else None)
        rows.append(row)
    for name in list(steps)[1:]:
        ratio = peaks[name] / peaks[first]
        rows.append(Row(f"memory, {name}", None, None, peaks[name], first, ratio, MEMORY_LIMIT, quantity="memory"))
    predictions = make_predictions(args, device)
    timings = time_in_turn(predictions, device, warmup=args.warmup, repeats=args.repeats)
    for name, timing in timings.items():
        row = Row(f"prediction, {name}", timing.median, timing.iqr)
        if name != first:
            row = replace(row, baseline=first, ratio=median_ratio(timing, timings[first]))
        rows.append(row)
    shape = {key: getattr(args, key) for key in ("patch", "batch", "classes", "keys", "features")}
    return report(metadata_of_run("prompt", device, args, **shape), rows, args.json)
