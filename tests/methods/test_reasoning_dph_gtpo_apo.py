"""DPH-RL's divergences by enumeration and its survey; GTPO's runs on strings; APO's weights by hand."""

from __future__ import annotations

import math

import pytest
import torch
from token_methods import assembled, bare

from methods.reasoning.apo import APO
from methods.reasoning.base import Rows
from methods.reasoning.dph_rl import DPHRL, generator
from methods.reasoning.gtpo import GTPO, runs
from runner.errors import UserError


def rows_of(advantage, width, lengths=None, group=None, **more) -> Rows:
    a, n = torch.tensor(advantage), len(advantage)
    length = torch.tensor(lengths or [width] * n)
    mask = (torch.arange(width) < length[:, None]).float()
    zeros = torch.zeros(n, width)
    return Rows(advantage=a[:, None].expand(n, width), mask=mask, weight=torch.ones(n, width), length=length.float(),
                group=torch.tensor(group or [0] * n), log_prob=zeros, ratio=zeros + 1, tokens=mask.sum(), count=n, told={},
                number=0, **more)


# ---- DPH-RL

def softmaxes():
    torch.manual_seed(0)
    return torch.randn(9, dtype=torch.float64, requires_grad=True), torch.randn(9, dtype=torch.float64).softmax(0)


def kl_of(p, q):
    return (p * (p / q).log()).sum()


EXACT = {"forward": lambda p, q: kl_of(q, p),
         "js": lambda p, q: kl_of(p, (p + q) / 2) + kl_of(q, (p + q) / 2),
         "alpha": lambda p, q: (1 - (p ** 0.7 * q ** 0.3).sum()) / (0.3 * 0.7),
         "js_definition": lambda p, q: kl_of(q, (p + q) / 2)}


@pytest.mark.parametrize("divergence", EXACT)
def test_the_expectation_under_the_start_is_the_divergence_and_so_is_its_gradient(divergence):
    z, start = softmaxes()
    mean = (start * generator(z.log_softmax(0) - start.log(), divergence, 0.3)).sum()
    exact = EXACT[divergence](z.softmax(0), start)
    torch.testing.assert_close(mean, exact)
    ours, = torch.autograd.grad(mean, z, retain_graph=True)
    torch.testing.assert_close(ours, torch.autograd.grad(exact, z)[0])
    assert ours.abs().max() > 1e-2


@pytest.mark.parametrize("divergence", EXACT)
def test_generators_are_least_at_one_and_finite_far_from_it(divergence):
    d = torch.linspace(-3, 3, 61, dtype=torch.float64, requires_grad=True)
    f = generator(d, divergence, 0.3)
    assert f[30].item() == pytest.approx(0, abs=1e-12) and f.argmin() == 30
    slope, = torch.autograd.grad(f.sum(), d)
    assert slope[30].item() == pytest.approx(0, abs=1e-12) and (slope[:30] < 0).all() and (slope[31:] > 0).all()
    far = torch.tensor([-1e4, -15.0, 15.0, 1e4], requires_grad=True)  # float32
    value = generator(far, divergence, 0.3)
    slope, = torch.autograd.grad(value.sum(), far)
    assert value.isfinite().all() and slope.isfinite().all() and (slope[1:3] != 0).all()  # no stop before the cut at 20


def test_forward_kl_s_gradient_is_u_minus_1():
    d = torch.tensor([-12.0, -1.0, 0.5], requires_grad=True)  # at u = 6e-6 k3 with verl's bound would be flat
    generator(d, "forward").sum().backward()
    torch.testing.assert_close(d.grad, torch.expm1(d.detach()))


def test_imitation_has_no_minimum_at_the_start():
    d = torch.zeros(1, requires_grad=True)
    generator(d, "nll").sum().backward()
    assert d.grad.item() == -1


def surveyed(*words, **settings):
    method, _, stream = assembled("method=dph_rl", *words, **{"survey": 24, "solved": 0.5, **settings})
    return method, stream.next(), stream


def test_the_survey_splits_the_problems_and_stores_what_the_start_said():
    method, batch, stream = surveyed()
    kept = method.surveyed
    assert stream.responses == 24 * 4 + 16 and len(kept["problem"]) == 24 and len(set(kept["problem"].tolist())) == 24
    explored = set(kept["problem"][kept["explored"]].tolist())
    assert 0 < len(explored) < 24 and set(batch["problem"].tolist()) <= explored and len(batch["problem"].unique()) == 4
    for row in range(len(kept["mask"])):  # every stored response is correct; its problem is one of D_pef
        prompt = method.tokenizer.decode(kept["prompt"][row].tolist())
        text = method.tokenizer.decode(kept["response"][row][kept["mask"][row] > 0].tolist())
        number, problem = next((i, p) for i, p in enumerate(stream.pool) if p.prompt == prompt)
        assert stream.world.judge(problem, text).correct and number in set(kept["problem"].tolist()) - explored
    with torch.no_grad():
        again = method.score(kept)["log_prob"]
    torch.testing.assert_close(again, kept["first_log_prob"])
    before = {k: v.clone() for k, v in kept.items()}
    method.update(batch), stream.next()
    assert all(torch.equal(before[k], v) for k, v in method.surveyed.items()), "it is asked once"


def test_all_correct_responses_can_be_kept():
    few, _, _ = surveyed()
    all_, batch, _ = surveyed(store="all_correct")
    assert torch.equal(few.surveyed["explored"], all_.surveyed["explored"])
    assert len(all_.surveyed["mask"]) > len(few.surveyed["mask"])


def test_an_empty_store_is_refused_and_reverse_needs_none():
    with pytest.raises(UserError, match="all_correct"):
        surveyed(survey=1, solved=1.0, survey_samples=64)
    method, _, stream = surveyed("method.divergence=reverse")
    assert not method.surveyed and stream.responses == 16 and method.reference is not None


def test_at_the_start_the_rehearsal_pushes_nowhere():
    """u = 1 for every stored token: value and gradient are 0, whereas imitation pushes."""
    for divergence, still in (("forward", True), ("js", True), ("alpha", True), ("nll", False)):
        method, batch, _ = surveyed(divergence=divergence, eta=1.0, minibatches=1)
        batch["reward"] = torch.zeros_like(batch["reward"])  # no policy gradient
        method.update(batch)
        size = max(p.grad.abs().max().item() for p in method.policy.parameters())
        assert size < 1e-5 if still else size > 1e-3


def test_rehearsal_in_parts_has_the_same_gradient():
    gradients = []
    for micro in (0, 3):
        method, batch, _ = surveyed(eta=1.0, divergence="nll", minibatches=1, micro_rows=micro)
        method.update(batch)
        gradients.append({k: p.grad.clone() for k, p in method.policy.named_parameters()})
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, rtol=1e-3, atol=1e-6)


def test_the_definition_of_js_sees_rl_rows_in_a_share_of_the_minibatches():
    method = bare(DPHRL, divergence="js_definition", eta=1.0, online_share=0.5, rehearsal=2)
    d = torch.tensor([[0.7, -0.4]])
    method.surveyed = {"prompt": torch.zeros(1, 1), "prompt_mask": torch.ones(1, 1), "response": torch.zeros(1, 2),
                       "mask": torch.ones(1, 2), "first_log_prob": -d}
    method.score = lambda rows, temperature: {"log_prob": torch.zeros(len(rows["mask"]), 2)}
    rows = rows_of([0.0], 2, old={"reference_log_prob": d})
    offline, both = generator(d, "js_definition").mean(), 2 * generator(d, "js_definition").mean()
    seen = []
    for update in range(20):
        method.updates = update
        seen.append(round(method.penalty(rows).item(), 5))
    assert set(seen) == {round(offline.item(), 5), round(both.item(), 5)}


# ---- GTPO

def strings(*texts, sign, group=None):
    width = max(map(len, texts))
    response = torch.tensor([[ord(c) for c in t.ljust(width)] for t in texts])
    rows = rows_of([float(s) for s in sign], width, [len(t) for t in texts], group, response=response,
                   now={"entropy": torch.zeros(len(texts), width)}, reward=torch.tensor(sign, dtype=torch.float32))
    return rows, [[int(v) for v in r[:len(t)]] for r, t in zip(runs(rows, torch.tensor(sign))[0], texts)], \
        [[int(v) for v in r[:len(t)]] for r, t in zip(runs(rows, torch.tensor(sign))[1], texts)]


def test_runs_of_conflicts():
    _, begin, end = strings("<ab>", "<acd>", "<b>", sign=[1, -1, -1])
    assert begin == [[1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 0, 0]]
    assert end == [[0, 0, 1, 1], [0, 0, 0, 0, 1], [0, 1, 1]]


def test_a_run_ends_at_the_first_token_that_is_not_shared():
    _, begin, end = strings("axbyc", "azbwc", sign=[1, -1])  # b at the same place is in no run
    assert begin == [[1, 0, 0, 0, 0]] * 2 and end == [[0, 0, 0, 0, 1]] * 2


def test_only_opposite_signs_of_one_group_conflict():
    for sign, group in (([1, 1], [0, 0]), ([-1, -1], [0, 0]), ([1, -1], [0, 1]), ([1, 0], [0, 0])):
        _, begin, end = strings("ab", "ab", sign=sign, group=group)
        assert not sum(map(sum, begin + end))
    _, begin, end = strings("ab", "ab", sign=[1, -1])
    assert begin == end == [[1, 1]] * 2


def test_padding_is_in_no_conflict():
    rows, begin, end = strings("a  ", "a", sign=[1, -1])
    assert runs(rows, torch.tensor([1, -1]))[0][1].tolist() == [1, 0, 0] and end == [[0, 0, 0], [0]]


def weights(rows, **settings):
    method = bare(GTPO, threshold=0.0, gamma=0.0, **settings)
    method.weigh(rows)
    return [r[:n].tolist() for r, n in zip(rows.weight, rows.length.int().tolist())]


def test_weights_of_conflicts_multiply():
    """Positives twice, and four times where both runs meet; negatives never; the rest once."""
    texts = ("<ab>", "<acd>", "<b>", "ab")
    rows, _, _ = strings(*texts, sign=[1, -1, -1, 0])
    assert weights(rows) == [[2, 2, 2, 2], [0, 0, 1, 1, 0], [0, 0, 0], [1, 1]]
    rows, _, _ = strings("ab", "ab", sign=[1, -1])
    assert weights(rows, conflict_weight=3.0) == [[9, 9], [0, 0]]


def test_official_divisor_is_the_longer_run():
    rows, _, _ = strings("<ab>", "<acd>", "<b>", "ab", sign=[1, -1, -1, 0])
    assert weights(rows, official_divisor=True) == [[1, 1, 1, 1], [0, 0, 0.5, 0.5, 0], [0, 0, 0], [1, 1]]


def entropies(advantage, entropy, first, **settings):
    rows = rows_of(advantage, 2, response=torch.arange(2 * len(advantage)).view(-1, 2), now={"entropy": torch.tensor(entropy)})
    method = bare(GTPO, **settings)
    method.first_entropy = torch.tensor(first)
    method.weigh(rows)
    return rows.advantage[:, 0].tolist()


def test_entropy_is_taken_off_advantages_and_bounds_them():
    entropy = [[0.1, 0.3], [0.6, 1.0], [0.0, 0.4]]
    assert entropies([0.5, -0.5, 0.0], entropy, 0.2) == pytest.approx([0.48, 0, -0.02])  # of advantage 0: -gamma H
    assert entropies([0.5, -0.5, 0.0], entropy, 0.9) == pytest.approx([0.48, -0.58, -0.02])  # the start is too uncertain
    relative = entropies([0.5, -0.5, 0.0], entropy, 0.05, threshold=3.0, threshold_of="initial")
    assert relative == pytest.approx([0, 0, 0])


def test_without_its_parts_gtpo_is_the_unclipped_base():
    """-mean_i (1/T_i) sum_t (r_i - mean r) grad lp, whatever the ratio."""
    gradients = []
    for name, settings in (("gtpo", {"conflicts": False, "gamma": 0.0, "threshold": 0.0}),
                           ("grpo", {"scale": "none", "aggregation": "seq_mean_token_mean", "minibatches": 1})):
        method, _, stream = assembled(f"method={name}", **settings)
        method.update(stream.next())
        gradients.append({k: p.grad.clone() for k, p in method.policy.named_parameters()})
    assert all(torch.equal(v, gradients[1][k]) for k, v in gradients[0].items())
    rows = rows_of([1.0, -1.0], 1)
    rows.ratio = torch.tensor([[7.0], [0.01]])
    rows.low, rows.high = bare(GTPO).config.clip_low, bare(GTPO).config.clip_high
    assert bare(GTPO).surrogate(rows).flatten().tolist() == pytest.approx([-7, 0.01])


# ---- APO

def test_the_kl_s_weight_by_difficulty_and_its_jump():
    for right, expected in ((1, 0.2881), (4, 0.7431), (7, 0.9073), (8, 1.0), (0, 1.0)):
        rows = rows_of([1.0, -1.0] * 4, 2, correct=torch.tensor([1.0] * right + [0.0] * (8 - right)))
        bare(APO).weigh(rows)
        assert rows.kl_weight.tolist() == pytest.approx([expected, 1.0] * 4, abs=1e-4)


def test_long_wrong_responses_weigh_more():
    method = bare(APO, length_base=2.0, kl_scale=0.0)
    rows = rows_of([1.0, 1.0, -1.0, -1.0, -1.0, -1.0], 9, [2, 4, 3, 4, 5, 9], [0, 0, 0, 0, 0, 1],
                   correct=torch.tensor([1.0, 1, 0, 0, 0, 0]))
    method.weigh(rows)
    assert rows.advantage[:, 0].tolist() == pytest.approx([1, 1, -1, -1.5, -1.75, -1])  # Tbar = 3; none is right in group 1
    published = rows_of([1.0, -1.0], 4096, [96, 4096], correct=torch.tensor([1.0, 0]))
    bare(APO, kl_scale=0.0).weigh(published)
    assert published.advantage[1, 0].item() == pytest.approx(-(2 - 1.00001 ** -4000), rel=1e-5)


def test_the_penalty_is_a_mean_over_responses():
    method = bare(APO, kl_scale=0.5)
    rows = rows_of([1.0, -1.0], 2, [2, 1], correct=torch.tensor([1.0, 0]), old={
        "reference_log_prob": torch.tensor([[0.0, -1.0], [1.0, 5.0]])})
    method.weigh(rows)
    weight = 1 - math.exp(-math.e * 0.5)
    assert method.penalty(rows).item() == pytest.approx(0.5 * (weight * math.exp(-1) / 2 + (math.e - 2)) / 2)
    fixed = bare(APO, kl_scale=0.5, by_difficulty=False).penalty(rows).item()
    assert fixed == pytest.approx(0.5 * (math.exp(-1) / 2 + math.e - 2) / 2)


def test_format_is_rewarded():
    batch = {"reward": torch.tensor([1.0, 0.0]), "format": torch.tensor([1.0, 0.5])}
    assert bare(APO).reward(batch).tolist() == [1.5, 0.25]
