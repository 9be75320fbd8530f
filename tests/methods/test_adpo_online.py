"""ADPO online by hand: the listwise loss and its gradient under every aggregation, anchors, temperatures, passes, reductions to
REINFORCE and DPO, fixed points."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from token_methods import assembled, bare

from methods.reasoning.adpo_online import ADPOOnline
from methods.reasoning.base import GroupPolicy, Rows

DOUBLE = {"rtol": 1e-9, "atol": 1e-11}
MODES = ["seq_mean_token_sum", "seq_mean_token_mean", "token_mean", "token_sum_norm"]
LENGTHS, WIDTH = [4, 2, 3, 1, 4, 2], 5
GROUP = [0, 0, 0, 1, 1, 1]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def made(**values):
    return bare(ADPOOnline, **{"aggregation": "seq_mean_token_sum", "adaptive": False, **values})


def minibatch(advantage=(1.0, 0.2, -1.2, 0.0, 0.9, -0.9), spread=0.5, heat=0.7, lengths=LENGTHS, group=GROUP, **columns) -> Rows:
    mask = (torch.arange(WIDTH) < torch.tensor(lengths)[:, None]).double()
    log_prob = (-torch.rand(len(lengths), WIDTH, dtype=torch.float64) * mask).requires_grad_()
    anchor = (log_prob.detach() + spread * torch.randn(len(lengths), WIDTH, dtype=torch.float64)) * mask
    a = torch.tensor(advantage, dtype=torch.float64)
    return Rows(log_prob=log_prob, mask=mask, group=torch.tensor(group), advantage=a[:, None].expand_as(mask),
                reward=(a > 0).double(), weight=torch.ones_like(mask), tokens=mask.sum(), count=len(mask), told={}, number=0,
                old={"log_prob": anchor, "heat": torch.full((len(mask),), heat, dtype=torch.float64)}, **columns)


@torch.no_grad()
def weighed(method, rows):
    method.weigh(rows)


def objective(method, rows):
    weighed(method, rows)
    return method.aggregate(method.surrogate(rows) * rows.weight, rows)


def likelihood(log_prob, rows, mode):
    sums = (log_prob * rows.mask).sum(1)
    return {"seq_mean_token_sum": sums, "seq_mean_token_mean": sums / rows.mask.sum(1),
            "token_mean": sums / rows.mask.sum() * rows.count, "token_sum_norm": sums / WIDTH}[mode]


def by_autograd(rows, advantage, mode, beta=0.5, ratio_bound=math.inf, score_bound=math.inf):
    """mean over prompts of the cross-entropy, as the paper writes it."""
    d = likelihood(rows.log_prob - rows.old["log_prob"], rows, mode).clamp(-ratio_bound, ratio_bound)
    u, losses = (d / rows.old["heat"]).clamp(-score_bound, score_bound), []
    for g in sorted(set(rows.group.tolist())):
        of = rows.group == g
        losses.append(-((advantage[of] / beta).softmax(0) * u[of].log_softmax(0)).sum())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bounds", [{}, {"ratio_bound": 0.3}, {"score_bound": 0.4}, {"ratio_bound": 0.5, "score_bound": 0.2}])
def test_value_and_gradient_are_the_paper_s(mode, bounds):
    rows, method = minibatch(), made(aggregation=mode, target_temperature=0.5, **bounds)
    expected = by_autograd(rows, rows.advantage[:, 0].clone(), mode, **bounds)
    ours = objective(method, rows)
    torch.testing.assert_close(ours, expected, **DOUBLE)
    torch.testing.assert_close(rows.told["list_loss"], expected.detach(), **DOUBLE)
    gradient, truth = (torch.autograd.grad(v, rows.log_prob, retain_graph=True)[0] for v in (ours, expected))
    torch.testing.assert_close(gradient, truth, **DOUBLE)
    assert truth.abs().sum() > 0


def test_groups_of_unequal_size_count_alike():
    rows, method = minibatch(group=[0, 0, 1, 1, 1, 1]), made()
    expected = by_autograd(rows, rows.advantage[:, 0].clone(), "seq_mean_token_sum")
    ours = objective(method, rows)
    torch.testing.assert_close(ours, expected, **DOUBLE)
    torch.testing.assert_close(*(torch.autograd.grad(v, rows.log_prob)[0] for v in (ours, expected)), **DOUBLE)


def test_pulls_of_a_group_sum_to_nothing():
    rows = minibatch()
    weighed(made(), rows)
    for g in (0, 1):
        assert rows.advantage[rows.group == g][:, 0].sum().item() == pytest.approx(0, abs=1e-12)


def test_turns_of_an_episode_are_one_response():
    """Six rows are four episodes: the same loss as that of four rows with all their tokens."""
    whole = minibatch(advantage=(1.0, -1.0, 0.3, -0.3), lengths=[5, 2, 3, 4], group=[0, 0, 1, 1])
    cut = minibatch(advantage=(1.0, 1.0, -1.0, 0.3, -0.3, -0.3), lengths=[3, 2, 2, 3, 1, 3], group=[0, 0, 0, 1, 1, 1],
                    unit=torch.tensor([7, 7, 2, 5, 9, 9]))
    where = [(0, 0, 0, 3), (1, 0, 3, 2), (2, 1, 0, 2), (3, 2, 0, 3), (4, 3, 0, 1), (5, 3, 1, 3)]  # row, response, first, number
    log_prob, anchor = torch.zeros(6, WIDTH).double(), torch.zeros(6, WIDTH).double()
    for row, response, first, number in where:
        log_prob[row, :number] = whole.log_prob.detach()[response, first:first + number]
        anchor[row, :number] = whole.old["log_prob"][response, first:first + number]
    cut.log_prob, cut.old["log_prob"] = log_prob.requires_grad_(), anchor
    losses = [objective(made(), rows) for rows in (whole, cut)]
    torch.testing.assert_close(*losses, **DOUBLE)
    one, two = (torch.autograd.grad(v, rows.log_prob)[0] for v, rows in zip(losses, (whole, cut)))
    for row, response, first, number in where:
        torch.testing.assert_close(two[row, :number], one[response, first:first + number], **DOUBLE)


# ---- reductions


def test_with_the_sampler_as_anchor_the_first_step_is_reinforce():
    """The sheet's trap: p = 1/P, no anchoring acts. Weights (q - 1/P) / tau on the whole likelihood, mean over prompts."""
    rows = minibatch(spread=0.0)
    q = torch.stack([(rows.advantage[:3, 0] / 0.5).softmax(0), (rows.advantage[3:, 0] / 0.5).softmax(0)]).flatten()
    reinforce = -((q - 1 / 3) / 0.7 * (rows.log_prob * rows.mask).sum(1)).sum() / 2
    gradient, = torch.autograd.grad(objective(made(), rows), rows.log_prob)
    torch.testing.assert_close(gradient, torch.autograd.grad(reinforce, rows.log_prob)[0], **DOUBLE)


def test_off_the_anchor_it_is_not_reinforce():
    rows = minibatch()
    rows.advantage = torch.zeros_like(rows.mask)  # no preference at all: what remains is the pull to the anchor
    weighed(made(), rows)
    ratio = ((rows.log_prob - rows.old["log_prob"]).detach() * rows.mask).sum(1)
    for of in (slice(0, 3), slice(3, 6)):
        assert (rows.advantage[of, 0] * (ratio[of] - ratio[of].mean())).sum() < 0
    still = minibatch(spread=0.0, advantage=[0.0] * 6)
    weighed(made(), still)
    assert still.advantage.abs().max() < 1e-12


def test_a_flat_target_is_grpo_over_beta_tau():
    """One step on the policy that sampled: q - 1/P -> A / (P beta), and the mean over prompts is P times that over rows."""
    rows, beta = minibatch(spread=0.0), 1e4
    a = rows.advantage.clone()
    weighed(made(target_temperature=beta), rows)
    torch.testing.assert_close(rows.advantage * beta * 0.7, a, rtol=1e-3, atol=1e-3)


def test_of_two_responses_with_a_sharp_target_it_is_dpo():
    rows = minibatch(advantage=(0.7, -0.7), lengths=[4, 2], group=[0, 0], heat=0.4)
    rho = ((rows.log_prob - rows.old["log_prob"]) * rows.mask).sum(1)
    dpo = -F.logsigmoid((rho[0] - rho[1]) / 0.4)
    ours = objective(made(target_temperature=1e-3), rows)
    torch.testing.assert_close(ours, dpo, **DOUBLE)
    torch.testing.assert_close(*(torch.autograd.grad(v, rows.log_prob)[0] for v in (ours, dpo)), **DOUBLE)


def test_a_fixed_anchor_s_optimum_is_it_times_q_to_the_tau_and_tau_goes_further_from_it():
    """Five responses of one token, all there are. With the sampler's anchor the first step is the shorter, the larger tau."""
    anchor = torch.randn(5, dtype=torch.float64).log_softmax(0)
    advantage, distances, steps = torch.tensor([1.0, 0.5, 0.0, -0.5, -1.0]).double(), [], []
    for tau in (0.25, 1.0, 4.0):
        z = anchor.clone().requires_grad_()
        optimiser, method = torch.optim.SGD([z], lr=tau ** 2, momentum=0.9), made(target_temperature=1.0)
        for step in range(600):
            rows = minibatch(advantage=advantage.tolist(), lengths=[1] * 5, group=[0] * 5, heat=tau)
            log_p = z.log_softmax(0)
            rows.log_prob = F.pad(log_p[:, None], (0, WIDTH - 1))
            rows.old["log_prob"] = F.pad(anchor[:, None], (0, WIDTH - 1))
            optimiser.zero_grad()
            objective(method, rows).backward()
            if not step:
                steps.append(z.grad.norm().item())
            optimiser.step()
        p = z.detach().softmax(0)
        expected = (anchor + tau * advantage.log_softmax(0)).softmax(0)
        assert (p - expected).abs().sum() / 2 < 1e-3
        distances.append((p * (p.log() - anchor)).sum().item())
    assert distances == sorted(distances) and steps == sorted(steps, reverse=True) and steps[0] > 10 * steps[2] > 0


# ---- temperatures


def hot(**values):
    method = made(adaptive=True, tau=1.0, **values)
    method.policy = SimpleNamespace(head=torch.zeros(16, 3))
    return method


def test_the_temperature_of_a_prompt():
    """Entropies of half and a quarter of log V, mean rewards 1 and 0 of the batch, one in the middle."""
    entropy = math.log(16) * torch.tensor([[0.5, 0.5], [0.5, 9], [0.25, 0.25], [0.25, 0.25], [1.5, 1.5], [1.5, 1.5]])
    batch = {"group": torch.tensor([0, 0, 1, 1, 2, 2]), "reward": torch.tensor([1.0, 1, 0, 0, 1, 0]),
             "mask": torch.tensor([[1.0, 1], [1, 0], [1, 1], [1, 1], [1, 1], [1, 1]])}
    expected = [1 + 0.5 + 0, 1 + 0.25 + 0.5 * 0.75 * 1, 1 + 1 + 0]
    assert hot().heat(batch, entropy)[::2].tolist() == pytest.approx(expected, rel=1e-5)
    assert hot(tau_low=1.55, tau_high=1.8).heat(batch, entropy)[::2].tolist() == pytest.approx([1.55, 1.625, 1.8], rel=1e-5)
    batch["reward"] = torch.ones(6)
    assert hot(b=1.0).heat(batch, entropy)[:2].tolist() == pytest.approx([1 + 0.5 + 0.5 * 0.5] * 2, rel=1e-5)


def test_prompts_without_any_reward_teach_nothing_if_asked():
    rows = minibatch(advantage=(1.0, 0.2, -1.2, 0.0, 0.0, 0.0))
    weighed(made(skip_failed=True), rows)
    assert rows.advantage[:3].abs().min() > 0 and rows.advantage[3:].eq(0).all()
    rows = minibatch(advantage=(1.0, 0.2, -1.2, 0.0, 0.0, 0.0))
    weighed(made(), rows)
    assert rows.advantage[3:, 0].abs().max() > 0


# ---- passes and anchors, on a policy


def settings(method, **values):
    method.config = dataclasses.replace(method.config, **values)
    return method


def test_every_pass_sees_every_row_once_and_minibatches_change():
    method, _, stream = assembled("method=adpo_online", "method.prompts=6", "method.minibatches=3", "method.passes=2")
    batch, seen, rates = stream.next(), [], []
    inner, schedule = method.step, method.schedule
    method.step = lambda rows, batch: (seen.append((rows.number, rows.problem.unique().tolist())), inner(rows, batch))
    method.schedule = lambda step, total: (rates.append((step, total)), schedule(step, total))
    method.updates, method.planned = 3, 10
    method.update(batch)
    assert [n for n, _ in seen] == list(range(6)) and rates == [(18 + i, 60) for i in range(6)]
    for part in (seen[:3], seen[3:]):
        assert sorted(p for _, problems in part for p in problems) == sorted(batch["problem"].unique().tolist())
    assert [p for _, p in seen[:3]] != [p for _, p in seen[3:]]
    assert GroupPolicy.passes(method) == 1


def test_one_pass_is_reinforce_on_a_policy_and_the_second_is_anchored():
    """The gradient of a single step against REINFORCE's by autograd; a second pass starts from p unlike 1/P."""
    gradients = []
    for listwise in (True, False):
        method, _, stream = assembled("method=adpo_online", "method.passes=1", "method.minibatches=1", "method.adaptive=false",
                                      "method.gradient_norm=0")
        batch = stream.next()
        batch["reward"] = (torch.arange(len(batch["reward"])) % 3 == 0).float()
        if listwise:
            assert method.update(batch)["score"] == 0
        else:
            a = method.advantage(batch, {})
            q = (a.view(4, 4) / 0.5).softmax(1).flatten()
            l = method.score(batch)["log_prob"].sum(1)
            (-((q - 1 / 4) / 0.8 * l).sum() / 4).backward()
        gradients.append({k: p.grad.clone() for k, p in method.policy.named_parameters()})
    for key, value in gradients[1].items():
        torch.testing.assert_close(gradients[0][key], value, rtol=1e-3, atol=1e-6)
    assert max(g.abs().max() for g in gradients[1].values()) > 1e-3
    assert settings(method, passes=2).update(batch)["score"] > 0


def test_what_the_anchors_are():
    """At the start all three are the policy; later the sampler's still is, the start's and the average are not."""
    scores = {}
    for anchor in ("sampler", "start", "ema"):
        method, _, stream = assembled("method=adpo_online", f"method.anchor_policy={anchor}", "method.passes=1",
                                      "method.minibatches=1", "method.learning_rate=0.001")
        scores[anchor] = []
        for _ in range(3):
            batch = stream.next()
            scores[anchor].append(method.update(batch)["score"].item())
            method.updates += 1
        if anchor == "ema":
            first = assembled("method=adpo_online", "method.anchor_policy=ema")[0].policy.lm_head.weight
            assert 0 < (method.average.lm_head.weight - first).norm() < (method.policy.lm_head.weight - first).norm()
            assert method.export()[0].keys() == method.policy.state_dict().keys()
    assert max(s[0] for s in scores.values()) < 1e-4 and max(scores["sampler"]) == 0
    assert 1e-3 < scores["ema"][2] < scores["start"][2]


def test_micro_batches_give_the_whole_minibatch_s_gradient():
    gradients = []
    for micro in (0, 3):
        method, _, stream = assembled("method=adpo_online", f"method.micro_rows={micro}", "method.anchor_policy=ema",
                                      "method.gradient_norm=0")
        batch = stream.next()
        batch["reward"] = (torch.arange(len(batch["reward"])) % 3 == 0).float()
        method.update(batch)
        gradients.append({k: p.grad.clone() for k, p in method.policy.named_parameters()})
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, rtol=2e-2, atol=1e-4)
