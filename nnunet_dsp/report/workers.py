"""Running one function over many cases in processes, where a process that is killed costs one case and not the report.

dataset_conversion.parallel is for what must succeed as a whole; here every case counts for itself.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_surviving(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    on_death: Callable[[Item], Result],
    *,
    processes: int,
    description: str,
) -> list[Result]:
    """function(item) for each item, in order; on_death(item) for one that killed its process.

    Args:
        function: a module-level function that raises nothing it can help.
        items: picklable.
        on_death: what stands for the result of an item whose process died (memory, a crash in a library).
        processes: worker processes; 1 works in this process, where nothing protects against such a death.
        description: text of the progress bar.
    """
    if processes <= 1 or len(items) <= 1:
        return [function(item) for item in tqdm(items, desc=description, disable=not items)]
    results: dict[int, Result] = {}
    left = list(range(len(items)))
    with tqdm(total=len(items), desc=description) as bar:
        while left:
            _run_pool(function, items, left, results, processes, bar)
            left = [index for index in left if index not in results]
            # A pool that breaks does not say over which item: those begun were the first of the rest, one a process
            # and one waiting. Each of them gets a process of its own.
            suspects, left = left[: processes + 1], left[processes + 1 :]
            for index in suspects:
                _run_pool(function, items, [index], results, 1, bar)
                if index not in results:
                    results[index] = on_death(items[index])
                    bar.update()
    return [results[index] for index in range(len(items))]


def _run_pool(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    indices: Sequence[int],
    results: dict[int, Result],
    processes: int,
    bar: tqdm,
) -> None:
    """Puts into `results` what can be had before the pool breaks, if it does."""
    # spawn, as nnU-Net does: a forked child of a process with torch's threads may hang
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(indices)), mp_context=context) as pool:
        futures: list[tuple[int, Future[Result]]] = []
        try:
            for index in indices:
                futures.append((index, pool.submit(function, items[index])))
        except BrokenProcessPool:
            pass
        for index, future in futures:
            try:
                results[index] = future.result()
                bar.update()
            except BrokenProcessPool:
                continue
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
