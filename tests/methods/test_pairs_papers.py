"""RPO, f-DPO, MADPO and HyPO: losses by hand, closed forms, what is the same method, estimators against enumeration."""

from __future__ import annotations

import math

import pytest
import torch
from pair_methods import TEXTS, arm_pairs, gradient, seen, slopes, tabular, value, word_pairs, words
from token_methods import bare, composed

from methods.preference.dpo import DPO
from methods.preference.f_dpo import FDPO, score
from methods.preference.hypo import HyPO
from methods.preference.madpo import MADPO, amplification, weight
from methods.preference.rpo import RPO
from runner.errors import UserError
from runner.run import assemble

D = torch.double
L = torch.tensor([[-1.1, -0.5, -3.0], [-2.0, -0.4, -1.0]], dtype=D)
REF = torch.tensor([[-1.5, -0.2, -2.0], [-1.0, -0.9, -1.0]], dtype=D)


def close(actual, expected, rtol=1e-9, atol=1e-11):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=rtol, atol=atol)


def moved(method, seed=0, by=1.0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in method.policy.parameters():
            p.add_(by * torch.randn_like(p))
    return method


# -- RPO

def test_rpos_two_forms_by_hand():
    """Responses of 2 and 1 tokens against 1 and 3; eta is multiplied by beta in the form of sums only."""
    log_prob = torch.tensor([[[-1.0, -3.0, 0.0], [-0.5, 0.0, 0.0]], [[-2.0, 0.0, 0.0], [-1.0, -1.0, -4.0]]], dtype=D)
    mask = torch.tensor([[[1, 1, 0], [1, 0, 0]], [[1, 0, 0], [1, 1, 1]]], dtype=D)
    given = {"log_prob": log_prob, "mask": mask}
    dpo = value(bare(DPO, beta=0.5), **given)
    close(value(bare(RPO, beta=0.5, eta=0.2), **given) - dpo, 0.2 * 0.5 * (4 + 0.5) / 2)
    close(value(bare(RPO, beta=0.5, eta=0.2, form="mean"), **given) - dpo, 0.2 * (2 + 0.5) / 2)
    close(value(bare(RPO, beta=0.5, eta=0.2, form="mean", imitated="all"), **given) - dpo, 0.2 * (2 + 0.5 + 2 + 2) / 4)
    close(value(bare(RPO, beta=0.5, eta=0.2, form="mean"), **given, label=[0.25, 1.0]) -
          value(bare(DPO, beta=0.5), **given, label=[0.25, 1.0]), 0.2 * (0.25 * 2 + 0.75 * 2 + 0.5) / 2)


def test_rpos_optimum_for_one_pair_that_always_wins_is_finite():
    """DPO drives a pair's margin up for ever; with imitation of both sides the gradient of a margin turns round."""
    far = torch.tensor([[30.0], [-30.0]], dtype=D)
    slope = slopes(bare(RPO, beta=0.5, eta=0.2, imitated="all"), far)[1]
    assert (slope < 0).all()  # both sides are raised
    assert slopes(bare(DPO, beta=0.5), far)[1][1] > 0


# -- f-DPO

DIVERGENCES = [("reverse_kl", 0.5), ("forward_kl", 0.5), ("js", 0.5), ("alpha", 0.3), ("alpha", 0.7)]


def f(u, divergence, a):
    if divergence == "reverse_kl":
        return u * u.log()
    if divergence == "forward_kl":
        return -u.log()
    if divergence == "js":
        return u * u.log() - (u + 1) * ((u + 1) / 2).log()
    return (u ** (1 - a) - (1 - a) * u - a) / (a * (a - 1))


@pytest.mark.parametrize(("divergence", "alpha"), DIVERGENCES)
def test_the_score_is_the_generators_derivative_up_to_a_constant(divergence, alpha):
    rho = torch.linspace(-4, 4, 9, dtype=D)
    u = rho.exp().requires_grad_()
    slope = torch.autograd.grad(f(u, divergence, alpha).sum(), u)[0]
    gap = score(rho, divergence, alpha) - slope
    close(gap, gap[0].expand_as(gap), rtol=1e-9, atol=1e-9)


def ratio(z, divergence, a):
    """(f')^-1"""
    if divergence == "reverse_kl":
        return z.exp()
    if divergence == "forward_kl":
        return -1 / z
    if divergence == "js":
        return z.exp() / (2 - z.exp())
    return (1 - a * z) ** (-1 / a)


def closed_form(base, reward, beta, divergence, a):
    """pi_ref (f')^-1((r - nu) / beta), nu of each context by bisection: (X, K)."""
    ref, r = base.double().softmax(-1), reward.double()
    most = {"reverse_kl": 50.0, "forward_kl": 0.0, "js": math.log(2), "alpha": 1 / a}[divergence]
    low = r.amax(-1, keepdim=True) - beta * most  # u is infinite there (or huge)
    high = low + 1e3
    for _ in range(200):
        nu = (low + high) / 2
        total = (ref * ratio((r - nu) / beta, divergence, a)).sum(-1, keepdim=True)
        low, high = torch.where(total > 1, nu, low), torch.where(total > 1, high, nu)
    return ref * ratio((r - nu) / beta, divergence, a)


@pytest.mark.parametrize(("divergence", "alpha"), DIVERGENCES)
def test_soft_labels_over_all_pairs_lead_to_the_closed_form(divergence, alpha):
    torch.manual_seed(2)
    base, reward, beta = 0.5 * torch.randn(2, 8), torch.randn(2, 8), 0.7
    expected = closed_form(base, reward, beta, divergence, alpha)
    close(expected.sum(-1), [1.0, 1.0], rtol=1e-6)
    method = tabular(FDPO, base, beta=beta, divergence=divergence, alpha=alpha)
    every = [(x, i, j) for x in range(2) for i in range(8) for j in range(i)]
    x, i, j = torch.tensor(every).T
    batch = arm_pairs(method, every, torch.sigmoid(reward[x, i] - reward[x, j]))
    for step in range(800):
        settings = {"beta": beta, "divergence": divergence, "alpha": alpha, "gradient_norm": 0.0}
        method.config = bare(FDPO, learning_rate=0.1 * 0.992 ** step, **settings).config
        method.update(batch)
    mine = (base + method.policy.theta.detach()).softmax(-1).double()
    assert (mine - expected).abs().sum(-1).max() / 2 < 1e-3
    others = [closed_form(base, reward, beta, d, a) for d, a in DIVERGENCES if (d, a) != (divergence, alpha)]
    assert min((mine - o).abs().sum(-1).max() / 2 for o in others) > 5e-3  # it is this one's


def test_alpha_goes_from_reverse_to_forward_kl():
    dpo, forward = (slopes(m, L, REF) for m in (bare(DPO, beta=0.4), bare(FDPO, beta=0.4, divergence="forward_kl")))
    for a, (loss, slope), distance in ((1e-3, dpo, 2e-3), (0.999, forward, 2e-3)):
        mine = slopes(bare(FDPO, beta=0.4, divergence="alpha", alpha=a), L, REF)
        close(mine[0], loss, rtol=distance, atol=0)
        close(mine[1], slope, rtol=5e-3, atol=1e-5)
    exact = slopes(bare(FDPO, beta=0.4, divergence="reverse_kl"), L, REF)
    assert torch.equal(exact[0], dpo[0]) and torch.equal(exact[1], dpo[1])


def test_exponents_are_cut_and_told():
    method = bare(FDPO, divergence="forward_kl")
    log_prob = torch.tensor([[0.0, 0.0], [-500.0, -1.0]], requires_grad=True)
    pairs = seen(method, log_prob)
    loss = method.loss(pairs)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(log_prob.grad).all()
    assert pairs.told["cut"].item() == pytest.approx(0.25)


# -- MADPO

def test_the_amplification_goes_from_c_max_through_one_to_its_inverse():
    at = torch.tensor([0.0, 6.91, -6.91, 200.0], dtype=D)
    c = amplification(at, 2.0, 1.0, 6.91)
    close(c[0], 2.0, rtol=2e-3)
    close(c[1:3], [1.0, 1.0])
    close(c[3], 0.5)
    close(amplification(at, 2.0, 0.0, 6.91), torch.ones(4, dtype=D))  # lambda 0 is DPO
    close(amplification(at, 1.0, 1.0, 6.91), torch.ones(4, dtype=D))


def test_weights_use_the_margin_with_its_sign():
    h = torch.tensor([1.5, -1.5, -8.0, 8.0], dtype=D)
    c = amplification(h, 2.0, 1.0, 6.91)
    w = weight(h, 2.0, 1.0, 6.91)
    close(w[:2], torch.sigmoid(c * h)[:2] / torch.sigmoid(h)[:2])
    assert w[0] > 1 > w[1]
    close(w[2], 1.0)
    assert torch.isfinite(weight(torch.tensor([-1e4, 1e4]), 2.0, 1.0, 6.91)).all()


def test_madpos_optimum_is_the_amplified_margin():
    """Labels with probability sigma(h), weights by the same h: the loss is least at z = c h."""
    h = torch.tensor([0.5, -2.0, 3.0], dtype=D)
    c = amplification(h, 2.0, 1.0, 6.91)
    method = bare(MADPO, beta=1.0)
    at_optimum = torch.stack([c * h, torch.zeros(3, dtype=D)])
    slope = slopes(method, at_optimum, label=torch.sigmoid(h), reward_margin=h)[1]
    assert slope.abs().max() < 1e-12
    slope = slopes(method, at_optimum * 0.9, label=torch.sigmoid(h), reward_margin=h)[1]
    assert (slope[0].flatten() * h.sign() < 0).all()
    own = value(bare(MADPO, beta=1.0, labels="model"), at_optimum, reward_margin=h)
    close(own, value(method, at_optimum, label=torch.sigmoid(h), reward_margin=h))


def test_the_reward_model_is_bradley_terrys_and_only_its_margins_stay():
    """Counts of wins have a closed form for two arms: h = log(wins / losses)."""
    triples = [(0, 0, 1)] * 6 + [(0, 1, 0)] * 2 + [(1, 2, 0)] * 3 + [(1, 0, 2)] * 1
    method = tabular(MADPO, torch.randn(2, 3), reward_steps=600, reward_rate=0.05)
    before = {k: v.clone() for k, v in method.state_dict().items()}
    batch = arm_pairs(method, triples)
    h = batch["reward_margin"]
    close(h[:8], [math.log(3)] * 6 + [-math.log(3)] * 2, rtol=1e-3)
    close(h[8:], [math.log(3)] * 3 + [-math.log(3)], rtol=1e-3)
    assert all(torch.equal(before[k], v) for k, v in method.state_dict().items())
    again = arm_pairs(method, triples)["reward_margin"]
    assert torch.equal(h, again)
    method = tabular(MADPO, torch.randn(2, 3), reward_steps=5, reward_rows=4, micro_rows=3)
    assert torch.equal(arm_pairs(method, triples)["reward_margin"], arm_pairs(method, triples)["reward_margin"])
    assert "reward_margin" not in arm_pairs(tabular(MADPO, torch.randn(2, 3), c_max=1.0), triples)


def test_a_transformers_reward_model_learns_its_pairs():
    method = words(MADPO, reward_steps=60, reward_rate=0.01, micro_rows=4)
    assert (word_pairs(method, TEXTS)["reward_margin"] > 1).all()


# -- HyPO

TRIPLES = [(0, 0, 1), (0, 2, 3), (1, 3, 0), (1, 1, 2)]


def kl_gradient(method, batch):
    """That of KL(pi || pi_ref) over the batch's prompts by autograd from tables."""
    theta = method.policy.theta.detach().clone().requires_grad_()
    own, ref = (method.policy.base + theta).log_softmax(-1), method.policy.base.log_softmax(-1)
    x = batch["prompt"][:, 0] - method.policy.base.shape[1] - 1
    kl = (own.exp() * (own - ref)).sum(-1)[x].mean()
    return kl.detach(), torch.autograd.grad(kl, theta)[0].flatten()


def test_the_exact_kl_and_its_gradient():
    torch.manual_seed(3)
    base = torch.randn(2, 4)
    method = moved(tabular(HyPO, base, beta=0.0, kl_weight=1.0, kl="exact"))
    batch = arm_pairs(method, TRIPLES)
    expected, slope = kl_gradient(method, batch)
    loss, found = gradient(method, batch)
    close(loss, expected + math.log(2), rtol=1e-5)
    close(found, slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_sampled_kls_gradient_is_unbiased(k):
    torch.manual_seed(3)
    method = moved(tabular(HyPO, torch.randn(2, 4), beta=0.0, kl_weight=1.0, responses=k), by=0.7)
    batch = arm_pairs(method, TRIPLES * 500)
    expected, slope = kl_gradient(method, batch)
    found = []
    for n in range(6):
        method.updates = n
        found.append(gradient(method, batch)[1])
    found = torch.stack(found)
    error = found.std(0) / math.sqrt(len(found))
    close(found.mean(0), slope, rtol=0, atol=max(0.02, 5 * error.max().item()))
    assert (found.mean(0) * slope).sum() / slope.square().sum() == pytest.approx(1, abs=0.15)
    pairs = method.pairs(batch)
    with torch.no_grad():
        method.see(pairs, method.score(method.rows(batch)))
    method.updates = 99
    method.penalty(pairs)
    assert pairs.told["kl"].item() == pytest.approx(expected.item(), abs=0.1)


def test_hypo_holds_unseen_arms_where_dpo_does_not_look():
    """At the reference the KL's gradient is zero; away from it it pulls arms that no pair shows, too."""
    method = tabular(HyPO, torch.zeros(1, 4), beta=0.1, kl_weight=1.0, kl="exact")
    batch = arm_pairs(method, [(0, 0, 1)])
    close(gradient(method, batch)[1][2:], [0.0, 0.0], atol=1e-7)
    with torch.no_grad():
        method.policy.theta[0, 3] = 2.0
    assert gradient(method, batch)[1][3] > 0.1
    dpo = tabular(DPO, torch.zeros(1, 4), beta=0.1)
    with torch.no_grad():
        dpo.policy.theta[0, 3] = 2.0
    close(gradient(dpo, arm_pairs(dpo, [(0, 0, 1)]))[1][2:], [0.0, 0.0], atol=1e-7)


def test_the_control_is_the_mean_log_ratio_of_the_data():
    loss = value(bare(HyPO, kl="offline", kl_weight=0.3), L, REF)
    close(loss - value(bare(DPO), L, REF), 0.3 * (L - REF).mean())


def test_samples_of_several_tokens_go_through_both_policies_in_parts_alike():
    method = words(HyPO, kl_weight=0.1, responses=3)
    batch = word_pairs(method, TEXTS)
    assert not method.capturable
    loss, slope = gradient(method, batch)
    method.config = bare(HyPO, kl_weight=0.1, responses=3, gradient_norm=0.0, learning_rate=0.01, micro_rows=4).config
    other, parts = gradient(method, batch)
    close(other, loss, rtol=1e-5)
    close(parts, slope, rtol=1e-3, atol=1e-5)


def test_an_exact_kl_over_sequences_is_refused():
    with pytest.raises(UserError, match="sums over all responses, which here have up to 6 tokens"):
        words(HyPO, kl="exact")




@pytest.mark.parametrize("names", ["hypo+simpo", "kto+simpo", "madpo+odds_ratio_po"])
def test_a_method_without_reference_leaves_it_to_the_other(names):
    method, _, stream = assemble(composed(f"method={names}", "env=bandit"))
    assert method.reference is not None and "chosen_reference" in stream.data()
    method.update(stream.next())
