"""Weighted likelihood by hand: means over tokens and rows, weights, penalties, the exact KL to the start in micro-batches."""

from __future__ import annotations

import pytest
import torch
from token_methods import assembled

from methods.reasoning.sft import SFT
from methods.tokens.demonstrated import Demonstrated, Given
from methods.tokens.scoring import whole_kl


class Compared(SFT):
    """SFT with half the weight on odd tokens, by responses, beside the exact KL to the start."""

    kl_weight = 0.3

    def needs_reference(self):
        return True

    def compares(self):
        return True

    def measure(self, logits, target, first=None):
        return {**super().measure(logits, target, first), "kl": whole_kl(logits, first)}

    def weigh_tokens(self, rows):
        odd = torch.arange(rows.mask.shape[1]) % 2
        return super().weigh_tokens(rows) * (1 - 0.5 * odd)

    def value(self, rows):
        return (super().value(rows) * rows.mask).sum(1)

    def penalty(self, rows):
        assert torch.equal(rows.told["entropy"], (rows.now["entropy"].detach() * rows.mask).sum() / rows.tokens)
        return self.kl_weight * self.mean(rows.now["kl"], rows)


def compared(micro=0):
    """A method two steps from its start, and a batch of rows of unequal length."""
    method, _, stream = assembled("method=sft", "method.learning_rate=0.01")
    method.__class__, method.reference = Compared, None
    method.setup(method.spec)
    method.make_optimizers()
    method.updates = 50
    for _ in range(2):
        method.update(stream.next())
    method.config = type(method.config)(**{**vars(method.config), "micro_rows": micro, "gradient_norm": 0.0})
    batch = stream.next()
    batch["mask"][::2, 5:] = 0
    return method, batch


def test_sft_is_the_algorithm_as_it_stands():
    assert SFT.__mro__[1] is Demonstrated and not set(vars(SFT)) & set(Demonstrated.PARTS)


def test_means_are_over_all_tokens_or_over_rows():
    method, _, _ = assembled("method=sft")
    rows = Given(mask=torch.tensor([[1.0, 1, 1], [1, 0, 0]]), tokens=torch.tensor(4.0))
    assert method.mean(torch.tensor([[1.0, 2, 3], [6, 100, 100]]), rows).item() == 3
    assert method.mean(torch.tensor([1.0, 6]), rows).item() == 3.5


def test_loss_and_gradient_are_those_of_whole_logits():
    method, batch = compared()
    rows = {k: batch[k] for k in ("prompt", "prompt_mask", "response", "mask")}
    log_p, log_q = (logits(m, rows) for m in (method.policy, method.reference))
    mask, log_q = rows["mask"], log_q.detach()
    log_prob = log_p.gather(-1, rows["response"].unsqueeze(-1)).squeeze(-1)
    weight = 1 - 0.5 * (torch.arange(mask.shape[1]) % 2)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    loss = -(weight * log_prob * mask).sum(1).mean() + 0.3 * (kl * mask).sum() / mask.sum()
    assert (kl * mask).sum() / mask.sum() > 1e-3
    expected = torch.autograd.grad(loss, list(method.policy.parameters()))
    told = method.update(batch)
    assert told["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert told["perplexity"].item() == pytest.approx((-(log_prob * mask).sum() / mask.sum()).exp().item(), rel=1e-5)
    for p, gradient in zip(method.policy.parameters(), expected):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-6)


def logits(policy, rows):
    ids, mask = (torch.cat([rows[a], rows[b].to(rows[a].dtype)], 1) for a, b in (("prompt", "response"), ("prompt_mask", "mask")))
    return (policy.hidden(ids, mask) @ policy.head.T)[:, rows["prompt"].shape[1] - 1:-1].log_softmax(-1)


def test_micro_batches_give_the_whole_batch_s_gradient_with_the_start_beside():
    gradients = []
    for micro in (0, 3):
        method, batch = compared(micro)
        told = method.update(batch)
        gradients.append({"loss": told["loss"], **{k: p.grad.clone() for k, p in method.policy.named_parameters()}})
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, rtol=1e-3, atol=1e-6)


def test_the_start_s_log_probabilities_in_micro_batches():
    method, batch = compared()
    whole = method.score_reference(batch)
    method.config = type(method.config)(**{**vars(method.config), "micro_rows": 3})
    for key, value in method.score_reference(batch).items():
        torch.testing.assert_close(value, whole[key], rtol=1e-4, atol=1e-5)
    rows = Given(**batch)
    torch.testing.assert_close(method.start_log_prob(rows), whole["log_prob"], rtol=1e-4, atol=1e-5)
    assert method.start_log_prob(rows) is rows.first_log_prob  # asked once


def test_adapters_are_compared_with_the_policy_that_they_were_added_to():
    pytest.importorskip("peft")
    from methods.tokens.lora import add_lora

    gradients = []
    for copied in (True, False):
        method, batch = compared()
        torch.manual_seed(0)
        first = method.reference
        method.policy.load_state_dict(first.state_dict())
        trainable = add_lora(method.policy, rank=2, alpha=4.0, targets=("q_proj", "down_proj"))
        with torch.no_grad():
            for p in trainable:
                p.add_(0.1 * torch.randn_like(p))
        method.reference = first if copied else None
        method.make_optimizers()
        for g in method.optimizers["policy"].param_groups:
            g["lr"] = 0.0
        told = method.update(batch)
        assert told["loss"].isfinite() and all(p.grad is not None for p in trainable)
        gradients.append([p.grad.clone() for p in trainable])
    assert all(torch.equal(a, b) for a, b in zip(*gradients)) and max(g.abs().max() for g in gradients[0]) > 0
