"""PPO on tokens by hand: sums, GAE, rewards, the critic's start, loss and step; entropy in the advantage."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from token_methods import assembled, bare

from methods.reasoning.entropy_advantage import EntropyAdvantage
from methods.reasoning.token_ppo import TokenPPO, discounted_sums, gae


@pytest.mark.parametrize("width", [1, 2, 5, 8, 13])
def test_discounted_sums(width):
    x = torch.randn(3, width)
    expected = [[sum(0.7 ** (s - t) * row[s] for s in range(t, width)) for t in range(width)] for row in x.tolist()]
    torch.testing.assert_close(discounted_sums(x, 0.7), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert discounted_sums(x, 0.0).equal(x)


def test_gae_by_hand():
    mask = torch.tensor([[1.0, 1, 1], [1, 1, 0]])
    reward, values = torch.tensor([[0.0, 0, 1], [0, -1, 0]]), torch.tensor([[0.5, 0.2, 0.4], [0.1, 0.3, 0]])
    a = gae(reward, values, mask, 0.9, 0.5)
    last = 1 - 0.4
    middle = 0.9 * 0.4 - 0.2 + 0.45 * last
    assert a[0].tolist() == pytest.approx([0.9 * 0.2 - 0.5 + 0.45 * middle, middle, last])
    assert a[1].tolist() == pytest.approx([0.9 * 0.3 - 0.1 + 0.45 * -1.3, -1.3, 0])


def test_trace_1_is_the_return_less_the_value_and_0_the_error_of_one_step():
    mask, values = torch.ones(1, 4), torch.tensor([[0.3, 0.1, 0.7, 0.2]])
    reward = torch.tensor([[0.0, 0, 0, 1]])
    torch.testing.assert_close(gae(reward, values, mask, 1.0, 1.0), 1 - values)
    assert gae(reward, values, mask, 1.0, 0.0)[0].tolist() == pytest.approx([-0.2, 0.6, -0.5, 0.8])


def scored(values, **settings):
    method = bare(TokenPPO, **settings)
    method.critic, method.told = None, {}
    method.score = lambda rows, measure, policy: {"value": values}
    return method


def test_the_reward_comes_at_the_end_and_the_kl_along_the_way():
    mask = torch.tensor([[1.0, 1, 1], [1, 0, 0]])
    batch = {"mask": mask, "reward": torch.tensor([1.0, 0.5])}
    old = {"log_prob": torch.tensor([[-1.0, -2, -3], [-1, 0, 0]]),
           "reference_log_prob": torch.tensor([[-1.5, -1, -3], [-2, 9, 9.0]])}
    a = scored(torch.zeros(2, 3), trace=1.0, whiten=False, reward_kl=0.1).advantage(batch, old)
    assert a.flatten().tolist() == pytest.approx([1 - 0.05 + 0.1, 1 + 0.1, 1, 0.5 - 0.1, 0, 0])
    assert torch.equal(batch["returns"], a) and batch["old_value"].eq(0).all()


def test_advantages_are_whitened_and_returns_are_not():
    mask, values = torch.tensor([[1.0, 1, 1], [1, 1, 0]]), torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0]])
    batch = {"mask": mask, "reward": torch.tensor([1.0, 0.0])}
    a = scored(values, trace=1.0).advantage(batch, {})[mask > 0]
    assert a.mean().abs() < 1e-6 and a.var().item() == pytest.approx(1, rel=1e-4)
    assert batch["returns"].flatten().tolist() == pytest.approx([1, 1, 1, 0, 0, 0])


def test_the_critic_starts_as_the_policy_s_trunk_and_says_0():
    method, _, stream = assembled("method=token_ppo")
    trunk = method.policy.model.state_dict()
    assert all(torch.equal(v, trunk[k]) for k, v in method.critic.trunk.state_dict().items())
    ours, theirs = {id(p) for p in method.critic.parameters()}, {id(p) for p in method.policy.parameters()}
    assert not ours & theirs
    batch = {**stream.next()}
    batch["mask"], method.told = batch["mask"].float(), {}
    method.advantage(batch, {})
    assert batch["old_value"].eq(0).all()
    assert not any(k.startswith("critic") for k in method.export()[0])


def losses(now, before, returns, clip):
    """The critic's loss and its slope in `now`, of single tokens."""
    out = []
    for n, b, r in zip(now, before, returns):
        leaf = torch.tensor([[n]], requires_grad=True)
        method = bare(TokenPPO, value_clip=clip)
        method.critic, method.optimizers = None, {"critic": SimpleNamespace(param_groups=[{"params": [leaf]}], step=lambda: None)}
        method.score = lambda rows, measure, policy, leaf=leaf: {"value": leaf * 1.0}
        method.config = dataclasses.replace(method.config, gradient_norm=0.0)
        one = torch.ones(1, 1)
        loss = method.fit_critic(SimpleNamespace(mask=one, old_value=one * b, returns=one * r, tokens=torch.tensor(1.0)))
        out.append((round(loss.item(), 5), round(leaf.grad.item(), 5)))
    return out


def test_the_value_loss_is_clipped_as_the_ratio_is():
    """Moved far towards the return: no more pull. Moved far away from it: the full pull back."""
    told = losses([0.1, 0.5, -0.5], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], 0.2)
    assert told == [(0.405, -0.9), (0.32, 0.0), (1.125, -1.5)]
    assert losses([0.5], [0.0], [1.0], 0.0) == [(0.125, -0.5)]


def test_the_critic_learns_what_the_rewards_are():
    method, _, stream = assembled("method=token_ppo", "method.critic_rate=0.003", learning_rate=0.0, whiten=False)
    batch = stream.next()
    batch["reward"] = torch.ones_like(batch["reward"])
    told = [method.update(batch) for _ in range(8)]
    assert told[0]["value"] == 0 and told[-1]["value"] > 0.5 and told[-1]["value_loss"] < 0.2 * told[0]["value_loss"]


def test_the_critic_s_step_does_not_depend_on_micro_batches():
    gradients = []
    for micro in (0, 3):
        method, _, stream = assembled("method=token_ppo", micro_rows=micro, minibatches=1)
        method.critic.head.data.fill_(0.1)  # else its trunk has no gradient yet
        method.update(stream.next())
        gradients.append({k: p.grad.clone() for k, p in method.critic.named_parameters()})
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, rtol=1e-3, atol=1e-6)
    assert max(g.abs().max() for g in gradients[0].values()) > 1e-3


def test_entropy_is_added_up_to_a_part_of_the_advantage():
    a, h = torch.tensor([[1.0, 1, -1, -1, 0, 1]]), torch.tensor([[0.5, 3, 0.5, 3, 3, 3]])
    rows = SimpleNamespace(advantage=a, mask=torch.tensor([[1.0, 1, 1, 1, 1, 0]]), now={"entropy": h.requires_grad_()}, told={})
    bare(EntropyAdvantage).weigh(rows)
    assert rows.advantage[0].tolist() == pytest.approx([1.2, 1.5, -0.8, -0.5, 0, 1]) and not rows.advantage.requires_grad
