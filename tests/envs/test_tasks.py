"""The tasks of token policies: figures of their recipes, verifiers that never raise, splits that never meet."""

from __future__ import annotations

import json
import random
from fractions import Fraction

import pytest

from envs.prompts.chain import Chain
from envs.prompts.countdown import Countdown, derivations, shape
from envs.prompts.gym import Gym
from envs.prompts.key_door import KeyDoor, mixture_success
from envs.prompts.modular import BenignForks, ModularChain
from envs.prompts.numbers import final
from envs.prompts.path import Path
from envs.prompts.task import Problem
from envs.prompts.textfile import TextFile
from envs.prompts.think_longer import ThinkLonger
from runner.errors import UserError

OWN = {"countdown": Countdown, "countdown-4": lambda: Countdown(4),
       "wrapper": lambda: Countdown(wrapper=True, extra_tokens=50), "think_longer": ThinkLonger,
       "modular": ModularChain, "forks": BenignForks, "chain": Chain, "path": Path,
       "shortest": lambda: Path(shortest=True, nodes=10, edges=24), "key_door": KeyDoor,
       "hidden": lambda: KeyDoor(partial=True), "two keys": lambda: KeyDoor(size=9, limit=60, keys=2)}
MADE = {}


def own(name):
    if name not in MADE:
        MADE[name] = OWN[name]()
    return MADE[name]


def first(problems, number):
    return [problems[i] for i in range(min(number, len(problems)))]


# ---- all of them -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", OWN)
def test_demonstrations_have_the_form_that_the_task_promises(name):
    task, rng, correct = own(name), random.Random(0), 0
    for problem in first(task.train(), 400):
        text = task.demonstrate(problem, rng)
        verdict = task.verify(problem, text)
        assert len(problem.prompt) == task.prompt_length and len(text) <= task.response_length
        assert set(problem.prompt + text) <= set(task.alphabet) and text.index(task.eos) == len(text) - 1
        assert verdict.format == 1 and verdict.answer is not None and verdict.correct in (0, 1)
        assert (task.canonical(problem, text) is not None) == verdict.correct
        assert all(c in task.valid_next(problem, text[:i]) for i, c in enumerate(text))
        assert task.valid_next(problem, text) == ""
        correct += verdict.correct
    assert 20 < correct < 400
    assert len(set(task.alphabet)) == len(task.alphabet) and "\0" not in task.alphabet


@pytest.mark.parametrize("name", OWN)
def test_problems_are_the_same_in_every_process_and_splits_never_meet(name):
    task, again = own(name), OWN[name]()
    train = first(task.train(), 3000)
    assert train[:50] == first(again.train(), 50) and task.held_out()[3] == again.held_out()[3]
    held = {p.prompt for p in first(task.held_out(), 300)} | {p.prompt for p in first(task.unlabelled(), 300)}
    if name == "hidden":  # what is hidden may look alike
        held, train = {p.answer[:3] for p in task.held_out()}, [Problem(p.answer[:3]) for p in train]
    assert not held & {p.prompt for p in train}
    assert not {p.prompt for p in task.held_out()[:50]} - held or name == "hidden"


@pytest.mark.parametrize("name", [n for n in OWN if OWN[n]().all_solutions(OWN[n]().train()[0]) is not None])
def test_all_solutions_are_right_and_no_demonstration_is_missing(name):
    task, rng = own(name), random.Random(1)
    for problem in first(task.train(), 100):
        listed = task.all_solutions(problem)
        assert len(set(listed)) == len(listed) > 0
        shown = {task.canonical(problem, task.demonstrate(problem, rng)) for _ in range(20)}
        assert shown - {None} <= set(listed)


# ---- countdown ---------------------------------------------------------------------------------------------------------
def test_countdown_has_the_figures_of_its_description():
    task = own("countdown")
    problems = [*task.train(), *task.held_out()]
    assert (len(task.train()), len(task.held_out()), len(task.groups)) == (1767, 196, 165)
    assert (len(task.alphabet) + 1, task.prompt_length, task.response_length) == (19, 9, 15)  # with padding
    solutions = [len(task.all_solutions(p)) for p in problems]
    random_hits = sum(n / len(derivations(p.answer[0], 99)) for n, p in zip(solutions, problems)) / len(problems)
    assert random_hits == pytest.approx(165 / 1963) and max(solutions) == 6
    assert sum(n <= 4 for n in solutions) / len(problems) > 0.99
    rng = random.Random(0)
    hits = [task.verify(p, task.demonstrate(p, rng)).correct for p in problems]
    assert sum(hits) / len(hits) == pytest.approx(0.5 + 0.5 * random_hits, abs=0.04)


def test_countdown_verifier_asks_for_every_rule():
    task = own("countdown")
    problem = task.problem((1, 3, 4), 1)
    assert problem.prompt == "1:3:4|01="
    for text in ("1*4=4,4-3=1.", "4*1=4,4-3=1.", "4-3=1,1*1=1.", "4-3=1,1*1=1."):
        assert task.verify(problem, text) == (1.0, "1", 1.0, None), text
    assert task.canonical(problem, "4*1=4,4-3=1.") == "1*4=4,4-3=1"
    for text in ("1*4=4,4-3=1", "1*4=5,4-3=1.", "1*4=4,4-4=0.", "1*4=4,3-4=-1.", "3-4=-1,1--1=2.", "4-3=1.", "1*4=4,4-03=1.",
                 "1*4=4,4-3=1.\n", "1*4=4,4-3=1..", "1*3=3,3-1=2,2-1=1.", "", ".", "1*4=4,,4-3=1.", "²*4=4,4-3=1."):
        assert task.verify(problem, text).correct == 0, text
    assert task.verify(problem, "3+4=7,7-1=6.").answer == "6"


def test_countdown_wrapper_counts_form_apart_from_correctness():
    task = own("wrapper")
    problem = task.problem((1, 3, 4), 1)
    assert task.verify(problem, "<1*4=4,4-3=1>.") == (1.0, "1", 1.0, None)
    assert task.verify(problem, "<1*4=4,4-3=7>.") == (0.0, None, 1.0, None)
    assert task.verify(problem, "<1*4=4,4-3=1.") == (0.0, None, 0.0, None)
    assert len(task.alphabet) == 18 + 2 + 50
    assert task.valid_next(problem, "") == "<" and task.valid_next(problem, "<1*4=4,4-3=1>") == "."


def accepted(task, problem, texts, place):
    """For each place in a response, named by place(prefix): (what demonstrations show there, what is accepted)."""
    found = {}
    for text in texts:
        for i, c in enumerate(text):
            shown, allowed = found.setdefault(place(text[:i]), (set(), set()))
            shown.add(c)
            allowed |= set(task.valid_next(problem, text[:i]))
    return found


def test_what_may_follow_is_exactly_what_is_demonstrated():
    task = own("countdown")
    texts = [text + "." for group in task.groups for text in derivations(group, 99)]
    for place, (shown, allowed) in accepted(task, task.train()[0], texts, shape).items():
        for kind in ("+-*", "123456789"):  # to syntax these are alike
            for seen in (shown, allowed):
                seen.update(kind if seen & set(kind) else "")
        assert shown == allowed, place
    assert [task.valid_next(task.train()[0], x) for x in ("d", "1w", "1+2=03", "ooo")] == [""] * 4
    for name in ("modular", "forks"):
        task, rng = own(name), random.Random(0)
        texts = [task.demonstrate(p, rng) for p in first(task.train(), 1500)]
        for place, (shown, allowed) in accepted(task, task.train()[0], texts, len).items():
            assert shown == allowed, (name, place)


def test_thinking_longer_makes_demonstrations_better():
    task, rng = own("think_longer"), random.Random(0)
    right = [[] for _ in range(7)]
    for problem in task.train():
        for _ in range(4):
            text = task.demonstrate(problem, rng)
            right[task.fillers(text)].append(task.verify(problem, text).correct)
    for n, seen in enumerate(right):
        expected = task.share(n) + (1 - task.share(n)) * 165 / 1963
        assert sum(seen) / len(seen) == pytest.approx(expected, abs=0.06)
    assert task.response_length == 21
    problem = task.problem((1, 3, 4), 1)
    assert task.verify(problem, "wwwwww1*4=4,4-3=1.").correct and not task.verify(problem, "wwwwwww1*4=4,4-3=1.").correct
    assert task.valid_next(problem, "wwwwww") == "123456789" and "w" in task.valid_next(problem, "w")


NUMBER = 800


# ---- modular arithmetic ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "share", "easy", "biased", "easy_majority", "biased_majority"),
                         [("modular", 0.376, 0.340, 0.179, 1.0, 0.05), ("forks", 0.344, 0.369, 0.180, 0.999, 0.0)])
def test_noisy_arithmetic_has_the_laws_of_its_description(name, share, easy, biased, easy_majority, biased_majority):
    task, rng = own(name), random.Random(0)
    of = {True: [], False: []}
    for problem in first(task.train(), NUMBER):
        law = task.answer_law(problem)
        assert sum(law) == pytest.approx(1)
        answered = task.verify(problem, task.demonstrate(problem, rng))
        of[task.biased(problem)].append((law[problem.answer], max(law) == law[problem.answer], answered.correct))
    mean = {b: [sum(x) / len(x) for x in zip(*rows)] for b, rows in of.items()}
    assert len(of[True]) / NUMBER == pytest.approx(share, abs=0.04)
    assert mean[False][:2] == pytest.approx([easy, easy_majority], abs=0.01)
    assert mean[True][:2] == pytest.approx([biased, biased_majority], abs=0.03)
    assert mean[False][2] == pytest.approx(easy, abs=0.05) and mean[True][2] == pytest.approx(biased, abs=0.05)


def test_modular_answers():
    task = own("modular")
    problem = Problem("3+4*2-7*8=", 6)
    assert task.verify(problem, "3+4=7;7*2=4;4-7=7;7*8=6.") == (1.0, "6", 1.0, None)
    assert task.verify(problem, "=6.") == (1.0, "6", 0.0, None)  # the ending alone is read
    assert task.verify(problem, "3+4=7;7*2=4;4-7=7;7*8=6").answer is None
    assert task.biased(problem) and not task.biased(Problem("3+9*2-7*6=", 0))
    assert len(task.alphabet) + 1 == 17 and len(task.unlabelled()) == 64
    clean = ModularChain(p_err=0.0, biased_p=0.0)
    assert all(clean.verify(p, clean.demonstrate(p, random.Random(0))).correct for p in first(clean.train(), 200))


# ---- chains, paths -----------------------------------------------------------------------------------------------------
def test_chains_and_paths_are_verified_by_what_they_mean():
    task = Chain(p_err=0.0)
    for problem in first(task.train(), 300):
        assert task.verify(problem, task.demonstrate(problem, random.Random(0))).correct
        assert 2 <= len(task.steps(problem)[1]) <= 5
    problem = Problem("ab,bc,ac,cd|a>d=", (frozenset(("ab", "bc", "ac", "cd")), "a", "d"))
    task = Path(nodes=4, edges=4, least=2, most=3)
    assert task.all_solutions(problem) == ["acd.", "abcd."]
    assert all(task.verify(problem, x).correct for x in ("acd.", "abcd."))
    assert not any(task.verify(problem, x).correct for x in ("ad.", "acd", "bcd.", "ac.", "acbcd."))
    brief = Path(nodes=4, edges=4, least=2, most=3, shortest=True)
    assert brief.all_solutions(problem) == ["acd."] and not brief.verify(problem, "abcd.").correct
    with pytest.raises(UserError, match="too many paths"):
        Path(nodes=20, edges=300, most=8)


# ---- key and door ------------------------------------------------------------------------------------------------------
def test_the_mixture_of_key_and_door_succeeds_as_described():
    task = own("key_door")
    success, turns = mixture_success(task)
    assert success == pytest.approx(0.30, abs=0.02) and len(task.alphabet) + 1 == 24 and task.prompt_length == 12
    assert mixture_success(task, 1.0) == (pytest.approx(1), pytest.approx(9.33, abs=0.01))
    assert mixture_success(KeyDoor(size=6, limit=20))[0] == pytest.approx(0.33, abs=0.02)
    assert mixture_success(KeyDoor(size=5, limit=16))[0] == pytest.approx(0.35, abs=0.02)
    rng, wins, episodes = random.Random(0), 0.0, task.episodes()
    for i in range(1500):
        state, over = episodes[i], False
        while not over:
            state, reward, over = task.step(state, task.demonstrate(task.turn(state), rng))
        wins += reward
    assert wins / 1500 == pytest.approx(success, abs=0.04)


def test_steps_of_key_and_door():
    task = own("key_door")
    state = task.episodes()[0]._replace(agent=(0, 0), keys=((1, 0),), door=(1, 1))
    assert task.observe(state) == "a00k10d11h0>"
    same, reward, over = task.step(state, "Kx.")
    assert (same.agent, reward, over, same.turn) == ((0, 0), -0.1, False, 1)
    assert task.step(state, "Kn.")[0].agent == (0, 0)  # blocked at the border
    state, reward, over = task.step(state, "Ke.")
    assert task.observe(state) == "a10k10d11h1>" and (reward, over) == (0.0, False)
    assert task.step(state, "?s.")[1:] == (1.0, True)
    assert task.step(state._replace(turn=23), "?n.")[1:] == (0.0, True)
    hidden = own("hidden")
    state = hidden.look(state._replace(agent=(6, 6), keys=((6, 4),), door=(0, 0), held=0, seen=0))
    assert hidden.observe(state) == "a66k64d--h0>"
    state = hidden.step(hidden.step(state, "Ks.")[0], "Kw.")[0]
    assert hidden.observe(state) == "a56k64d--h0>"  # seen once, known


# ---- other people's problems -------------------------------------------------------------------------------------------
def test_reasoning_gym_families():
    pytest.importorskip("reasoning_gym")
    for family in ("chain_sum", "gcd", "spiral_matrix", "polynomial_multiplication", "lcm"):
        task = Gym(family, held_out=32, scan=16)
        for problem in first(task.train(), 20):
            assert task.verify(problem, task.demonstrate(problem, None))[:2] == (1.0, problem.answer["answer"].strip())
        held = {p.prompt for p in task.held_out()}
        assert not held & {p.prompt for p in first(task.train(), 200)}
        problem = task.train()[0]
        assert task.verify(problem, f"so <answer> {problem.answer['answer']} </answer>").correct
        assert set("".join(p.prompt for p in first(task.train(), 20))) <= set(task.alphabet)
    task = Gym("countdown", held_out=8, scan=4)
    for text in ("9**9**9", "(9**9)**9**9", "99999999!", "__import__('os')", "1e999999999", "exit()", "(" * 500, ""):
        assert task.verify(task.train()[0], text).correct == 0
    for values, word in ((("chain_sm",), "did you mean: chain_sum"), (("chain_sum", 10), "a prompt has [0-9]+ characters"),
                         (("composite",), "refuses"), (("graph_color",), "stores no answers")):
        with pytest.raises(UserError, match=word):
            task = Gym(*values, held_out=8)
            task.demonstrate(task.train()[0], None)
    with pytest.raises(UserError, match="did you mean: min_terms"):
        Gym("chain_sum", options={"min_term": 1})


@pytest.mark.parametrize(("text", "value"), [
    ("#### 72", 72), ("The answer is 72.", 72), ("so $1,234.50", "1234.5"), ("−5", -5), ("-$5", -5), ("$-5", -5), ("10-5", 5),
    (r"\boxed{\frac{3}{4}}", "3/4"), (r"\boxed{1\frac{3}{4}} 9", "7/4"), ("1 3/4 cups", "7/4"), ("area is 20 cm^2", 20),
    ("1{,}234", 1234), ("72 \\text{ dollars}", 72), (".5", ".5"), ("€3", 3), ("2e3", 2000), ("5/0", None), ("**72**", 72),
    ("#### -1,000 apples\nfoo 7", -1000), ("#### 5\n#### 6", 6), ("####", None), ("9" * 50, None), ("9" * 10000, None),
    ("", None), ("72.00", 72), ("3-4", 4), (r"\boxed{5", 5), ("50 %", 50), ("18 dollars/hour", 18),
    (r"\boxed{-\frac12}", "-1/2")])
def test_numbers_are_read_from_text(text, value):
    found = final(text)[0]
    assert (found and found.value) == (None if value is None else Fraction(value))


ROWS = [("What is half of a hundred?", "Half is <<100/2=50>>50.\n#### 50"), ("How many?", "#### 1,234"),
        ("Cost?", "#### -0.5")]


def written(folder, rows, name="some.jsonl"):
    file = folder / name
    file.write_text("\n".join(r if isinstance(r, str) else json.dumps({"question": r[0], "answer": r[1]}) for r in rows))
    return str(file)


def test_questions_from_a_file(tmp_path):
    held = written(tmp_path, [ROWS[2]], "test.jsonl")
    task = TextFile(written(tmp_path, ROWS), held)
    assert len(task.train()) == 2 and [p.prompt for p in task.held_out()] == ["Cost?\n"]
    half, many = task.train()
    assert task.demonstrate(half, None) == "Half is 50.\n#### 50\x03"
    assert task.verify(half, task.demonstrate(half, None)).correct
    assert task.verify(half, "50%").correct and task.verify(task.held_out()[0], "-50%").correct
    assert task.verify(many, "It is $1234.00.") == (1.0, "1234", 0.0, None)
    many_rows = [(f"Question {i}?", f"#### {i}") for i in range(200)]
    task = TextFile(written(tmp_path, many_rows))
    assert 8 < len(task.held_out()) < 40 and len(task.train()) + len(task.held_out()) == 200
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"question": [r[0] for r in many_rows], "answer": [r[1] for r in many_rows]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "some.parquet")
    assert TextFile(str(tmp_path / "some.parquet")).train() == task.train()


def test_files_that_cannot_be_used_are_named_by_line(tmp_path):
    rows = [ROWS[0], "{", ("", "#### 1"), ("Why?", "7"), "", ("Why?", "#### so"), '{"q": 1}', "[]", ROWS[1]]
    with pytest.raises(UserError) as error:
        TextFile(written(tmp_path, rows))
    for word in ("6 rows", "line 2: no JSON", "line 3: no question", "line 4: its answer has no '####'", "line 6: no number",
                 "…"):
        assert word in str(error.value), word
    task = TextFile(written(tmp_path, rows), written(tmp_path, ROWS[1:], "test.jsonl"), skip_bad=True)
    assert len(task.bad) == 6 and len(task.train()) == 1
    with pytest.raises(UserError, match="huggingface-cli download --repo-type dataset openai/gsm8k"):
        TextFile(str(tmp_path / "main" / "none.jsonl"))
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        TextFile(str(tmp_path / "bad.parquet"))
    with pytest.raises(UserError, match="a prompt has 27 characters"):
        TextFile(written(tmp_path, ROWS), written(tmp_path, ROWS[2:], "test.jsonl"), prompt_length=20)


# ---- whatever a policy writes ------------------------------------------------------------------------------------------
def mangled(text: str, alphabet: str, rng: random.Random) -> str:
    kind = rng.randrange(12)
    if kind == 0:
        return rng.choice(["", "\0", "\n", text * 500, alphabet, text[::-1], "9" * 20000, "(" * 2000, "𝟙٣½²", "\ud800",
                           "=9" * 999])
    if kind == 1:
        return "".join(chr(rng.choice([rng.randrange(0x250), rng.randrange(0x2000, 0x2300), rng.randrange(0x1F600, 0x1F650)]))
                       for _ in range(rng.randrange(30)))
    out = list(text)
    for _ in range(rng.randint(1, 4)):
        at, c = rng.randrange(len(out) + 1), rng.choice(alphabet)
        out[at:at + rng.randrange(2)] = [c] * rng.randrange(2)
    return "".join(out)


def test_no_answer_makes_a_verifier_raise(tmp_path, capsys):
    tasks = {name: own(name) for name in OWN}
    tasks["textfile"] = TextFile(written(tmp_path, ROWS), written(tmp_path, ROWS[2:], "test.jsonl"))
    for family in ("chain_sum", "countdown", "polynomial_multiplication", "n_queens", "spiral_matrix", "mini_sudoku"):
        tasks[f"gym {family}"] = Gym(family, held_out=4, scan=4)
    rng, counts = random.Random(0), {}
    for name, task in tasks.items():
        problems, seen = first(task.train(), 20), [0, 0, 0]
        for _ in range(10_000 // len(tasks) + 1):
            problem = rng.choice(problems)
            text = mangled(task.demonstrate(problem, rng), task.alphabet, rng)
            correct, answer, form, _ = task.verify(problem, text)
            assert correct in (0, 1) and (answer is None or isinstance(answer, str)) and 0 <= form <= 1
            assert correct == 0 or answer is not None
            task.canonical(problem, text)
            follows = task.valid_next(problem, text)
            assert follows is None or set(follows) <= set(task.alphabet)
            seen = [seen[0] + 1, seen[1] + (answer is not None), seen[2] + int(correct)]
        counts[name] = seen
    with capsys.disabled():
        print(f"\nmangled answers: {sum(s[0] for s in counts.values())}; still read, still right:",
              ", ".join(f"{n} {s[1]}, {s[2]}" for n, s in counts.items()))


def test_what_is_asked_and_what_is_read_of_a_sentence():
    gym = Gym("chain_sum", options={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}, ask="The number only.",
              reads="last_number", response_length=24)
    problem = gym.train()[0]
    assert problem.prompt.endswith("=\nThe number only.\n") and len(problem.prompt) <= gym.prompt_length
    right = problem.answer["answer"]
    for text in (right, f"7 - 1 = {right}", f"The answer is {right}.", f"<answer>so {right}</answer> 99"):
        assert gym.verify(problem, text + gym.eos).correct == 1, text
    for text in ("", "none", f"{right} or {int(right) + 1}", f"{right}5"):
        assert gym.verify(problem, text + gym.eos).correct == 0, text
    plain = Gym("chain_sum", options={"min_terms": 2, "max_terms": 2}, response_length=24)
    assert plain.verify(plain.train()[0], f"It is {plain.train()[0].answer['answer']}" + plain.eos).correct == 0
