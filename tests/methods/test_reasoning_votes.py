"""COPO, AEPO, TTRL, SPINE: batches and rows made by hand."""

import itertools
import math
import random
from collections import Counter

import pytest
import torch

from methods.reasoning.aepo import AEPO
from methods.reasoning.base import GroupPolicy, Rows
from methods.reasoning.batches import votes
from methods.reasoning.copo import COPO, answer_entropy, global_advantage
from methods.reasoning.spine import SPINE, two_clusters
from methods.reasoning.ttrl import TTRL, elected


def method(cls, **knobs):
    made = cls(cls.Config(**knobs))
    made.told = {}
    return made


def numbers(*values):
    return torch.tensor(values)


# ---- COPO

GROUP = torch.arange(3).repeat_interleave(4)
ANSWER = numbers(7, 7, 7, 7, 2, 3, 2, 3, -1, 0, 1, 4)
CORRECT = numbers(1.0, 1, 1, 1, 0, 1, 0, 1, 0, 0, 0, 0)


def batch(**more):
    return {"answer": ANSWER, "group": GROUP, "reward": CORRECT, "correct": CORRECT, "mask": torch.ones(12, 2), **more}


def test_answer_entropy_in_bits():
    assert votes(ANSWER, GROUP).tolist() == [4] * 4 + [2] * 4 + [1] * 4
    assert answer_entropy(ANSWER, GROUP).tolist() == [0.0] * 4 + [1.0] * 4 + [2.0] * 4
    assert answer_entropy(ANSWER, torch.zeros_like(GROUP))[0] == pytest.approx(
        -sum(n / 12 * math.log2(n / 12) for n in Counter(ANSWER.tolist()).values()))
    assert answer_entropy(numbers(5, 5, 5), numbers(0, 0, 1)).tolist() == [0, 0, 0]  # the same answer in another group


def test_the_global_advantage_compares_prompts():
    told = global_advantage(CORRECT, GROUP)
    assert told.tolist() == pytest.approx([1.0] * 4 + [0.0] * 4 + [-1.0] * 4, abs=1e-5)  # means 1, 0.5, 0; deviation 0.5
    assert (global_advantage(torch.full((12,), 0.1), GROUP) == 0).all()


def test_consistent_groups_learn_from_the_global_advantage():
    copo, b = method(COPO), batch()
    local = copo.advantage(b, {})
    weight = [1 / (1 + math.exp(5)), 0.5, 1 / (1 + math.exp(-5))]
    assert b["local_weight"].tolist() == pytest.approx([w for w in weight for _ in range(4)], abs=1e-6)
    assert torch.equal(local, method(GroupPolicy).advantage(b, {}))
    assert copo.told["wrong_pushed_up"] == 0  # two wrong ones with B = 0 and A < 0, four with B < 0

    weighed = {}
    for blend in ("soft_with_zero", "forced", "local"):
        b = batch()
        method(COPO, blend=blend).advantage(b, {})
        weighed[blend] = b.get("local_weight")
    assert weighed["soft_with_zero"][4:8].tolist() == [0, 0.5, 0, 0.5]
    assert weighed["forced"].tolist() == [0] * 4 + [1] * 4 + [0] * 4
    assert weighed["local"] is None
    b = batch()
    method(COPO, blend="soft_with_zero", scale="none", official_zero=True).advantage(b, {})
    assert not b["local_weight"].any()


def test_wrong_responses_of_good_groups_are_pushed_up_and_counted():
    correct = numbers(1.0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0)
    for blend, share in (("soft_with_zero", 1 / 8), ("forced", 0.0)):
        copo = method(COPO, blend=blend)
        copo.advantage({**batch(), "reward": correct, "correct": correct}, {})
        assert copo.told["wrong_pushed_up"] == pytest.approx(share)


def test_diverse_groups_can_be_discounted():
    b = batch(answer=numbers(7, 7, 7, 7, 7, 3, 2, 3, 0, 1, 2, 4), reward=torch.ones(12))
    copo = method(COPO, discounted=True)
    copo.advantage(b, {})
    value = [1 - e * 0.75 / 2 for e in (0.0, 1.5, 2.0)]
    mean = sum(value) / 3
    deviation = math.sqrt(sum((v - mean) ** 2 for v in value) / 2)
    assert b["global_advantage"][::4].tolist() == pytest.approx([(v - mean) / deviation for v in value], abs=1e-4)


def test_the_loss_is_a_blend_of_two_clipped_losses():
    log_ratio = torch.tensor([[0.5, -0.5], [0.5, 0.1]])
    rows = Rows(advantage=numbers([1.0, 1.0], [-1.0, -1.0]), global_advantage=numbers(-1.0, 2.0), ratio=log_ratio.exp(),
                local_weight=numbers(0.25, 1.0), low=0.2, high=0.2)

    def clipped(a):
        return torch.maximum(-a * rows.ratio, -a * rows.ratio.clamp(0.8, 1.2))

    own, between = clipped(rows.advantage), clipped(numbers([-1.0], [2.0]).expand(2, 2))
    loss = method(COPO).surrogate(rows)
    assert loss[0].tolist() == pytest.approx((0.25 * own + 0.75 * between)[0].tolist())
    assert torch.equal(loss[1], own[1])
    assert rows.advantage[0].tolist() == [1.0, 1.0]  # put back


# ---- AEPO

def sampled(correct, mark, groups):
    """A batch whose tokens tell where they come from: `mark` plus the row."""
    rows = len(correct)
    tokens = (mark + torch.arange(rows))[:, None].expand(rows, 3)
    correct = torch.tensor(correct)
    return {"prompt": tokens[:, :2], "prompt_mask": torch.ones(rows, 2, dtype=torch.bool), "response": tokens,
            "mask": torch.ones(rows, 3), "log_prob": tokens.float(), "correct": correct,
            "group": torch.arange(groups).repeat_interleave(rows // groups),
            "reward": correct, "answer": torch.arange(rows), "length": torch.full((rows,), 3.0)}


MAIN = sampled([1.0, 0, 0, 0, 1, 1, 0, 0], 0, 2)
CONTROL = sampled([1.0, 1, 0, 0, 1, 1, 1, 1, 0, 1, 0, 0], 100, 3)  # correct ones of mixed groups: rows 0, 1 and 9


def aepo(reading=0.0, **knobs):
    made = method(AEPO, **knobs)
    made.register_buffer("entropy_reading", torch.tensor(reading))
    return made


def came_in(out):
    return sorted(set((out["response"][:, 0] - 100)[out["control"] > 0].tolist()))


@pytest.mark.parametrize("choice", ["random", "first"])
def test_correct_rows_of_mixed_control_groups_come_in(choice):
    out = aepo(replaced=0.5, choice=choice).mixed(MAIN, CONTROL)
    assert came_in(out) == [0, 1, 9] and out["control"].sum() == 3  # three candidates for four places
    here = out["control"] == 0
    for key in ("prompt", "response", "log_prob"):
        assert torch.equal(out[key][here], MAIN[key][here])
        assert torch.equal(out[key][~here][:, 0], out["response"][~here][:, 0].to(out[key].dtype))  # whole rows move
    for key in ("reward", "correct", "group", "answer", "length"):
        assert torch.equal(out[key], MAIN[key])  # figures and group means are those of the main rollout
    if choice == "first":
        assert out["control"].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
        assert out["response"][:3, 0].tolist() == [100, 101, 109]


def test_the_number_of_replaced_rows():
    assert aepo(replaced=0.25).mixed(MAIN, CONTROL)["control"].sum() == 2
    assert aepo(replaced=0.01).mixed(MAIN, CONTROL)["control"].sum() == 1  # one at least
    assert aepo(0.9, replaced=0.5).mixed(MAIN, CONTROL)["control"].sum() == 1  # above the target: half of three
    none = aepo(replaced=0.5).mixed(MAIN, sampled([1.0, 1, 0, 0], 100, 2))
    assert none["control"].sum() == 0 and torch.equal(none["response"], MAIN["response"])


def test_advantages_are_those_before_the_exchange_and_one_for_what_came_in():
    made = aepo(replaced=0.5, choice="first", control_advantage=1.5)
    out = made.mixed(MAIN, CONTROL)
    plain = method(GroupPolicy).advantage(MAIN, {})
    assert made.advantage(out, {}).tolist() == pytest.approx([1.5, 1.5, 1.5, *plain[3:].tolist()])
    assert torch.equal(made.advantage(MAIN, {}), plain)


def test_the_thermostat_follows_the_reading_of_the_batch_before():
    made, logits = aepo(0.4, entropy_target=0.5), torch.zeros(3, 5)
    assert made.temperature_of(logits).tolist() == [[pytest.approx(1.2)]] * 3
    told = {"entropy": torch.full((8, 3), 0.7), "log_prob": torch.full((8, 3), -3.0)}
    told["entropy"][:3] = 9.0
    out = aepo(replaced=0.5, choice="first").mixed(MAIN, CONTROL)
    made.observe(out, told)
    assert made.temperature_of(logits)[0] == pytest.approx(1.2)  # in force from the next batch on
    made.after_update(out)
    assert made.entropy_reading == pytest.approx(0.7)  # main rows alone
    assert made.temperature_of(logits)[0] == pytest.approx(0.8)
    made = method(AEPO, reading="sample")
    made.register_buffer("entropy_reading", torch.zeros(()))
    made.observe(out, told), made.after_update(out)
    assert made.entropy_reading == pytest.approx(3.0)
    plain = method(AEPO, proposal="plain", temperature=0.9)
    plain.register_buffer("entropy_reading", torch.zeros(()))
    assert plain.temperature_of(logits)[0] == pytest.approx(0.9)


def test_the_blend_tilts_correct_responses_towards_the_other_temperature():
    made = aepo(0.45, variant="blend", entropy_target=0.5)
    logits, target = torch.tensor([[2.0, 0.0, 1.0]]), numbers(1)
    told = made.measure(logits, target)
    assert told["control_log_prob"] == pytest.approx((logits / 1.2).log_softmax(-1)[0, 1].item())
    old = {k: v.expand(4, 1) for k, v in told.items()}
    correct = numbers(1.0, 0.0, 0.0, 0.0)
    made.observe({"mask": torch.ones(4, 1), "correct": correct}, old)
    ratio = 0.05 / 0.25
    assert made.blended == pytest.approx(ratio / (1 + ratio))
    rows = Rows(advantage=torch.full((4, 1), 2.0), correct=correct, old=old)
    made.weigh(rows)
    a, tilt = made.blended, (told["control_log_prob"] - told["log_prob"]).exp()
    assert rows.advantage[0] == pytest.approx(((1 - a) * 2 + a * tilt).item())
    assert rows.advantage[1:].unique() == pytest.approx(((1 - a) * 2).item())
    made.observe({"mask": torch.ones(4, 1), "correct": torch.zeros(4)}, old)
    assert made.blended == 0  # nothing correct


# ---- TTRL

def test_the_first_met_of_the_most_common_answers_is_elected():
    rng = random.Random(0)
    for _ in range(50):
        groups = [[rng.choice([-1, 0, 1, 2, 3]) for _ in range(7)] for _ in range(5)]
        answer = torch.tensor(list(itertools.chain(*groups)))
        group = torch.arange(5).repeat_interleave(7)
        winner, count = elected(answer, group)
        for g, told in enumerate(groups):
            known = Counter(a for a in told if a >= 0)  # a Counter keeps the order in which answers were met
            expected = known.most_common(1)[0] if known else (-1, 0)
            assert (answer[winner[7 * g]].item(), count[7 * g].item()) == expected
            assert group[winner[7 * g]] == g


class Source:
    """Four prompts; their responses' answers as given, in groups."""

    def __init__(self, answers, correct):
        self.answers, self.correct = answers, correct

    def problems(self, number):
        return list(range(number))

    def rollouts(self, problems, samples, temperature=1.0, name="rollout", adjust=None):
        answer = torch.tensor([self.answers[i][j] for i in problems for j in range(samples)])
        correct = torch.tensor([float(self.answers[i][j] == self.correct[i]) for i in problems for j in range(samples)])
        return {"answer": answer, "group": torch.arange(len(answer)) // samples, "correct": correct, "reward": correct,
                "mask": torch.ones(len(answer), 2)}


SOURCE = Source([[0, 1, 1, 1], [2, 2, 3, 3], [-1, -1, -1, 4], [-1, -1, -1, -1]], [0, 3, 4, 5])


def test_the_majority_of_all_votes_rewards_the_first_responses():
    ttrl = method(TTRL, prompts=4, samples=2, votes=4)
    out = ttrl.collect(SOURCE)
    assert out["group"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and out["label"][::2].tolist() == [1, 2, 4, -1]
    assert ttrl.reward(out).tolist() == [0, 1, 1, 1, 0, 0, 0, 0]  # without an answer: nothing, even if nobody has one
    assert ttrl.told["label_accuracy"] == 1 / 4  # 4 alone is right
    assert ttrl.told["majority"] == (3 + 2 + 1 + 0) / 16
    assert ttrl.told["reward_accuracy"] == 4 / 8  # the first prompt's both and the second's both are wrong
    blind = {**out, "correct": 1 - out["correct"], "reward": 1 - out["reward"]}
    assert torch.equal(ttrl.reward(blind), ttrl.reward(out))  # the truth is not read
    assert method(TTRL, labels="verifier").reward(out).tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    assert len(method(TTRL, prompts=4, samples=3, votes=1).collect(SOURCE)["label"]) == 12  # at least `samples` vote


# ---- SPINE

ENTROPY = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5, 9.0], [5.0, 0.0, 0.0, 0.0, 0.0, 6.0]])
MASK = torch.tensor([[1.0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])


def spine(**knobs):
    made = method(SPINE, **knobs)
    made.register_buffer("band_edges", torch.tensor([-torch.inf, torch.inf]))
    return made


def observed(entropy=ENTROPY, mask=MASK, **knobs):
    made = spine(**knobs)
    made.observe({"mask": mask}, {"entropy": entropy})
    return made


def test_forks():
    each = observed(fork_share=0.4).forks(ENTROPY, MASK)
    assert each.tolist() == [[0, 0, 0, 1, 1, 0], [1, 0, 0, 0, 0, 1]]  # of every response its own; padding never
    assert observed(fork="top_batch", fork_share=0.2).forks(ENTROPY, MASK).tolist() == [[0] * 6, [1, 0, 0, 0, 0, 1]]
    assert observed(fork="two_cluster").forks(ENTROPY, MASK).tolist() == [[1, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 1]]
    assert torch.equal(observed(fork_share=1.0).forks(ENTROPY, MASK), MASK)


def test_two_clusters_maximise_the_variance_between_them():
    values = torch.cat([torch.randn(40, generator=torch.Generator().manual_seed(0)), torch.linspace(3, 5, 13)])
    between = {v: (s := values[values > v]).numel() * (r := values[values <= v]).numel() * (s.mean() - r.mean()).item() ** 2
               for v in values.tolist() if v < values.max()}
    assert two_clusters(values).item() == max(between, key=between.get)
    assert two_clusters(numbers(1.5)) == 1.5  # one value alone has nothing above it


def rows_for(made, entropy=ENTROPY):
    entropy = entropy.clone().requires_grad_()
    rows = Rows(mask=MASK, tokens=MASK.sum(), old={"entropy": ENTROPY}, now={"entropy": entropy}, weight=torch.ones_like(MASK))
    made.weigh(rows)
    return rows, entropy


def test_only_forks_are_learned_from():
    made = observed(fork_share=0.4, renormalise=True)
    rows, _ = rows_for(made)
    assert rows.tokens == rows.mask.sum() == 4 and rows.weight.all()
    made = observed(fork_share=0.4, renormalise=False)
    rows, _ = rows_for(made)
    assert rows.tokens == 11 and torch.equal(rows.mask, MASK) and (rows.weight * rows.mask).sum() == 4


def test_the_band_acts_on_forks_outside_it_through_the_current_entropy():
    for band in ("linear", "squared"):
        made = observed(fork_share=0.4, band_weight=2.0, band=band, band_low=0.0, band_high=1.0)
        assert made.band_edges.tolist() == pytest.approx([0.4, 6.0])
        inside, entropy = rows_for(made)
        value = made.penalty(inside)
        value.backward()
        assert value == 0 and not entropy.grad.any()
        current = ENTROPY.clone()
        current[0, 3], current[1, 5], current[0, 0] = 0.2, 6.5, 0.0  # below, above; not a fork
        rows, entropy = rows_for(made, current)
        value = made.penalty(rows)
        value.backward()
        distance = [0.2, 0.5] if band == "linear" else [0.04, 0.25]
        assert value.item() == pytest.approx(2.0 * sum(distance) / 4, rel=1e-5)
        slope = [-1.0, 1.0] if band == "linear" else [-0.4, 1.0]
        assert entropy.grad[[0, 1], [3, 5]].tolist() == pytest.approx([s * 2.0 / 4 for s in slope], rel=1e-5)
        assert entropy.grad.count_nonzero() == 2


def test_edges():
    frozen = observed(fork_share=1.0)
    before = frozen.band_edges.clone()
    known = ENTROPY[MASK > 0]
    assert before.tolist() == pytest.approx([known.quantile(0.1).item(), known.quantile(0.9).item()])
    frozen.observe({"mask": MASK}, {"entropy": ENTROPY * 2})
    assert torch.equal(frozen.band_edges, before)

    robust = observed(fork_share=1.0, edges="mad")
    middle = known.quantile(0.5)
    reach = 2 * (known - middle).abs().quantile(0.5)
    assert robust.band_edges.tolist() == pytest.approx([(middle - reach).item(), (middle + reach).item()])
    first = robust.band_edges.clone()
    robust.observe({"mask": MASK}, {"entropy": ENTROPY * 2})
    assert robust.band_edges.tolist() == pytest.approx((first * 1.1).tolist())  # 0.9 e + 0.1 (2 e)


def test_a_batch_without_forks_changes_nothing():
    made = observed(torch.zeros_like(ENTROPY), fork_share=0.2)
    assert made.band_edges.isinf().all() and made.told["fork_entropy"] == 0
    rows = Rows(mask=MASK, tokens=MASK.sum(), old={"entropy": 0 * ENTROPY}, now={"entropy": (0 * ENTROPY).requires_grad_()},
                weight=torch.ones_like(MASK))
    made.weigh(rows)
    value = made.penalty(rows)
    value.backward()
    assert value == 0 and not rows.now["entropy"].grad.any()
