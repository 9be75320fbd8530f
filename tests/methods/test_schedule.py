"""Schedules of DDPM's kind in flow's terms, without diffusers."""

from __future__ import annotations

import pytest
import torch
from token_methods import bare

from methods.diffusion import flow, schedule
from methods.diffusion.ddpm import DDPM
from methods.diffusion.mlp import MLP
from runner.interface import Spec


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", schedule.BETAS)
@pytest.mark.parametrize("to_noise", [False, True])
def test_times_rise_and_keep_what_the_betas_keep(kind, to_noise):
    beta = schedule.betas(kind, 50)
    t = schedule.table(beta, to_noise)
    kept = (1 - t.double()).square() / ((1 - t.double()).square() + t.double().square())
    assert (t[1:] > t[:-1]).all() and t[0] > 0 and (t[-1] == 1) == to_noise
    product = (1 - beta).cumprod(0)
    torch.testing.assert_close(kept[0], product[0], rtol=1e-5, atol=0)
    if not to_noise:
        torch.testing.assert_close(kept, product, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", schedule.PREDICTIONS)
def test_every_prediction_of_the_truth_is_the_true_velocity(kind):
    t = torch.tensor([0.1, 0.5, 0.9])
    data, noise = numbers(3, 4), numbers(3, 4, seed=1)
    x, at = (1 - flow.rows(t, data)) * data + flow.rows(t, data) * noise, flow.rows(t, data)
    r = schedule.size(data, t)
    said = {"epsilon": noise, "sample": data, "v_prediction": (1 - at) / r * noise - at / r * data}[kind]
    torch.testing.assert_close(schedule.velocity(kind, x, t, said), noise - data, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shift", [0.2, 1.0, 3.0, 50.0])
@pytest.mark.parametrize("steps", [1, 3, 10, 19, 20])
def test_trailing_steps_begin_at_the_last_and_never_stand(steps, shift):
    t = schedule.table(schedule.betas("linear", 20))
    grid = schedule.trailing(t, steps, shift)
    assert len(grid) == steps + 1 and grid[0] == t[-1] and grid[-1] == 0 and (grid[1:] < grid[:-1]).all()
    if shift == 1 and steps == 10:
        assert torch.equal(grid[:-1], t[torch.arange(19, 0, -2)])


def test_places_are_the_steps_of_their_times():
    t = schedule.table(schedule.betas("squaredcos_cap_v2", 30))
    assert torch.equal(schedule.place(t, t), torch.arange(30))
    assert schedule.place(t, torch.tensor([0.0, 1.0])).tolist() == [0, 29]


@pytest.mark.parametrize("steps", [2, 10, 50, 1000])
def test_ddpm_begins_where_hardly_any_data_is_left_however_many_steps_there_are(steps):
    """Generation begins at pure noise: what the last step keeps of the data has to be next to nothing."""
    method = bare(DDPM, schedule_steps=steps, sampler_steps=2)
    method.blueprint = MLP(MLP.Config(width=8, depth=2))
    method.setup(Spec(sample_shape=(2,), classes=2))
    last = method.table[-1]
    assert 1 - last < 0.03 and (method.table.diff() > 0).all()
    noise = numbers(5, 2)
    torch.testing.assert_close(method.begin(noise) / schedule.size(noise, last), noise)  # x_k, as the network sees it
    assert method.export()[1]["kind"] == "epsilon"
    if steps == 1000:
        assert torch.equal(method.table, schedule.table(schedule.betas("linear", 1000)))
