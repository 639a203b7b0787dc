"""report/workers.py: a case that kills its process costs that case, not the report."""

from __future__ import annotations

import os
import signal

from nnunet_dsp.report.workers import map_surviving


def deadly(item: int) -> str:
    if item in (3, 7):
        os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does where memory runs out
    return f"looked at {item}"


def dead(item: int) -> str:
    return f"{item} killed its process"


def test_cases_that_kill_their_process_are_told_and_all_others_are_there_in_order():
    found = map_surviving(deadly, range(12), dead, processes=2, description="Checking")
    assert found == [dead(item) if item in (3, 7) else f"looked at {item}" for item in range(12)]


def test_one_process_works_in_this_one_and_no_cases_are_no_trouble():
    assert map_surviving(str, [1, 2], dead, processes=1, description="Checking") == ["1", "2"]
    assert map_surviving(str, [], dead, processes=4, description="Checking") == []
