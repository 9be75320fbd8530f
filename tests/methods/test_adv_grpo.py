"""Adv-GRPO's reward: the hinge loss by hand, whose turn it is, and what the gate lets through."""

from __future__ import annotations

import pytest
import torch
from test_flow import Line, policy

from methods.diffusion.adv_grpo import AdvGRPO, Features, hinge


class Referenced(Line):
    """References lie at `at`."""

    def __init__(self, at=0.0):
        self.at = at

    def real(self, condition, name):
        return torch.full((len(condition), 2), self.at)


def weights(method):
    return [p.clone() for p in method.network.parameters()], [p.clone() for p in method.head.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b))


def test_the_hinge_loss_by_hand():
    real, made = torch.tensor([[2.0], [0.5]]), torch.tensor([[-3.0], [0.25]])
    whole = 0.5 * ((0 + 0.5) / 2 + (0 + 1.25) / 2)
    assert hinge((real, None), (made, None)).item() == pytest.approx(whole)
    patches = torch.tensor([[[0.0, 1.0]], [[2.0, -1.0]]]), torch.tensor([[[0.0, -1.0]], [[-2.0, 1.0]]])
    part = 0.5 * ((1 + 0 + 0 + 2) / 4 + (1 + 0 + 0 + 2) / 4)
    assert hinge((real, patches[0]), (made, patches[1])).item() == pytest.approx(whole + 0.3 * part)


def test_features_are_frozen_normalised_and_the_same_everywhere():
    phi, again = Features((1, 8, 8), 32), Features((1, 8, 8), 32)
    x = torch.randn(5, 1, 8, 8)
    whole, patches = phi(x)
    assert whole.shape == (5, 32) and patches.shape == (5, 9, 32) and not list(phi.parameters())
    torch.testing.assert_close(patches.norm(dim=2), torch.ones(5, 9))
    assert torch.equal(again(x)[0], whole)


def test_of_some_turns_the_last_is_the_generators():
    method = policy(AdvGRPO, turns=3, reward_width=8, features=16)
    for number in range(6):
        network, head = weights(method)
        method.update(method.collect(Referenced()))
        method.updates += 1
        mine, judge = weights(method)
        assert same(network, mine) == (number % 3 != 2) and same(head, judge) == (number % 3 == 2)


@pytest.mark.parametrize(("at", "hacks"), [(9.0, False), (-9.0, True)])
def test_the_reward_is_trained_where_the_generator_beats_the_references(at, hacks):
    """The proxy is the first coordinate: references at 9 are better than what is made, at -9 worse."""
    method = policy(AdvGRPO, mode="preference", reward_width=8, features=16)
    network, head = weights(method)
    told = method.update(method.collect(Referenced(at)))
    mine, judge = weights(method)
    assert bool(told["hacks"]) == hacks and same(network, mine) == hacks and same(head, judge) == (not hacks)


def test_the_fitted_reward_prefers_references():
    method = policy(AdvGRPO, mode="preference", reward_width=16, features=32, reward_rate=1e-2, prompts=4)
    gaps = []
    for _ in range(15):
        gaps.append(method.update(method.collect(Referenced(-1.0)))["gap"].item())
        method.updates += 1
    assert gaps[0] < -0.3 and max(gaps[5:]) > gaps[0] + 0.3
