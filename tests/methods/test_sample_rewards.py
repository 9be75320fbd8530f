"""Reward models of samples: Rao and Kupper's probabilities enumerated, gradients in closed form, ties of a world, and finished
runs that reward other methods."""

from __future__ import annotations

import importlib.util
import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from token_methods import bare

from envs.generation.images import Images
from envs.generation.metrics import calibration_error, rank_correlation
from envs.generation.plane import Plane
from methods.diffusion.bradley_terry_ties import BradleyTerryTies
from methods.diffusion.mlp import MLP
from methods.diffusion.rater import Rater, rater_of
from methods.diffusion.sample_reward_model import SampleRewardModel
from runner.errors import UserError
from runner.interface import Spec

_spec = importlib.util.spec_from_file_location("lab", Path(__file__).parents[1] / "conformance" / "lab.py")
lab = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(lab)

KS = (1.2, 2.0, 5.0, 20.0)
POINTS = Spec(sample_shape=(2,), classes=2)


def made(cls, spec=POINTS, **values):
    torch.manual_seed(0)
    method = bare(cls, **values)
    method.blueprint = MLP(MLP.Config(width=16, depth=2))
    method.setup(spec)
    method.make_optimizers()
    return method


def loss(method, winner, loser, tie):
    winner, loser = (torch.as_tensor(v, dtype=torch.float64) for v in (winner, loser))
    return method.loss(SimpleNamespace(winner=winner, loser=loser, tie=torch.as_tensor(tie), told={}))


# ---- the likelihood ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("k", KS)
def test_the_three_outcomes_sum_to_one_and_the_loss_is_minus_their_logarithm(k):
    """Rao and Kupper: P(a > b) = p_a / (p_a + k p_b), and the rest is a tie; p = exp r."""
    method = bare(BradleyTerryTies, k=k)
    for a, b in itertools.product((-3.0, -0.4, 0.0, 0.7, 2.5), repeat=2):
        pa, pb = math.exp(a), math.exp(b)
        first, second = pa / (pa + k * pb), pb / (pb + k * pa)
        tie = method.tie_probability(torch.tensor([a - b], dtype=torch.float64)).item()
        assert first + second + tie == pytest.approx(1, abs=1e-12)
        assert loss(method, [a], [b], [False]).item() == pytest.approx(-math.log(first), rel=1e-9)
        assert loss(method, [b], [a], [False]).item() == pytest.approx(-math.log(second), rel=1e-9)
        for one, other in ((a, b), (b, a)):  # a tie has no order
            assert loss(method, [one], [other], [True]).item() == pytest.approx(-math.log(tie), rel=1e-9)


@pytest.mark.parametrize("k", KS)
def test_ties_draw_ratings_together(k):
    """d/dd of a tie's loss is sigma(d - log k) - sigma(-d - log k): 0 at equal ratings, where the loss is least."""
    method = bare(BradleyTerryTies, k=k)
    d = torch.tensor([-2.0, -0.3, 0.0, 0.3, 2.0], dtype=torch.float64, requires_grad=True)
    gradient, = torch.autograd.grad(sum(loss(method, v[None], [0.0], [True]) for v in d), d)
    expected = (d - math.log(k)).sigmoid() - (-d - math.log(k)).sigmoid()
    torch.testing.assert_close(gradient, expected.detach())
    assert gradient[2].item() == 0 and (gradient[3:] > 0).all() and (gradient[:2] < 0).all()
    assert method.tie_probability(torch.zeros(1)).item() == pytest.approx((k - 1) / (k + 1), rel=1e-6)


@pytest.mark.parametrize("k", KS)
def test_the_true_difference_is_the_expected_losss_minimum(k):
    method, true = bare(BradleyTerryTies, k=k), 0.8
    tie = method.tie_probability(torch.tensor([true], dtype=torch.float64)).item()
    first, second = (1 / (1 + k * math.exp(s * true)) for s in (-1, 1))

    def expected(d):
        return first * loss(method, d, [0.0], [False]) + second * loss(method, [0.0], d, [False]) \
            + tie * loss(method, d, [0.0], [True])

    d = torch.tensor([true], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(expected(d), d)[0].abs().item() < 1e-12
    assert all(expected(d.detach() + step) > expected(d.detach()) for step in (-0.5, 0.5))


def test_without_ties_it_is_bradley_terry_to_the_bit():
    winner, loser, tie = torch.randn(9), torch.randn(9), torch.arange(9) % 3 == 0
    rows = SimpleNamespace(winner=winner, loser=loser, tie=tie, told={})
    each = -F.logsigmoid(winner - loser)
    assert torch.equal(bare(BradleyTerryTies, k=1.0).loss(rows), each.mean())
    assert torch.equal(bare(SampleRewardModel).loss(rows), each.mean())
    torch.testing.assert_close(bare(SampleRewardModel, ties="drop").loss(rows), each[~tie].mean())
    assert bare(SampleRewardModel, ties="drop").loss(SimpleNamespace(**{**vars(rows), "tie": tie | True})).item() == 0
    assert bare(BradleyTerryTies, k=1.0).tie_probability(winner).eq(0).all()
    near = loss(bare(BradleyTerryTies, k=1 + 1e-9), winner, loser, tie & False)
    torch.testing.assert_close(near.float(), each.mean())


def test_the_generator_stays_and_the_level_is_held():
    x = torch.randn(2, 32, 2, generator=torch.Generator().manual_seed(2)).sort(0).values  # the right one is preferred
    batch = {"chosen": x[1], "rejected": x[0], "condition": torch.arange(32) % 2, "tie": torch.zeros(32, dtype=torch.bool)}
    method = made(SampleRewardModel, center=0.5)
    before = {k: v.clone() for k, v in method.network.state_dict().items()}
    winner, loser = (method.score(batch[s], batch["condition"]) for s in ("chosen", "rejected"))
    told = method.update(batch)
    assert told["level"].item() == pytest.approx((winner + loser).square().mean().item(), rel=1e-5)
    assert told["accuracy"].item() == pytest.approx((winner > loser).float().mean().item())
    for _ in range(150):
        method.updates += 1
        told = method.update(batch)
    assert told["accuracy"] > 0.8 and told["level"] < 0.2
    assert all(torch.equal(v, before[k]) for k, v in method.network.state_dict().items())
    smooth = made(SampleRewardModel, average=0.9)
    smooth.update(batch)
    start = made(SampleRewardModel).rating
    for old, new, now in zip(start.parameters(), smooth.rating.parameters(), smooth.smoothed.parameters()):
        torch.testing.assert_close(now, 0.9 * old + 0.1 * new)


# ---- the world ---------------------------------------------------------------------------------------------------------------

def test_ties_are_the_closest_pairs_and_nobody_elses_label_changes():
    pools = []
    for share in (0.0, 0.3):
        stream = Plane(Plane.Config(start="none", pairs=500, ties=share)).stream(made(SampleRewardModel), "preferred", 0)
        stream.ready(1)
        pools.append(stream.pairs)
    none, some = pools
    tie = some["tie"]
    assert not none["tie"].any() and tie.sum() == 150
    apart = (some["chosen_reward"] - some["rejected_reward"]).abs()
    assert apart[tie].max() <= apart[~tie].min()
    for k in ("chosen", "rejected", "chosen_reward"):
        assert torch.equal(none[k][~tie], some[k][~tie])
    sharp = Plane(Plane.Config(start="none", pairs=500, ties=0.3, label_temperature=1e-6))
    pairs = sharp.compared(made(SampleRewardModel), 500, 1)
    right = (pairs["chosen_reward"] > pairs["rejected_reward"]).float()
    assert right[~pairs["tie"]].mean() == 1 and 0.35 < right[pairs["tie"]].mean() < 0.65  # by a coin


def test_who_rates_by_the_proxy_is_right():
    world = Plane(Plane.Config(start="none", eval_samples=400, ties=0.25, label_temperature=1e-6))
    method = made(BradleyTerryTies)
    method.score = world.reward
    told = world.evaluate(method, 0)
    assert told["pair_accuracy"] == 1 and told["rank_agreement"] == pytest.approx(1)
    method.score = lambda x, condition: -world.reward(x, condition)
    told = world.evaluate(method, 0)
    assert told["pair_accuracy"] == 0 and told["rank_agreement"] == pytest.approx(-1)
    method.score = lambda x, condition: torch.zeros(len(x))
    told = world.evaluate(method, 0)
    assert told["pair_accuracy"] == 0.5 and told["tie_error"] == pytest.approx(2 / 3 - 0.25, abs=1e-6)  # k = 5
    assert made(SampleRewardModel).tie_probability(torch.randn(3)).eq(0).all() and world.pictures(method, 0) == {}


def test_rank_correlation_and_calibration_by_hand():
    x = torch.tensor([0.3, -1.0, 5.0, 2.0])
    assert rank_correlation(x, x.exp()).item() == pytest.approx(1)
    assert rank_correlation(x, torch.tensor([1.0, 0.0, 2.0, 3.0])).item() == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert rank_correlation(x[:1], x[:1]).item() == 0
    predicted, happened = torch.tensor([0.05, 0.05, 0.72, 0.78, 1.0]), torch.tensor([True, False, True, True, False])
    assert calibration_error(predicted, happened).item() == pytest.approx((0.9 + 0.5 + 1.0) / 5)


@pytest.mark.parametrize("shape", [(2,), (1, 8, 8), (3, 16, 16), (1, 13, 13)])
def test_a_rater_is_built_again_from_its_weights(shape):
    rater = Rater(shape, 3, (12, 7))
    x, condition = torch.randn(5, *shape, requires_grad=True), torch.arange(5) % 3
    spec = Spec(sample_shape=shape, classes=3)
    for prefix in ("rating.", ""):  # of a run, and of what `export` writes
        weights = {f"{prefix}{k}": v for k, v in rater.state_dict().items()}
        again = rater_of({**weights, **({"network.leave.weight": torch.zeros(2)} if prefix else {})}, spec)
        assert torch.equal(again(x, condition), rater(x, condition))
    gradient, = torch.autograd.grad(again(x, condition).sum(), x)
    assert gradient.abs().sum() > 0 and not any(p.requires_grad for p in again.parameters())
    assert not torch.equal(rater(x, condition), rater(x, (condition + 1) % 3))


# ---- finished runs that reward -----------------------------------------------------------------------------------------------

@pytest.fixture
def judge(tmp_path):
    method, world, stream = lab.assembled("bradley_terry_ties", "env.ties=0.3")
    lab.train(method, stream, 3)
    save_file({k: v.contiguous().clone() for k, v in method.state_dict().items()}, tmp_path / "weights.safetensors")
    return method, tmp_path


def test_a_finished_run_rewards_in_the_place_of_the_proxy(judge):
    method, folder = judge
    word = f'env.judge_run="{folder}"'
    for name in ("flow_grpo", "flow_dpo_online"):
        other, world, stream = lab.assembled(name, word)
        x, condition = torch.randn(4, 3, 2), torch.arange(4) % 2
        expected = torch.stack([method.score(x[:, i], condition) for i in range(3)]).mean(0)
        torch.testing.assert_close(stream.reward(x, condition), expected)
        told = lab.train(other, stream, 1)
        assert all(math.isfinite(v) for v in told[0].values())
        made = world.evaluate(other, 0)
        assert {"judged", "proxy", "energy"} <= made.keys() and made["judged"] != made["proxy"]
        assert len(world.provenance()["judge"]) == 16
    _, world, stream = lab.assembled("flow_rwr", word)
    batch = stream.next()
    torch.testing.assert_close(batch["chosen_reward"], method.score(batch["chosen"], batch["condition"]))
    assert not torch.allclose(batch["chosen_reward"], world.reward(batch["chosen"], batch["condition"]))
    _, world, _ = lab.assembled("r0", word)  # differentiates what it is rewarded by
    of, = world.spec().proxies
    x = torch.randn(4, 2, requires_grad=True)
    torch.testing.assert_close(of(x, condition).detach(), method.score(x, condition))
    assert torch.autograd.grad(of(x, condition).sum(), x)[0].abs().sum() > 0


def test_without_a_judge_nothing_is_learned():
    method, world, _ = lab.assembled("flow_grpo")
    assert "judged" not in world.evaluate(method, 0) and "judge" not in world.provenance()
    x, condition = torch.randn(4, 2), torch.arange(4) % 2
    assert torch.equal(world.rated(x, condition), world.reward(x, condition))


@pytest.mark.parametrize("case", ["missing", "empty folder", "no weights file", "a generator's", "of other conditions",
                                  "of images"])
def test_wrong_judges_are_refused_by_name(case, judge, tmp_path, cli):
    method, folder = judge
    path, held = folder / "weights.safetensors", dict(method.state_dict())
    if case == "missing":
        path = tmp_path / "nowhere"
    elif case == "empty folder":
        path = tmp_path / "empty"
        path.mkdir()
    elif case == "no weights file":
        path.write_bytes(b"not a safetensors file")
    elif case == "a generator's":
        save_file({k: v.clone() for k, v in held.items() if not k.startswith("rating.")}, path)
    else:
        spec = Spec(sample_shape=(2,) if case == "of other conditions" else (1, 8, 8), classes=8)
        save_file({f"rating.{k}": v for k, v in Rater(spec.sample_shape, 8, (64, 64)).state_dict().items()}, path)
    done = cli("method=flow_grpo", "env=ring", "size=smoke", "logger=none", f"env.judge_run={path}")
    assert done.code == 2 and f"env.judge_run={path}" in done.text and "Traceback" not in done.text, done.text
    says = {"missing": "is no folder of a finished run", "empty folder": "is no folder of a finished run",
            "no weights file": "can't be read", "a generator's": "no reward model of samples"}
    assert says.get(case, "rates other samples") in done.text, done.text


def test_a_judge_of_images():
    world = Images(Images.Config(start="none", pairs=40, eval_samples=40))
    method = made(BradleyTerryTies, world.spec())
    stream = world.stream(method, "preferred", 0)
    batch = stream.next()
    first = method.update(batch)["loss"]
    for _ in range(30):
        method.updates += 1
        last = method.update(batch)["loss"]
    assert last < first
    told = world.evaluate(method, 0)
    assert set(told) == {"pair_accuracy", "rank_agreement", "tie_error"}
    with pytest.raises(UserError, match="rates other samples"):
        rater_of(method.state_dict(), POINTS)
