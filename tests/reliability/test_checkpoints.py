"""Checkpoints: whole or not at all, a corrupt one is told and the previous one used."""

from __future__ import annotations

import json

import pytest
import torch

from runner.catalogue import Catalogue
from runner.checkpoint import Checkpoints, Corrupt
from runner.compose import compose
from runner.loop import Preempted
from runner.run import execute, folder_of

WORDS = ["method=td3", "env=pointmass", "size=smoke", "loop.steps=60", "loop.log_every=10", "loop.validate_every=0",
         "loop.save_steps=20", "loop.save_seconds=0", "logger=none", "method.hidden=[16,16]"]


def state():
    return {"a": torch.arange(6.0).reshape(2, 3), "b": [1, 2.5, None, "x", True], "c": {0: (torch.zeros(0), 3)},
            "big": 2**70}


def test_round_trip_keeps_types_and_bits(tmp_path):
    Checkpoints(tmp_path).save(3, state())
    loaded = Checkpoints(tmp_path).load(3)
    assert torch.equal(loaded["a"], state()["a"]) and loaded["b"] == state()["b"] and loaded["big"] == 2**70
    assert isinstance(loaded["c"][0], tuple) and loaded["c"][0][0].shape == (0,)


def test_only_plain_state_is_saved(tmp_path):
    with pytest.raises(TypeError, match="/method/net"):
        Checkpoints(tmp_path).save(1, {"method": {"net": object()}})
    assert Checkpoints(tmp_path).steps() == []


def test_old_ones_are_dropped(tmp_path):
    points = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        points.save(step, state())
    assert points.steps() == [3, 2]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "text"])
def test_damage_is_found(tmp_path, damage):
    points = Checkpoints(tmp_path)
    points.save(1, state())
    tensors, text = points.path(1) / "tensors.safetensors", points.path(1) / "state.json"
    if damage == "flip":
        data = bytearray(tensors.read_bytes())
        data[-1] ^= 1
        tensors.write_bytes(data)
    elif damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-5])
    elif damage == "remove":
        tensors.unlink()
    else:
        text.write_text(text.read_text().replace("2.5", "2.6"))
    with pytest.raises(Corrupt):
        points.load(1)


class StopAt:
    """Asks the loop to stop at its n-th event."""

    def __init__(self, n):
        self.left, self.signal = n, 15

    def __call__(self):
        self.left -= 1
        return self.left < 0


def interrupted(tmp_path, monkeypatch, events):
    import runner.run as run

    job = compose([*WORDS, f"runs={tmp_path}"], Catalogue())

    class Stop(run.Stop):
        def __call__(self):
            self.count = getattr(self, "count", 0) + 1
            return self.count > events

    with monkeypatch.context() as m:
        m.setattr(run, "Stop", Stop)
        with pytest.raises(Preempted):
            execute(job, quiet=True)
    return job, folder_of(job)


def test_a_corrupt_checkpoint_falls_back_says_so_and_ends_with_the_same_bits(tmp_path, monkeypatch):
    whole = execute(compose([*WORDS, f"runs={tmp_path / 'whole'}"], Catalogue()), quiet=True)
    job, folder = interrupted(tmp_path / "broken", monkeypatch, 4)
    newest = Checkpoints(folder / "checkpoints").steps()[0]
    path = folder / "checkpoints" / f"step_{newest:09d}" / "tensors.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    result = execute(job, quiet=True)
    told = [e["told"] for e in map(json.loads, (folder / "events.jsonl").read_text().splitlines()) if e["event"] == "resumed"]
    assert f"checkpoint of step {newest} cannot be used" in told[0] and "falling back" in told[0]
    assert told[1].startswith("continuing from step")
    assert result["metrics"] == whole["metrics"]
    name = folder.name
    for file in ("metrics.jsonl", "weights.safetensors"):
        assert (folder / file).read_bytes() == (tmp_path / "whole" / name / file).read_bytes()


def test_all_checkpoints_corrupt_starts_again(tmp_path, monkeypatch):
    job, folder = interrupted(tmp_path, monkeypatch, 4)
    for path in (folder / "checkpoints").glob("step_*/state.json"):
        path.write_text("{")
    execute(job, quiet=True)
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [10, 20, 30, 40, 50, 60]


def test_the_replay_is_saved_once_and_not_with_every_checkpoint(tmp_path, monkeypatch):
    _, folder = interrupted(tmp_path, monkeypatch, 5)
    segments = sorted(p.name for p in (folder / "checkpoints" / "journal").iterdir())
    ends = [tuple(map(int, s.removesuffix(".safetensors").split("_")[1:])) for s in segments]
    assert len(ends) >= 2 and all(a[1] == b[0] for a, b in zip(ends, ends[1:])), "each segment goes on where one ended"


def test_a_disk_that_fills_up_is_told_and_the_run_can_go_on(tmp_path, monkeypatch):
    import errno

    from runner.errors import UserError
    from runner.record import Record

    job = compose([*WORDS, f"runs={tmp_path}"], Catalogue())
    log, written = Record.log, []

    def full(self, line):
        written.append(line)
        if len(written) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        log(self, line)

    with monkeypatch.context() as m:
        m.setattr(Record, "log", full)
        with pytest.raises(UserError, match="disk is full"):
            execute(job, quiet=True)
    assert Checkpoints(folder_of(job) / "checkpoints").steps() == [40, 20]
    assert execute(job, quiet=True)["status"] == "done"
    steps = [json.loads(line)["step"] for line in (folder_of(job) / "metrics.jsonl").read_text().splitlines()]
    assert steps == [10, 20, 30, 40, 50, 60]


def test_json_of_a_single_run(tmp_path, capsys):
    from runner.cli import main

    assert main([*WORDS, f"runs={tmp_path}", "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "done"


def test_more_rows_than_the_replay_holds_between_two_checkpoints(tmp_path):
    """The journal's segment then begins later than the last one ended; every row must come back to its own place."""
    from runner.run import assemble

    job = compose([*WORDS, "env.capacity=50", "env.start_steps=30", f"runs={tmp_path}"], Catalogue())
    _, _, stream = assemble(job)
    points = Checkpoints(tmp_path / "checkpoints")
    for step, draws in ((1, 1), (2, 77), (3, 5)):  # 31, 108 and 113 rows in all: 77 in between, of which 50 are held
        for _ in range(draws):
            stream.next()
        points.save(step, {"stream": stream.state_dict()}, stream)
    _, _, other = assemble(job)
    other.load_state_dict(Checkpoints(tmp_path / "checkpoints").load(3, other)["stream"])
    assert torch.equal(other.rows, stream.rows)
