"""The benchmark of rollouts and scores runs."""

from __future__ import annotations

import json
from pathlib import Path


def test_the_benchmark_runs(shell, tmp_path):
    script = Path(__file__).parents[2] / "scripts" / "bench" / "generation.py"
    done = shell("--quick", "--device", "cpu", "--repeats", "1", "--json", tmp_path / "out.json", python=[str(script)])
    assert done.code == 0, done.text
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["rollout"] > figures["rollout_floor"] > 0 and figures["scoring"] > figures["scoring_floor"] > 0
    assert "times floor" in done.out
