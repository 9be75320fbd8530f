"""Worlds of prompts: text to tokens and back, gold metrics, order of problems, starts, bad input; and worlds of many turns."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from types import SimpleNamespace

import pytest
import torch

from envs.prompts import base as prompts
from envs.prompts.base import Prompts, invalid_mass, majority, pass_at
from envs.prompts.key_door import KeyDoor, State
from envs.prompts.task import Problem, Task, Verdict
from envs.prompts.turns import play
from methods.reasoning.base import GroupPolicy, group_statistics
from methods.reasoning.batches import groups_of, join
from methods.tokens.base import Completions
from methods.tokens.tokenizer import Characters
from runner import catalogue
from runner.catalogue import Catalogue, load_class
from runner.compose import compose
from runner.errors import UserError
from runner.interface import make_config
from runner.knobs import fill, knobs_of
from runner.run import assemble

BOOK = Catalogue()
OWN = [e.name for e in BOOK.all("env") if e.family == "prompts" and e.card.get("data")]
TURNS = ("env=key_door", "env.start=none", "env.limit=5")


def assembled(*words):
    return assemble(compose([*words, "size=smoke", "logger=none", "hardware=cpu"], BOOK))


def world_of(name, **values):
    entry = BOOK.get("env", name)
    cls = load_class(entry)
    return cls(make_config([cls.Config], fill(catalogue.knobs(entry), {**entry.values, **values}, "env")), "cpu")


class Told(Task):
    """Prompts "1" … "9"; a response is right if it repeats the prompt."""

    alphabet, eos, prompt_length, response_length = "0123456789.", ".", 1, 3

    def train(self):
        return [Problem(str(i), i) for i in range(1, 10)]

    held_out = train

    def verify(self, problem, response):
        if response == "0.":
            raise ValueError("no zeros")
        return Verdict(float(response == f"{problem.prompt}."), response[:-1] or None, float(response.endswith(".")))

    def valid_next(self, problem, prefix):
        return {0: "0123456789", 1: "."}.get(len(prefix), "")


class Scripted:
    """A method that answers prompt p with the texts of script(p), `samples` of them; its distributions are uniform."""

    def __init__(self, script, alphabet="0123456789."):
        self.script, self.tokenizer, self.seed, self.processes = script, Characters(alphabet, "."), 0, (0, 1)

    def device(self):
        return torch.device("cpu")

    def response_length(self):
        return 3

    def complete(self, texts, samples, uniforms, temperature=1.0, fresh=True, steps=None):
        assert len(uniforms) == len(texts) * samples
        written = [t for text in texts for t in itertools.islice(itertools.cycle(self.script(text)), samples)]
        ids = torch.zeros(len(written), 3, dtype=torch.long)
        for row, text in zip(ids, written):
            row[:len(text)] = torch.tensor(self.tokenizer.encode(text))
        prompt = torch.zeros(len(written), 1, dtype=torch.long)
        return Completions(written, prompt, prompt.bool(), ids, ids > 0, torch.zeros(ids.shape))

    def score(self, rows):
        return {"entropy": rows["mask"].float() * 0.5}

    def distributions(self, out):
        return torch.full((*out.response.shape, self.tokenizer.size), 1 / self.tokenizer.size).log()


def bare():
    return GroupPolicy(make_config([GroupPolicy.Config], {k.name: k.default for k in knobs_of(GroupPolicy.Config)}))


def told_world(**values):
    world = world_of("countdown", **values)
    world.task = Told()
    return world


# ---- text and tokens ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", OWN)
def test_prompts_and_demonstrations_survive_the_tokens(name):
    method, world, _ = assembled("method=sft", f"env={name}")
    rng, spec = random.Random(0), world.spec()
    problems = [world.task.train()[i] for i in range(20)]
    texts = [world.task.demonstrate(p, rng) for p in problems]
    prompt, prompt_mask = method.encode([p.prompt for p in problems])
    response, mask = method.encode_responses(texts)
    assert prompt.shape == (20, spec.prompt_length) and prompt_mask.all() and response.shape[1] == spec.response_length
    assert [method.tokenizer.decode(row) for row in prompt] == [p.prompt for p in problems]
    assert [method.tokenizer.decode(row[:n]) for row, n in zip(response, mask.sum(1))] == texts
    assert all(row[n - 1] == method.tokenizer.eos for row, n in zip(response, mask.sum(1)))


@pytest.mark.parametrize("name", OWN)
def test_cards_name_a_world_that_gives_every_metric_it_declares(name):
    declared = {m: meaning[0] for m, meaning in catalogue.metrics(BOOK.get("env", name)).items()}
    _, world, _ = assembled("method=sft", f"env={name}")
    assert declared == {k: m.direction for k, m in world.metrics.items()} and "pass_1" in declared


# ---- gold metrics ------------------------------------------------------------------------------------------------------
def test_pass_at_k_is_the_share_of_subsets_with_a_success():
    for n, k in ((6, 1), (6, 4), (7, 7)):
        for correct in range(n + 1):
            subsets = list(itertools.combinations([1] * correct + [0] * (n - correct), k))
            assert pass_at(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_evaluation_counts_what_was_written():
    """Prompt p is answered correctly p times of 16."""
    world = told_world(eval_prompts=5, eval_samples=16)
    told = world.evaluate(Scripted(lambda p: [f"{p}."] * int(p) + ["0"] * (16 - int(p))), 0)
    right = [1, 2, 3, 4, 5]
    assert told["pass_1"] == pytest.approx(sum(right) / 80)
    for k in (4, 16):
        assert told[f"pass_{k}"] == pytest.approx(sum(
            sum(map(any, itertools.combinations([1] * c + [0] * (16 - c), k))) / len(list(itertools.combinations(range(16), k)))
            for c in right) / 5)
    assert told["greedy"] == 1 and told["coverage"] == 1 and told["format"] == told["pass_1"]
    assert told["length"] == pytest.approx((2 * 15 + 65) / 80) and told["entropy"] == pytest.approx(0.5)


def test_majority_breaks_ties_at_random_and_lets_nobody_vote_without_an_answer():
    right, wrong, silent = Verdict(1.0, "7"), Verdict(0.0, "8"), Verdict(0.0, None, 0.0)
    assert majority([right] * 5 + [wrong] * 3, 8, 0) == 1 and majority([right] * 3 + [wrong] * 5, 8, 0) == 0
    assert majority([right] + [silent] * 7, 8, 0) == 1 and majority([silent] * 8, 8, 0) == 0
    even = [majority([right] * 4 + [wrong] * 4, 8, seed) for seed in range(200)]
    assert sum(even) / 200 == pytest.approx(0.5, abs=0.06)
    assert even == [majority([right] * 4 + [wrong] * 4, 8, seed) for seed in range(200)]


def test_invalid_mass_of_a_uniform_policy():
    """12 tokens: ten digits are possible first, then the end alone; what has left the form is not looked at further."""
    method, task = Scripted(lambda p: ["5.", "77."]), Told()
    out = method.complete(["1"], 2, torch.zeros(2, 1))
    mass, count = invalid_mass(task, task.train()[:1] * 2, out, method)
    assert count == 4 and mass == pytest.approx(2 * (2 / 12 + 11 / 12), rel=1e-5)


def test_testbeds_tell_their_own_metrics():
    world = world_of("modular", eval_prompts=30, eval_samples=8)
    answers = {p.prompt: p.answer for p in world.task.unlabelled()}
    judged = world_of("modular", eval_prompts=30, eval_samples=8, judged="unlabelled")
    easy = [p for p in list(judged.task.unlabelled())[:30] if not judged.task.biased(p)]

    def script(prompt):
        biased = world.task.biased(Problem(prompt))
        return [f"={answers[prompt]}."] if not biased else [f"={(answers[prompt] + 1) % 10}."] * 3 + [f"={answers[prompt]}."]

    told = judged.evaluate(Scripted(script, world.task.alphabet), 0)
    assert (told["pass_1_easy"], told["pass_1_biased"], told["maj_8_easy"], told["maj_8_biased"]) == (1, 0.25, 1, 0)
    assert told["pass_1"] == pytest.approx((len(easy) + 0.25 * (30 - len(easy))) / 30)
    assert told.keys() <= judged.metrics.keys()
    longer = world_of("think_longer", eval_prompts=4, eval_samples=4)
    right = {p.prompt: longer.task.all_solutions(p)[0] + "." for p in longer.task.held_out()}
    wrong = "1+1=2."
    told = longer.details(longer.task.held_out()[:1], [[(t, longer.task.verify(longer.task.held_out()[0], t)) for t in (
        right[longer.task.held_out()[0].prompt], wrong, "www" + right[longer.task.held_out()[0].prompt])]])
    assert told["pass_1_fillers_0"] == 0.5 and told["pass_1_fillers_3"] == 1 and "pass_1_fillers_6" not in told
    assert told["fillers"] == 1 and told["length_wrong"] == 6


# ---- the order of problems ---------------------------------------------------------------------------------------------
def asked(processes=(0, 1), pool=10, seed=0):
    method = SimpleNamespace(seed=seed, processes=processes)
    return Prompts(SimpleNamespace(), method, list(range(pool)), {})


def test_every_epoch_has_every_problem_once_in_an_order_of_its_own():
    stream = asked()
    epochs = [[n for _ in range(5) for n in stream.problems(2)] for _ in range(3)]
    assert all(sorted(e) == list(range(10)) for e in epochs) and len({tuple(e) for e in epochs}) == 3
    assert asked(seed=1).problems(10) != epochs[0]


def test_problems_of_several_processes_are_those_of_one():
    whole, parts = asked(), [asked((r, 2)) for r in range(2)]
    for _ in range(4):  # across the end of an epoch
        assert whole.problems(6) == [n for part in parts for n in part.problems(3)]


def test_the_order_goes_on_after_a_stop():
    first, second = asked(), asked()
    first.problems(7)
    second.load_state_dict(first.state_dict())
    assert [first.problems(4) for _ in range(4)] == [second.problems(4) for _ in range(4)]


def test_batches_go_on_after_a_stop_and_names_may_not_repeat():
    _, _, first = assembled("method=grpo", "env=countdown")
    first.next(), first.next()
    _, _, second = assembled("method=grpo", "env=countdown")
    second.load_state_dict(first.state_dict())
    one, two = first.next(), second.next()
    assert all(torch.equal(one[k], two[k]) for k in one) and first.counters() == second.counters() == {"responses": 48}
    with pytest.raises(ValueError, match="twice"):
        first.rollouts([0], 2)


# ---- starts ------------------------------------------------------------------------------------------------------------
def test_a_start_that_is_not_there_says_what_can_be_done(monkeypatch, tmp_path):
    monkeypatch.setattr(prompts, "STARTS", tmp_path)
    with pytest.raises(UserError, match=r"countdown\.safetensors\nbuild them: env\.start=own"):
        assembled("method=grpo", "env=countdown", "env.start=shipped")
    monkeypatch.setenv("BALLAST_DATA", str(tmp_path))
    with pytest.raises(UserError, match="are not there"):
        assembled("method=grpo", "env=countdown", "env.start=own")
    assembled("method=grpo", "env=countdown", "env.start=none")


def test_a_start_of_another_shape_is_refused():
    with pytest.raises(UserError, match="another shape.*\n.*train a start"):
        assembled("method=grpo", "env=countdown", "env.start=shipped", "policy.width=32")


@pytest.mark.parametrize("name", [n for n in OWN if (prompts.STARTS / f"{n}.safetensors").is_file()])
def test_shipped_starts_fit_and_name_a_clean_commit(name):
    card = json.loads((prompts.STARTS / f"{name}.json").read_text())
    file = prompts.STARTS / f"{name}.safetensors"
    assert not card["dirty"] and card["env"] == name and file.stat().st_size <= 1_000_000
    assert hashlib.sha256(file.read_bytes()).hexdigest() == card["digest"]
    method, _, _ = assembled("method=grpo", f"env={name}", "env.start=shipped")
    assert sum(p.numel() for p in method.policy.parameters()) == card["parameters"]


# ---- bad input ---------------------------------------------------------------------------------------------------------
def test_a_prompt_longer_than_the_context_is_named():
    _, _, stream = assembled("method=grpo", "env=countdown", "env.start=none", "policy.context=20")
    with pytest.raises(UserError, match=r"a prompt has 9 tokens.*context of 20 leaves 5: '.*=.*\n.*env\.response_length"):
        stream.next()


def test_a_verifier_or_a_reward_that_raises_is_named_with_its_completion():
    world = told_world()
    with pytest.raises(RuntimeError, match=r"the verifier of Told raised ValueError: no zeros\nprompt '1', completion '0\.'"):
        world.judge(world.task.train()[0], "0.")
    world.reward = lambda verdict: 1 / verdict.correct
    with pytest.raises(RuntimeError, match=r"the reward of CountdownWorld raised ZeroDivisionError.*\nprompt '1', completion '2"):
        world.rewarded(world.task.train()[0], "2.", world.judge(world.task.train()[0], "2."))


@pytest.mark.parametrize("words", [("env=countdown", "env.start=none"), TURNS], ids=["one turn", "many turns"])
@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean", "token_sum_norm"])
def test_empty_responses_and_equal_rewards_change_nothing(words, aggregation):
    method, _, stream = assembled("method=grpo", *words, f"method.aggregation={aggregation}")
    batch = stream.next()
    before = {k: v.clone() for k, v in method.state_dict().items()}
    batch["reward"] = torch.full_like(batch["reward"], 0.1)
    batch["mask"][:5] = 0
    batch["length"] = batch["mask"].sum(1)
    told = method.update(batch)
    assert all(torch.equal(before[k], v) for k, v in method.state_dict().items()) and told["same_reward"] == 1
    batch["mask"] = torch.zeros_like(batch["mask"])
    told |= method.update({**batch, "reward": torch.rand(len(batch["mask"]))})
    assert all(torch.isfinite(v) for v in told.values())
    assert all(torch.isfinite(v).all() for v in method.state_dict().values())


def test_an_empty_response_is_wrong():
    for name in OWN:
        world = world_of(name)
        assert world.judge(world.task.train()[0], "").correct == 0


# ---- many turns --------------------------------------------------------------------------------------------------------
def written(texts):
    rows = len(texts)
    ids = torch.arange(rows)[:, None]
    return Completions(texts, ids, ids >= 0, ids.repeat(1, 3), torch.ones(rows, 3, dtype=torch.bool), torch.zeros(rows, 3))


def test_episodes_are_played_in_lock_step_and_end_alone():
    task = KeyDoor(limit=4)
    quick, slow, lost = (State((0, 0), ((x, 0),), (x + 1, 0)) for x in (1, 2, 5))
    asked = []

    def east(texts, episodes, turn):
        asked.append(episodes.tolist())
        return written(["xx." if turn == 1 and i == 2 else "Ke." for i in episodes.tolist()])

    told = play(task, [quick, slow, lost], east)
    assert told.length == [2, 3, 4] and told.reward == [1, 1, 0]
    assert [t.episodes for t in told.turns] == [[0, 1, 2], [0, 1, 2], [1, 2], [2]] == asked
    assert [t.cost for t in told.turns] == [[0, 0, 0], [0, 0, -0.1], [0, 0], [0]]

    class Broken(KeyDoor):
        def step(self, state, text):
            raise KeyError(text)

    with pytest.raises(RuntimeError, match=r"Broken\.step raised KeyError.*\nprompt 'a00k10d20h0>', completion 'Ke\.'"):
        play(Broken(), [quick], lambda texts, episodes, turn: written(["Ke."]))


def test_rows_of_a_batch_are_turns_of_episodes():
    method, world, stream = assembled("method=grpo", "env=key_door", "env.start=none", "env.limit=6", "method.prompts=3")
    batch = stream.next()
    unit, turn = batch["unit"], batch["turn"]
    assert unit.unique().tolist() == list(range(12)) and torch.equal(batch["group"], unit // 4)
    assert all(torch.equal(turn[unit == u], torch.arange(int((unit == u).sum()))) for u in range(12))
    for row in range(len(unit)):
        text = method.tokenizer.decode(batch["response"][row][:int(batch["length"][row])].tolist())
        bad = len(text) != 3 or text[0] not in "KD?" or text[1] not in "nesw" or text[2] != "."
        assert batch["format"][row] == (not bad)
        assert batch["reward"][row] == pytest.approx(batch["correct"][row].item() - 0.1 * bad)
        if not turn[row]:
            prompt = method.tokenizer.decode(batch["prompt"][row].tolist())
            assert prompt == world.task.observe(stream.pool[int(batch["problem"][row])])
    assert stream.counters() == {"responses": len(unit)}
    told = method.update(batch)
    assert told["turns"].item() == pytest.approx(len(unit) / 12)
    assert told["correct"].item() == pytest.approx(batch["correct"][turn == 0].mean().item())
    assert 0 < told["entropy_by_turn"] < 4


def test_several_processes_play_what_one_would_and_a_stop_changes_nothing():
    def new(processes=(0, 1)):
        method, _, stream = assembled("method=grpo", *TURNS, "method.samples=2")
        stream.rank, stream.ranks = processes
        stream.names = set()
        return stream

    whole = new().rollouts([5, 6, 7, 8], 2)
    parts = join([new((0, 2)).rollouts([5, 6], 2), new((1, 2)).rollouts([7, 8], 2)])
    assert all(torch.allclose(whole[k].float(), parts[k].float(), atol=1e-5) for k in whole)
    first, second = new(), new()
    first.next()
    second.load_state_dict(first.state_dict())
    one, two = first.next(), second.next()
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("name", [m.name for m in BOOK.all("method") if "prompts" in m.needs])
def test_every_method_learns_from_turns(name):
    more = {"dph_rl": ["env.limit=24", "method.store=all_correct"]}.get(name, ["env.limit=4"])  # it has to see a success
    method, _, stream = assembled(f"method={name}", "env=key_door", "method.prompts=2", "method.samples=2", *more)
    told = method.update(stream.next())
    assert told["turns"] > 2 and all(torch.isfinite(v) for v in told.values())


def test_rewards_are_compared_over_episodes():
    """Group 0: episodes of 3, 1 and 2 turns with rewards 1, 0, 0 (one of them with an invalid text); group 1: all equal."""
    value = torch.tensor([1.0, 1, 1, 0, 0, -0.1, 0.3, 0.3, 0.3])
    unit, group = torch.tensor([0, 0, 0, 1, 4, 4, 7, 7, 9]), torch.tensor([0] * 6 + [1] * 3)
    mean, deviation, size = group_statistics(value, group, unit)
    episodes = torch.tensor([1.0, 0.0, -0.05])
    assert mean[:6].tolist() == pytest.approx([episodes.mean().item()] * 6) and mean[6:].eq(value[6]).all()
    assert deviation[:6].tolist() == pytest.approx([episodes.std().item()] * 6) and deviation[6:].eq(0).all()
    assert size.tolist() == [3] * 6 + [2] * 3
    advantage = bare().advantage({"reward": value, "group": group, "unit": unit}, {})
    assert advantage[:6].tolist() == pytest.approx(((value[:6] - episodes.mean()) / episodes.std()).tolist(), rel=1e-4)
    assert advantage[6:].eq(0).all()
    same = group_statistics(value, group, torch.arange(9))  # every row its own: as without
    assert all(torch.equal(a, b) for a, b in zip(same, group_statistics(value, group)))


def test_equal_episodes_of_any_length_have_no_deviation():
    unit = torch.repeat_interleave(torch.arange(1, 12), torch.arange(1, 12))  # sums of 0.7 round differently for each length
    mean, deviation, _ = group_statistics(torch.full((66,), 0.7), torch.zeros(66, dtype=torch.long), unit)
    assert mean.eq(torch.tensor(0.7)).all() and deviation.eq(0).all()


def test_every_turn_and_every_set_of_rollouts_has_numbers_of_its_own(monkeypatch):
    method, _, stream = assembled("method=grpo", *TURNS)
    seen, generate = [], method.generate
    monkeypatch.setattr(method, "generate", lambda texts, samples, uniforms, *more, **named: (
        seen.append(uniforms.clone()), generate(texts, samples, uniforms, *more, **named))[1])
    stream.next()
    stream.rollouts([0, 1, 2, 3], 4, name="second")
    stream.next()
    assert len(seen) == 15 and len({tuple(u.flatten().tolist()) for u in seen}) == 15


def test_episodes_stay_whole_when_batches_are_cut_and_joined():
    batch = {"prompt": torch.ones(5, 2).long(), "prompt_mask": torch.ones(5, 2).bool(), "group": torch.tensor([0, 0, 0, 1, 1]),
             "unit": torch.tensor([0, 0, 1, 2, 3]), "answer": torch.full((5,), -1), "reward": torch.tensor([1.0, 1, 0, 1, 0])}
    both = join([batch, groups_of(batch, torch.tensor([False, True]))])
    assert both["group"].tolist() == [0, 0, 0, 1, 1, 2, 2] and both["unit"].unique_consecutive().numel() == 6
    mean, _, size = group_statistics(both["reward"], both["group"], both["unit"])
    assert mean.tolist() == [0.5] * 7 and size.tolist() == [2] * 7


@pytest.mark.parametrize("name", [n for n in BOOK.names("env") if "demonstrations" in BOOK.get("env", n).provides
                                  and BOOK.get("env", n).card.get("data")])
def test_a_start_s_recipe_composes_and_what_is_shipped_tells_where_it_is_from(name):
    from runner import data

    entry = BOOK.get("env", name)
    for size in data.SIZES:
        job = compose(data.recipe(entry, size)["start"], BOOK)
        assert job.env.name == name and job.config["method"]["name"] == "sft"
    starts = entry.source.parent / "starts"
    card = json.loads((starts / f"{name}.json").read_text())
    assert card["env"] == name and card["dirty"] is False and card["metrics"]["pass_1"] > 0.05
    assert (starts / f"{name}.safetensors").stat().st_size <= 1_000_000
