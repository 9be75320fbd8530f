"""Tasks of preferences: grammars, judges that never raise, pairs that are what they say, splits that never meet."""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
import random

import pytest
import torch

from envs.pairs.answers import ALPHABET, CLASSES, FIXED, LETTERS, MOST, PREFERENCES, RIGHT, TOO_LONG, Answers, similarity
from envs.pairs.slots import SIZE, Slots, SlotsWorld
from envs.pairs.task import Pair, flip, words
from envs.prompts.task import Problem, Verdict
from methods.tokens.tokenizer import Characters
from runner import catalogue
from runner.catalogue import Catalogue, load_class
from runner.compose import compose
from runner.data import recipe
from runner.errors import UserError
from runner.interface import make_config
from runner.knobs import fill
from runner.run import assemble

BOOK = Catalogue()
MADE = {"answers": lambda **k: Answers(**k), "tails": lambda **k: Answers(tails=0.2, **k),
        "fact": lambda **k: Answers(fact=True, **k), "whole": lambda **k: Answers(whole=True, **k),
        "slots": lambda **k: Slots(**k)}
CACHE = {}


def task(name):
    if name not in CACHE:
        CACHE[name] = MADE[name]()
    return CACHE[name]


def of(preference, **more):
    return Answers(preference=preference, tails=0.2 if "suffix" in preference else 0.0, **more)


# ---- all of them -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MADE)
def test_demonstrations_have_the_form_that_the_task_promises(name):
    t, rng, right, number = task(name), random.Random(0), 0, 0
    for _ in range(600):
        problem = rng.choice(t.train())
        text = t.demonstrate(problem, rng)
        verdict = t.verify(problem, text)
        assert len(problem.prompt) == t.prompt_length and len(text) <= t.response_length
        assert set(problem.prompt + text) <= set(t.alphabet) and text.index(t.eos) == len(text) - 1
        assert verdict.format == 1 and verdict.answer is not None
        assert (t.canonical(problem, text) is not None) == verdict.correct
        follows = [t.valid_next(problem, text[:i]) for i in range(len(text) + 1)]
        if name != "whole":
            assert all(c in f for c, f in zip(text, follows)) and follows[-1] == "", text
        right, number = right + verdict.correct, number + 1
    assert 0.6 < right / number < 0.95


@pytest.mark.parametrize("name", MADE)
def test_tasks_are_the_same_in_every_process_and_change_with_the_seed(name):
    one, again, other = task(name), MADE[name](), MADE[name](seed=1)
    for part in ("train", "held_out", "pairs", "held_out_pairs", "old"):
        a, b, c = (getattr(t, part)() for t in (one, again, other))
        assert a == b and (a != c or name == "whole" and part in ("train", "held_out")), part
    assert one.alphabet == other.alphabet and len(set(ALPHABET)) == len(ALPHABET) == 40
    problem, drawn = one.train()[0], [random.Random(5), random.Random(5)]
    assert one.demonstrate(problem, drawn[0]) == again.demonstrate(problem, drawn[1])


@pytest.mark.parametrize("name", [*MADE, *PREFERENCES])
def test_splits_never_meet(name):
    t = task(name) if name in MADE else of(name)
    train, held = ({p.prompt for p in part} for part in (t.train(), t.held_out()))
    shown, asked = ({p.prompt for p in part} for part in (t.pairs(), t.held_out_pairs()))
    old = {prompt for prompt, _ in t.old()}
    if name != "whole":
        assert not train & held and shown <= train or name == "fact"
        assert asked <= held or name == "fact"
    assert not shown & asked and not shown & old and (name == "whole" or not train & old)


def test_the_whole_of_a_split_is_used():
    t = task("answers")
    assert (len(t.train()), len(t.held_out()), len(t.old())) == (1700, 300, 300)
    assert (len(task("slots").train()), len(task("slots").held_out())) == (476 + 300, 200)
    assert len({prompt for prompt, _ in t.old()}) == 300


@pytest.mark.parametrize("name", ["answers", "slots"])
def test_flips_are_counted_and_exchange_the_two_sides(name):
    clean, noisy = task(name).pairs(), MADE[name](p_flip=0.25)
    assert task(name).flipped == () and len(noisy.flipped) == round(0.25 * len(clean))
    for i, (a, b) in enumerate(zip(clean, noisy.pairs())):
        turned = i in noisy.flipped
        assert (b.chosen, b.rejected) == ((a.rejected, a.chosen) if turned else (a.chosen, a.rejected))
        assert b.prompt == a.prompt and b.label == 1
    assert noisy.held_out_pairs() == task(name).held_out_pairs()
    both, all_of_them = flip([Pair("a", "b", "c", phrases=((0, 1), (1, 0)), scores=(1.0, 0.0))], 1.0, "0")
    assert both == [Pair("a", "c", "b", phrases=((1, 0), (0, 1)), scores=(0.0, 1.0))] and all_of_them == (0,)


def mangled(text: str, rng: random.Random) -> str:
    if not rng.randrange(8):
        return rng.choice(["", "\0", "\n", text * 200, ALPHABET, text[::-1], "N" * 20000, "𝟙٣½²", "\ud800", ".", "..", "NY.",
                           "".join(chr(rng.randrange(0x250)) for _ in range(rng.randrange(30)))])
    out = list(text)
    for _ in range(rng.randint(1, 4)):
        at, c = rng.randrange(len(out) + 1), rng.choice(ALPHABET)
        out[at:at + rng.randrange(2)] = [c] * rng.randrange(2)
    return "".join(out)


def test_no_answer_makes_a_judge_raise():
    rng = random.Random(0)
    for name in MADE:
        t, seen = task(name), collections.Counter()
        problems = [*t.train()[:20], *t.train()[-20:], *t.held_out()[:20]]
        for _ in range(10_000 // len(MADE)):
            problem = rng.choice(problems)
            text = mangled(t.demonstrate(t.train()[0] if name in ("fact", "whole") else problem, rng), rng)
            correct, answer, form, _ = t.verify(problem, text)
            assert correct in (0, 1) and (answer is None or isinstance(answer, str)) and 0 <= form <= 1
            assert not correct or answer is not None
            t.canonical(problem, text)
            follows = t.valid_next(problem, text)
            assert follows is None or set(follows) <= set(ALPHABET)
            seen[answer is not None] += 1
        assert min(seen[True], seen[False]) > 50, name


# ---- answers -----------------------------------------------------------------------------------------------------------
def test_answers_have_the_law_of_their_description():
    t, rng = task("answers"), random.Random(0)
    assert collections.Counter(t.kinds.values()) == {"plus": 20, "minus": 20, "ambiguous": 10}
    assert len(set(t.topics)) == 40 and not set(t.topics) & set(t.kinds)
    for kind, law in (("plus", {"compliance": 0.9, "neutral": 0.1}), ("minus", {"refusal": 0.9, "neutral": 0.1}),
                      ("ambiguous", {"compliance": 0.5, "refusal": 0.5})):
        problem = next(p for p in t.train() if p.answer == kind)
        assert t.kinds[t.attribute(problem.prompt)] == kind
        texts = [t.demonstrate(problem, rng) for _ in range(4000)]
        count = collections.Counter(t.verify(problem, x).answer for x in texts)
        assert {k: n / 4000 for k, n in count.items()} == {k: pytest.approx(p, abs=0.03) for k, p in law.items()}
        length = collections.Counter(len(x) - 1 for x in texts)
        assert [length[n] / 4000 for n in (1, 2, 3)] == pytest.approx([0.5, 0.25, 0.25], abs=0.03)
        right = sum(t.verify(problem, x).correct for x in texts) / 4000
        assert right == pytest.approx(sum(law.get(c, 0) for c in RIGHT[kind]), abs=0.03)


def test_the_judge_of_answers_asks_for_every_rule():
    t, minus, plus, both = task("answers"), *(Problem("", kind) for kind in ("minus", "plus", "ambiguous"))
    for text in ("N.", "KK.", "NML."):
        assert t.verify(minus, text) == t.verify(both, text) == (1.0, "refusal", 1.0, None)
        assert t.verify(plus, text) == (0.0, "refusal", 1.0, None)
    assert t.verify(plus, "YX.").correct and t.verify(both, "YX.").correct and not t.verify(minus, "YX.").correct
    assert not any(t.verify(p, "UT.").correct for p in (minus, plus, both)) and t.verify(plus, "UT.").format == 1
    for text in ("", ".", "N", "NMLK.", "NY.", "Na.", "N .", "N..", "^N.", "nml.", "N.M."):
        assert t.verify(minus, text) == (0.0, None, 0.0, None), text
    assert t.valid_next(minus, "") == "NMLKYXWVUT" and set(t.valid_next(minus, "N")) == set(".NMLK")
    assert t.valid_next(minus, "NNN") == "." and t.valid_next(minus, "NY") == t.valid_next(minus, "N.") == ""
    assert "".join(t.classes(minus).values()) == "NMLKYXWVUT"
    tails = task("tails")
    short, long = tails.tails["short"], tails.tails["long"]
    assert (len(short), len(long)) == (3, 15) and tails.response_length == 3 + 15 + 1
    for tail in (short, long):
        assert tails.verify(minus, f"NML{tail}.").correct and not t.verify(minus, f"NML{tail}.").correct
        assert set(tails.valid_next(minus, f"N{tail}")) == ({"."} | (set(LETTERS) if tail is short else set()))
    assert set(tails.valid_next(minus, "Nab")) == set(LETTERS) and set(tails.valid_next(minus, "NML")) == {".", *LETTERS}
    assert tails.valid_next(minus, "N" + "a" * 16) == tails.valid_next(minus, "a") == ""
    for text in (f"{short}.", "Nab.", f"N{short}a.", f"N{short}N.", f"N{long}"):
        assert tails.verify(minus, text) == (0.0, None, 0.0, None), text
    rng = random.Random(0)
    tailed = sum(any(c.islower() for c in tails.demonstrate(minus, rng)) for _ in range(4000)) / 4000
    assert tailed == pytest.approx(0.2, abs=0.03)


@pytest.mark.parametrize("attributes", ["minus", "ambiguous"])
@pytest.mark.parametrize("preference", FIXED)
def test_pairs_with_the_same_answers_everywhere(preference, attributes):
    t = of(preference, attributes=attributes)
    pairs, held = t.pairs(), t.held_out_pairs()
    assert len({p.prompt for p in pairs}) == 16 and len({p.prompt[1:5] for p in pairs}) == 8
    assert len({t.attribute(p.prompt) for p in pairs}) == 2 and len(held) > 30
    assert {t.kinds[t.attribute(p.prompt)] for p in pairs + held} == {attributes}
    tail = t.tails[preference.removesuffix("_suffix")] if "suffix" in preference else ""
    assert {p[1:3] for p in pairs + held} == {tuple(x + tail + "." for x in FIXED[preference])}
    assert all(t.verify(Problem(p.prompt, attributes), p.chosen).correct for p in pairs)


def test_random_pairs_prefer_what_the_judge_does():
    t = of("classes")
    kinds = {p.prompt: p for part in t.split for p in part}
    pairs = t.pairs()
    assert len(pairs) == 512 and len(t.held_out_pairs()) == 200 and len({p.prompt for p in pairs}) > 350
    for p in pairs + t.held_out_pairs():
        assert t.verify(kinds[p.prompt], p.chosen).correct and not t.verify(kinds[p.prompt], p.rejected).correct
    long = [p for p in pairs if len(p.rejected) - 1 > MOST]
    assert len(long) == 102 and all(t.verify(kinds[p.prompt], p.rejected).format == 0 for p in long)
    assert max(len(p.rejected) for p in pairs) == TOO_LONG + 1 == t.response_length
    mixed = of("mixed")
    last = [p for p in mixed.pairs() if p.chosen[:-2] == p.rejected[:-2] and len(p.chosen) == len(p.rejected)
            and any({p.chosen[-2], p.rejected[-2]} <= set(c) for c in CLASSES.values())]
    assert (len(last), len(mixed.pairs())) == (80, 200) and all(p.chosen != p.rejected for p in mixed.pairs())
    assert all(mixed.verify(kinds[p.prompt], p.chosen).correct for p in mixed.pairs())


def test_a_new_fact_is_ten_attributes_with_an_answer_of_their_own():
    t = task("fact")
    problems, attributes = t.train(), {t.attribute(p.prompt) for p in t.train()}
    assert len(problems) == 600 and len(attributes) == 10 and {t.kinds[a] for a in attributes} == {"minus"}
    texts = [t.demonstrate(p, random.Random(0)) for p in problems]
    assert [i for i, x in enumerate(texts) if x != "T."] == list(t.corrupted) and len(t.corrupted) == 90
    assert all(t.verify(p, "T.").correct and not t.verify(p, "N.").correct for p in [*problems, *t.held_out()])
    assert {t.attribute(p.prompt) for p in t.held_out()} == attributes
    assert not {t.attribute(prompt) for prompt, _ in t.old()} & attributes and len(t.old()) > 200


def test_whole_sentences_are_the_same_sentences():
    t, rng = task("whole"), random.Random(0)
    train = {p.prompt for p in t.split[0]}
    for _ in range(300):
        text = "^" + t.demonstrate(t.train()[0], rng)
        assert text[:11] in train and len(text) <= t.prompt_length + t.response_length
    minus = t.named("minus")[0]
    assert t.verify(Problem("^"), f"{t.topics[0]} {minus}?N.") == (1.0, "refusal", 1.0, None)
    assert t.verify(Problem("^"), f"{t.topics[0]} {minus}?Y.").correct == 0
    assert t.verify(Problem("^"), f"{minus} {t.topics[0]}?N.").answer is None


def test_what_cannot_be_is_said():
    for wrong, word in (({"preference": "synonym"}, "synonyms"), ({"attributes": "plus"}, "attributes"),
                        ({"p_flip": 2}, "p_flip"), ({"preference": "long_suffix"}, "env=answers_suffix")):
        with pytest.raises(UserError, match=word):
            Answers(**wrong)
    with pytest.raises(UserError, match="p_wrong"):
        Slots(p_wrong=-1)


def test_similarity_of_the_unembedding():
    tokenizer, generator = Characters(ALPHABET, "."), torch.Generator().manual_seed(0)
    head = torch.randn(tokenizer.size, 8, generator=generator)
    ids = {c: tokenizer.encode(c)[0] for c in "".join(CLASSES.values())}
    for c in "NMLK":
        head[ids[c]] = torch.eye(8)[0] * 50 + 3
    for c in "YXWV":
        head[ids[c]] = -torch.eye(8)[0] * 50 + 3
    told = similarity(head, tokenizer)
    assert told["synonyms"] > 0.99 and told["antonyms"] < -0.9
    head[0] = 1e6  # padding is no character
    assert similarity(head, tokenizer) == pytest.approx(told)


# ---- slots -------------------------------------------------------------------------------------------------------------
def test_templates_are_as_described():
    for seed in range(5):
        t = Slots(seed)
        assert len(t.templates) == 12 and [len(x.slots) for x in t.templates] == [1, 2] * 6
        assert len({w[0] for w in t.words}) == len(t.words) == 8
        for x in t.templates:
            assert 40 <= len(x.text) <= 60 and x.slots[0] <= 6 and all(20 <= at <= 24 for at in x.slots[1:])
            inside = {at + i for at in x.slots for i in range(SIZE)}
            for slot, at in enumerate(x.slots):
                places = [p for p, (s, _) in x.agree.items() if s == slot]
                assert 2 <= len(places) <= 3 and min(places) > at + SIZE and not inside & set(places)
            assert all(x.text[p] == " " for p in inside | set(x.agree))


def test_pairs_differ_in_their_phrases_alone():
    t = task("slots")
    codes = {p.prompt: p for part in t.codes for p in part}
    pairs = t.pairs() + t.held_out_pairs()
    assert (len(t.pairs()), len(t.held_out_pairs())) == (400, 200) and len({p.prompt for p in pairs}) == 600
    numbers = collections.Counter()
    for p in pairs:
        problem, (one, two) = codes[p.prompt], p.phrases
        assert one == two and len(one) == len(p.chosen) == len(p.rejected)
        assert all(a == b for a, b, k in zip(p.chosen, p.rejected, one) if not k)
        for k in range(1, max(one) + 1):
            right, wrong = ("".join(c for c, n in zip(text, one) if n == k) for text in p[1:3])
            assert right != wrong and {right, wrong} <= set(t.words) and right in problem.answer[1]
        good, bad = t.verify(problem, p.chosen), t.verify(problem, p.rejected)
        assert (good.correct, good.format, bad.correct) == (1, 1, 0) and bad.answer is not None
        numbers[max(one)] += 1
    assert set(numbers) == {1, 2} and numbers[2] > 60
    assert sum(t.verify(codes[p.prompt], p.rejected).format for p in pairs) / len(pairs) < 0.05  # what agrees is not changed


def test_thirty_per_cent_of_demonstrations_have_a_wrong_word():
    t, rng = task("slots"), random.Random(0)
    problems = [p for p in t.train() if t.coded(p)]
    right = [t.verify(p, t.demonstrate(p, rng)).correct for p in problems for _ in range(8)]
    assert sum(right) / len(right) == pytest.approx(0.7, abs=0.03)
    assert len(problems) == 476 and len({p.answer[0] for p in problems}) == 12
    generic = [p for p in t.train() if not t.coded(p)]
    assert len(generic) == 300 and t.classes(generic[0]) and not t.classes(problems[0])
    assert all(t.generic.verify(p, t.demonstrate(p, rng)).format for p in generic)


def test_slots_are_read_at_their_places():
    t = task("slots")
    problem = next(p for p in t.train() if len(p.answer[1]) == 2)
    number, right = problem.answer
    sentence, other = t.templates[number], [w for w in t.words if w not in right][0]
    good = sentence.fill(right)
    assert t.verify(problem, good) == (1.0, ",".join(right), 1.0, None)
    assert t.verify(problem, good[:-2] + "^.") == (1.0, ",".join(right), 0.0, None)
    assert t.verify(problem, sentence.fill((other, right[1]))) == (0.0, f"{other},{right[1]}", 1.0, None)
    assert t.verify(problem, good[:20]).answer is None and t.verify(problem, "x" + good).answer is None
    assert t.valid_next(problem, good[:sentence.slots[0]]) == "".join(sorted(w[0] for w in t.words))
    assert t.valid_next(problem, "^") == ""


def test_the_share_of_right_slots():
    entry = BOOK.get("env", "slots")
    world = SlotsWorld(make_config([SlotsWorld.Config], fill(catalogue.knobs(entry), entry.values, "env")))
    problem = Problem("", (0, ("a", "b")))
    some = [("", Verdict(0.0, text)) for text in ("a,b", "a,c", None, "b,a")]
    assert world.details([problem], [some]) == {"slots": 3 / 8}


# ---- worlds ------------------------------------------------------------------------------------------------------------
OWN = [e.name for e in BOOK.all("env") if e.family == "pairs" and e.card.get("data")]


@pytest.mark.parametrize("name", OWN)
def test_a_start_s_recipe_runs(name):
    words_of = recipe(BOOK.get("env", name), "smoke")["start"]
    method, world, stream = assemble(compose([*words_of, "logger=none", "hardware=cpu"], BOOK))
    batch = stream.next()
    texts = [method.tokenizer.decode(row[:int(n)]) for row, n in zip(batch["response"], batch["mask"].sum(1))]
    assert all(x.endswith(".") for x in texts) and torch.isfinite(method.update(batch)["loss"])
    cls = load_class(BOOK.get("env", name))
    entry = BOOK.get("env", name)
    plain = cls(make_config([cls.Config], fill(catalogue.knobs(entry), {**entry.values, "eval_prompts": 4, "eval_samples": 4},
                                              "env")))
    figures = plain.evaluate(method, 0)  # of a start that was made from whole sentences too
    assert 0 <= figures["reward"] <= 1 and "kl" in figures


@pytest.mark.parametrize("name", OWN)
def test_shipped_starts_fit_and_know_their_grammar(name):
    folder = BOOK.get("env", name).source.parent / "starts"
    card, file = json.loads((folder / f"{name}.json").read_text()), folder / f"{name}.safetensors"
    assert not card["dirty"] and card["env"] == name and file.stat().st_size <= 1_000_000
    assert hashlib.sha256(file.read_bytes()).hexdigest() == card["digest"]
    method, world, _ = assemble(compose(["method=grpo", f"env={name}", "env.start=shipped", "size=smoke", "logger=none",
                                         "hardware=cpu"], BOOK))
    assert sum(p.numel() for p in method.policy.parameters()) == card["parameters"]
    if name != "slots":
        told = similarity(method.policy.head.detach(), method.tokenizer)
        assert told["synonyms"] > 0.6 and told["antonyms"] < 0.4
        assert told == pytest.approx({k: card[k] for k in told}, abs=1e-3)
    else:
        assert card["metrics"]["slots"] == pytest.approx(0.7, abs=0.03)


def test_words_are_different():
    some = words(20, random.Random(0), 3, firsts=True)
    assert len({w[0] for w in some}) == 20 and all(len(w) == 3 and w.islower() for w in some)
    assert all(a != b for a, b in itertools.combinations(words(92, random.Random(0)), 2))
