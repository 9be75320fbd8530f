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


def test_a_captured_update_leaves_its_batch_too(tmp_path):
    """The batch was read inside a graph; it is taken once more. A stand-in for the graph serves where there is no GPU."""
    from runner.loop import Loop
    from runner.record import Record
    from runner.run import assemble
    from runner.settings import Loop as Settings

    method, world, stream = assemble(compose(["method=td3_bc", "env=pointmass_medium", "size=smoke", "logger=none"], Catalogue()))
    seen = []

    class Graphs:
        def advance(self, step, event):
            seen.append(stream.next())
            return 1, {"critic_loss": torch.tensor(float("nan") if step == 6 else 0.0)}

    record = Record(tmp_path)
    loop = Loop(method, world, stream, Settings(steps=12, log_every=1), seed=0, record=record)
    loop.graphs = Graphs()
    record.open_metrics(0)
    with pytest.raises(NonFinite, match="step 7.*nonfinite.safetensors"):
        loop.run()
    batch = load_file(tmp_path / "nonfinite.safetensors")
    assert len(seen) == 7 and all(torch.equal(batch[k], v) for k, v in seen[-1].items())
