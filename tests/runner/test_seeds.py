"""Several seeds in one process: what each leaves equals what it leaves alone, up to the order of floating-point sums."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from runner.catalogue import Catalogue
from runner.compose import compose
from runner.run import _assemble, assemble, execute

BOOK = Catalogue()


def batchable() -> list[str]:
    from runner import catalogue

    out = []
    for name in BOOK.names("method"):
        if "offline" in BOOK.get("method", name).needs and catalogue.load_class(BOOK.get("method", name)).batchable:
            out.append(name)
    return out


def words(name, *more):
    envs = BOOK.fitting(BOOK.methods(name))
    env = next((e for e in ("pointmass_medium",) if e in envs), next(e for e in envs if "offline" in BOOK.get("env", e).provides))
    return [f"method={name}", f"env={env}", "size=smoke", "logger=none", "hardware=cpu", *more]


@pytest.mark.parametrize("name", batchable())
def test_stacked_updates_equal_single_ones(name):
    """Seven updates of seeds 3, 4, 5 together against each alone: weights within 2e-5, metrics within 1e-4 relative."""
    method, _, stream, stack = _assemble(compose(words(name, "seed=3", "hardware.seeds=3"), BOOK))
    lines = []
    for _ in range(7):
        lines.append({k: v.expand(3).tolist() for k, v in method.update(stream.next()).items()})
        method.updates += 1
    for i, seed in enumerate((3, 4, 5)):
        single, _, alone = assemble(compose(words(name, f"seed={seed}"), BOOK))
        for line in lines:
            told = single.update(alone.next())
            single.updates += 1
            assert {k: v.item() for k, v in told.items()} == pytest.approx({k: v[i] for k, v in line.items()}, rel=1e-4,
                                                                          abs=1e-5)
        cut = stack.slice(method.state_dict(), i)
        for key, value in single.state_dict().items():
            torch.testing.assert_close(cut[key], value, rtol=1e-4, atol=2e-5, msg=lambda m: f"{key}: {m}")


def test_every_seed_leaves_a_run_of_its_own(tmp_path):
    job = compose(words("td3", "seed=2", "hardware.seeds=3", f"runs={tmp_path}"), BOOK)
    result = execute(job, quiet=True)
    assert result["status"] == "done" and result["seed"] == 2
    folders = sorted(tmp_path.iterdir())
    assert len(folders) == 3
    returns = set()
    for folder, seed in zip(folders, (2, 3, 4)):
        run = json.loads((folder / "run.json").read_text())
        assert run["status"] == "done" and run["seed"] == run["config"]["seed"] == seed and run["name"] == folder.name
        assert run["batch"] == {"first": 2, "seeds": 3, "state": folders[0].name}
        assert [json.loads(l)["step"] for l in (folder / "metrics.jsonl").read_text().splitlines()] == [4, 8, 12]
        assert load_file(folder / "weights.safetensors")["actor.0.weight"].dim() == 2
        returns.add(run["metrics"]["return"])
    assert len(returns) == 3
    assert execute(job, quiet=True)["already"]


def test_a_batch_of_seeds_continues_from_its_checkpoint(tmp_path):
    """Stopped in the middle and started again: the same lines and weights as without the stop, bit for bit."""
    from runner.loop import Preempted

    def run(folder, stop_at=None):
        job = compose(words("td3", "hardware.seeds=2", f"runs={tmp_path / folder}", "loop.save_steps=3"), BOOK)
        if stop_at:
            import runner.loop as loop

            original = loop.Loop._at_event

            def stopping(self, *event):
                self.stop = lambda: self.step >= stop_at
                original(self, *event)
            loop.Loop._at_event = stopping
            try:
                with pytest.raises(Preempted):
                    execute(job, quiet=True)
            finally:
                loop.Loop._at_event = original
        execute(job, quiet=True)
        return [((f / "metrics.jsonl").read_text(), load_file(f / "weights.safetensors"))
                for f in sorted((tmp_path / folder).iterdir())]

    for (lines, weights), (lines2, weights2) in zip(run("a"), run("b", stop_at=6), strict=True):
        assert lines == lines2
        assert all(torch.equal(weights[k], weights2[k]) for k in weights)


@pytest.mark.parametrize(("more", "said"), [
    (["method=adpo", "env=pointmass"], "cannot train several seeds"),
    (["method=td3", "env=pointmass"], "one seed at a time"),
    (["method=td3", "env=pointmass_medium", "loop.select=best"], "loop.select=best"),
])
def test_what_cannot_be_stacked_is_refused(cli, more, said):
    result = cli(*more, "size=smoke", "logger=none", "hardware=cpu", "hardware.seeds=2")
    assert result.code == 2 and said in result.err
    assert not list(cli.cwd.iterdir())


def test_every_seed_counts_as_running_while_the_first_is_locked(cli):
    from runner.record import Lock, Record

    folders = [cli.cwd / "runs" / name for name in ("a-s0-1", "a-s1-2")]
    for folder in folders:
        folder.mkdir(parents=True)
        Record(folder).write(name=folder.name, status="running", seed=0, batch={"first": 0, "seeds": 2, "state": "a-s0-1"},
                             config={"method": {"name": "td3"}, "env": {"name": "line"}, "size": "smoke", "seed": 0,
                                     "loop": {"steps": 9}})
    shown = lambda: [run["status"] for run in json.loads(cli("status", "--json").out)]  # noqa: E731
    assert shown() == ["killed", "killed"]
    lock = Lock(folders[0]).acquire()
    try:
        assert shown() == ["running", "running"]
    finally:
        lock.release()


def test_a_batch_of_seeds_is_not_forked(cli):
    result = cli("method=td3", "env=pointmass_medium", "size=smoke", "hardware.seeds=2", "--fork")
    assert result.code == 2 and "--fork copies one run" in result.err and not list(cli.cwd.iterdir())


def test_overlapping_batches_of_seeds_are_refused(cli):
    base = ["method=td3", "env=pointmass_medium", "size=smoke", "logger=none", "hardware=cpu", "hardware.seeds=2"]
    assert cli(*base, "seed=1").code == 0
    result = cli(*base, "seed=0")
    assert result.code == 2 and "seed 1 has been trained in another batch" in result.err


def test_a_batch_that_ended_while_its_records_were_written_can_be_given_again(cli):
    """The members are marked done before the first: a kill in between must not shut the batch out."""
    base = ["method=td3", "env=pointmass_medium", "size=smoke", "logger=none", "hardware=cpu", "hardware.seeds=2"]
    assert cli(*base).code == 0
    first = next(p for p in (cli.cwd / "runs").iterdir() if "-s0-" in p.name)
    run = json.loads((first / "run.json").read_text())
    (first / "run.json").write_text(json.dumps({**run, "status": "running"}))
    assert cli(*base).code == 0
    assert json.loads((first / "run.json").read_text())["status"] == "done"
    result = cli(*base, "seed=1")  # trained already, but as the second of a batch: seed 2 was not
    assert result.code == 2 and "began with seed 0" in result.err
