"""From words to a checked config: every pair composes, and who wins over whom."""

from __future__ import annotations

import json

import pytest

from runner import settings
from runner.catalogue import Catalogue, knobs, stream_kind
from runner.compose import SECTIONS, compose, expand, identity, of_size, rebuild
from runner.errors import UserError
from runner.knobs import Knob, knobs_of

BOOK = Catalogue()
METHODS, SIZES = BOOK.names("method"), BOOK.names("size")


def composes(method, env, size) -> str:
    job = compose([f"method={method}", f"env={env}", f"size={size}"], BOOK)
    assert job.config["method"]["name"] == method and job.config["env"]["name"] == env
    assert set(job.config["method"]) == {"name", *(k.name for k in knobs(BOOK.get("method", method)))}
    assert set(job.config["env"]) == {"name", *(k.name for k in knobs(BOOK.get("env", env)))}
    assert job.config["size"] == size and 1 <= job.config["loop"]["steps"] <= (50 if size == "smoke" else 10**8)
    assert json.loads(json.dumps(job.config)) == job.config  # plain: as it will be read back
    assert identity(job.config) == job.id == rebuild(job.config, BOOK).id
    return job.id


@pytest.mark.parametrize("method", METHODS)
def test_every_method_composes_at_every_size(method):
    fits = BOOK.fitting([BOOK.get("method", method)])
    assert fits, f"{method} fits no env"
    assert len({composes(method, fits[0], size) for size in SIZES}) == len(SIZES)


@pytest.mark.parametrize("env", BOOK.names("env"))
def test_every_env_composes_with_each_kind_of_its_batches(env):
    """With the first method that takes them, at every size: all of them see the same advice of the env's."""
    entry = BOOK.get("env", env)
    kinds = {stream_kind([m], entry): m.name for m in reversed(BOOK.all("method"))}
    ids = {composes(name, env, size) for kind, name in kinds.items() if kind for size in SIZES}
    assert len(ids) == len(SIZES) * len(kinds.keys() - {None}) > 0


@pytest.mark.parametrize("method", METHODS)
def test_what_every_pair_says_of_its_size_fits_both(method):
    """Every pair at every size, without Hydra, which takes 30 ms for one: what env, policy and method advise each other is
    known to the one that it is for, and lies in its range."""
    entry = BOOK.get("method", method)
    shared = {section: knobs_of(schema) for section, schema in SECTIONS.items()} | {"method": knobs(entry)}
    for env in (BOOK.get("env", name) for name in BOOK.fitting([entry])):
        policy = BOOK.policy([entry], "", env)
        schemas = shared | {"env": knobs(env), "policy": knobs(policy) if policy else []}
        schema = {f"{section}.{k.name}": k for section, known in schemas.items() for k in known}
        for size in SIZES:
            for key, value in of_size([entry], env, policy, size):
                assert key in schema, f"{key} of {method} on {env.name}, size={size}"
                schema[key].check(value, key.partition(".")[0])
                assert key != "loop.steps" or size != "smoke" or value <= 50


@pytest.mark.parametrize("group", ["hardware", "logger"])
def test_every_profile_composes(group):
    for name in BOOK.names(group):
        config = compose(["method=kd", "env=pointmass", f"{group}={name}"], BOOK).config
        assert set(config[group]) == {k.name for k in knobs_of(getattr(settings, group.title()))}


# ---- precedence ----------------------------------------------------------------------------------------------------

ENV_CODE = '''\
from __future__ import annotations

from envs.control.pointmass import PointMass


class Mine(PointMass):
    pass
'''
ENV_CARD = '''\
card: {kind: env, title: mine, summary: mine, provides: [transitions]}
episodes: 5
start_steps: 77
sizes:
  smoke:
    transitions: {env.start_steps: 20, loop.steps: 9, loop.log_every: 3, method.discount: 0.7, method.target_rate: 0.2}
    candidates: {env.start_steps: 1}
'''
METHOD_MORE = '''\
learning_rate: 0.01
discount: 0.5
sizes:
  smoke: {loop.steps: 8, method.target_rate: 0.3, env.episodes: 4}
'''


@pytest.fixture
def layered(own):
    own.card("field", ENV_CARD).code("field", ENV_CODE)
    own.method("mine", more=METHOD_MORE)
    return Catalogue([own.folder])


def composed(book, *words):
    return compose(["method=mine", "env=field", *words], book).config


def test_precedence_from_the_weakest_to_the_strongest(layered):
    claim = composed(layered, "size=claim")
    assert claim["method"]["critics"] == 2                # the Config's default
    assert claim["method"]["mine_weight"] == 0.1
    assert claim["method"]["learning_rate"] == 0.01       # the method's yaml over the default 3e-4
    assert claim["method"]["discount"] == 0.5
    assert claim["method"]["target_rate"] == 0.005
    assert claim["env"]["episodes"] == 5 and claim["env"]["start_steps"] == 77   # the env's yaml
    assert claim["loop"]["steps"] == 5000                 # the size over the default 1000

    smoke = composed(layered, "size=smoke")
    assert smoke["loop"]["validate_every"] == 6           # the size
    assert smoke["loop"]["log_every"] == 3                # the env's sizes over the size
    assert smoke["env"]["start_steps"] == 20              # the env's sizes over the env's yaml; of our stream only
    assert smoke["method"]["discount"] == 0.7             # the env's sizes over the method's yaml
    assert smoke["method"]["target_rate"] == 0.3          # the method's sizes over the env's sizes
    assert smoke["loop"]["steps"] == 8
    assert smoke["env"]["episodes"] == 4
    assert smoke["method"]["learning_rate"] == 0.01       # no size says anything of it

    told = composed(layered, "method.target_rate=0.4", "loop.steps=7", "env.episodes=3", "size=smoke",
                    "loop.log_every=2", "method.learning_rate=0.5", "method.discount=0.6")
    assert (told["method"]["target_rate"], told["loop"]["steps"], told["env"]["episodes"], told["loop"]["log_every"],
            told["method"]["learning_rate"], told["method"]["discount"]) == (0.4, 7, 3, 2, 0.5, 0.6)  # the command line


def test_where_a_word_stands_does_not_matter(layered):
    words = ["method=mine", "env=field", "size=smoke", "seed=2", "method.discount=0.1"]
    assert compose(words, layered).id == compose(words[::-1], layered).id


@pytest.mark.parametrize("line, wanted", [
    ("learning_rat: 0.1\n", "learning_rat"), ("learning_rate: fast\n", "learning_rate"), ("discount: 2\n", "discount"),
    ("sizes:\n  claim: {method.discuont: 0.1}\n", "discuont"), ("sizes:\n  claim: {loop.step: 1}\n", "loop.step"),
])
def test_a_wrong_value_in_a_yaml_is_refused_by_name(own, line, wanted):
    own.method("mine", more=line)
    with pytest.raises(UserError, match=wanted):
        compose(["method=mine", "env=halfcheetah"], Catalogue([own.folder]))


def test_composition_merges_the_sizes_of_both(own, bodies):
    own.method("mine", more="sizes:\n  smoke: {loop.steps: 5}\n")
    own.method("yours", bodies["actor_penalty"], "actor_penalty", more="sizes:\n  smoke: {loop.log_every: 2}\n")
    book = Catalogue([own.folder])
    for name in ("mine+yours", "yours+mine", " yours + mine "):
        loop = compose([f"method={name}", "env=pointmass", "size=smoke"], book).config["loop"]
        assert (loop["steps"], loop["log_every"]) == (5, 2)


# ---- the identity --------------------------------------------------------------------------------------------------

def test_what_the_identity_leaves_out():
    config = compose(["method=kd", "env=pointmass"], BOOK).config
    before = json.dumps(config)
    base = identity(config)
    assert json.dumps(config) == before
    for section, key, value in (("loop", "save_steps", 5), ("loop", "save_seconds", 1.0), ("loop", "keep", 9)):
        assert identity({**config, section: {**config[section], key: value}}) == base
    assert identity({**config, "runs": "x", "logger": {}}) == base
    for section, key, value in (("loop", "steps", 5), ("method", "tau", 2.0), ("env", "episodes", 3),
                                ("hardware", "threads", 2)):
        assert identity({**config, section: {**config[section], key: value}}) != base
    assert identity({**config, "seed": 1}) != base and identity({**config, "size": "x"}) != base
    assert identity(dict(reversed(config.items()))) == base


# ---- sweeps --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("words, expected", [
    (["a=1"], [["a=1"]]),
    (["a=1,2", "b=x"], [["a=1", "b=x"], ["a=2", "b=x"]]),
    (["a=range(0,3)"], [["a=0"], ["a=1"], ["a=2"]]),
    (["a=choice(x,y)"], [["a=x"], ["a=y"]]),
    (["a=1,2", "b=3,4"], [["a=1", "b=3"], ["a=1", "b=4"], ["a=2", "b=3"], ["a=2", "b=4"]]),
    (["a=[1,2],[3]"], [["a=[1,2]"], ["a=[3]"]]),
    (["a=x+y,z"], [["a=x+y"], ["a=z"]]),
], ids=lambda v: " ".join(map(str, v)))
def test_expand(words, expected):
    assert expand(words) == expected


# ---- env=NAME:ARGUMENT ---------------------------------------------------------------------------------------------

def test_an_argument_behind_the_name_sets_the_knob_that_the_card_names():
    short = compose(["method=grpo", "env=reasoning_gym:gcd"], BOOK)
    assert short.config["env"]["family"] == "gcd" and short.config["env"]["name"] == "reasoning_gym"
    assert short.id == compose(["method=grpo", "env=reasoning_gym", "env.family=gcd"], BOOK).id != compose(
        ["method=grpo", "env=reasoning_gym"], BOOK).id
    assert rebuild(short.config, BOOK).id == short.id
    assert compose(["method=grpo", "env=prompts/textfile:/data/a b.jsonl"], BOOK).config["env"]["file"] == "/data/a b.jsonl"
    sweep = expand(["method=grpo", "env=reasoning_gym:gcd,reasoning_gym:lcm"])  # Hydra writes the colon with a backslash
    assert [compose(words, BOOK).config["env"]["family"] for words in sweep] == ["gcd", "lcm"]


@pytest.mark.parametrize("word, said", [("countdown:3", "env 'countdown' takes nothing after a colon; write env=countdown"),
                                        ("reasoning_gym:", "followed by a family: reasoning_gym:FAMILY"),
                                        ("reasoning_gim:gcd", "did you mean: reasoning_gym?")])
def test_an_argument_that_makes_no_sense_is_refused(word, said):
    with pytest.raises(UserError) as error:
        compose(["method=grpo", f"env={word}"], BOOK)
    assert said in str(error.value)


def test_an_unknown_family_lists_near_ones(cli):
    pytest.importorskip("reasoning_gym")
    told = cli("method=grpo", "env=reasoning_gym:chian_sum", "size=smoke", "logger=none")
    assert told.code == 2 and "unknown task family of reasoning_gym 'chian_sum'\ndid you mean: chain_sum" in told.err


# ---- knobs ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, value, expected", [
    ("int", 3, 3), ("int", 1e5, 100_000), ("float", 2, 2.0), ("float", "3e-4", 3e-4), ("bool", True, True),
    ("str", "x", "x"), ("str", 3, "3"), ("str | None", None, None), ("tuple[int, ...]", [1, 2], (1, 2)),
    ("tuple[float, ...]", [1, 2.5], (1.0, 2.5)), ("int | None", 4, 4), ("tuple[int, ...]", [], ()),
])
def test_knob_takes(kind, value, expected):
    got = Knob("k", kind, None).check(value, "method")
    assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize("kind, value", [
    ("int", 1.5), ("int", True), ("int", "x"), ("int", None), ("float", True), ("float", "x"), ("float", None),
    ("bool", 1), ("bool", "true"), ("str", None), ("str", True), ("tuple[int, ...]", 3), ("tuple[int, ...]", [1.5]),
    ("float", float("nan")), ("float", float("inf")), ("float", "-inf"), ("tuple[float, ...]", [float("nan")]),
])
def test_knob_refuses(kind, value):
    with pytest.raises(UserError, match="method.k="):
        Knob("k", kind, None).check(value, "method")


def test_knob_bounds_are_inclusive():
    k = Knob("k", "float", 0.5, "meaning", low=0.0, high=1.0)
    assert k.check(0, "") == 0.0 and k.check(1, "") == 1.0
    for wrong in (-1e-9, 1.0000001):
        with pytest.raises(UserError, match=r"out of range.*\[0.0, 1.0\]"):
            k.check(wrong, "")
