"""Networks that are used or trained further as they come: model=given, the path of a finished run."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from token_methods import bare

from methods.diffusion.apg import APG
from methods.diffusion.dit import DiTPolicy
from methods.diffusion.flow_grpo import FlowGRPO
from methods.diffusion.flow_matching import FlowMatching
from methods.diffusion.mlp import MLP
from methods.diffusion.unet import UNetPolicy
from runner.errors import UserError
from runner.interface import Spec

SPEC = Spec(sample_shape=(1, 8, 8), classes=3)
POLICIES = [(MLP, {"width": 8, "depth": 2}), (UNetPolicy, {"channels": (8, 8)}), (DiTPolicy, {"width": 16, "depth": 1})]


def of(cls, policy, sizes, path="", **values):
    method = bare(cls, **{"sampler_steps": 2, **values})
    method.blueprint = policy(policy.Config(**sizes, path=str(path)))
    method.setup(SPEC)
    method.make_optimizers()
    return method


def equal(network, state):
    return all(torch.equal(v, state[k]) for k, v in network.state_dict().items())


@pytest.mark.parametrize(("policy", "sizes"), POLICIES, ids=["mlp", "unet", "dit"])
def test_a_finished_run_is_begun_from(policy, sizes, tmp_path):
    """The moving average where the run kept one, else the network; from its folder, its file, or what `export` wrote."""
    run = of(FlowMatching, policy, sizes, average=0.9)
    with torch.no_grad():
        for p in run.averaged.parameters():
            p.add_(0.1)
    save_file({k: v.contiguous() for k, v in run.state_dict().items()}, tmp_path / "weights.safetensors")
    save_file({k: v.contiguous() for k, v in run.network.state_dict().items()}, tmp_path / "exported.safetensors")
    averaged, plain = run.averaged.state_dict(), run.network.state_dict()
    for place, state in ((tmp_path, averaged), (tmp_path / "weights.safetensors", averaged),
                         (tmp_path / "exported.safetensors", plain)):
        mine = of(FlowGRPO, policy, sizes, place, kl_weight=0.1)
        mine.prepare({f"start/{k}": v + 1 for k, v in plain.items()})  # the env's start is not for it
        assert equal(mine.network, state) and equal(mine.reference, state)
    other = {k: v * 2 if isinstance(v, int) else tuple(2 * c for c in v) for k, v in sizes.items()}
    with pytest.raises(UserError, match="of another shape"):
        of(FlowMatching, policy, other, tmp_path)
    if "depth" in sizes:  # a deeper run is not cut to size
        with pytest.raises(UserError, match="of another shape"):
            of(FlowMatching, policy, {**sizes, "depth": sizes["depth"] - 1}, tmp_path)
    with pytest.raises(UserError, match="no weights there"):
        of(FlowMatching, policy, sizes, tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("no weights")
    with pytest.raises(UserError, match="can't be read"):
        of(FlowMatching, policy, sizes, tmp_path / "notes.txt")


def test_a_given_network_stays_as_it_is_and_is_wanted():
    policy, sizes = POLICIES[0]
    mine = of(APG, policy, sizes, model="given")
    batch = {"x": torch.randn(4, 1, 8, 8), "condition": torch.arange(4) % 3}
    with pytest.raises(UserError, match="no network is given"):
        mine.update(batch)
    start = {f"start/{k}": v + 0.1 for k, v in mine.network.state_dict().items()}
    mine.prepare(start)
    assert mine.update(batch)["loss"] == 0 and equal(mine.network, {k.removeprefix("start/"): v for k, v in start.items()})


def test_given_from_the_command_line(cli):
    words = ["env=ring", "size=smoke", "logger=none", "loop.steps=1"]
    done = cli("method=flow_matching", *words)
    assert done.code == 0, done.text
    run, = (cli.cwd / "runs").iterdir()
    for more in ([f"policy.path={run}"], []):  # the other run; the env's start
        done = cli("method=cfg", "method.model=given", *words, *more)
        assert done.code == 0, done.text
    weights = [load_file(p / "weights.safetensors") for p in (cli.cwd / "runs").iterdir()
               if json.loads((p / "run.json").read_text())["config"]["policy"]["path"] or p == run]
    assert len(weights) == 2 and all(
        torch.equal(v, weights[1][k]) for k, v in weights[0].items() if k.startswith("network."))
    done = cli("method=cfg", "method.model=given", *words, "env.start=none")
    assert done.code == 2 and "no network is given" in done.text
