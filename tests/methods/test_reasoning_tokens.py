"""Lp-Reg, STEER, HAPO: tokens weighed by their probability or entropy, on rows made by hand."""

import pytest
import torch

from methods.reasoning.base import GroupPolicy, Rows
from methods.reasoning.hapo import HAPO, Spread, score, spread, token_level
from methods.reasoning.lp_reg import LpReg, proxy_log_prob
from methods.reasoning.steer import STEER, dealt, entropy_change


def method(cls, **knobs):
    return cls(cls.Config(**knobs))


def rows_of(log_prob, old=None, advantage=-1.0, mask=None, entropy=None, **more):
    log_prob = torch.as_tensor(log_prob, dtype=torch.float32)
    old = log_prob.detach().clone() if old is None else torch.as_tensor(old, dtype=torch.float32)
    mask = torch.ones_like(old) if mask is None else torch.as_tensor(mask, dtype=torch.float32)
    entropy = torch.zeros_like(old) if entropy is None else torch.as_tensor(entropy, dtype=torch.float32)
    told = {"log_prob": old, "entropy": entropy}
    return Rows(log_prob=log_prob, old=told, now={"log_prob": log_prob, "entropy": entropy}, mask=mask,
                weight=torch.ones_like(mask), ratio=(log_prob - old).exp(), log_ratio=log_prob - old, low=0.2, high=0.2,
                advantage=torch.as_tensor(advantage, dtype=torch.float32).expand_as(old), tokens=mask.sum(), count=len(mask),
                told={}, number=0, **more)


# ---- Lp-Reg

P = torch.tensor([0.6, 0.3, 0.09, 0.01])


def test_the_proxy_keeps_plausible_tokens_and_shares_out_their_mass():
    logits, target = P.log().expand(4, 4), torch.arange(4)
    told = proxy_log_prob(logits, target, "min_p", 0.1, 0.0)
    assert told[:3].exp().tolist() == pytest.approx([0.6 / 0.99, 0.3 / 0.99, 0.09 / 0.99])
    assert told[3] < -9000
    assert proxy_log_prob(logits, target, "fixed", 0.0, 0.2)[:2].exp().tolist() == pytest.approx([2 / 3, 1 / 3])
    assert (proxy_log_prob(logits, target, "fixed", 0.0, 0.9) < -9000).all()  # nothing is kept; nothing becomes infinite


def test_only_the_rarest_plausible_negative_tokens_are_pulled():
    lp = torch.tensor([[-1.0, -5.0, -4.0, -3.0, -2.0, -6.0, -7.0, -8.0]])
    rows = rows_of(lp, advantage=[[-1, -1, -1, -1, -1, 1, -1, -1.0]], mask=[[1, 1, 1, 1, 1, 1, 1, 0]])
    proxy = lp + 0.1
    proxy[0, 6] = -1e4  # the rarest is noise
    chosen = method(LpReg, share=0.5).endangered(rows, proxy)
    assert chosen.tolist() == [[False, True, True, False, False, False, False, False]]  # 3 of 6 looked at: -7, -5, -4
    assert not method(LpReg, share=0.3).endangered(rows, proxy).any()  # 1 of 6: one token alone is left out
    proxy[0, 1] = -5.5  # risen above the proxy
    assert method(LpReg, share=0.5).endangered(rows, proxy).nonzero().tolist() == [[0, 2]]


def gradient_at(rho, **knobs):
    """d loss / d lp of two endangered tokens with A = -1, p_old = 0.05 and a proxy of the same mass."""
    old = torch.full((1, 4), 0.05).log()
    lp = (old + torch.tensor(float(rho)).log()).requires_grad_()
    rows = rows_of(lp, old, advantage=[[-1, -1, 1, 1.0]])
    rows.old["proxy"] = old.clone()
    loss = method(LpReg, share=1.0, **knobs).surrogate(rows)
    return torch.autograd.grad(loss.sum(), lp)[0][0]


def test_the_pull_balances_the_push_at_0618():
    slope = [gradient_at(rho)[0].item() for rho in (0.5, 0.618034, 0.8)]
    assert slope[0] < 0 < slope[2]  # below, the loss falls by raising lp
    assert slope[1] == pytest.approx(0, abs=1e-4)


def test_other_tokens_keep_the_clipped_loss_and_chosen_ones_lose_it():
    lp = torch.full((1, 4), -3.0).add(torch.tensor([0.5, 0.5, -0.5, -0.5])).requires_grad_()
    rows = rows_of(lp, torch.full((1, 4), -3.0), advantage=[[-1, 1, -1, -1.0]])
    rows.old["proxy"] = torch.full((1, 4), -3.0)
    ours, base = method(LpReg, share=1.0, pull=2.0).surrogate(rows), method(GroupPolicy).surrogate(rows)
    assert torch.equal(ours[0, :2], base[0, :2])
    rho, d = lp.detach()[0, 2:].add(3.0).exp(), 0.5
    assert ours[0, 2:].tolist() == pytest.approx((rho + 2.0 * (torch.tensor(d).exp() - d - 1)).tolist())


def test_the_official_cap_lets_go_of_the_most_endangered():
    assert gradient_at(1 / 20, pull_cap=10.0)[0] > 0 > gradient_at(1 / 20)[0]
    assert gradient_at(1 / 10, pull_cap=10.0)[0] < 0


# ---- STEER

def test_the_estimate_ranks_the_true_change_of_entropy():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(4000, 16, generator=generator, dtype=torch.float64)
    p = logits.softmax(-1)
    entropy = -(p * p.log()).sum(-1)
    action = torch.multinomial(p, 1, generator=generator)
    step = 1e-3 * (torch.zeros_like(p).scatter_(1, action, 1.0) - p)
    after = (logits + step).softmax(-1)
    change = -(after * after.log()).sum(-1) - entropy
    lp = p.gather(1, action).squeeze(1).log()
    for power, correlation in ((1, 0.70), (2, 0.65)):
        told = -entropy_change(torch.ones_like(lp), lp, lp, entropy, power)
        assert torch.corrcoef(torch.stack([told, change]))[0, 1] == pytest.approx(correlation, abs=0.03)
        assert 0.85 < (told.sign() == change.sign()).double().mean() < 0.95  # it misses a tenth of the signs
    assert entropy_change(torch.tensor(torch.inf), lp[0], lp[0], entropy[0]) == 0


def weights(change, mask=None, **knobs):
    change = torch.tensor([change])
    mask = torch.ones_like(change) if mask is None else torch.tensor([mask])
    return method(STEER, **knobs).weights_of(change, mask)[0]


def test_the_greatest_change_gets_the_least_weight():
    assert weights([0.0, 1.0, 2.0]).tolist() == pytest.approx([1.0, 0.8 ** 0.5, 0.8])
    assert weights([0.0, 1.0, 9.0], [1, 1, 0])[:2].tolist() == pytest.approx([1.0, 0.8])  # padding has no say
    assert weights([0.0, 0.01]).tolist() == pytest.approx([1.0, 0.8 ** 0.5])  # nothing below 0.02 counts as great
    assert weights([0.0, 1.0, 2.0], map="linear").tolist() == pytest.approx([1.2, 1.0, 0.8])
    assert weights([0.5, 0.5], map="linear").tolist() == pytest.approx([1.0, 1.0])
    assert weights([0.0, 1.0, 1.0, 1.0, 100.0], quantile=0.75).tolist() == pytest.approx([1.0, 0.8, 0.8, 0.8, 0.8])
    assert weights([0.0, 1.0, 1.0, 1.0, 100.0])[1] > 0.99  # one outlier else decides for all


def steered(**knobs):
    p, entropy = torch.tensor([[0.05, 0.9, 0.3, 0.5]]), [[0.5, 0.5, 0.5, 1.5]]
    rows = rows_of(p.log(), entropy=entropy, mask=[[1, 1, 1, 0]], advantage=1.0)
    method(STEER, **knobs).weigh(rows)
    return rows.weight[0]


def test_controls():
    plain = steered(w_min=0.2)
    assert plain[0] == pytest.approx(0.2) and plain[1] < 1
    signed = steered(w_min=0.2, signed=True)
    assert signed[0] == 1 and signed[1] == pytest.approx(0.2)  # raising a rare token raises entropy; the sure one lowers it
    assert steered(w_min=0.2, renormalise=True)[:3].mean() == pytest.approx(1.0)
    assert steered(w_min=0.2, permuted=True)[:3].sort().values.tolist() == pytest.approx(plain[:3].sort().values.tolist())


def test_dealing_stays_on_the_mask():
    generator = torch.Generator().manual_seed(1)
    values, mask = torch.arange(40.0).view(4, 10), (torch.rand(4, 10, generator=generator) < 0.6).float()
    out = dealt(values, mask, torch.rand(4, 10, generator=generator))
    assert out[mask > 0].sort().values.tolist() == values[mask > 0].tolist()
    assert not torch.equal(out[mask > 0], values[mask > 0])


# ---- HAPO

H = torch.tensor([[1e-8, 0.01, 0.1, 0.3, 1.0, 2.0, 7.0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 0.0]])


def test_the_score_spans_minus_one_to_one_with_zero_at_the_pivot():
    known = spread(H, MASK, 0.8, 1e-8)
    h = score(H, known, 1e-8, False)[0]
    assert known.pivot == pytest.approx(0.0) and h[4] == 0  # 0.8 of five gaps: the fifth, H = 1
    assert h[[0, 5, 6]].tolist() == pytest.approx([-1, 1, 1]) and h.abs().max() <= 1  # beyond what was seen: clipped
    assert h[2] == pytest.approx(torch.tensor(0.1).log().item() / 18.4207, abs=1e-4)
    released = score(H, known, 1e-8, True)[0]
    assert released[0] == pytest.approx(1) and (released >= 0).all()  # the surest token counts as the most uncertain
    bounded = score(H, spread(H, MASK, 0.8, 0.05), 0.05, False)[0]
    assert bounded[:2].tolist() == pytest.approx([-1, -1]) and bounded[2] < h[2]  # the floor takes the extreme's say
    flat = torch.full((1, 3), 0.5)
    assert (score(flat, spread(flat, torch.ones(1, 3), 0.8, 1e-8), 1e-8, False) == 0).all()


def test_advantages_sum_to_zero_over_the_tokens_of_a_group():
    length, group = torch.tensor([3, 5, 9, 2, 4, 4]), torch.tensor([0, 0, 0, 1, 1, 1])
    mask = (torch.arange(9) < length[:, None]).float()
    batch = {"reward": torch.tensor([1, 0, 0, 0.7, 0.7, 0.7]), "group": group, "mask": mask}
    plain = torch.tensor([5.0, 5, 5, 0, 0, 0])
    advantage = token_level(batch, plain)
    assert (advantage[:3] * length[:3]).sum() == pytest.approx(0, abs=1e-5)
    assert (advantage[:3].square() * length[:3]).sum() / 17 == pytest.approx(1, abs=1e-5)
    assert (advantage[3:] == 0).all()
    assert token_level(batch, plain, "none")[0] == pytest.approx(1 - 3 / 17)


def test_a_group_with_too_large_an_advantage_keeps_the_plain_one():
    length = torch.tensor([1, 30, 30])  # (1 - 1/61) / sd = 7.7
    batch = {"reward": torch.tensor([1.0, 0, 0]), "group": torch.zeros(3, dtype=torch.int64),
             "mask": (torch.arange(30) < length[:, None]).float()}
    assert token_level(batch, torch.tensor([1.1, -0.5, -0.6])).tolist() == pytest.approx([1.1, -0.5, -0.6])


def test_clip_range_and_advantage_follow_the_score():
    entropy = torch.tensor([[0.01, 0.01, 1.0, 2.0, 2.0]])  # pivot at H = 1; h = -1, -1, 0, 1, 1
    old = torch.full((1, 5), -2.0)
    rho = torch.tensor([[1.0, 1.4, 1.0, 1.0, 1.4]])

    def weighed(**knobs):
        rows = rows_of(old + rho.log(), old, advantage=1.0, entropy=entropy)
        method(HAPO, pivot=0.5, **knobs).weigh(rows)
        return rows

    rows = weighed()
    assert rows.low[0].tolist() == pytest.approx([0.4, 0.4, 0.2, 0.2, 0.2])
    assert rows.high[0].tolist() == pytest.approx([0.2, 0.2, 0.2, 0.4, 0.4])
    assert rows.advantage[0].tolist() == pytest.approx([0.0, 1.0, 1.0, 1.0, 2.0], abs=1e-6)  # shrunk inside, enlarged outside
    assert weighed(redistribute=0.0).advantage.unique().tolist() == [1.0]
    assert weighed(widen=0.0).low == 0.2
    rows = weighed(sign="released")
    assert rows.low.unique().tolist() == pytest.approx([0.2]) and rows.high[0, 0] == pytest.approx(0.4)
    assert rows.advantage[0].tolist() == pytest.approx([1, 2, 1, 1, 2])  # the surest tokens are enlarged, none is shrunk
    assert rows.told["below_pivot"] == 0


def test_uncertain_tokens_are_drawn_hotter_once_there_are_statistics():
    hapo = method(HAPO, temperature=0.7, heat=0.1)
    for name in Spread._fields:
        hapo.register_buffer(f"spread_{name}", torch.zeros(()))
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0], [40.0, 0, 0, 0]])
    assert hapo.temperature_of(logits).squeeze(1).tolist() == pytest.approx([0.7, 0.7, 0.7])
    hapo.observe({"mask": torch.ones(1, 4)}, {"entropy": torch.tensor([[1e-9, 0.01, 0.5, torch.tensor(4.0).log()]])})
    heat = hapo.temperature_of(logits).squeeze(1)
    assert heat[0] == pytest.approx(0.77) and heat[0] > heat[1] > heat[2] and heat[2] == pytest.approx(0.63)
