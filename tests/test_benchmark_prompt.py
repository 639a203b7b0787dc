"""`nnunet_dsp benchmark prompt` on networks small enough for a test: what it measures, and what it refuses."""

import argparse
import json

import pytest

from nnunet_dsp.benchmark import prompt

SMALL = "--patch 32 --batch 1 --features 4 6 8 --keys 64 --repeats 2 --warmup 1".split()


def run(*arguments):
    parser = argparse.ArgumentParser()
    prompt.add_arguments(parser)
    return prompt.run(parser.parse_args([*SMALL, *map(str, arguments)]))


def test_steps_memory_and_prediction_are_compared_with_nnunets(tmp_path, capsys):
    assert run("--json", tmp_path / "result.json") == 0
    content = json.loads((tmp_path / "result.json").read_text())
    rows = {row["name"]: row for row in content["rows"]}
    assert content["meta"]["keys"] == 64 and content["meta"]["patch"] == 32
    step = rows["step, prompt, 64 keys"]
    assert step["baseline"] == "nnU-Net" and step["limit"] == prompt.TIME_LIMIT and step["ratio"] > 0
    memory = rows["memory, prompt, 64 keys"]
    assert memory["quantity"] == "memory" and memory["limit"] == prompt.MEMORY_LIMIT
    assert memory["ratio"] == pytest.approx(memory["peak_bytes"] / rows["step, nnU-Net"]["peak_bytes"])
    assert rows["prediction, prompt"]["ratio"] > 0
    assert "step, nnU-Net" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [("--patch", 30), ("--patch", 8), ("--classes", 1), ("--keys", 0)])
def test_sizes_no_network_can_have_are_refused(arguments):
    with pytest.raises(ValueError, match="Expected --patch to be a multiple of 4"):
        run(*arguments)
