"""Candidate lists and their yardsticks: closed forms against torch.distributions and Monte Carlo, the stream's shapes,
passes and state, the split of the states."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from envs.control.distillation import Candidates, Distillation, divergences, ndcg, normal_kl, normal_log_prob
from envs.control.teacher import Teacher
from methods.common.networks import mlp
from methods.preference.adpo import ADPO
from runner.errors import UserError
from runner.interface import Spec

S, A = 3, 2  # observation and action sizes


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_teacher(std=0.3, dtype=torch.float32):
    torch.manual_seed(5)
    return Teacher(mlp(S, (8,), A, squash=True).to(dtype).requires_grad_(False), std, S, A)


def make_method(dtype=torch.float32, **values):
    torch.manual_seed(0)
    method = ADPO(ADPO.Config(hidden=(8,), **values))
    method.setup(Spec(observation_size=S, action_size=A))
    method.to(dtype)
    method.make_optimizers()
    return method


def make_data(states=100, seed=0, **values):
    config = {"held_out": 0.2, "from_teacher": 4, "from_student": 3, "from_uniform": 2, "batch_size": 16, "passes": 1}
    config = SimpleNamespace(**{**config, **values})
    return Distillation(randn(states, S, seed=7, dtype=torch.float32), make_teacher(), config,
                        torch.Generator().manual_seed(seed))


class Gaussian:
    """A method whose policy is known: N(mean(s) + shift, std^2)."""

    def __init__(self, teacher, std, shift=0.0, sign=1.0):
        self.teacher, self.std, self.shift, self.sign = teacher, std, shift, sign

    def distribution(self, states):
        mean = self.sign * self.teacher.mean(states) + self.shift
        return mean, torch.full_like(mean, self.std)

    def log_prob(self, states, candidates):
        mean, std = self.distribution(states)
        return Normal(mean.unsqueeze(1), std.unsqueeze(1)).log_prob(candidates).sum(-1)


# -- closed forms ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("std", [0.3, torch.tensor(2.0, dtype=torch.float64),
                                 torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)], ids=["float", "scalar", "vector"])
def test_normal_log_prob(std):
    action, mean = randn(4, 6, 3), randn(4, 1, 3, seed=1)
    wanted = Normal(mean, torch.as_tensor(std, dtype=torch.float64)).log_prob(action).sum(-1)
    torch.testing.assert_close(normal_log_prob(action, mean, std), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("std_p", [0.3, torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64), randn(5, 3, seed=2).exp()],
                         ids=["float", "vector", "rows"])
@pytest.mark.parametrize("std_q", [0.8, torch.tensor([0.6, 2.0, 0.1], dtype=torch.float64), randn(5, 3, seed=3).exp()],
                         ids=["float", "vector", "rows"])
def test_normal_kl(std_p, std_q):
    p, q = randn(5, 3), randn(5, 3, seed=1)
    as_normal = lambda mean, std: Normal(mean, torch.as_tensor(std, dtype=torch.float64))  # noqa: E731
    wanted = kl_divergence(as_normal(p, std_p), as_normal(q, std_q)).sum(-1)
    torch.testing.assert_close(normal_kl(p, std_p, q, std_q), wanted, rtol=1e-12, atol=1e-12)
    assert normal_kl(p, std_p, p, std_p).abs().max() < 1e-14


def test_normal_kl_sums_over_actions_whichever_mean_is_broadcast():
    one, many = randn(3), randn(5, 3, seed=1)
    for p, q in ((one, many), (many, one)):
        wanted = kl_divergence(Normal(p, 0.3), Normal(q, 0.8)).sum(-1)
        torch.testing.assert_close(normal_kl(p, 0.3, q, 0.8), wanted, rtol=1e-12, atol=1e-12)


def test_normal_kl_by_monte_carlo():
    n = 200_000
    p, q = torch.tensor([0.3, -0.5], dtype=torch.float64), torch.tensor([0.0, 0.2], dtype=torch.float64)
    std_p, std_q = torch.tensor([0.4, 1.2], dtype=torch.float64), torch.tensor([0.9, 0.7], dtype=torch.float64)
    x = p + std_p * randn(n, 2)
    ratio = normal_log_prob(x, p, std_p) - normal_log_prob(x, q, std_q)
    assert abs(ratio.mean() - normal_kl(p, std_p, q, std_q)) < 5 * ratio.std() / n ** 0.5
    assert abs(normal_kl(p, std_p, q, std_q) - normal_kl(q, std_q, p, std_p)) > 20 * ratio.std() / n ** 0.5


def test_divergences_both_ways():
    teacher, states = make_teacher(std=0.3, dtype=torch.float64), randn(40, S)
    figures = divergences(Gaussian(teacher, 0.6, shift=0.2), teacher, states)
    forward = A * (math.log(0.6 / 0.3) + (0.3 ** 2 + 0.2 ** 2) / (2 * 0.6 ** 2) - 0.5)
    backward = A * (math.log(0.3 / 0.6) + (0.6 ** 2 + 0.2 ** 2) / (2 * 0.3 ** 2) - 0.5)
    assert figures["kl_teacher_student"] == pytest.approx(forward, rel=1e-10)
    assert figures["kl_student_teacher"] == pytest.approx(backward, rel=1e-10)
    assert figures["student_std"] == pytest.approx(0.6)
    same = divergences(Gaussian(teacher, 0.3), teacher, states)
    assert same["kl_teacher_student"] == pytest.approx(0, abs=1e-12)
    assert same["kl_student_teacher"] == pytest.approx(0, abs=1e-12)


# -- ranking -----------------------------------------------------------------------------------------------------------
def test_ndcg_is_one_for_the_teachers_order_and_less_for_others():
    teacher, states = make_teacher(dtype=torch.float64), randn(50, S)
    assert ndcg(Gaussian(teacher, 0.3), teacher, states, seed=0) == pytest.approx(1, abs=1e-6)
    assert ndcg(Gaussian(teacher, 2.0), teacher, states, seed=0) == pytest.approx(1, abs=1e-6)  # the order is the same
    near = ndcg(Gaussian(teacher, 0.3, shift=0.05), teacher, states, seed=0)
    far = ndcg(Gaussian(teacher, 0.3, shift=0.6), teacher, states, seed=0)
    assert 1 - 1e-6 > near > far
    random = SimpleNamespace(log_prob=lambda s, c: randn(len(s), c.shape[1], seed=9))
    reverse = SimpleNamespace(log_prob=lambda s, c: -Gaussian(teacher, 0.3).log_prob(s, c))
    assert 0 < ndcg(reverse, teacher, states, 0) < ndcg(random, teacher, states, 0) < 0.8


def test_ndcg_against_a_loop_and_by_seed():
    teacher, states, seen = make_teacher(dtype=torch.float64), randn(4, S), []
    student = Gaussian(teacher, 0.5, shift=0.4)

    def spy(s, c):
        seen.append(c)
        return student.log_prob(s, c)

    method = SimpleNamespace(log_prob=spy)
    value = ndcg(method, teacher, states, seed=3)
    lists, ratios = seen[0], []
    assert lists.shape == (4, 32, A)
    for state, actions in zip(states, lists, strict=True):
        mean = teacher.mean(state[None])[0]
        density = [math.exp(-((a - mean) ** 2).sum().item() / (2 * 0.3 ** 2)) for a in actions]
        relevance = [d / sum(density) for d in density]
        order = sorted(range(32), key=lambda i: ((actions[i] - mean - 0.4) ** 2).sum().item())
        gain = sum(relevance[i] / math.log2(k + 2) for k, i in enumerate(order))
        ratios.append(gain / sum(r / math.log2(k + 2) for k, r in enumerate(sorted(relevance, reverse=True))))
    assert value == pytest.approx(sum(ratios) / 4, rel=1e-6)
    before = torch.get_rng_state()
    assert ndcg(method, teacher, states, seed=3) == value and torch.equal(seen[0], seen[1])
    assert torch.equal(torch.get_rng_state(), before)  # its own randomness only
    ndcg(method, teacher, states, seed=4)
    assert not torch.equal(seen[0], seen[2])
    assert lists[:, 16:].abs().max() <= 1  # the second half is uniform in the box


# -- the split ---------------------------------------------------------------------------------------------------------
def rows(x):
    return {tuple(r) for r in x.tolist()}


@pytest.mark.parametrize("states, share", [(100, 0.2), (101, 0.1), (30, 0.5)])
def test_validation_and_held_out_states_are_disjoint_from_training(states, share):
    data = make_data(states, held_out=share)
    parts = [rows(x) for x in (data.train, data.validation, data.held_out)]
    assert sum(map(len, parts)) == states and len(set.union(*parts)) == states
    held = int(states * share)
    assert len(data.train) == states - held and abs(len(data.validation) - len(data.held_out)) <= 1
    assert set.union(*parts) == rows(randn(states, S, seed=7, dtype=torch.float32))
    assert torch.equal(data.train_mean, data.teacher.mean(data.train))


def test_the_split_depends_on_its_generator_only():
    torch.manual_seed(1)
    a = make_data(seed=0)
    torch.manual_seed(2)
    b, c = make_data(seed=0), make_data(seed=1)
    assert torch.equal(a.train, b.train) and torch.equal(a.held_out, b.held_out)
    assert rows(a.held_out) != rows(c.held_out)


def test_few_states_still_leave_one_for_each_yardstick():
    data = make_data(10, held_out=0.01)
    assert (len(data.train), len(data.validation), len(data.held_out)) == (8, 1, 1)


# -- the stream --------------------------------------------------------------------------------------------------------
def test_batches_hold_what_they_say():
    data, method = make_data(), make_method(anchor="teacher")
    stream = data.stream(method, seed=3)
    batch = stream.next()
    assert set(batch) == {"context", "candidates", "reward", "teacher_log_prob"}
    assert batch["context"].shape == (16, S) and batch["candidates"].shape == (16, 9, A)
    assert batch["reward"].shape == batch["teacher_log_prob"].shape == (16, 9)
    wanted = Normal(data.teacher.mean(batch["context"]).unsqueeze(1), 0.3).log_prob(batch["candidates"]).sum(-1)
    torch.testing.assert_close(batch["reward"], wanted, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(batch["teacher_log_prob"], wanted, rtol=1e-5, atol=1e-4)
    assert stream.data()["context"] is data.train


def test_contexts_are_training_states_only():
    data = make_data()
    stream = data.stream(make_method(), seed=3)
    seen = set.union(*(rows(stream.next()["context"]) for _ in range(60)))
    assert seen == rows(data.train)  # all of them, and none that is held out


def test_candidates_come_from_teacher_student_and_box():
    data = make_data(from_teacher=300, from_student=200, from_uniform=100, batch_size=64)
    method = make_method()
    with torch.no_grad():
        method.policy.log_std.fill_(math.log(0.05))
        method.policy.net[-1].bias.add_(3)
    batch = data.stream(method, seed=3).next()
    drawn, own, box = batch["candidates"].split([300, 200, 100], 1)
    mean = data.teacher.mean(batch["context"]).unsqueeze(1)
    for part, centre, std in ((drawn, mean, 0.3), (own, method.distribution(batch["context"])[0].unsqueeze(1), 0.05)):
        noise = (part - centre) / std
        assert abs(noise.mean().item()) < 5 / noise.numel() ** 0.5 and abs(noise.std().item() - 1) < 0.02
        assert (noise.mean(1).abs() < 6 / part.shape[1] ** 0.5).all()  # for every state, around its own mean
    assert box.abs().max() <= 1 and box.abs().max() > 0.99
    assert abs(box.mean().item()) < 5 / (3 * box.numel()) ** 0.5
    assert abs(box.std().item() - 3 ** -0.5) < 0.02


@pytest.mark.parametrize("counts", [(0, 2, 3), (3, 0, 2), (2, 3, 0), (5, 0, 0), (0, 0, 2)])
def test_any_source_may_be_left_out(counts):
    data = make_data(**dict(zip(("from_teacher", "from_student", "from_uniform"), counts, strict=True)))
    batch = data.stream(make_method(), seed=3).next()
    assert batch["candidates"].shape == (16, sum(counts), A) and batch["reward"].shape == (16, sum(counts))


@pytest.mark.parametrize("counts", [(0, 0, 0), (1, 0, 0), (0, 1, 0)])
def test_a_list_needs_two_candidates(counts):
    data = make_data(**dict(zip(("from_teacher", "from_student", "from_uniform"), counts, strict=True)))
    with pytest.raises(UserError, match="at least 2"):
        data.stream(make_method(), seed=3)


@pytest.mark.parametrize("passes", [1, 3])
def test_passes_reuse_the_batch(passes):
    stream = make_data(passes=passes).stream(make_method(), seed=3)
    batches = [stream.next()["candidates"] for _ in range(3 * passes)]
    for k in range(3):
        group = batches[k * passes:(k + 1) * passes]
        assert all(torch.equal(group[0], b) for b in group)
    assert not torch.equal(batches[0], batches[passes]) and not torch.equal(batches[passes], batches[2 * passes])


def test_behaviour_log_probs_are_the_students_when_the_list_was_drawn():
    data, method = make_data(passes=2), make_method(anchor="on_policy", learning_rate=0.05)
    stream = data.stream(method, seed=3)
    first = stream.next()
    drawn_with = method.log_prob(first["context"], first["candidates"])
    assert torch.equal(first["behaviour_log_prob"], drawn_with)
    loss = method.update(first)["loss"].item()
    assert loss == pytest.approx(math.log(9), rel=1e-6)  # u = 0 at the first pass
    second = stream.next()
    assert torch.equal(second["behaviour_log_prob"], drawn_with)  # and they stay for the second
    assert method.update(second)["loss"].item() != pytest.approx(math.log(9), rel=1e-6)
    third = stream.next()
    assert torch.equal(third["behaviour_log_prob"], method.log_prob(third["context"], third["candidates"]))


def run(stream, method, updates):
    out = []
    for _ in range(updates):
        batch = stream.next()
        method.update(batch)
        method.updates += 1
        out.append({k: v.clone() for k, v in batch.items()})
    return out


@pytest.mark.parametrize("before", [0, 1, 2, 3])
def test_a_stream_continues_to_the_bit(before):
    """State saved after `before` batches, in the middle of a batch's passes or not, reproduces the next ones."""
    data, method = make_data(passes=3), make_method(anchor="on_policy", learning_rate=0.05)
    stream = data.stream(method, seed=3)
    run(stream, method, before)
    saved = torch.get_rng_state(), stream.state_dict(), {k: v.clone() for k, v in method.state_dict().items()}
    optimizer = {k: {n: t.clone() for n, t in v.items()}
                 for k, v in method.optimizers["policy"].state_dict()["state"].items()}
    wanted = run(stream, method, 7)

    again = make_method(anchor="on_policy", learning_rate=0.05)
    again.load_state_dict(saved[2])
    state = again.optimizers["policy"].state_dict()
    again.optimizers["policy"].load_state_dict({**state, "state": optimizer})
    continued = Candidates(data, again, seed=99)  # another seed: the state must bring its own
    continued.load_state_dict(saved[1])
    torch.set_rng_state(saved[0])
    actual = run(continued, again, 7)
    for a, w in zip(actual, wanted, strict=True):
        assert a.keys() == w.keys() and all(torch.equal(a[k], w[k]) for k in a)
    assert not torch.equal(wanted[0]["candidates"], wanted[-1]["candidates"])


def test_a_saved_state_does_not_move_with_the_stream():
    data, method = make_data(), make_method()
    stream = data.stream(method, seed=3)
    stream.next()
    state = stream.state_dict()
    copy = {"generator": state["generator"].clone(), "batch": {k: v.clone() for k, v in state["batch"].items()}}
    for _ in range(3):
        stream.next()
    assert torch.equal(state["generator"], copy["generator"])
    assert all(torch.equal(state["batch"][k], v) for k, v in copy["batch"].items())


def test_streams_differ_by_seed_and_repeat_by_seed():
    data, method = make_data(from_student=0), make_method()
    a, b, c = (data.stream(method, seed).next() for seed in (3, 3, 4))
    assert torch.equal(a["candidates"], b["candidates"])
    assert not torch.equal(a["candidates"], c["candidates"])
