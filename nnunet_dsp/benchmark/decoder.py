"""``nnunet_dsp benchmark decoder``: how long it takes to turn affinities into instances."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_dsp.benchmark.timing import (
    Row,
    add_timing_arguments,
    check_timing_arguments,
    metadata_of_run,
    report,
    time_in_turn,
)
from nnunet_dsp.instances.decoders import EXTRA, REQUIRES, available, decode
from nnunet_dsp.instances.measures import measure

REACHES = (1, 3, 9, 27)
NOISE = 0.15  # standard deviation; a perfect border is easier than what a network gives
# shape, instances, and the seconds that the default decoder may take on two cores
SHAPES: dict[str, tuple[tuple[int, ...], int, float]] = {
    "2D": ((512, 512), 150, 1.0),
    "3D": ((100, 250, 250), 200, 30.0),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "2D: 512 x 512 with 9 offsets and 150 instances; 3D: 100 x 250 x 250 with 12 offsets and 200 instances. "
        "The affinities are those of a Voronoi partition, a tenth off and with noise; the adapted Rand error of what "
        "is decoded from them is in the JSON."
    )
    parser.add_argument(
        "--decoder", nargs="+", choices=tuple(REQUIRES), default=["mutex"], help="(default: mutex, which has limits)"
    )
    parser.add_argument("--only", choices=tuple(SHAPES), help="only this one (default: both)")
    parser.add_argument("--shape", type=int, nargs="+", metavar="N", help="with --only: another size, without limits")
    add_timing_arguments(parser, repeats=5)
    parser.set_defaults(warmup=1)


def run(args: argparse.Namespace) -> int:
    device = check_timing_arguments(args)
    if device.type != "cpu":
        raise ValueError("--device: decoders run on a CPU.")
    for decoder in args.decoder:
        if not available(decoder):
            raise ImportError(
                f"--decoder {decoder} is not installed. Install it with `pip install nnunet-dsp[{EXTRA[decoder]}]`"
            )
    if args.shape is not None and (args.only is None or len(args.shape) != int(args.only[0]) or min(args.shape) < 32):
        raise ValueError("--shape goes with --only 2D or --only 3D: two or three numbers of at least 32 voxels.")
    rows: list[Row] = []
    errors: dict[str, float | None] = {}
    for name, (shape, number, limit) in SHAPES.items():
        if args.only not in (None, name):
            continue
        shape = shape if args.shape is None else tuple(args.shape)
        offsets = offsets_for(len(shape))
        truth, affinities = noisy_affinities(shape, number, offsets, args.seed)
        found: dict[str, npt.NDArray[np.int32]] = {}

        def run_decoder(decoder: str, affinities: Any = affinities, offsets: Any = offsets, found: Any = found) -> None:
            found[decoder] = decode(affinities, offsets, decoder=decoder)

        times = time_in_turn(
            {decoder: lambda d=decoder: run_decoder(d) for decoder in args.decoder},  # type: ignore[misc]
            device,
            warmup=args.warmup,
            repeats=args.repeats,
        )
        for decoder, timing in times.items():
            title = f"{name}, {' x '.join(map(str, shape))}, {len(offsets)} offsets: {decoder}"
            most = limit if decoder == "mutex" and args.shape is None else None
            rows.append(Row(title, timing.median, timing.iqr, limit=most, quantity="seconds"))
            errors[title] = measure(truth, found[decoder])["arand"]
    return report(metadata_of_run("decoder", device, args, noise=NOISE, arand=errors), rows, args.json)


def offsets_for(dim: int) -> list[tuple[int, ...]]:
    """1, 3, 9 and 27 along each axis; in 2D also one across."""
    offsets = [tuple(-reach if a == axis else 0 for a in range(dim)) for reach in REACHES for axis in range(dim)]
    return [*offsets, (-9, -9)] if dim == 2 else offsets


def noisy_affinities(
    shape: tuple[int, ...], number: int, offsets: list[tuple[int, ...]], seed: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """A Voronoi partition into `number` instances, and affinities of it: 0.1 and 0.9 with noise; 0.5 at the border."""
    from scipy.ndimage import distance_transform_edt

    random = np.random.default_rng(seed)
    places = np.unravel_index(random.choice(int(np.prod(shape)), number, replace=False), shape)
    seeds = np.zeros(shape, np.int32)
    seeds[places] = np.arange(1, number + 1)
    nearest = distance_transform_edt(seeds == 0, return_distances=False, return_indices=True)
    truth: npt.NDArray[np.int32] = seeds[tuple(nearest)]
    affinities = np.full((len(offsets), *shape), 0.5, np.float32)
    for channel, offset in zip(affinities, offsets, strict=True):
        here = tuple(slice(-o, None) for o in offset)  # the edge's upper end; offsets are negative or 0
        there = tuple(slice(None, max(0, n + o)) for n, o in zip(shape, offset, strict=True))
        same = (truth[here] == truth[there]).astype(np.float32)
        noise = random.normal(0, NOISE, same.shape).astype(np.float32)
        channel[here] = np.clip(0.1 + 0.8 * same + noise, 0, 1)
    return truth, affinities


__all__ = ["add_arguments", "noisy_affinities", "offsets_for", "run"]
