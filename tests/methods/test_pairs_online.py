"""Pairs of one's own responses (online DPO, INPO) and of two objectives (MODPO), against closed forms."""

from __future__ import annotations

import copy

import pytest
import torch
from pair_methods import arm_pairs, tabular

import envs.pairs.base
from envs.pairs.base import Stored
from envs.pairs.cyclic import CyclicWorld, Game
from envs.pairs.fronts import FrontsWorld, hypervolume
from methods.preference.dpo import DPO
from methods.preference.inpo import INPO
from methods.preference.ipo import IPO
from methods.preference.modpo import MODPO
from methods.preference.online_dpo import OnlineDPO
from runner.catalogue import Catalogue
from runner.compose import compose
from runner.errors import UserError
from runner.interface import make_config
from runner.knobs import knobs_of
from runner.run import assemble, make_fabric

BOOK = Catalogue()


def settings(cls, **values):
    return make_config([cls.Config], {**{k.name: k.default for k in knobs_of(cls.Config)}, **values})


def gradient(method, columns):
    """Loss and gradient of theta on a batch of pairs."""
    pairs = method.pairs(columns)
    if "chosen_current" in columns:
        pairs.current = torch.stack([columns["chosen_current"], columns["rejected_current"]])
    method.see(pairs, method.score(method.rows(columns), method.measuring()))
    loss = method.loss(pairs)
    return loss.detach(), torch.autograd.grad(loss, method.policy.theta)[0]


def moved(method, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        method.policy.theta.copy_(torch.randn_like(method.policy.theta))
    return method


TRIPLES = [(0, 0, 1), (0, 2, 1), (1, 3, 0), (1, 1, 2), (0, 3, 2)]


def test_inpo_with_tau_of_eta_is_ipo_against_the_start_and_with_none_against_the_round():
    base = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    eta = 0.4
    for tau in (eta, 0.0):
        ours, theirs = moved(tabular(INPO, base, eta=eta, tau=tau)), moved(tabular(IPO, base, beta=eta))
        columns = arm_pairs(ours, TRIPLES)
        current = moved(tabular(DPO, base), seed=5)  # pi_t, another policy
        for side in ("chosen", "rejected"):
            rows = {"prompt": columns["prompt"], "prompt_mask": columns["prompt_mask"], "response": columns[side],
                    "mask": columns[f"{side}_mask"]}
            columns[f"{side}_current"] = current.score(rows)["log_prob"].detach()
        against = columns if tau else {**columns, **{f"{s}_reference": columns[f"{s}_current"] for s in ("chosen", "rejected")}}
        mine = gradient(ours, columns)
        other = gradient(theirs, {k: v for k, v in against.items() if not k.endswith("_current")})
        torch.testing.assert_close(mine, other)


def test_an_inpo_round_is_the_mirror_step():
    """All pairs of arms under a uniform pi_t and the oracle's own probabilities: the regression's minimiser is the step."""
    k, eta, tau = 5, 0.7, 0.2
    g = torch.Generator().manual_seed(3)
    raw = torch.rand(k, k, generator=g)
    beats = (0.5 + 0.4 * (raw - raw.T)).fill_diagonal_(0.5)
    base = torch.randn(1, k, generator=g)
    method = tabular(INPO, base, eta=eta, tau=tau, learning_rate=0.05)
    with torch.no_grad():
        method.policy.theta.copy_(-base)  # pi_t is uniform, so that every pair of arms is as likely
    triples = [(0, i, j) for i in range(k) for j in range(k)]
    columns = arm_pairs(method, triples, [float(beats[i, j]) for _, i, j in triples])
    for side in ("chosen", "rejected"):
        columns[f"{side}_current"] = torch.full((k * k, 1), -torch.tensor(float(k)).log().item())
    adam = torch.optim.Adam([method.policy.theta], lr=0.02)
    for _ in range(2000):
        adam.zero_grad()
        method.policy.theta.grad = gradient(method, columns)[1]
        adam.step()
    wins = beats.mean(1)  # P(y beats pi_t)
    truth = (wins / eta + tau / eta * base[0].log_softmax(-1)).softmax(-1)
    assert 0.5 * (method.policy.scores(torch.tensor([0])).softmax(-1)[0] - truth).abs().sum() < 1e-3


def test_the_gap_is_nought_at_the_nash_policy_alone():
    game, tau, eta = Game(settings(CyclicWorld), 0), 0.1, 3.0
    base = game.base[0].double().log_softmax(-1)
    log_p, gaps = base.clone(), []
    for _ in range(2000):  # exact mirror steps
        gaps.append(game.gap(log_p, tau))
        log_p = ((game.beats.double() @ log_p.exp()) / eta + tau / eta * base + (1 - tau / eta) * log_p).log_softmax(-1)
    assert gaps[0] > 0.01 and gaps[-1] < 1e-6
    torch.manual_seed(0)
    assert min(game.gap(torch.randn(12).log_softmax(-1), tau) for _ in range(100)) > 1e-3
    assert torch.allclose(game.beats + game.beats.T, torch.ones(12, 12))


@pytest.mark.parametrize("name", ["online_dpo", "inpo"])
def test_rounds_of_pairs(name):
    """What is preferred stands first; extremes are the best and the worst; labels are drawn with the oracle's probability."""
    job = compose([f"method={name}", "env=cyclic", "method.prompts=2000", "method.responses=3", "method.pairing=extremes",
                   "logger=none", "hardware=cpu"], BOOK)
    method, world, stream = assemble(job)
    batch = stream.next()
    beats = batch["beats"].view(-1, 3, 3)
    torch.testing.assert_close(beats + beats.transpose(1, 2), torch.ones_like(beats))
    columns, seen = method.paired(batch), batch["response"].view(-1, 3)
    for row in range(50):
        wins = beats[row].mean(-1)
        two = {int(columns["chosen"][row]), int(columns["rejected"][row])}
        assert two == {int(seen[row][wins.argmax()]), int(seen[row][2 - wins.flip(0).argmin()])}
    first = columns["chosen"].squeeze(1) == seen.gather(1, beats.mean(-1).argmax(-1, keepdim=True)).squeeze(1)
    differ = columns["chosen"].squeeze(1) != columns["rejected"].squeeze(1)
    assert columns["label"].eq(1).all()
    assert abs(first[differ].float().mean() - columns["oracle"][differ].mean()) < 0.04
    told = method.update(batch)
    assert all(v.isfinite() for v in told.values())


def test_soft_labels_are_the_oracle():
    method, _, stream = assemble(compose(["method=online_dpo", "env=cyclic", "method.prompts=64", "method.labels=soft",
                                          "logger=none", "hardware=cpu"], BOOK))
    columns = method.paired(stream.next())
    assert (columns["label"] >= 0.5).all() and not columns["label"].eq(1).any()
    torch.testing.assert_close(columns["label"], torch.maximum(columns["oracle"], 1 - columns["oracle"]))


def test_online_dpo_of_one_pass_is_dpo_on_its_pairs():
    words = ["method=online_dpo", "env=cyclic", "method.prompts=64", "method.passes=1", "logger=none", "hardware=cpu"]
    method, _, stream = assemble(compose(words, BOOK))
    batch = stream.next()
    columns = method.paired(batch)
    plain = tabular(DPO, method.policy.base, learning_rate=method.config.learning_rate, gradient_norm=1.0)
    with torch.no_grad():
        told = plain.score_reference(plain.rows(columns))["log_prob"].view(2, -1, 1)
    plain.update({**columns, "chosen_reference": told[0], "rejected_reference": told[1]})
    method.update(batch)
    torch.testing.assert_close(method.policy.theta.grad, plain.policy.theta.grad)  # Adam would blow rounding up
    assert isinstance(method, OnlineDPO) and not method.capturable


def test_modpo_reaches_the_weighted_optimum():
    """With the other objective's true reward as margin and exact labels: pi_ref exp((w r1 + (1 - w) r2) / beta)."""
    g = torch.Generator().manual_seed(0)
    base, first, second = (torch.randn(1, 6, generator=g) for _ in range(3))
    beta = 0.5
    for w in (0.2, 0.7):
        method = tabular(MODPO, base, beta=beta, weight=w, learning_rate=0.03, margin_steps=1)
        triples = [(0, i, j) for i in range(6) for j in range(i)]
        labels = [float(torch.sigmoid(first[0, i] - first[0, j])) for _, i, j in triples]
        columns = arm_pairs(tabular(DPO, base), triples, labels)
        columns |= {f"{side}_other": second[0, columns[side][:, 0] - 1] for side in ("chosen", "rejected")}
        for _ in range(3000):
            method.update(columns)
        truth = (base + (w * first + (1 - w) * second) / beta).softmax(-1)
        assert 0.5 * (method.policy.scores(torch.tensor([0])).softmax(-1) - truth).abs().sum() < 2e-3


def test_modpo_of_weight_one_is_dpo():
    base = torch.zeros(2, 4)
    columns = arm_pairs(tabular(DPO, base), TRIPLES)
    columns |= {f"{s}_other": torch.randn(len(TRIPLES)) for s in ("chosen", "rejected")}
    for combine in ("margin", "none"):
        torch.testing.assert_close(gradient(moved(tabular(MODPO, base, weight=1.0, combine=combine)), columns),
                                   gradient(moved(tabular(DPO, base)), columns))


def test_a_table_s_soup_is_the_weighted_optimum_and_its_part_is_dpo():
    g = torch.Generator().manual_seed(0)
    base, first, second = torch.randn(2, 5, generator=g), *torch.randn(2, 1, 5, generator=g)
    beta, shares = 0.5, torch.tensor([0.2, 0.7])
    settings = {"beta": beta, "learning_rate": 0.03}
    method = tabular(MODPO, base, combine="soup", margin_steps=3000, margin_rate=0.05, **settings)
    dpo = tabular(DPO, base, **settings)
    triples = [(x, i, j) for x in range(2) for i in range(5) for j in range(i)]

    def pairs(reward):
        return arm_pairs(dpo, triples, [float(torch.sigmoid(reward[0, i] - reward[0, j])) for _, i, j in triples])

    columns = {**pairs(first), "weight": shares.repeat_interleave(10)}
    method.prepare({**columns, **{f"other/{k}": v for k, v in pairs(second).items() if not k.endswith("_reference")}})
    for _ in range(2000):
        method.update(columns)
        dpo.update(columns)
    torch.testing.assert_close(method.alone.theta, dpo.policy.theta.detach())
    truth = (base + (shares[:, None] * first + (1 - shares[:, None]) * second) / beta).softmax(-1)
    assert 0.5 * (method.policy.scores(torch.tensor([0, 1])).softmax(-1) - truth).abs().sum(-1).max() < 2e-3


def test_one_soup_mixes_all_weights_of_any_policy():
    g = torch.Generator().manual_seed(0)
    features, base = torch.randn(2, 4, 3, generator=g), torch.zeros(2, 4)
    method = tabular(MODPO, base, "mlp", features, combine="soup", weight=0.3, margin_steps=5)
    dpo = tabular(DPO, base, "mlp", features)
    columns = arm_pairs(dpo, TRIPLES)
    other = {f"other/{k}": v for k, v in arm_pairs(dpo, TRIPLES[::-1]).items() if not k.endswith("_reference")}
    method.prepare({**columns, **other})
    for _ in range(3):
        method.update(columns)
    parts = list(zip(*(m.parameters() for m in (method.policy, method.alone, method.second))))
    assert any((a != b).any() for _, a, b in parts)
    for p, a, b in parts:
        torch.testing.assert_close(p.detach(), 0.3 * a + 0.7 * b)
    with pytest.raises(UserError, match="say how: method.weight"):
        tabular(MODPO, base, "mlp", features, combine="soup")


def test_the_margin_is_fitted_to_the_other_objective_s_pairs():
    """On plenty of pairs the implicit reward comes near the truth on its labels' scale."""
    job = compose(["method=modpo", "env=fronts", "env.weights=2", "env.contexts=3", "env.arms=4", "env.pairs=8000",
                   "env.batch_size=64", "env.base_scale=0", "logger=none", "hardware=cpu"], BOOK)
    method, world, stream = assemble(job)
    batch = {k: v[:2000] for k, v in stream.columns.items()}
    t = world.task
    x = (batch["prompt"][:, 0] - t.arms - 1) % t.size
    true = t.rewards[1][x, batch["chosen"][:, 0] - 1] - t.rewards[1][x, batch["rejected"][:, 0] - 1]
    found = batch["chosen_other"] - batch["rejected_other"]
    slope = (found * true).sum() / (true * true).sum() / job.config["env"]["sharpness"]
    assert abs(slope - 1) < 0.1 and torch.corrcoef(torch.stack([found, true]))[0, 1] > 0.98


def test_fronts_know_their_optimum():
    world = FrontsWorld(settings(FrontsWorld))
    world.task = world.make(0)
    best = world.exact(world.optimum(0.1))
    assert abs(best["regret"]) < 1e-5 and best["hypervolume"] == pytest.approx(1) and best["distance"] < 1e-5
    start = world.exact(world.task.base.log_softmax(-1))
    assert start["regret"] > 1 and start["hypervolume"] < 0.6
    assert hypervolume(torch.tensor([[2.0, 1.0], [1.0, 2.0], [0.5, 0.5]]), torch.zeros(2)) == pytest.approx(3)


def test_stored_rows_come_once_an_epoch_and_go_on_where_they_stopped():
    columns = {"pair": torch.arange(10)}
    one, two = (Stored(columns, {}, 3, seed=4) for _ in range(2))
    seen = [one.next()["pair"].tolist() for _ in range(7)]
    epochs = [sum(seen[i:i + 3], []) for i in (0, 3)]
    assert all(len(set(e)) == 9 for e in epochs) and epochs[0] != epochs[1]
    two.load_state_dict({"taken": 4})
    assert [two.next()["pair"].tolist() for _ in range(3)] == seen[4:]
    shares = [Stored(columns, {}, 2, 0, (rank, 2)).next()["pair"].tolist() for rank in (0, 1)]
    assert len(set(sum(shares, []))) == 4
    ahead = copy.deepcopy(two)
    ahead.load_state_dict({"taken": 0})
    ahead.ready(10)  # as before a captured graph of ten updates
    assert [ahead.take()["pair"].tolist() for _ in range(7)] == seen


@pytest.mark.parametrize("words", [["env=bandit", "policy=small"], ["env=answers", "policy=arms"]])
def test_policies_for_other_envs_are_refused(words):
    with pytest.raises(UserError, match="policy=small|leave policy as it is"):
        assemble(compose(["method=dpo", *words, "logger=none", "hardware=cpu"], BOOK))


def test_what_is_computed_before_training_has_the_run_s_precision():
    """Under bf16 the policy at the start is its own reference in bf16, up to the order of sums, and not that in float32."""
    words = ["method=dpo", "env=answers", "size=smoke", "hardware=cpu", "hardware.precision=bf16-mixed", "logger=none"]
    job = compose(words, BOOK)
    fabric = make_fabric(job.config["hardware"])
    method, _, stream = assemble(job, fabric)
    batch = stream.next()
    rows = {"prompt": batch["prompt"], "prompt_mask": batch["prompt_mask"], "response": batch["chosen"],
            "mask": batch["chosen_mask"]}
    with torch.no_grad(), fabric.autocast():
        half = method.score(rows)["log_prob"]
    with torch.no_grad():
        whole = method.score(rows)["log_prob"]
    off = [(told - batch["chosen_reference"]).abs().mean() for told in (half, whole)]
    assert off[1] > 1e-4 and off[0] < 0.2 * off[1], off


def test_gold_metrics_do_not_depend_on_how_many_rows_go_at_once(monkeypatch):
    method, world, stream = assemble(compose(["method=dpo", "env=answers", "size=smoke", "hardware=cpu", "logger=none"], BOOK))
    method.update(stream.next())
    at_once = world.evaluate(method, 0)
    monkeypatch.setattr(envs.pairs.base, "AT_ONCE", 7)
    assert world.evaluate(method, 0) == pytest.approx(at_once, rel=1e-4, abs=1e-5)


def test_an_option_that_would_do_nothing_is_refused():
    with pytest.raises(UserError, match="hardware.compile=true compiles"):
        assemble(compose(["method=dpo", "env=bandit", "hardware=cpu", "hardware.compile=true", "logger=none"], BOOK))
