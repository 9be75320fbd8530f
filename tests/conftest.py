"""Shared fixtures: the command line in this process (`cli`) and as a real one (`shell`), each in an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # pytest's importlib mode does not add it
    sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def text(self):
        return self.out + self.err


def _clean_environment(monkeypatch, home: Path):
    for name in [n for n in os.environ if n.startswith(("WANDB", "SLURM"))]:
        monkeypatch.delenv(name)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "FORCE_COLOR", "CLICOLOR_FORCE", "BALLAST_DATA", "MINARI_DATASETS_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # whoever tries the network fails at once
    monkeypatch.setenv("HOME", str(home))


@pytest.fixture
def cli(tmp_path, tmp_path_factory, monkeypatch, capsys):
    """cli("method=adpo", …) -> Result: runner.cli.main in this process, in an empty folder (so runs/ lies there).

    An exception other than the ones that main turns into an exit code fails the test: it would be a traceback."""
    from runner.cli import main

    monkeypatch.chdir(tmp_path)
    _clean_environment(monkeypatch, tmp_path_factory.mktemp("home"))

    def call(*words: str) -> Result:
        for name in [n for n in sys.modules if n.startswith("_include_")]:  # two tests may use one name
            del sys.modules[name]
        capsys.readouterr()
        code = main([str(w) for w in words])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return Result(code, captured.out, captured.err)

    call.cwd = tmp_path
    return call


@pytest.fixture
def shell(tmp_path, tmp_path_factory, monkeypatch):
    """shell("list") -> Result of a real `python -m runner list`; shell(…, python=[…]) replaces `-m runner`."""
    _clean_environment(monkeypatch, tmp_path_factory.mktemp("home"))

    def call(*words: str, python=("-m", "runner"), timeout=280) -> Result:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *python, *map(str, words)], cwd=tmp_path, env=env, text=True,
                              stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout)
        return Result(done.returncode, done.stdout, done.stderr)

    call.cwd = tmp_path
    return call


# ---- a user's own methods and envs ---------------------------------------------------------------------------------

_METHOD = '''\
from __future__ import annotations

import dataclasses
import os

import torch

from methods.control.{module} import {base}
from runner.interface import knob


class {name}({base}):
    @dataclasses.dataclass(frozen=True)
    class Config({base}.Config):
        {knob}: float = knob({default}, "weight of what {name} adds", low=0.0)

{body}
'''

PENALTY = '''\
    def critic_penalty(self, batch, values, features):
        penalty, own = super().critic_penalty(batch, values, features), self.config.{knob} * values.square().mean()
        return own if penalty is None else penalty + own
'''

ACTOR_PENALTY = '''\
    def actor_penalty(self, batch, sample):
        penalty, own = super().actor_penalty(batch, sample), self.config.{knob} * sample.action.square().mean()
        return own if penalty is None else penalty + own
'''

TARGET = '''\
    def target(self, batch):
        return (1 - self.config.{knob}) * super().target(batch)
'''


class Own:
    """A folder for --include that tests fill."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def card(self, name: str, text: str):
        (self.folder / f"{name}.yaml").write_text(text)
        return self

    def code(self, name: str, text: str):
        (self.folder / f"{name}.py").write_text(text)
        return self

    def method(self, name: str, body: str = PENALTY, changes: str = "critic_penalty", base: str = "TD3", knob: str = "",
               default: float = 0.1, more: str = ""):
        """A td3 (or ddpg) variant called `name`, its one setting called `knob`."""
        knob = knob or f"{name}_weight"
        self.card(name, f"card:\n  kind: method\n  title: {name} of my own\n  summary: td3 with {name}\n"
                        f"  formula: L + w E[Q²]\n  baseline: {base.lower()}\n  changes: [{changes}]\n"
                        f"  needs: [transitions]\n  neutral: {{{knob}: 0.0}}\n{more}")
        return self.code(name, _METHOD.format(module=base.lower(), base=base, name=name.title(), knob=knob,
                                              default=default, body=body.replace("{knob}", knob)))

    @property
    def option(self) -> str:
        return f"--include={self.folder}"


@pytest.fixture
def own(tmp_path_factory) -> Own:
    return Own(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="session")
def bodies():
    return {"critic_penalty": PENALTY, "actor_penalty": ACTOR_PENALTY, "target": TARGET}
