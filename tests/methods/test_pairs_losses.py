"""The family's baseline losses by hand: values, gradients, what is the same loss, bounds and limits, soft labels."""

from __future__ import annotations

import math

import pytest
import torch
from pair_methods import TEXTS, arm_pairs, gradient, prepared, seen, slopes, swapped, tabular, value, word_pairs, words
from token_methods import bare

from methods.preference.beta_dpo import BetaDPO
from methods.preference.cdpo import CDPO
from methods.preference.dpo import DPO
from methods.preference.dpop import DPOP
from methods.preference.ipo import IPO
from methods.preference.kto import KTO
from methods.preference.odds_ratio_po import OddsRatioPO, log_odds
from methods.preference.r_dpo import RDPO
from methods.preference.robust_dpo import RobustDPO
from methods.preference.simpo import SimPO

D = torch.double
L = torch.tensor([[-1.1, -0.5, -3.0], [-2.0, -0.4, -1.0]], dtype=D)  # log-probabilities of three pairs' sides
REF = torch.tensor([[-1.5, -0.2, -2.0], [-1.0, -0.9, -1.0]], dtype=D)
DELTA = ((L - REF)[0] - (L - REF)[1]).tolist()
RHO_W, RHO_L = (L - REF).tolist()


def logsig(z):
    return -math.log1p(math.exp(-z))


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def close(actual, expected, rtol=1e-9, atol=1e-11):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=rtol, atol=atol)


def mean(values):
    return sum(values) / len(values)


HAND = {
    "dpo": (DPO, {"beta": 0.6}, lambda: mean([-logsig(0.6 * d) for d in DELTA])),
    "cdpo": (CDPO, {"beta": 0.6, "flip_rate": 0.2},
             lambda: mean([-0.8 * logsig(0.6 * d) - 0.2 * logsig(-0.6 * d) for d in DELTA])),
    "robust": (RobustDPO, {"beta": 0.6, "flip_rate": 0.2},
               lambda: mean([(-0.8 * logsig(0.6 * d) + 0.2 * logsig(-0.6 * d)) / 0.6 for d in DELTA])),
    "ipo": (IPO, {"beta": 0.6}, lambda: mean([(d - 1 / 1.2) ** 2 for d in DELTA])),
    "dpop": (DPOP, {"beta": 0.3, "fall_weight": 5.0},
             lambda: mean([-logsig(0.3 * (d - 5 * max(0.0, -w))) for d, w in zip(DELTA, RHO_W)])),
    "simpo": (SimPO, {"beta": 2.0, "gamma": 0.5}, lambda: mean([-logsig(2 * (w - lo) - 1) for w, lo in zip(*L.tolist())])),
    "cpo": (SimPO, {"beta": 0.1, "gamma": 0.0, "per_token": False, "nll": 1.0},
            lambda: mean([-logsig(0.1 * (w - lo)) - w for w, lo in zip(*L.tolist())])),
    "slic": (SimPO, {"beta": 1.0, "gamma": 0.0, "per_token": False, "nll": 0.1, "shape": "hinge"},
             lambda: mean([max(0.0, 1 - (w - lo)) - 0.1 * w for w, lo in zip(*L.tolist())])),
    "orpo": (OddsRatioPO, {}, lambda: mean([-w - 0.1 * logsig(w - math.log(1 - math.exp(w)) - lo + math.log(1 - math.exp(lo)))
                                           for w, lo in zip(*L.tolist())])),
    "kto": (KTO, {"beta": 0.6, "desirable": 1.2, "undesirable": 0.7, "point": "zero"},
            lambda: mean([1.2 * (1 - sigmoid(0.6 * w)) for w in RHO_W] + [0.7 * (1 - sigmoid(-0.6 * lo)) for lo in RHO_L])),
    "r_dpo": (RDPO, {"beta": 0.6, "length_price": 0.3}, lambda: mean([-logsig(0.6 * d) for d in DELTA])),  # equal lengths
}


@pytest.mark.parametrize("name", HAND)
def test_values_by_hand_gradients_by_differences(name):
    cls, settings, expected = HAND[name]
    method = bare(cls, **settings)
    loss, slope = slopes(method, L, REF)
    close(loss, expected())
    for s in range(2):
        for i in range(3):
            step = torch.zeros_like(L)
            step[s, i] = 1e-6
            close(slope[s, i], (value(method, L + step, REF) - value(method, L - step, REF)) / 2e-6, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", HAND)
def test_a_pair_turned_round_with_its_label_is_the_same_pair(name):
    cls, settings, _ = HAND[name]
    method, label = bare(cls, **settings), torch.tensor([1.0, 0.7, 0.0], dtype=D)
    loss, slope = slopes(method, L, REF, label=label)
    other, turned = slopes(method, L.flip(0), REF.flip(0), label=1 - label)
    close(other, loss)
    close(turned.flip(0), slope)
    hard, _ = slopes(method, L[:, 2:], REF[:, 2:], label=torch.zeros(1, dtype=D))
    close(hard, value(method, L[:, 2:].flip(0), REF[:, 2:].flip(0)))


@pytest.mark.parametrize(("cls", "settings"), [
    (CDPO, {"flip_rate": 0.0}), (RobustDPO, {"flip_rate": 0.0}), (DPOP, {"fall_weight": 0.0}), (IPO, {"shape": "logistic"}),
    (RDPO, {"length_price": 0.0}), (KTO, {"compared": "pairs"}),
    (OddsRatioPO, {"odds_weight": 1.0, "nll": 0.0, "score": "log_ratio"}),
    (SimPO, {"gamma": 0.0, "per_token": False, "anchored": True})])
def test_these_are_dpo(cls, settings):
    label = torch.tensor([1.0, 0.7, 0.2], dtype=D)
    mine, theirs = (slopes(m, L, REF, label=label) for m in (bare(cls, beta=0.4, **settings), bare(DPO, beta=0.4)))
    assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])


# -- noisy labels

def test_cdpo_has_a_bounded_optimum_and_robust_dpo_falls_for_ever():
    e, beta = 0.2, 0.5
    for far, sign in ((0.9, -1), (1.1, 1)):  # of log((1 - e) / e)
        at = far * math.log((1 - e) / e) / beta
        slope = slopes(bare(CDPO, beta=beta, flip_rate=e), torch.tensor([[at], [0.0]], dtype=D))[1]
        assert sign * slope[0, 0] > 0
    robust, reach = bare(RobustDPO, beta=beta, flip_rate=e), []
    for m in (100.0, 200.0):
        reach.append(value(robust, torch.tensor([[m / beta], [0.0]], dtype=D)).item())
    assert reach[1] < reach[0] < 0
    assert reach[1] - reach[0] == pytest.approx(-e * 100 / (1 - 2 * e))


def test_robust_dpo_is_unbiased_and_undoes_what_cdpo_does():
    """Over labels turned with probability e its mean is DPO's; cdpo's is DPO's with labels turned twice."""
    e, z = 0.3, torch.tensor([[0.8], [-0.5]], dtype=D)
    right, wrong = (value(bare(RobustDPO, beta=1.0, flip_rate=e), z, label=torch.tensor([p], dtype=D)) for p in (1.0, 0.0))
    close((1 - e) * right + e * wrong, value(bare(DPO, beta=1.0), z))
    label = torch.tensor([0.8], dtype=D)
    turned = label * (1 - 2 * e) + e
    close(value(bare(RobustDPO, beta=1.0, flip_rate=e), z, label=turned), value(bare(DPO, beta=1.0), z, label=label))
    close(value(bare(CDPO, beta=1.0, flip_rate=e), z, label=label), value(bare(DPO, beta=1.0), z, label=turned))


def test_ipo_ends_at_its_target_and_at_its_share_of_it():
    for p in (1.0, 0.7):
        method = tabular(IPO, torch.zeros(1, 3), beta=0.5, learning_rate=0.05)
        batch = arm_pairs(method, [(0, 0, 1)], [p])
        for _ in range(600):
            method.update(batch)
        theta = method.policy.theta.detach()[0]
        close(theta[0] - theta[1], (2 * p - 1) / (2 * 0.5), rtol=1e-2)


# -- likelihoods of one side

def test_dpop_holds_up_the_preferred_response_where_dpo_lets_it_fall():
    """Below 0 the slope towards a larger rho(y_w) is (1 + lambda) times the slope away from y_l; above, they are equal."""
    for rho, factor in ((-0.5, 6.0), (0.5, 1.0)):
        slope = slopes(bare(DPOP, beta=0.3, fall_weight=5.0), torch.tensor([[rho], [-1.0]], dtype=D))[1].flatten()
        close(-slope[0] / slope[1], factor)


def test_log_odds_are_accurate_at_both_ends_and_their_slope_is_finite():
    s = torch.tensor([-1e-5, -0.1, -math.log(2), -0.7, -5.0, -60.0], dtype=D, requires_grad=True)
    out = log_odds(s)
    close(out, [float(x) - math.log(-math.expm1(float(x))) for x in s.detach()], rtol=1e-7)
    slope = torch.autograd.grad(out.sum(), s)[0]
    close(slope, 1 / -torch.expm1(s.detach()), rtol=1e-7)
    certain = torch.zeros(1, dtype=D, requires_grad=True)
    log_odds(certain).sum().backward()
    assert torch.isfinite(log_odds(certain)).all() and torch.isfinite(certain.grad).all()


def test_scores_a_token_and_prices_of_length():
    """Responses of 2 and 1 tokens against 1 and 3."""
    log_prob = torch.tensor([[[-1.0, -3.0, 0.0], [-0.5, 0.0, 0.0]], [[-2.0, 0.0, 0.0], [-1.0, -1.0, -4.0]]], dtype=D)
    mask = torch.tensor([[[1, 1, 0], [1, 0, 0]], [[1, 0, 0], [1, 1, 1]]], dtype=D)
    given = {"log_prob": log_prob, "mask": mask}
    close(value(bare(SimPO, beta=2.0, gamma=0.5), **given), mean([-logsig(2 * (-2 + 2) - 1), -logsig(2 * (-0.5 + 2) - 1)]))
    close(value(bare(SimPO, beta=0.1, gamma=0.0, per_token=False, nll=1.0), **given),  # all three tokens weigh alike
          mean([-logsig(0.1 * -2), -logsig(0.1 * 5.5)]) + 4.5 / 3)
    close(value(bare(IPO, beta=0.5, per_token=True), **given), mean([(0 - 1) ** 2, (1.5 - 1) ** 2]))
    close(value(bare(IPO, beta=0.5), **given), mean([(-2 - 1) ** 2, (5.5 - 1) ** 2]))
    close(value(bare(RDPO, beta=0.5, length_price=0.2), **given), mean([-logsig(-1 + 0.2), -logsig(2.75 - 0.4)]))
    s = [(-2.0, -2.0), (-0.5, -2.0)]
    odds = [w - math.log(1 - math.exp(w)) - lo + math.log(1 - math.exp(lo)) for w, lo in s]
    close(value(bare(OddsRatioPO), **given), mean([2 - 0.1 * logsig(odds[0]), 0.5 - 0.1 * logsig(odds[1])]))


@pytest.mark.parametrize("cls", [SimPO, OddsRatioPO])
def test_no_reference_is_kept_where_none_is_asked(cls):
    method = words(cls)
    batch = word_pairs(method, TEXTS)
    assert method.reference is None and "chosen_reference" not in batch
    assert words(SimPO, anchored=True).reference is not None
    loss, slope = gradient(method, batch)
    other, turned = gradient(method, swapped(batch))
    torch.testing.assert_close(other, loss)
    torch.testing.assert_close(turned, slope, rtol=1e-4, atol=1e-6)


# -- KTO

def test_ktos_point_of_reference_is_the_mean_over_the_next_rows_responses():
    method = words(KTO, beta=0.5)
    batch = word_pairs(method, TEXTS)
    pairs = method.pairs(batch)
    rows = [(p, side) for n in (1, 2) for p, *side in [(t[0], t[n]) for t in TEXTS]]
    prompts, responses = [p for p, _ in rows], [s[0] for _, s in rows]
    total = 0.0
    for prompt, response in zip(prompts, responses[1:] + responses[:1]):
        ids = torch.tensor(method.tokenizer.encode(prompt + response)).unsqueeze(0)
        for policy, sign in ((method.policy, 1), (method.reference, -1)):
            log_p = policy.logits(ids)[0].detach().log_softmax(-1)
            total += sign * sum(log_p[t - 1, ids[0, t]].item() for t in range(len(prompt), ids.shape[1]))
    found = method.mismatched(batch).mean()
    torch.testing.assert_close(found, torch.tensor(total / len(rows)), rtol=1e-4, atol=1e-5)
    assert method.reference_point(pairs).item() == pytest.approx(max(0.0, total / len(rows)), abs=1e-5)
    method.config = bare(KTO, beta=0.5, micro_rows=3).config
    torch.testing.assert_close(method.mismatched(batch).mean(), found)


def test_ktos_point_is_no_less_than_zero_and_has_no_gradient():
    method = bare(KTO, beta=0.5)
    for shift, expected in ((-0.4, 0.0), (0.4, 0.4)):
        method.mismatched = lambda batch, shift=shift: torch.full((6,), shift, dtype=D)
        loss, slope = slopes(method, L, REF)
        close(loss, mean([1 - sigmoid(0.5 * (w - expected)) for w in RHO_W]
                         + [1 - sigmoid(0.5 * (expected - lo)) for lo in RHO_L]))
        x = torch.tensor(RHO_W, dtype=D)
        p = torch.sigmoid(0.5 * (x - expected))
        close(slope[0].flatten(), -0.5 * p * (1 - p) / 6)


# -- beta-DPO

def test_beta_dpos_beta_and_moving_statistics_by_hand():
    method = tabular(BetaDPO, torch.zeros(1, 4), left_out=0.0, beta=0.5, gain=0.6, memory=0.9)
    gap = torch.tensor([DELTA])
    with torch.no_grad():
        pairs = seen(method, L.float(), REF.float())
        s = method.worth(pairs)
    m, spread = gap.mean(), gap.std(correction=0)
    close(pairs.mean, 0.1 * m, rtol=1e-5)
    close(pairs.deviation, 0.1 * spread, rtol=1e-5)
    beta = 0.5 * (1 + 0.6 * (m - 0.1 * m))
    close(pairs.told["beta"], beta, rtol=1e-5)
    close(method.config.beta * s, beta * pairs.rho, rtol=1e-5)
    method.after_update(pairs)
    close(method.gap_mean, 0.1 * m, rtol=1e-5)
    very = seen(method, torch.tensor([[-90.0], [0.0]]))
    method.worth(very)
    close(very.told["beta"], 1e-3, rtol=1e-5)  # no less
    neutral = tabular(BetaDPO, torch.zeros(1, 4), left_out=0.0, gain=0.0, beta=0.5)
    assert torch.equal(value(neutral, L.float(), REF.float()), value(bare(DPO, beta=0.5), L.float(), REF.float()))


def test_beta_dpo_keeps_pairs_by_how_usual_they_are():
    method = tabular(BetaDPO, torch.zeros(1, 4), left_out=0.4, beta=0.5)
    method.gap_mean.fill_(1.0)
    method.gap_deviation.fill_(1.0)
    gap, counts = torch.tensor([1.0, 1.5, 0.5, 6.0, 1.2]), torch.zeros(5)
    for n in range(2000):
        method.updates = n
        pairs = seen(method, torch.stack([gap, torch.zeros(5)]))
        pairs.mean, pairs.deviation = method.gap_mean, method.gap_deviation
        kept = method.draw(gap, pairs)
        assert kept.sum() == 3
        counts += kept
    weight = (-(gap - 1) ** 2 / 2).exp().double()
    expected = torch.zeros(5, dtype=D)  # inclusion over all ordered draws of three without replacement
    for i in range(5):
        for j in {*range(5)} - {i}:
            for k in {*range(5)} - {i, j}:
                p = weight[i] / weight.sum() * weight[j] / (weight.sum() - weight[i]) \
                    * weight[k] / (weight.sum() - weight[i] - weight[j])
                for n in (i, j, k):
                    expected[n] += p
    torch.testing.assert_close(counts.double() / 2000, expected, rtol=0, atol=0.04)
    pairs = seen(method, torch.stack([gap, torch.zeros(5)]))
    z = method.difference(pairs)
    weight = method.weigh(z, pairs)
    close(weight.mean(), 1.0, rtol=1e-5)  # the mean over kept pairs
    assert (weight == 0).sum() == 2


def test_helpers_prepare_at_the_reference():
    method = words(DPO)
    before = {k: v.clone() for k, v in method.policy.state_dict().items()}
    prepared(method, word_pairs(method, TEXTS))
    assert all(torch.equal(before[k], v) for k, v in method.policy.state_dict().items())
