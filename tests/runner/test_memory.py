"""What several runs share: found again under everything it depends on, and under nothing else."""

from __future__ import annotations

import torch

from runner.memory import Memory


def test_a_result_is_computed_once(tmp_path, monkeypatch):
    monkeypatch.setenv("BALLAST_DATA", str(tmp_path / "data"))
    calls, of = [], {"weights": torch.randn(4, 3), "ids": torch.arange(5), "scale": torch.tensor(2.0)}

    def compute():
        calls.append(1)
        return {"out": torch.full((2, 2), float(len(calls)))}

    first = Memory("32-true", least=1)("reference", of, compute)
    again = Memory("32-true", least=1)("reference", {k: v.clone() for k, v in of.items()}, compute)
    assert len(calls) == 1 and torch.equal(first["out"], again["out"])
    for change in ({"weights": of["weights"] + 1e-7}, {"ids": of["ids"].int()}, {"more": torch.zeros(1)}):
        Memory("32-true", least=1)("reference", {**of, **change}, compute)
    Memory("bf16-mixed", least=1)("reference", of, compute)
    assert len(calls) == 5
    file = next(p for p in (tmp_path / "remembered").iterdir())
    for p in (tmp_path / "remembered").iterdir():
        p.write_bytes(p.read_bytes()[:20])  # cut off
    assert Memory("32-true", least=1)("reference", of, compute)["out"][0, 0] == 6 and len(calls) == 6
    assert file.parent.is_dir() and not list(file.parent.glob("tmp*"))


def test_what_is_cheap_or_another_process_s_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("BALLAST_DATA", str(tmp_path / "data"))
    of = {"a": torch.zeros(3)}
    for memory in (Memory("32-true"), Memory("32-true", writes=False, least=1)):
        assert memory("x", of, lambda: {"out": torch.ones(1)})["out"] == 1
    assert not list(tmp_path.rglob("*.safetensors"))
