"""Listwise DPO: it is ADPO at stated knobs to the bit, DPO on two candidates, and the product of choices from shrinking lists."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from methods.preference.listwise_dpo import ListwiseDPO
from runner.interface import make_config

_spec = importlib.util.spec_from_file_location("lab", Path(__file__).parents[1] / "conformance" / "lab.py")
lab = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(lab)


@pytest.mark.parametrize("env", ["noisy_lists", "pointmass"])
@pytest.mark.parametrize(("beta", "top_k"), [(0.3, 0), (1.0, 2)])
def test_it_is_adpo_to_the_bit(env, beta, top_k):
    ends = []
    for name, words in (("listwise_dpo", (f"method.beta={beta}",)),
                        ("adpo", (f"method.tau={1 / beta}", 'method.anchor="self"', 'method.form="plackett_luce"'))):
        method, _, stream = lab.assembled(name, *words, f"method.top_k={top_k}", env=env)
        told = [line["loss"] for line in lab.train(method, stream, 6)]
        ends.append((told, lab.bits(method.policy)))
    assert ends[0] == ends[1]


def loss(log_prob, anchor, reward, **values):
    method = ListwiseDPO(make_config([ListwiseDPO.Config], values))
    return method.loss(method.score(log_prob, anchor, {}), None, {"reward": reward})


def test_two_candidates_are_dpo():
    l, a = torch.randn(2, 5, 2, dtype=torch.float64)
    reward = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0], [0.0, 1.0], [1.0, -1.0]])
    gap = (l - a)[:, 0] - (l - a)[:, 1]
    expected = -F.logsigmoid(0.4 * gap * torch.sign(reward[:, 0] - reward[:, 1])).mean()
    torch.testing.assert_close(loss(l, a, reward, beta=0.4), expected)


def test_a_ranking_is_a_product_of_choices():
    l, a, reward = torch.randn(3, 4, 5, dtype=torch.float64)
    expected = 0.0
    for i in range(4):
        left, f = reward[i].argsort(descending=True).tolist(), 0.7 * (l - a)[i]
        while len(left) > 1:
            expected -= f[left].log_softmax(-1)[0].item() / 4
            left = left[1:]
    assert loss(l, a, reward, beta=0.7).item() == pytest.approx(expected)
    top = -(0.7 * (l - a)).log_softmax(-1).gather(1, reward.argmax(-1, keepdim=True)).mean()
    torch.testing.assert_close(loss(l, a, reward, beta=0.7, top_k=1), top)
    torch.testing.assert_close(loss(l + 3, a - 1, reward), loss(l, a, reward))  # constants cancel
