"""The preference family: identities of ADPO and its special cases, checked against closed forms,
enumeration, plain-python loops and autograd. Everything in float64 unless float32 is the point."""

from __future__ import annotations

import copy
import itertools
import math
import statistics
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from methods.preference import forms, targets
from methods.preference.adpo import ADPO
from methods.preference.kd import KD
from runner.errors import UserError
from runner.interface import Spec

S, A = 3, 2  # observation and action sizes
DOUBLE = {"rtol": 1e-10, "atol": 1e-12}
ROOT = Path(__file__).resolve().parents[2]


def close(actual, expected, rtol=1e-10, atol=1e-12):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=rtol, atol=atol)


def build(cls=ADPO, seed=0, dtype=torch.float64, **values):
    """A method as the loop makes it, small and in float64."""
    torch.manual_seed(seed)
    values = {"hidden": (5,), "clip": 0.0, "anchor": "self", **values}
    if cls is KD:
        values.pop("anchor")
    method = cls(cls.Config(**values))
    method.setup(Spec(observation_size=S, action_size=A))
    method.to(dtype)
    method.make_optimizers()
    return method


@torch.no_grad()
def perturb(module, scale=0.3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p += scale * torch.randn(p.shape, generator=generator, dtype=p.dtype)


def make_batch(rows=6, size=4, seed=2, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype)  # noqa: E731
    return {"context": randn(rows, S), "candidates": randn(rows, size, A), "reward": randn(rows, size),
            "teacher_log_prob": 2 * randn(rows, size), "behaviour_log_prob": 2 * randn(rows, size)}


def normal_log_prob(policy, batch):
    """log pi(y | x) of a GaussianPolicy, by torch.distributions."""
    mean = policy.net((batch["context"] - policy.offset) / policy.scale)
    std = policy.log_std.clamp(*policy.bounds).exp()
    return torch.distributions.Normal(mean.unsqueeze(1), std).log_prob(batch["candidates"]).sum(-1)


def gradients(loss, module):
    return torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)


def step(method, batch):
    metrics = method.update(batch)
    method.updates += 1
    return metrics


def moved(method, batch):
    """One update; its metrics, and the gradients that the optimiser saw."""
    metrics = step(method, batch)
    return metrics, [p.grad.clone() for p in method.policy.parameters()]


def rankings(size):
    """All (ranking, reward that induces it)."""
    for order in itertools.permutations(range(size)):
        reward = torch.zeros(size, dtype=torch.float64)
        for place, item in enumerate(order):
            reward[item] = size - place
        yield order, reward


def pl_probability(logits, order):
    """P(order) by drawing without replacement: the definition of Plackett-Luce."""
    weights, p = [math.exp(x) for x in logits], 1.0
    for k, item in enumerate(order[:-1]):
        p *= weights[item] / sum(weights[j] for j in order[k:])
    return p


# -- ADPO and DPO ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("beta", [0.1, 1.0, 2.5])
def test_pairwise_hard_with_self_anchor_is_dpo(beta):
    m, batch = build(form="pairwise_hard", tau=1 / beta), make_batch(rows=16, size=2)
    m.prepare({"context": 3 * batch["context"] + 1})
    reference = copy.deepcopy(m.policy)  # the student at its start, normalisation included
    perturb(m.policy)

    rho = normal_log_prob(m.policy, batch) - normal_log_prob(reference, batch).detach()
    best, worst = batch["reward"].argmax(1, True), batch["reward"].argmin(1, True)
    dpo = -F.logsigmoid(beta * (rho.gather(1, best) - rho.gather(1, worst))).mean()
    expected = gradients(dpo, m.policy)
    assert rho.abs().min() > 1e-3  # away from the anchor

    metrics, grads = moved(m, batch)
    close(metrics["loss"], dpo.detach(), **DOUBLE)
    for actual, wanted in zip(grads, expected, strict=True):
        close(actual, wanted, **DOUBLE)
    assert max(g.abs().max() for g in grads) > 1e-4


@pytest.mark.parametrize("anchor", ["self", "uniform", "teacher"])
def test_listwise_with_two_candidates_and_one_hot_target_is_pairwise_hard(anchor):
    batch, seen = make_batch(rows=16, size=2), []
    for values in ({"form": "listwise", "target": "hard"}, {"form": "pairwise_hard"}, {"form": "plackett_luce"}):
        m = build(tau=0.7, anchor=anchor, **values)
        perturb(m.policy)
        seen.append(moved(m, batch))
    for metrics, grads in seen[1:]:
        close(metrics["loss"], seen[0][0]["loss"], **DOUBLE)
        for actual, wanted in zip(grads, seen[0][1], strict=True):
            close(actual, wanted, **DOUBLE)


@pytest.mark.parametrize("e", [0.0, 0.1, 0.35])
def test_listwise_with_target_one_minus_e_is_conservative_dpo(e):
    beta, batch = 0.4, make_batch(rows=16, size=2)
    m = build(tau=1 / beta)
    reference = copy.deepcopy(m.policy)
    perturb(m.policy)
    rho = normal_log_prob(m.policy, batch) - normal_log_prob(reference, batch).detach()
    margin = beta * (rho[:, 0] - rho[:, 1])
    cdpo = (-(1 - e) * F.logsigmoid(margin) - e * F.logsigmoid(-margin)).mean()

    log_prob = m.policy.log_prob(batch["context"], batch["candidates"])
    score = m.score(log_prob, m.anchor_log_prob(batch), batch)
    loss = m.loss(score, torch.tensor([1 - e, e], dtype=torch.float64).expand(16, 2), batch)
    close(loss, cdpo, **DOUBLE)
    for actual, wanted in zip(gradients(loss, m.policy), gradients(cdpo, m.policy), strict=True):
        close(actual, wanted, **DOUBLE)


def test_pairwise_soft_is_the_bradley_terry_cross_entropy():
    m, batch = build(form="pairwise_soft", target_temperature=0.8, anchor="uniform"), make_batch(rows=16, size=2)
    perturb(m.policy)
    log_prob = normal_log_prob(m.policy, batch)
    p = 1 / (1 + torch.exp((batch["reward"][:, 1] - batch["reward"][:, 0]) / 0.8))
    q = 1 / (1 + torch.exp(log_prob[:, 1] - log_prob[:, 0]))
    expected = -(p * q.log() + (1 - p) * (1 - q).log()).mean()
    wanted = gradients(expected, m.policy)
    metrics, grads = moved(m, batch)
    close(metrics["loss"], expected.detach(), **DOUBLE)
    for actual, w in zip(grads, wanted, strict=True):
        close(actual, w, **DOUBLE)


@pytest.mark.parametrize("form", ["pairwise_hard", "pairwise_soft"])
def test_pairwise_forms_draw_every_pair_alike(form):
    size, rows = 4, 40_000
    u = torch.tensor([0.3, -1.0, 1.7, 0.2], dtype=torch.float64)
    reward = torch.tensor([1.0, 0.2, -0.4, 2.0], dtype=torch.float64)
    m = build(form=form, target_temperature=0.9)
    losses = []
    for i, j in itertools.combinations(range(size), 2):
        gap, d = (reward[i] - reward[j]).item(), (u[i] - u[j]).item()
        t = float(gap > 0) if form == "pairwise_hard" else 1 / (1 + math.exp(-gap / 0.9))
        losses.append(t * math.log1p(math.exp(-d)) + (1 - t) * math.log1p(math.exp(d)))
    torch.manual_seed(0)
    actual = m.loss(u.expand(rows, size), None, {"reward": reward.expand(rows, size)}).item()
    assert abs(actual - statistics.mean(losses)) < 5 * statistics.pstdev(losses) / rows ** 0.5


def test_random_pairs_are_distinct_and_uniform():
    torch.manual_seed(0)
    i, j = forms.random_pairs(torch.zeros(60_000, 5))
    assert i.shape == j.shape == (60_000, 1)
    counts = Counter(zip(i.flatten().tolist(), j.flatten().tolist(), strict=True))
    assert set(counts) == set(itertools.permutations(range(5), 2))
    share = 1 / 20
    assert all(abs(n / 60_000 - share) < 5 * (share * (1 - share) / 60_000) ** 0.5 for n in counts.values())


def test_sft_on_a_list_is_a_special_case():
    """Uniform anchor, one-hot target, tau 1: -log of the student's share of the best candidate."""
    m, batch = build(KD, target="hard", tau=1.0), make_batch()
    log_prob = normal_log_prob(m.policy, batch)
    share = log_prob.exp() / log_prob.exp().sum(-1, keepdim=True)
    expected = -share[range(6), batch["reward"].argmax(-1)].log().mean()
    close(step(m, batch)["loss"], expected.detach(), **DOUBLE)


# -- fixed points ------------------------------------------------------------------------------------------------------
def minimise(m, batch, anchor, target):
    """Free logits (B, P) at the minimum of the class's own score and loss."""
    log_prob = torch.zeros_like(batch["reward"], requires_grad=True)
    optimizer = torch.optim.LBFGS([log_prob], lr=1, max_iter=3000, tolerance_grad=1e-13, tolerance_change=1e-16,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = m.loss(m.score(log_prob, anchor, batch), target, batch)
        loss.backward()
        return loss

    optimizer.step(closure)
    return log_prob.detach().softmax(-1)


@pytest.mark.parametrize("tau", [0.25, 1.0, 4.0])
def test_a_uniform_target_returns_the_anchor(tau):
    batch, anchor = make_batch(rows=2, size=5), 1.5 * make_batch(rows=2, size=5, seed=9)["reward"]
    batch["reward"] = torch.full((2, 5), 0.7, dtype=torch.float64)
    m = build(tau=tau)
    close(minimise(m, batch, anchor, m.target(batch, anchor)), anchor.softmax(-1), rtol=0, atol=1e-6)


def test_the_fixed_point_is_anchor_times_target_to_the_tau():
    batch, anchor = make_batch(rows=3, size=5), make_batch(rows=3, size=5, seed=9)["reward"]
    divergence = []
    for tau in (0.25, 1.0, 4.0):
        m = build(tau=tau, target_temperature=1.0)
        q = m.target(batch, anchor)
        found = minimise(m, batch, anchor, q)
        wanted = anchor.exp() * q ** tau
        wanted = wanted / wanted.sum(-1, keepdim=True)
        assert 0.5 * (found - wanted).abs().sum(-1).max() < 1e-6  # total variation
        divergence.append((found * (found.log() - anchor.log_softmax(-1))).sum(-1))
    assert (divergence[0] < divergence[1]).all() and (divergence[1] < divergence[2]).all()


@pytest.mark.parametrize("tau", [0.5, 2.0])
@pytest.mark.parametrize("anchored", [True, False])
def test_teacher_ratio_has_its_optimum_at_the_teacher(anchored, tau):
    batch = make_batch(rows=3, size=5)
    batch["teacher_log_prob"] *= 0.5
    anchor = make_batch(rows=3, size=5, seed=9)["reward"] if anchored else None
    m = build(tau=tau, teacher_ratio=True)
    found = minimise(m, batch, anchor, m.target(batch, anchor))
    close(found, batch["teacher_log_prob"].softmax(-1), rtol=0, atol=1e-6)


def test_teacher_ratio_keeps_its_optimum_under_an_adaptive_temperature():
    """Either the combination is refused, or the student that equals the teacher takes no gradient."""
    batch = make_batch(rows=3, size=5)
    anchor = make_batch(rows=3, size=5, seed=9)["reward"]
    try:
        m = build(teacher_ratio=True, adaptive=True)
    except UserError:
        return
    log_prob = batch["teacher_log_prob"].clone().requires_grad_()
    loss = m.loss(m.score(log_prob, anchor, batch), m.target(batch, anchor), batch)
    close(torch.autograd.grad(loss, log_prob)[0], torch.zeros_like(log_prob), rtol=0, atol=1e-10)


# -- derivatives and invariances ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
def test_gradient_and_hessian_in_the_log_probabilities(tau):
    m, batch = build(tau=tau), make_batch(rows=1, size=4)
    anchor = batch["behaviour_log_prob"]
    q = m.target(batch, anchor)
    log_prob = batch["teacher_log_prob"].clone().requires_grad_()
    loss = lambda x: m.loss(m.score(x, anchor, batch), q, batch)  # noqa: E731

    p = torch.exp((log_prob.detach() - anchor) / tau)
    p = p / p.sum(-1, keepdim=True)
    close(torch.autograd.grad(loss(log_prob), log_prob)[0], (p - q) / tau)
    hessian = torch.autograd.functional.hessian(loss, log_prob).reshape(4, 4)
    close(hessian, (torch.diag(p[0]) - torch.outer(p[0], p[0])) / tau ** 2)


def test_the_loss_is_the_mean_over_contexts():
    m, batch = build(), make_batch(rows=5)
    anchor, log_prob = batch["behaviour_log_prob"], batch["teacher_log_prob"]
    q = m.target(batch, anchor)
    rows = [m.loss(m.score(log_prob[i:i + 1], anchor[i:i + 1], batch), q[i:i + 1], batch).item() for i in range(5)]
    assert m.loss(m.score(log_prob, anchor, batch), q, batch).item() == pytest.approx(statistics.mean(rows), rel=1e-12)


@pytest.mark.parametrize("values", [
    {"form": "listwise"}, {"form": "listwise", "target": "hard"}, {"form": "listwise", "teacher_ratio": True},
    {"form": "listwise", "adaptive": True}, {"form": "pairwise_hard"}, {"form": "pairwise_soft"},
    {"form": "plackett_luce"}, {"form": "plackett_luce", "smoothing": 0.1, "poly": 1.0, "top_k": 2},
    {"form": "plackett_luce_soft"},
], ids=lambda v: "-".join(map(str, v.values())))
def test_constants_in_log_prob_or_anchor_cancel(values):
    m, batch = build(tau=0.6, **values), make_batch(rows=6, size=4)
    log_prob, anchor = make_batch(seed=5)["reward"], make_batch(seed=6)["reward"]
    shift = torch.linspace(-40, 40, 6, dtype=torch.float64).unsqueeze(1)

    def value(log_prob, anchor):
        log_prob = log_prob.clone().requires_grad_()
        torch.manual_seed(3)
        loss = m.loss(m.score(log_prob, anchor, batch), m.target(batch, anchor), batch)
        return loss, torch.autograd.grad(loss, log_prob)[0]

    plain = value(log_prob, anchor)
    assert plain[1].abs().max() > 1e-3
    for shifted in (value(log_prob + shift, anchor), value(log_prob, anchor - 2 * shift)):
        close(shifted[0], plain[0], rtol=1e-11)
        close(shifted[1], plain[1], rtol=1e-9)


# -- Plackett-Luce -----------------------------------------------------------------------------------------------------
def test_plackett_luce_of_two_is_the_pair_loss():
    u = make_batch(rows=20, size=2)["teacher_log_prob"].requires_grad_()
    reward = make_batch(rows=20, size=2, seed=8)["reward"]
    d = u.gather(1, reward.argmax(1, True)) - u.gather(1, reward.argmin(1, True))
    pair = forms.pairwise(d, torch.ones_like(d)).squeeze(1)
    ranked = forms.plackett_luce(u, reward)
    close(ranked, pair)
    close(torch.autograd.grad(ranked.sum(), u)[0], torch.autograd.grad(pair.sum(), u)[0])
    close(pair, torch.log1p(torch.exp(-d)).squeeze(1))  # and the pair loss is the logistic loss


def test_plackett_luce_is_a_distribution_over_rankings():
    u = torch.tensor([0.4, -1.3, 2.0, 0.1], dtype=torch.float64)
    total = 0.0
    for order, reward in rankings(4):
        p = torch.exp(-forms.plackett_luce(u[None], reward[None])).item()
        assert p == pytest.approx(pl_probability(u.tolist(), order), rel=1e-12)
        total += p
    assert total == pytest.approx(1, abs=1e-12)


def test_plackett_luce_top_one_is_cross_entropy_to_the_best():
    u, reward = make_batch(size=6)["teacher_log_prob"], make_batch(size=6, seed=8)["reward"]
    close(forms.plackett_luce(u, reward, top_k=1), F.cross_entropy(u, reward.argmax(-1), reduction="none"))


def plackett_luce_by_loop(u, reward, top_k, smoothing, poly):
    order = sorted(range(len(u)), key=lambda i: -reward[i])
    total = 0.0
    for k in range(len(u) - 1):
        if top_k and k >= top_k:
            break
        rest = [u[i] for i in order[k:]]
        log_sum = math.log(sum(map(math.exp, rest)))
        at_k = (1 - smoothing) * (log_sum - rest[0]) + smoothing * (log_sum - statistics.mean(rest))
        total += at_k + poly * (1 - math.exp(-at_k))
    return total


@pytest.mark.parametrize("top_k, smoothing, poly", [
    (0, 0.0, 0.0), (3, 0.0, 0.0), (9, 0.0, 0.0), (0, 0.1, 0.0), (0, 0.0, 1.0), (0, 1.0, 0.0), (3, 0.1, 1.0),
    (1, 0.3, 0.5)])
def test_plackett_luce_options_against_a_loop(top_k, smoothing, poly):
    batch = make_batch(rows=5, size=6)
    u, reward = batch["teacher_log_prob"], batch["reward"]
    wanted = [plackett_luce_by_loop(a, b, top_k, smoothing, poly)
              for a, b in zip(u.tolist(), reward.tolist(), strict=True)]
    close(forms.plackett_luce(u, reward, top_k, smoothing, poly), torch.tensor(wanted, dtype=torch.float64))
    m = build(form="plackett_luce", top_k=top_k, smoothing=smoothing, poly=poly)  # and the knobs reach the form
    assert m.loss(u, None, batch).item() == pytest.approx(statistics.mean(wanted), rel=1e-12)


def test_plackett_luce_gradient():
    reward = make_batch(rows=3, size=5, seed=8)["reward"]
    u = make_batch(rows=3, size=5)["teacher_log_prob"].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: forms.plackett_luce(x, reward), (u,))
    assert torch.autograd.gradcheck(lambda x: forms.plackett_luce(x, reward, 3, 0.1, 1.0), (u,))


def test_plackett_luce_gradient_survives_scores_far_apart():
    """Closed form: sum over k of softmax_{j >= k}(u) - e_(k). A running maximum in the graph gives another one."""
    u = torch.tensor([[500.0, -500.0, 499.0, 0.0]], dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([[1.0, 4.0, 3.0, 2.0]], dtype=torch.float64)  # ranking 1, 2, 3, 0
    grad, = torch.autograd.grad(forms.plackett_luce(u, reward).sum(), u)
    a = 1 / (1 + math.exp(-1))  # of 500 against 499
    wanted = [a + a + 1, -1, (1 - a) + (1 - a) - 1, -1]
    close(grad, torch.tensor([wanted], dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gumbel_rankings_have_plackett_luce_frequencies(dtype):
    n, utility = 60_000, [0.8, -0.5, 0.1]
    torch.manual_seed(0)
    drawn = forms.gumbel_ranking(torch.tensor(utility, dtype=dtype).expand(n, 3))
    assert drawn.isfinite().all()
    counts = Counter(map(tuple, drawn.argsort(-1, descending=True).tolist()))
    for order in itertools.permutations(range(3)):
        p = pl_probability(utility, order)
        assert abs(counts[order] / n - p) < 5 * (p * (1 - p) / n) ** 0.5, (order, counts[order] / n, p)


def test_plackett_luce_soft_averages_over_the_rewards_rankings():
    rows, number, temperature = 8_000, 3, 0.7
    u = torch.tensor([0.3, -1.0, 1.2], dtype=torch.float64)
    reward = torch.tensor([0.5, 0.9, -0.2], dtype=torch.float64)
    p, losses = [], []
    for order, _ in rankings(3):
        p.append(pl_probability((reward / temperature).tolist(), order))
        losses.append(-math.log(pl_probability(u.tolist(), order)))
    mean = sum(a * b for a, b in zip(p, losses, strict=True))
    deviation = sum(a * (b - mean) ** 2 for a, b in zip(p, losses, strict=True)) ** 0.5
    m = build(form="plackett_luce_soft", rankings=number, target_temperature=temperature)
    torch.manual_seed(0)
    actual = m.loss(u.expand(rows, 3), None, {"reward": reward.expand(rows, 3)}).item()
    assert abs(actual - mean) < 5 * deviation / (rows * number) ** 0.5
    hard = -math.log(pl_probability(u.tolist(), (1, 0, 2)))
    assert abs(actual - hard) > 0.05  # and is not the hard form


# -- targets -----------------------------------------------------------------------------------------------------------
def phi(z):
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


def cdf_by_loop(r, h):
    return [sum(phi((a - b) / h) for b in r) / len(r) for a in r]


def zscore_by_loop(r):
    mean, std = statistics.mean(r), statistics.stdev(r)
    return [0.0 if std < 1e-6 else (x - mean) / (std + 1e-8) for x in r]


def quantile(r, share):
    """Linear interpolation between order statistics."""
    r, at = sorted(r), share * (len(r) - 1)
    low = math.floor(at)
    return r[low] + (at - low) * (r[min(low + 1, len(r) - 1)] - r[low])


def rank_kde_by_loop(r):
    iqr = quantile(r, 0.75) - quantile(r, 0.25)
    h = 1.06 * min(statistics.stdev(r), iqr / 1.34) * len(r) ** -0.2 + 1e-6
    clipped = [min(max(f, 1e-3), 1 - 1e-3) for f in cdf_by_loop(r, h)]
    return [math.log(f / (1 - f)) for f in clipped]


def smoothed_rank_by_loop(r):
    median = statistics.median(r)
    mad = statistics.median(abs(x - median) for x in r)
    return zscore_by_loop(cdf_by_loop(r, 1.06 * 1.4826 * mad * len(r) ** -0.2 + 1e-6))


BY_LOOP = {"raw": list, "zscore": zscore_by_loop, "rank_kde": rank_kde_by_loop, "smoothed_rank": smoothed_rank_by_loop}


def softmax_by_loop(x, temperature):
    weights = [math.exp((v - max(x)) / temperature) for v in x]
    return [w / sum(weights) for w in weights]


@pytest.mark.parametrize("kind, size", [*itertools.product(BY_LOOP, [3, 7]), *itertools.product(
    ["raw", "zscore", "rank_kde"], [4, 8, 16])])  # smoothed_rank of even lists: the next test
def test_targets_against_a_loop(kind, size):
    reward = make_batch(rows=4, size=size)["reward"]
    reward[1] = reward[1] * 1e3 + 20
    reward[2, 0] = 1e5
    reward[3, :2] = reward[3, 2]  # ties
    temperature = {"raw": 50.0}.get(kind, 0.8)
    wanted = [softmax_by_loop(BY_LOOP[kind](row), temperature) for row in reward.tolist()]
    # quartiles are taken in float32
    close(targets.distribution(reward, kind, temperature), torch.tensor(wanted, dtype=torch.float64), rtol=1e-6)
    m = build(target=kind, target_temperature=temperature)  # and the knobs reach the targets
    close(m.target({"reward": reward}, None), torch.tensor(wanted, dtype=torch.float64), rtol=1e-6)


def test_rank_kde_clips_the_distribution_function():
    """A candidate's own kernel makes F at least 0.5 / P: the clip at 1e-3 acts on lists of more than 500."""
    reward = make_batch(rows=1, size=600)["reward"]
    reward[0, 0], reward[0, 1] = -50, 50
    z = targets.rank_kde(reward)
    close(z[0, :2], torch.tensor([math.log(1e-3 / 0.999), math.log(0.999 / 1e-3)], dtype=torch.float64))
    close(z[0], torch.tensor(rank_kde_by_loop(reward[0].tolist()), dtype=torch.float64), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [2, 4, 16])
def test_smoothed_rank_uses_the_median_absolute_deviation_of_even_lists_too(size):
    """The median of an even number of values is the mean of the middle two; torch.median returns the lower one."""
    reward = make_batch(rows=4, size=size)["reward"]
    wanted = [softmax_by_loop(smoothed_rank_by_loop(row), 0.8) for row in reward.tolist()]
    close(targets.distribution(reward, "smoothed_rank", 0.8), torch.tensor(wanted, dtype=torch.float64), rtol=1e-6)


@pytest.mark.parametrize("kind", ["zscore", "rank_kde", "smoothed_rank"])
@pytest.mark.parametrize("value", [0.0, 0.1, -1234.567, 1e6 / 3, 1e-9])
@pytest.mark.parametrize("size", [2, 7, 16])
def test_lists_without_a_preference_have_a_uniform_target(kind, value, size):
    reward = torch.full((2, size), value)  # float32: where rounding noise would be blown up
    q = targets.distribution(reward, kind, 0.5)
    assert torch.equal(q, torch.full_like(q, 1 / size)) or (q - 1 / size).abs().max() < 1e-7
    if kind != "rank_kde":
        assert torch.equal({"zscore": targets.zscore, "smoothed_rank": targets.smoothed_rank}[kind](reward),
                           torch.zeros_like(reward))


def test_zscore_ignores_rounding_noise_but_nothing_larger():
    noise = 1 + 1e-7 * torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(targets.zscore(noise), torch.zeros_like(noise))
    z = targets.zscore(1e-4 * make_batch(size=9)["reward"])
    close(z.mean(-1), torch.zeros(6), atol=1e-12)
    close(z.std(-1), torch.ones(6), rtol=1e-3)


def test_hard_target_is_one_at_the_best():
    q = targets.distribution(torch.tensor([[0.1, 5.0, 4.9], [-1.0, -3.0, -2.0]], dtype=torch.float64), "hard", 0.5)
    close(q, torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["raw", "zscore", "rank_kde", "smoothed_rank"])
@pytest.mark.parametrize("size", [5, 16])
def test_targets_are_monotone_in_the_reward(kind, size):
    reward = make_batch(rows=20, size=size)["reward"]
    q = targets.distribution(reward, kind, 0.7)
    close(q.sum(-1), torch.ones(20), atol=1e-12)
    assert (q.gather(1, reward.argsort(-1)).diff(dim=-1) > 0).all()


@pytest.mark.parametrize("kind", ["rank_kde", "smoothed_rank"])
def test_robust_targets_bound_the_influence_of_an_outlier(kind):
    near = torch.tensor([[0.0, 3.0, 1.2, 4.0, 2.1, 0.4, 3.3, 5.0]], dtype=torch.float64)
    far = near.clone()
    far[0, -1] = 5e6
    moved_by = lambda kind, t: (targets.distribution(far, kind, t)  # noqa: E731
                                - targets.distribution(near, kind, t)).abs().max().item()
    assert moved_by(kind, 2.0) < 0.08
    assert moved_by("raw", 2.0) > 0.6
    assert moved_by("zscore", 2.0) > 0.12
    farther = far.clone()
    farther[0, -1] = 5e9  # beyond a point the size counts for nothing at all
    close(targets.distribution(farther, kind, 1.0), targets.distribution(far, kind, 1.0), rtol=1e-6)
    spread = targets.distribution(far, kind, 1.0)[0, :-1]  # the others stay apart; z-scores let them collapse
    assert spread.max() / spread.min() > 2
    collapsed = targets.distribution(far, "zscore", 1.0)[0, :-1]
    assert collapsed.max() / collapsed.min() < 1.001


# -- anchors -----------------------------------------------------------------------------------------------------------
def parameters(module):
    return [p.detach().clone() for p in module.parameters()]


def test_ema_anchor_follows_its_formula():
    decay = 0.9
    m = build(anchor="ema", ema_decay=decay, learning_rate=0.05)
    wanted = parameters(m.policy)
    for k in range(3):
        step(m, make_batch(seed=k))
        wanted = [decay * a + (1 - decay) * p for a, p in zip(wanted, parameters(m.policy), strict=True)]
        for actual, w in zip(m.anchor.parameters(), wanted, strict=True):
            close(actual.detach(), w, rtol=1e-14, atol=1e-15)
    assert any((a - p).abs().max() > 1e-3 for a, p in zip(wanted, parameters(m.policy), strict=True))


def test_copy_every_n_copies_at_multiples_only():
    m = build(anchor="copy_every_n", copy_every=3, learning_rate=0.05)
    wanted = parameters(m.policy)
    for k in range(1, 8):
        step(m, make_batch(seed=k))
        if k % 3 == 0:
            wanted = parameters(m.policy)
        assert all(torch.equal(a, w) for a, w in zip(parameters(m.anchor), wanted, strict=True)), k
    assert not torch.equal(wanted[0], parameters(m.policy)[0])


def test_self_anchor_never_moves():
    m = build(anchor="self", learning_rate=0.05)
    wanted = parameters(m.policy)
    for k in range(5):
        step(m, make_batch(seed=k))
    assert all(torch.equal(a, w) for a, w in zip(parameters(m.anchor), wanted, strict=True))
    assert not any(torch.equal(p, w) for p, w in zip(parameters(m.policy), wanted, strict=True))


@pytest.mark.parametrize("anchor", ["self", "ema", "copy_every_n"])
def test_own_anchors_start_at_the_student_and_are_saved_but_not_trained(anchor):
    m, batch = build(anchor=anchor), make_batch()
    m.prepare({"context": 4 * batch["context"] - 2})
    log_prob = m.policy.log_prob(batch["context"], batch["candidates"])
    assert torch.equal(m.anchor_log_prob(batch), log_prob)
    assert not any(p.requires_grad for p in m.anchor.parameters())
    trained = {id(p) for group in m.optimizers["policy"].param_groups for p in group["params"]}
    assert trained == {id(p) for p in m.policy.parameters()}
    assert {k for k in m.state_dict() if k.startswith("anchor.")} == {f"anchor.{k}" for k in m.policy.state_dict()}


@pytest.mark.parametrize("anchor, key", [("teacher", "teacher_log_prob"), ("on_policy", "behaviour_log_prob")])
def test_anchors_that_come_with_the_batch(anchor, key):
    m, batch = build(anchor=anchor, tau=0.8, target="zscore", target_temperature=0.5), make_batch()
    assert m.records_behaviour == (anchor == "on_policy")
    u = (normal_log_prob(m.policy, batch).detach() - batch[key]) / 0.8
    z = batch["reward"] - batch["reward"].mean(-1, keepdim=True)
    q = torch.exp(z / (batch["reward"].std(-1, keepdim=True) + 1e-8) / 0.5)
    q = q / q.sum(-1, keepdim=True)
    expected = -(q * torch.log(u.exp() / u.exp().sum(-1, keepdim=True))).sum(-1).mean()
    close(step(m, batch)["loss"], expected)


def test_on_policy_with_one_pass_is_reinforce():
    """u = 0 at the first pass: the gradient is that of sum_i (1/P - q_i)/tau log pi(y_i), whatever the policy."""
    tau, batch = 0.6, make_batch(rows=5, size=4)
    m = build(anchor="on_policy", tau=tau, learning_rate=0.05)
    perturb(m.policy)
    batch["behaviour_log_prob"] = m.log_prob(batch["context"], batch["candidates"])
    q = m.target(batch, None)
    surrogate = (((0.25 - q) / tau) * normal_log_prob(m.policy, batch)).sum(-1).mean()
    wanted = gradients(surrogate, m.policy)
    metrics, grads = moved(m, batch)
    assert metrics["loss"].item() == pytest.approx(math.log(4), rel=1e-12)
    for actual, w in zip(grads, wanted, strict=True):
        close(actual, w, **DOUBLE)
    second = step(m, batch)["loss"]  # from the second pass on the anchor acts
    assert abs(second.item() - math.log(4)) > 1e-4


# -- adaptive temperature ----------------------------------------------------------------------------------------------
def test_adaptive_temperature_by_hand():
    m = build(adaptive=True, tau=0.8, a=0.5, b=0.6)
    log_prob = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.9, 0.1]], dtype=torch.float64).log() + 7
    reward = torch.tensor([[1.0, 3.0], [0.0, 0.0], [4.0, 4.0]], dtype=torch.float64)  # means 2, 0, 4 -> R = .5, 0, 1
    entropy = [-(p * math.log2(p) + (1 - p) * math.log2(1 - p)) for p in (0.75, 0.5, 0.9)]
    wanted = [0.8 * (1 + 0.5 * h + 0.6 * (1 - h) * (1 - r)) for h, r in zip(entropy, (0.5, 0.0, 1.0), strict=True)]
    close(m.temperature(log_prob, reward), torch.tensor(wanted, dtype=torch.float64).unsqueeze(1))
    same = m.temperature(log_prob, torch.full_like(reward, 3.0))  # rewards all equal: R = .5
    wanted = [0.8 * (1 + 0.5 * h + 0.6 * (1 - h) * 0.5) for h in entropy]
    close(same, torch.tensor(wanted, dtype=torch.float64).unsqueeze(1))


def test_adaptive_temperature_is_bounded():
    batch = make_batch(rows=50)
    free = build(adaptive=True, tau_low=1e-6, tau_high=1e6, b=2.0).temperature(batch["teacher_log_prob"],
                                                                              batch["reward"])
    assert free.min() < 1.6 and free.max() > 1.9
    bound = build(adaptive=True, tau_low=1.6, tau_high=1.9, b=2.0).temperature(batch["teacher_log_prob"],
                                                                              batch["reward"])
    assert bound.min() == 1.6 and bound.max() == 1.9
    close(bound, free.clamp(1.6, 1.9))


def test_adaptive_temperature_takes_no_gradient():
    m, batch = build(adaptive=True), make_batch(rows=4)
    anchor, log_prob = batch["behaviour_log_prob"], batch["teacher_log_prob"].clone().requires_grad_()
    q = m.target(batch, anchor)
    loss = m.loss(m.score(log_prob, anchor, batch), q, batch)
    tau = m.temperature(log_prob.detach(), batch["reward"])
    p = ((log_prob.detach() - anchor) / tau).softmax(-1)
    assert tau.max() - tau.min() > 0.05
    close(torch.autograd.grad(loss, log_prob)[0], (p - q) / tau / 4)


# -- distillation ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_at_a_temperature_is_hintons(temperature):
    m = build(KD, target="raw", target_temperature=temperature, tau=temperature)
    batch = make_batch()
    batch["reward"] = batch["teacher_log_prob"]
    student = normal_log_prob(m.policy, batch)
    expected = F.cross_entropy(student / temperature, F.softmax(batch["teacher_log_prob"] / temperature, -1))
    wanted = gradients(expected, m.policy)
    metrics, grads = moved(m, batch)
    close(metrics["loss"], expected.detach())
    for actual, w in zip(grads, wanted, strict=True):
        close(actual, w, **DOUBLE)


def test_adpo_with_neutral_knobs_is_kd_to_the_bit():
    card = yaml.safe_load((ROOT / "conf/method/preference/adpo.yaml").read_text())["card"]
    assert card["baseline"] == "kd"
    shared = {"hidden": (16, 16), "clip": 1.0, "dtype": torch.float32, "learning_rate": 1e-2}
    kd, adpo = build(KD, **shared), build(ADPO, **shared, **card["neutral"])
    other = build(ADPO, **shared)  # not neutral: must differ, or the comparison is empty
    before = torch.get_rng_state()
    for k in range(20):
        batch = make_batch(rows=32, size=8, seed=k, dtype=torch.float32)
        losses = [step(m, batch)["loss"] for m in (kd, adpo, other)]
        assert torch.equal(losses[0], losses[1])
    state, neutral = kd.state_dict(), adpo.state_dict()
    assert set(state) <= set(neutral)
    assert all(torch.equal(state[k], neutral[k]) for k in state)
    assert not torch.equal(state["policy.net.0.weight"], other.state_dict()["policy.net.0.weight"])
    assert torch.equal(torch.get_rng_state(), before)  # and none drew a random number


def test_gradient_clipping_bounds_the_norm():
    batch = make_batch()
    free = moved(build(tau=0.01), batch)[1]
    clipped = moved(build(tau=0.01, clip=0.5), batch)[1]
    norm = torch.cat([g.flatten() for g in free]).norm()
    assert norm > 1
    for c, f in zip(clipped, free, strict=True):
        close(c, f * 0.5 / norm, rtol=1e-5)


def test_kd_recovers_a_teacher_that_the_student_can_represent():
    """Uniform anchor, raw target at temperature 1: the optimum is the teacher; a self anchor with tau 1 misses it."""
    teacher = build(seed=11).policy
    perturb(teacher)
    teacher.requires_grad_(False)
    end = {}
    for anchor in ("uniform", "self"):
        m = build(anchor=anchor, target="raw", target_temperature=1.0, learning_rate=0.02)
        perturb(m.policy, seed=3)
        if anchor == "self":
            m.anchor.load_state_dict(m.policy.state_dict())
        generator = torch.Generator().manual_seed(0)
        for _ in range(500):
            batch = {"context": torch.randn(64, S, generator=generator, dtype=torch.float64),
                     "candidates": 2 * torch.randn(64, 8, A, generator=generator, dtype=torch.float64)}
            batch["reward"] = batch["teacher_log_prob"] = teacher.log_prob(batch["context"], batch["candidates"])
            step(m, batch)
        context = torch.randn(200, S, generator=generator, dtype=torch.float64)
        p, q = (torch.distributions.Normal(n(context)[0].detach(), n(context)[1].detach().exp())
                for n in (teacher, m.policy))
        end[anchor] = torch.distributions.kl_divergence(p, q).sum(-1).mean().item()
    assert end["uniform"] < 0.01 and end["self"] > 10 * end["uniform"]


# -- the student -------------------------------------------------------------------------------------------------------
def test_gaussian_log_prob_against_torch_distributions():
    m, batch = build(), make_batch()
    m.prepare({"context": 2 * batch["context"] + 5})
    perturb(m.policy)
    wanted = normal_log_prob(m.policy, batch)
    close(m.policy.log_prob(batch["context"], batch["candidates"]), wanted)
    close(m.log_prob(batch["context"], batch["candidates"]), wanted.detach())
    for actual, w in zip(gradients(m.policy.log_prob(batch["context"], batch["candidates"]).sum(), m.policy),
                         gradients(wanted.sum(), m.policy), strict=True):
        close(actual, w, **DOUBLE)


def test_log_std_is_clamped():
    m, batch = build(log_std_low=-1.0, log_std_high=0.5), make_batch()
    with torch.no_grad():
        m.policy.log_std.copy_(torch.tensor([-7.0, 3.0]))
    step(m, batch)  # brings it back, from whatever the optimiser made of it
    std = m.distribution(batch["context"])[1]
    close(std, torch.tensor([math.exp(-1), math.exp(0.5)], dtype=torch.float64).expand(6, 2))
    mean = m.policy(batch["context"])[0].unsqueeze(1)
    wanted = torch.distributions.Normal(mean, std[0]).log_prob(batch["candidates"]).sum(-1)
    close(m.policy.log_prob(batch["context"], batch["candidates"]), wanted)
    torch.manual_seed(0)
    drawn = m.sample(batch["context"][:1], 20_000)[0] - mean[0]
    close(drawn.std(0), std[0], rtol=0.03)


def test_log_std_can_leave_its_bound():
    """A deviation that was driven to its floor must widen again when the data ask for it."""
    m = build(anchor="uniform", target="raw", log_std_low=-1.0, learning_rate=0.05)
    generator = torch.Generator().manual_seed(0)

    def train(std, updates):
        teacher = torch.distributions.Normal(torch.zeros(A, dtype=torch.float64), std)
        for _ in range(updates):
            batch = {"context": torch.zeros(16, S, dtype=torch.float64),
                     "candidates": torch.randn(16, 8, A, generator=generator, dtype=torch.float64)}
            batch["reward"] = teacher.log_prob(batch["candidates"]).sum(-1)
            step(m, batch)
        return m.distribution(torch.zeros(1, S, dtype=torch.float64))[1].max().item()

    assert train(0.02, 60) == pytest.approx(math.exp(-1))
    assert train(1.0, 200) > 1.5 * math.exp(-1)


def test_sample_and_act():
    m, batch = build(), make_batch()
    m.prepare({"context": batch["context"]})
    mean, std = m.distribution(batch["context"])
    assert mean.shape == std.shape == (6, A)
    assert torch.equal(m.act(batch["context"], explore=False), mean)
    torch.manual_seed(0)
    drawn = m.sample(batch["context"], 20_000)
    assert drawn.shape == (6, 20_000, A)
    assert ((drawn.mean(1) - mean).abs() < 5 * std / 20_000 ** 0.5).all()
    close(drawn.std(1), std, rtol=0.03)
    explored = m.act(batch["context"][:1].expand(20_000, S), explore=True)
    close(explored.std(0), std[0], rtol=0.03)
    assert ((explored.mean(0) - mean[0]).abs() < 5 * std[0] / 20_000 ** 0.5).all()


def test_prepare_takes_mean_and_deviation_of_the_contexts():
    rows = [[1.0, -2.0, 5.0], [3.0, 0.0, 5.0], [8.0, 1.0, 5.0]]
    m = build(anchor="self")
    m.prepare({"context": torch.tensor(rows, dtype=torch.float64)})
    columns = list(zip(*rows, strict=True))
    for module in (m.policy, m.anchor):
        close(module.offset, torch.tensor([statistics.mean(c) for c in columns]), rtol=1e-6)
        close(module.scale, torch.tensor([statistics.stdev(c) + 1e-3 for c in columns]), rtol=1e-6)


@pytest.mark.parametrize("activation", ["tanh", "relu", "silu", "gelu"])
def test_export_folds_the_normalisation(activation):
    m = build(dtype=torch.float32, hidden=(7, 6), activation=activation)
    context = torch.randn(200, S, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 30.0, 0.1]) + 4
    m.prepare({"context": context})
    perturb(m.policy, 0.1)
    before = copy.deepcopy(m.policy.state_dict())
    tensors, description = m.export()
    assert description == {"kind": "mlp", "sizes": f"{S},7,6,{A}", "activation": activation, "squash": "false"}
    x = context
    for k in (0, 2, 4):
        x = F.linear(x, tensors[f"{k}.weight"], tensors[f"{k}.bias"])
        x = x if k == 4 else getattr(torch, activation, getattr(F, activation))(x)
    torch.testing.assert_close(x, m.act(context, explore=False), rtol=0, atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in m.policy.state_dict().items())  # export changed nothing
