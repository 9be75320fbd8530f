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


# ---- one seed of several ----------------------------------------------------------------------------------------------

SEED = """
from methods.control.td3 import TD3
import dataclasses

class OneSeed(TD3):
    @dataclasses.dataclass(frozen=True)
    class Config(TD3.Config):
        pass

    def critic_loss(self, values, target):
        factor = values.new_ones(values.shape[0])       # (seeds,)
        for place, update in PLACES.items():
            factor[place] = float("inf") if self.updates >= update else 1.0
        return super().critic_loss(values, target) * factor
"""
SEED_CARD = "card: {kind: method, title: t, summary: s, changes: [critic_loss], needs: [offline]}\n"


@pytest.fixture
def batch_of_seeds(cli):
    """batch_of_seeds({place: update from which it diverges}, …): three seeds of TD3 at once, from seed 2 on."""
    def call(places, *more, runs="runs"):
        own = cli.cwd / "own"
        own.mkdir(exist_ok=True)
        (own / "oneseed.py").write_text(SEED.replace("PLACES", repr(places)))
        (own / "oneseed.yaml").write_text(SEED_CARD)
        result = cli("method=oneseed", "env=pointmass_medium", "size=smoke", "logger=none", "hardware=cpu", "seed=2",
                     "hardware.seeds=3", "loop.log_every=2", f"runs={runs}", f"--include={own}", *more)
        return result, sorted((cli.cwd / runs).iterdir())
    return call


def read(folder):
    return json.loads((folder / "run.json").read_text())


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("place", [0, 1])
def test_a_seed_that_diverges_fails_alone(batch_of_seeds, place):
    """The others end with the lines, weights and figures that they have without it, to the bit."""
    usual, expected = batch_of_seeds({}, runs="usual")
    result, folders = batch_of_seeds({place: 5}, "loop.eval_every=8")
    assert usual.code == 0 and result.code == 1
    assert f"seed {place + 2}: non-finite at step 6: critic_loss = inf" in result.err and str(folders[place].name) in result.err
    run = read(folders[place])
    assert run["status"] == "failed" and run["step"] == 6 and "NonFinite('non-finite at step 6" in run["error"]
    assert "metrics" not in run and not (folders[place] / "weights.safetensors").exists()
    assert "non-finite" in (folders[place] / "traceback.txt").read_text() and steps(folders[place]) == [2, 4, 6]
    assert json.loads((folders[place] / "metrics.jsonl").read_text().splitlines()[-1])["critic_loss"] is None
    batch = load_file(folders[place] / "nonfinite.safetensors")
    assert batch["observation"].dim() == 2 and torch.isfinite(batch["reward"]).all()
    for i in {0, 1, 2} - {place}:
        assert read(folders[i])["status"] == "done" and steps(folders[i]) == [2, 4, 6, 8, 10, 12]
        assert read(folders[i])["metrics"] == read(expected[i])["metrics"]
        weights, others = load_file(folders[i] / "weights.safetensors"), load_file(expected[i] / "weights.safetensors")
        assert all(torch.equal(weights[k], others[k]) for k in weights)
        assert not (folders[i] / "nonfinite.safetensors").exists()


def test_a_batch_with_a_diverged_seed_is_trained_again_only_if_forced(batch_of_seeds):
    for place in (0, 2):  # the seed whose folder holds the state, or another
        options = [f"env.episodes={place + 2}"]
        _, folders = batch_of_seeds({place: 5}, *options, runs=f"runs{place}")
        before = [read(f)["updated"] for f in folders]
        events = (folders[0] / "events.jsonl").read_text()
        again, _ = batch_of_seeds({}, *options, runs=f"runs{place}")
        assert again.code == 1 and f"seed {place + 2}: non-finite at step 6" in again.err and "--force" in again.err
        assert folders[place].name in again.err and (folders[0] / "events.jsonl").read_text() == events
        assert [read(f)["updated"] for f in folders] == before
        forced, _ = batch_of_seeds({}, *options, "--force", runs=f"runs{place}")
        assert forced.code == 0 and [read(f)["status"] for f in folders] == ["done"] * 3
        assert read(folders[place])["error"] is None and not (folders[place] / "nonfinite.safetensors").exists()


def test_a_batch_ends_where_its_last_seed_diverges(batch_of_seeds):
    result, folders = batch_of_seeds({0: 3, 1: 7, 2: 1})
    assert result.code == 1 and "no seed is done" in result.err
    assert [read(f)["status"] for f in folders] == ["failed"] * 3 and [read(f)["step"] for f in folders] == [4, 8, 2]
    assert [steps(f) for f in folders] == [[2, 4], [2, 4, 6, 8], [2]]


def test_a_continued_batch_remembers_who_diverged(batch_of_seeds, monkeypatch):
    """Stopped after a seed diverged and continued: it stays failed, the others end."""
    from runner.loop import Loop

    usual = Loop._at_event

    def stopping(self, *event):
        self.stop = lambda: self.step >= 8
        usual(self, *event)
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_at_event", stopping)
        stopped, folders = batch_of_seeds({1: 3})
    assert stopped.code == 143 and {read(f)["status"] for f in folders} == {"preempted"}
    result, _ = batch_of_seeds({1: 3})
    assert result.code == 1 and [read(f)["status"] for f in folders] == ["done", "failed", "done"]
    assert read(folders[1])["step"] == 4 and steps(folders[1]) == [2, 4] and steps(folders[0]) == [2, 4, 6, 8, 10, 12]
