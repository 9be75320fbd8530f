"""Reward models on trunks and over arms, best-of-n by a fitted one, prompts that one rewards, PPO with the KL in the reward."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from pair_methods import words
from safetensors.torch import save_file
from token_methods import bare

from envs.pairs import decoding
from methods.preference.best_of_n import BestOfN, numbers
from methods.reasoning.ppo_rlhf import PPORLHF
from methods.tokens import rewards
from runner.errors import UserError

_spec = importlib.util.spec_from_file_location("lab", Path(__file__).parents[1] / "conformance" / "lab.py")
lab = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(lab)


def rows_of(method, prompts, responses):
    prompt, prompt_mask = method.encode(prompts)
    response, mask = method.encode_responses(responses)
    return {"prompt": prompt, "prompt_mask": prompt_mask, "response": response, "mask": mask.float()}


def test_a_head_reads_the_hidden_state_at_the_last_token():
    method, world, _ = lab.assembled("reward_model", env="answers")
    torch.nn.init.normal_(method.reward_head)
    pairs = world.task.pairs()[:5]
    rows = rows_of(method, [p.prompt for p in pairs], [p.chosen for p in pairs])
    rated = method.rate(rows)
    for i in range(5):
        ids = torch.cat([rows["prompt"][i][rows["prompt_mask"][i]], rows["response"][i][rows["mask"][i].bool()]])[None]
        last = method.policy.hidden(ids, torch.ones_like(ids, dtype=torch.bool))[0, -1]
        assert rated[i].item() == pytest.approx((last @ method.reward_head[0]).item(), rel=1e-4, abs=1e-5)
    full = {**rows, "response": torch.ones_like(rows["response"]), "mask": torch.ones_like(rows["mask"])}
    assert torch.isfinite(method.rate(full)).all()  # no place is left behind the last token


def test_the_loss_is_the_likelihood_of_pairs_and_the_level():
    for env in ("answers", "bandit"):
        method, _, stream = lab.assembled("reward_model", "method.center=0.5", env=env)
        lab.train(method, stream, 3)
        batch = stream.next()
        columns = {"prompt": batch["prompt"], "prompt_mask": batch["prompt_mask"]}
        with torch.no_grad():
            w, l = (method.rate({**columns, "response": batch[s], "mask": batch[f"{s}_mask"]}) for s in ("chosen", "rejected"))
        expected = (-torch.nn.functional.logsigmoid(w - l) + 0.5 * (w + l).square()).mean()
        assert (w - l).abs().max() > 1e-3
        assert method.update(batch)["loss"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_rows_may_go_in_parts():
    ends = []
    for micro in (0, 3):
        method, _, stream = lab.assembled("reward_model", f"method.micro_rows={micro}", env="answers")
        lab.train(method, stream, 4)
        ends.append(method.reward_head.detach().clone())
    assert ends[0].abs().max() > 1e-4
    torch.testing.assert_close(*ends, rtol=1e-2, atol=1e-5)


def test_the_trunk_and_the_head_learn_and_so_held_out_pairs_are_rated_right():
    method, world, stream = lab.assembled("reward_model", "method.learning_rate=0.003", "env.batch_size=64", env="answers")
    before = world.evaluate(method, 0)["accuracy"]
    trunk = method.policy.model.embed_tokens.weight.detach().clone()
    lab.train(method, stream, 40)
    assert before == 0.5 and world.evaluate(method, 0)["accuracy"] > 0.8
    assert not torch.equal(trunk, method.policy.model.embed_tokens.weight)


def test_over_arms_it_is_dpo_but_for_the_level():
    """The same loss and gradient, since normalisers cancel."""
    ends, start = [], torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    for name, settings in (("reward_model", ("method.center=0.0",)), ("dpo", ("method.beta=1.0",))):
        method, world, stream = lab.assembled(name, *settings, env="bandit")
        with torch.no_grad():
            method.policy.theta.copy_(start)
        loss = method.update(stream.next())["loss"]
        ends.append(torch.cat([method.policy.theta.grad.flatten(), loss[None]]))
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)
    assert ends[0].abs().max() > 0.05
    method, _, stream = lab.assembled("reward_model", "method.center=1.0", env="bandit")
    levels = [line["level"] for line in lab.train(method, stream, 200)]
    assert levels[-1] < 0.2


def test_best_of_n_is_the_exact_choice_of_the_fitted_model_among_draws_of_the_start():
    method, world, stream = lab.assembled("best_of_n", "method.n=3", env="bandit")
    told = lab.train(method, stream, 20)
    assert told[0]["kl_bound"] == pytest.approx(math.log(3) - 2 / 3)
    reward, p = method.policy.theta.detach(), world.task.base.softmax(-1)
    g = torch.Generator().manual_seed(0)
    draws = torch.multinomial(p, 3 * 20_000, replacement=True, generator=g).view(4, 20_000, 3)
    best = draws.gather(-1, reward.gather(1, draws.flatten(1)).view(draws.shape).argmax(-1, keepdim=True)).squeeze(-1)
    share = torch.stack([row.bincount(minlength=5) / 20_000 for row in best])
    torch.testing.assert_close(world.table(method).exp().detach(), share, rtol=0, atol=0.015)
    with torch.no_grad():
        assert world.evaluate(method, 0)["kl"] <= math.log(3) - 2 / 3


def test_over_tokens_the_best_of_n_independent_draws_of_the_start_is_given():
    """Responses of one letter, so that what is given has a distribution: that of arms."""
    n, each = 4, 4000
    method = words(BestOfN, width=1, n=n)
    torch.nn.init.normal_(method.reward_head)
    prompts, g = ["abcd", "qrst"], torch.Generator().manual_seed(3)
    uniforms = torch.rand(2 * each, 1, generator=g)
    with torch.no_grad():
        out = method.complete(prompts, each, uniforms)
    tokens = torch.arange(1, 27)
    prompt, prompt_mask = method.encode(prompts)
    for i in range(2):
        rows = {"prompt": prompt[i].expand(26, -1), "prompt_mask": prompt_mask[i].expand(26, -1), "response": tokens[:, None],
                "mask": torch.ones(26, 1)}
        p = method.score_reference(rows)["log_prob"][:, 0].exp()
        expected = decoding.best_of((p / p.sum())[None].double(), method.rate(rows)[None].double(), n)[0]
        share = out.response[i * each:(i + 1) * each, 0].bincount(minlength=27)[1:] / each
        assert (p - expected).abs().max() > 0.1
        torch.testing.assert_close(share.double(), expected, rtol=0, atol=0.03)
    assert out.texts == [chr(96 + t) for t in out.response[:, 0].tolist()] and len(out.texts) == 2 * each
    plain = method.with_weights()
    assert plain.complete(prompts, 3, uniforms[:6]).texts == plain.generate(prompts, 3, uniforms[:6]).texts
    again = numbers(uniforms[:6], n)
    assert again.shape == (24, 1) and torch.equal(again, numbers(uniforms[:6], n)) and torch.equal(again[::n], uniforms[:6])


def test_over_tokens_gold_metrics_are_those_of_what_is_chosen():
    settings = ("method.learning_rate=0.003", "env.batch_size=64", "env.eval_prompts=20", "env.eval_samples=8")
    told = {}
    for n in (1, 8):
        method, world, stream = lab.assembled("best_of_n", f"method.n={n}", *settings, env="answers")
        lab.train(method, stream, 40)
        told[n] = world.evaluate(method, 0)
    assert not {"kl", "kl_from_reference", "entropy", "right_mass"} & told[8].keys() and told[8]["accuracy"] > 0.8
    assert told[8]["reward"] > 0.97 > 0.95 > told[1]["reward"] and told[8]["win_rate"] > 0.53
    assert abs(told[1]["win_rate"] - 0.5) < 0.03  # one draw is the start's


def test_the_true_judge_wins_n_of_n_plus_1_draws():
    _, world, _ = lab.assembled("dpo", "env.arms=400", "env.contexts=3", "env.best_of=4", env="bandit")
    told = world.references(0)["best of 4"]
    assert told["win_rate"] == pytest.approx(0.8, abs=0.01) and told["kl"] == pytest.approx(math.log(4) - 0.75, abs=0.02)
    assert decoding.best_of(torch.tensor([[0.5, 0.5]]), torch.zeros(1, 2), 9).tolist() == [[0.5, 0.5]]


def test_a_finished_run_of_a_reward_model_judges_prompts(tmp_path):
    judge, world, _ = lab.assembled("reward_model", env="answers")
    torch.nn.init.normal_(judge.reward_head)
    save_file({k: v.contiguous().clone() for k, v in judge.state_dict().items()}, tmp_path / "weights.safetensors")
    method, _, stream = lab.assembled("ppo_rlhf", f'env.judge_run="{tmp_path}"', env="answers")
    batch = stream.next()
    expected = judge.rate({k: batch[k] for k in ("prompt", "prompt_mask", "response", "mask")})
    torch.testing.assert_close(batch["reward"], expected, rtol=1e-4, atol=1e-5)
    assert set(batch["correct"].tolist()) <= {0.0, 1.0} and batch["reward"].std() > 0
    with pytest.raises(UserError, match="no folder of a finished run"):
        lab.assembled("ppo_rlhf", f'env.judge_run="{tmp_path}/none"', env="answers")
    with pytest.raises(UserError, match="holds no reward model"):
        rewards.rater_of(method.policy, {rewards.HEAD: torch.zeros(1, 3)})


def test_the_reward_is_bounded_and_beta_moves_towards_its_target():
    method = bare(PPORLHF, reward_clip=2.0, kl_target=1.0, horizon=40.0)
    assert method.reward({"reward": torch.tensor([-5.0, 1.0, 3.0])}).tolist() == [-2, 1, 2]
    for distance, factor in (([4.0, 2.0], 1 + 0.2 * 2 / 40), ([0.5, 0.5], 1 - 0.2 * 2 / 40), ([1.2, 1.0], 1 + 0.1 * 2 / 40)):
        method.beta = torch.tensor(0.1)
        method.after_update({"distance": torch.tensor(distance)})
        assert method.beta.item() == pytest.approx(0.1 * factor)


def test_a_batch_is_gone_through_several_times_and_told_what_it_costs():
    counts = []
    for passes in (1, 3):
        method, _, stream = lab.assembled("ppo_rlhf", f"method.passes={passes}", env="countdown")
        steps = []
        original = method.step
        method.step = lambda rows, batch, original=original, steps=steps: (steps.append(1), original(rows, batch))
        told = lab.train(method, stream, 1)[0]
        counts.append(len(steps))
    assert counts[1] == 3 * counts[0] and told["beta"] == pytest.approx(0.1)
    assert told["kl_of_response"] == pytest.approx(0, abs=1e-4)


LISTS = ("env.list_size=4", "env.batch_size=0", "env.pairs=50")


@pytest.mark.parametrize("likelihood", ["plackett_luce", "all_pairs", "ends"])
def test_the_likelihood_of_rankings_over_arms_and_by_a_head(likelihood):
    method, _, stream = lab.assembled("reward_model", f'method.likelihood="{likelihood}"', "method.center=0.0", *LISTS,
                                      env="bandit")
    lab.train(method, stream, 3)
    batch = stream.next()
    assert batch["between"].shape == (50, 2, 1)
    lists = torch.cat([batch["chosen"][:, None], batch["between"], batch["rejected"][:, None]], 1)
    assert all(len(set(row.flatten().tolist())) == 4 for row in lists)

    def by_hand(r):
        probability = torch.ones(len(r)).double()
        for k in range(3):  # of choosing the best one of those that are left, again and again
            probability = probability * r[:, k].exp() / r[:, k:].exp().sum(1)
        pairs = [torch.log1p(torch.exp(r[:, j] - r[:, i])) for i in range(4) for j in range(i + 1, 4)]
        return {"plackett_luce": -probability.log(), "all_pairs": sum(pairs) / 6, "ends": pairs[2]}[likelihood].mean()

    x = batch["prompt"][:, -1] - 6
    expected = by_hand(method.policy.theta.detach().double()[x[:, None], lists[:, :, 0] - 1])
    assert method.update(batch)["loss"].item() == pytest.approx(expected.item(), rel=1e-5)

    headed, world, _ = lab.assembled("reward_model", f'method.likelihood="{likelihood}"', "method.center=0.0", env="answers")
    torch.nn.init.normal_(headed.reward_head)
    texts = ["N.", "NML.", "YX.", "TU."]
    prompts = [p.prompt for p in world.task.pairs()[:3]]
    parts = [rows_of(headed, prompts, [t] * 3) for t in texts]
    columns = {"prompt": parts[0]["prompt"], "prompt_mask": parts[0]["prompt_mask"], "label": torch.ones(3),
               "between": torch.stack([p["response"] for p in parts[1:3]], 1),
               "between_mask": torch.stack([p["mask"] for p in parts[1:3]], 1)}
    for side, p in zip(("chosen", "rejected"), (parts[0], parts[3])):
        columns |= {side: p["response"], f"{side}_mask": p["mask"]}
    expected = by_hand(torch.stack([headed.rate(p) for p in parts], 1).double())
    assert headed.update(columns)["loss"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_rankings_are_drawn_from_plackett_luce():
    from envs.pairs.rankings import drawn

    reward = torch.tensor([[1.0, 0.0, -1.0]])
    _, arms = drawn(reward, 3, 20_000, 3, 1.5, torch.Generator().manual_seed(0))
    p = (1.5 * reward[0]).softmax(-1)
    assert torch.allclose((arms[:, 0:1] == torch.arange(3)).float().mean(0), p, atol=0.015)
    second = (arms[arms[:, 0] == 0][:, 1] == 1).float().mean()
    assert second.item() == pytest.approx((p[1] / (p[1] + p[2])).item(), abs=0.015)
    two = drawn(reward, 3, 20_000, 2, 1.5, torch.Generator().manual_seed(1))[1]
    both = two[(two.sort(1).values == torch.tensor([0, 2])).all(1)]
    assert (both[:, 0] == 0).float().mean().item() == pytest.approx(1 / (1 + math.exp(-3)), abs=0.02)


def test_rankings_with_a_noise_of_their_own_refuse_others_and_other_methods_see_their_ends():
    with pytest.raises(UserError, match="rankings of as many"):
        lab.assembled("dpo", *LISTS, 'env.flips="symmetric"', env="bandit")
    with pytest.raises(UserError, match="rewards that order"):
        lab.assembled("dpo", "env.list_size=4", env="cyclic")
    ends = [lab.train(m, s, 4)[-1]["loss"] for m, _, s in (
        lab.assembled("reward_model", 'method.likelihood="ends"', "method.center=0.0", *LISTS, env="bandit"),
        lab.assembled("dpo", "method.beta=1.0", *LISTS, env="bandit"))]
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)
