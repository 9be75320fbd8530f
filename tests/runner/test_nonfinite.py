"""A run that diverges ends as failed, names what was not finite, and leaves the batch."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from runner.catalogue import Catalogue
from runner.compose import compose
from runner.loop import NonFinite
from runner.run import Failed, execute

METHOD = """
from methods.control.ppo import PPO
import dataclasses

class Diverging(PPO):
    @dataclasses.dataclass(frozen=True)
    class Config(PPO.Config):
        pass

    def policy_loss(self, mini, ratio):
        return super().policy_loss(mini, ratio) * (float("VALUE") if self.updates >= 5 else 1.0)
"""
CARD = "card: {kind: method, title: t, summary: s, changes: [policy_loss], needs: [rollouts]}\n"


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_diverged_run_fails_and_leaves_its_batch(tmp_path, value):
    (tmp_path / "diverging.py").write_text(METHOD.replace("VALUE", value))
    (tmp_path / "diverging.yaml").write_text(CARD)
    job = compose(["method=diverging", "env=pointmass", "size=smoke", "loop.log_every=2", "logger=none",
                   f"runs={tmp_path / 'runs'}"], Catalogue([str(tmp_path)]))
    with pytest.raises(Failed, match="NonFinite: non-finite at step 6: policy_loss"):
        execute(job, quiet=True)
    folder = next((tmp_path / "runs").iterdir())
    run = json.loads((folder / "run.json").read_text())
    assert run["status"] == "failed" and "non-finite" in run["error"] and run["step"] == 6
    batch = load_file(folder / "nonfinite.safetensors")
    assert batch["observation"].shape == (32, 2, 6) and torch.isfinite(batch["reward"]).all()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert lines[-1]["policy_loss"] is None and lines[1]["policy_loss"] is not None


def test_finite_metrics_of_any_size_pass(tmp_path):
    """The largest numbers are no divergence, and counters may be NaN (no episode has ended yet)."""
    (tmp_path / "diverging.py").write_text(METHOD.replace("VALUE", "1e10"))
    (tmp_path / "diverging.yaml").write_text(CARD)
    job = compose(["method=diverging", "env=pointmass", "size=smoke", "logger=none", "loop.steps=5", "loop.log_every=1",
                   "method.learning_rate=0", f"runs={tmp_path / 'runs'}"], Catalogue([str(tmp_path)]))
    assert execute(job, quiet=True)["status"] == "done"
    assert issubclass(NonFinite, Exception)
