"""EPO: history, band and phases by hand; the published indicator trains as the plain bonus does, to the bit."""

from __future__ import annotations

import math

import pytest
import torch

from methods.reasoning.base import Rows
from methods.reasoning.epo import EPO, phase
from runner.catalogue import Catalogue
from runner.compose import compose
from runner.interface import make_config
from runner.knobs import knobs_of
from runner.run import assemble

BOOK = Catalogue()
KEY_DOOR = ("env=key_door", "env.limit=3", "env.start=none", "method.prompts=2", "method.samples=2", "method.minibatches=2")


def bare(turns=1, **values):
    method = EPO(make_config([EPO.Config], {**{k.name: k.default for k in knobs_of(EPO.Config)}, **values}))
    method.register_buffer("history", torch.zeros(2, turns))
    method.told = {}
    return method


def rows(entropy, turn, mask=None):
    h = torch.tensor(entropy, requires_grad=True)
    mask = torch.ones_like(h) if mask is None else torch.tensor(mask)
    return h, Rows(now={"entropy": h}, mask=mask, tokens=mask.sum(), count=len(mask), told={}, turn=torch.tensor(turn))


def trained(*words, updates=4):
    job = compose([*words, "size=smoke", "logger=none", "hardware=cpu"], BOOK)
    method, _, stream = assemble(job)
    lines = []
    for _ in range(updates):
        lines.append({k: v.item() for k, v in method.update(stream.next()).items()})
        method.updates += 1
    return method, lines


def test_history_is_the_mean_over_updates_of_each_turns_mean():
    method = bare(3)
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    method.observe({"mask": mask, "turn": torch.tensor([0, 0, 1])}, {"entropy": torch.tensor([[1.0, 2], [6, 99], [4, 6]])})
    assert method.average().tolist() == [3.0, 5.0, 0.0]  # turn 2 has not occurred yet
    method.observe({"mask": mask[:1], "turn": torch.tensor([0])}, {"entropy": torch.tensor([[1.0, 1.0]])})
    assert method.average().tolist() == [2.0, 5.0, 0.0]  # turn 1 did not occur: it stays
    method.observe({"mask": mask[:1], "turn": torch.tensor([2])}, {"entropy": torch.tensor([[0.5, 1.5]])})
    assert method.average().tolist() == [2.0, 5.0, 1.0]


def test_hinge_and_its_gradient():
    method = bare(2, band_low=0.5, band_high=1.5, alpha=0.1, phase="const", entropy_weight=2.0)
    method.history.copy_(torch.tensor([[2.0, 8.0], [1.0, 2.0]]))  # averages 2 and 4
    h, r = rows([[0.4, 2.0, 3.5], [7.0, 5.0, 1.0]], [0, 1], [[1.0, 1, 1], [1, 1, 0]])
    value = method.penalty(r)
    outside = (1 - 0.4) + (3.5 - 3) + (7 - 6)
    assert value.item() == pytest.approx(-2 * 17.9 / 5 + 2 * 0.1 * outside / 5)
    assert r.told["in_band"].item() == pytest.approx(2 / 5)
    value.backward()
    expected = -torch.tensor([[1.1, 1.0, 0.9], [0.9, 1.0, 0.0]]) * 2 / 5
    torch.testing.assert_close(h.grad, expected)


def test_the_indicator_has_no_gradient_and_the_mask_weakens_the_bonus():
    for mode, outer in (("indicator", 1.0), ("mask", 0.1)):
        method = bare(2, band_low=0.5, band_high=1.5, mode=mode, phase="const", entropy_weight=1.0)
        method.history.copy_(torch.tensor([[2.0, 4.0], [1.0, 1.0]]))
        h, r = rows([[0.4, 2.0], [7.0, 5.0]], [0, 1])
        method.penalty(r).backward()
        torch.testing.assert_close(h.grad, -torch.tensor([[outer, 1.0], [outer, 1.0]]) / 4)


def test_a_response_is_held_against_the_band_as_a_whole():
    for band_of, low in (("response", 1.0), ("padded", 0.5)):  # means 1.0 and, over the padded width of 4, 0.5
        method = bare(band_low=1.5, band_of=band_of, phase="const", entropy_weight=1.0, alpha=1.0)
        method.history.fill_(1.0)
        _, r = rows([[0.5, 1.5, 9.0, 9.0]], [0], [[1.0, 1, 0, 0]])
        assert method.penalty(r).item() == pytest.approx(-1.0 + (1.5 - low))


def test_late_turns_alone():
    for turn, applies in ((1, False), (2, True)):
        method = bare(3, band_low=3.0, late_turn=2, phase="const", entropy_weight=1.0, alpha=1.0)
        method.history.fill_(1.0)
        _, r = rows([[1.0], [1.0]], [0, turn])
        assert method.penalty(r).item() == pytest.approx(-1.0 + 2.0 * applies)


def test_phases():
    assert phase(0, "decay") == 1 and phase(0.5, "decay") == pytest.approx(1 - 0.2 * (1 - math.exp(-2)))
    assert phase(1, "decay") == phase(7, "decay") == pytest.approx(0.8 * math.exp(-3))
    assert phase(0, "grow") == phase(1, "decay") and phase(1, "grow") == 1 and phase(0.3, "const") == 1
    values = []
    for updates in (0, 75):
        method = bare(band_low=3.0, entropy_weight=1.0, alpha=1.0)
        method.history.fill_(1.0)
        method.updates = updates
        values.append(method.penalty(rows([[1.0]], [0])[1]).item())
    assert values == pytest.approx([-1 + 2 * 1, -1 + 2 * phase(0.5, "decay")])
    falling = [phase(i / 20, "decay") for i in range(21)]
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize("world", [("env=countdown",), KEY_DOOR], ids=["one turn", "many turns"])
def test_the_published_form_trains_as_the_plain_bonus(world):
    """The band is so narrow that everything lies outside: the logged loss differs, the weights do not."""
    words = [*world, "method.entropy_weight=0.1", "method.kl_weight=0.01", "method.dual_clip=3.0"]
    published = ["method.band_low=0.999", "method.band_high=1.001", "method.alpha=1.0"]
    plain, lines = trained("method=entropy_bonus", *words)
    faithful, told = trained("method=epo", *words, *published, "method.mode=indicator")
    assert all(torch.equal(v, faithful.state_dict()[k]) for k, v in plain.state_dict().items())
    assert all(theirs["loss"] > line["loss"] and theirs["in_band"] < 1 for theirs, line in zip(told, lines))
    hinge, _ = trained("method=epo", *words, "method.band_low=1.5", "method.alpha=1.0")
    assert not torch.equal(hinge.policy.head, plain.policy.head)


def test_history_is_kept_for_every_turn_of_the_world():
    method, _ = trained("method=epo", *KEY_DOOR, updates=2)
    assert method.history.shape == (2, 3) and method.history[1].tolist() == [2, 2, 2]
    assert "history" in method.state_dict()
