"""Running one function over many cases: with a progress bar, in worker processes when more than one is asked for."""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
Result = TypeVar("Result")


def default_num_processes() -> int:
    """How many worker processes to use if nobody says: nnU-Net's own `nnUNet_def_n_proc`, else the cores, at most 8."""
    stated = os.environ.get("nnUNet_def_n_proc", "")
    return max(1, int(stated)) if stated.isdigit() else min(8, os.cpu_count() or 1)


def map_cases(
    function: Callable[[Item], Result], items: Iterable[Item], *, processes: int, description: str
) -> Iterator[Result]:
    """Yield function(item) for each item, in the order of the items.

    Args:
        function: a module-level function (it is pickled when `processes` > 1).
        items: what to call it with; picklable when `processes` > 1.
        processes: worker processes; 1 works in this process.
        description: the text of the progress bar.

    Raises:
        ChildProcessError: a worker was killed (most often for want of memory). Errors of `function` come through as
            they are.
    """
    items = list(items)
    if processes <= 1 or len(items) <= 1:
        yield from map(function, tqdm(items, desc=description, disable=len(items) == 0))
        return
    # spawn, as nnU-Net does: a forked child of a process with torch's threads may hang
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(items)), mp_context=context) as pool:
        try:
            yield from tqdm(pool.map(function, items), total=len(items), desc=description)
        except BrokenProcessPool as error:
            raise ChildProcessError(
                f"A worker process died while {description.lower()}. It was most likely killed for want of memory: "
                f"try again with fewer than {processes} processes (--num-processes)."
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
