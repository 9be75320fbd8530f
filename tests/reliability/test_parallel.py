"""Two processes on the CPU: ddp and fsdp train, agree, save, continue, and a sharded run's weights are whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runner.catalogue import Catalogue
from runner.compose import compose
from runner.run import execute

ROOT = Path(__file__).resolve().parents[2]


def run(tmp_path, *words, world="pointmass", devices=2, accelerator="cpu"):
    tmp_path.mkdir(exist_ok=True)
    words = [*words, f"env={world}", "size=smoke", "loop.steps=12", "loop.save_steps=5", "loop.log_every=2", "logger=none",
             f"hardware.devices={devices}", f"hardware.accelerator={accelerator}", f"runs={tmp_path}"]
    if devices == 1:  # in this process: its imports are made
        execute(compose(words, Catalogue()), quiet=True)
        return next(tmp_path.iterdir())
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "runner", *words, "--quiet"], env=env, capture_output=True, text=True,
                          cwd=tmp_path, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return next(tmp_path.iterdir())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes(strategy, tmp_path):
    """The same two data shares give the same mean gradients, however the parameters are laid out."""
    from safetensors.torch import load_file

    folder = run(tmp_path, "method=adpo", f"hardware={strategy}")
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "done" and record["world_size"] == 2
    weights = load_file(folder / "weights.safetensors")
    assert weights["policy.net.0.weight"].shape == (64, 6), "a sharded run saves whole weights"
    ranks = [load_file(folder / "checkpoints" / r / "step_000000010" / "tensors.safetensors") for r in (".", "rank1")]
    shared = [k for k in ranks[0] if k.startswith("/modules")]
    assert shared and all((ranks[0][k] == ranks[1][k]).all() for k in shared), "the ranks hold the same networks"
    assert any((ranks[0][k] != ranks[1][k]).any() for k in ranks[0] if k.startswith("/stream/batch")), "and other data"
    # continue from step 10, as after a kill
    record["status"] = "running"
    before = (folder / "metrics.jsonl").read_bytes()
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "weights.safetensors").unlink()
    run(tmp_path, "method=adpo", f"hardware={strategy}")
    assert (folder / "metrics.jsonl").read_bytes() == before
    again = load_file(folder / "weights.safetensors")
    assert all((weights[k] == again[k]).all() for k in weights)


@pytest.mark.parametrize("method", ["ppo", "trpo"])
def test_two_processes_on_policy(method, tmp_path):
    """Ranks play their own rollouts and hold the same networks, normalisation included; trpo's search decides alike."""
    from safetensors.torch import load_file

    folder = run(tmp_path, f"method={method}", "hardware=ddp")
    assert json.loads((folder / "run.json").read_text())["status"] == "done"
    ranks = [load_file(folder / "checkpoints" / r / "step_000000010" / "tensors.safetensors") for r in (".", "rank1")]
    shared = [k for k in ranks[0] if k.startswith("/modules")]
    assert any("seen" in k for k in shared) and all((ranks[0][k] == ranks[1][k]).all() for k in shared)
    observed = [k for k in ranks[0] if k.startswith("/stream") and "observation" in k]
    assert observed and any((ranks[0][k] != ranks[1][k]).any() for k in observed)


def accelerators() -> list[str]:
    import torch

    if torch.cuda.device_count() > 1:
        return ["cpu", "gpu"]
    print("\ntests/reliability/test_parallel.py: two GPUs NOT EXERCISED, they are not here")
    return ["cpu"]


@pytest.mark.parametrize("accelerator", accelerators())
@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean"])
def test_two_processes_share_a_batch_of_prompts(aggregation, accelerator, tmp_path):
    """Two processes with two prompts each do what one does with four: the same problems, numbers, denominators and losses."""
    lines = []
    for devices, prompts in ((1, 4), (2, 2)):
        folder = run(tmp_path / str(devices), "method=grpo", f"method.prompts={prompts}", "method.minibatches=1",
                     f"method.aggregation={aggregation}", "method.learning_rate=0.001", world="countdown", devices=devices,
                     accelerator=accelerator)
        lines.append([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()])
    for one, two in zip(*lines, strict=True):
        assert one["responses"] == two["responses"]
        keys = ("loss", "reward", "length", "entropy")
        assert {k: two[k] for k in keys} == pytest.approx({k: one[k] for k in keys}, rel=2e-3, abs=2e-4)
    assert len({line["reward"] for line in lines[0]}) > 2  # something was learned from
