"""Cards and code agree, and what is read without importing is what is imported."""

from __future__ import annotations

import functools
import re

import pytest
import yaml

from runner import catalogue, settings
from runner.catalogue import CONF, ROOT, Catalogue
from runner.compose import SECTIONS
from runner.errors import UserError
from runner.knobs import knobs_of

BOOK = Catalogue()
METHODS, ENVS = BOOK.all("method"), BOOK.all("env")
by_name = lambda e: e.name  # noqa: E731


@pytest.mark.parametrize("entry", METHODS + ENVS, ids=by_name)
def test_the_schema_read_is_the_schema_imported(entry):
    cls = catalogue.load_class(entry)
    assert cls.__name__ == catalogue.main_class(entry.source).name
    read, imported = catalogue.knobs(entry), knobs_of(cls.Config)
    assert read == imported
    assert [k.name for k in read] == [k.name for k in imported]
    for k in read:
        assert k.help, f"{k.name} has no meaning"
        assert k.check(list(k.default) if isinstance(k.default, tuple) else k.default, "") == k.default, k.name
        assert not k.choices or k.default in k.choices
        assert not {"card", "sizes", "name"} & {k.name}


@pytest.mark.parametrize("entry", METHODS + ENVS, ids=by_name)
def test_the_code_read_is_the_code_imported(entry):
    cls = catalogue.load_class(entry)
    read = [c.name for c in catalogue.lineage(catalogue.main_class(entry.source))]
    assert read == [c.__name__ for c in cls.__mro__[:len(read)]]
    if entry.kind == "method":
        assert catalogue.parts(entry) == (list(cls.PARTS), list(cls.ADDITIVE))
        assert set(cls.ADDITIVE) <= set(cls.PARTS) and all(hasattr(cls, p) for p in cls.PARTS)


@pytest.mark.parametrize("entry", METHODS, ids=by_name)
def test_cards_of_methods(entry):
    card = entry.card
    assert card.get("title") and card.get("summary") and card.get("formula"), entry.yaml
    assert set(card) <= {"title", "paper", "summary", "formula", "baseline", "changes", "needs", "neutral", "kind", "policy",
                         "tokens"}
    assert card.get("tokens") in (None, "several")  # several: where a response is one token, some of it changes nothing
    assert "\n" not in card["summary"] and len(card["summary"]) <= 140
    assert not card.get("paper") or re.match("https?://", card["paper"])
    assert entry.needs
    assert card["changes"] == catalogue.changed_parts(entry)
    names = [k.name for k in catalogue.knobs(entry)]
    if card.get("baseline") is None:
        assert not card["changes"], f"{entry.name} changes parts: of what?"
    else:
        baseline = BOOK.get("method", card["baseline"])
        shared = catalogue.parts(baseline) == catalogue.parts(entry)  # two families may change one algorithm
        assert (baseline.family == entry.family or shared) and baseline.name != entry.name
        known = {*baseline.needs, *(["mixed"] if "offline" in baseline.needs else [])}  # mixed begins as offline, bit for bit
        known |= {"unpaired"} if "pairs" in baseline.needs and "pairs" in entry.needs else set()  # beside pairs: labels alone
        assert set(entry.needs) <= known
    knobs = {k.name: k for k in catalogue.knobs(entry)}
    for key, value in (card.get("neutral") or {}).items():
        assert key in names, f"{entry.name}: neutral names '{key}'"
        knobs[key].check(value, "method")
    for k in knobs.values():
        for other, value in (getattr(k, "when", None) or {}).items():
            if other.startswith("env."):  # a setting of every env that fits
                assert all(other[4:] in [k.name for k in catalogue.knobs(BOOK.get("env", e))] for e in BOOK.fitting([entry]))
                continue
            assert other in names and other != k.name, f"{entry.name}.{k.name}: when names '{other}'"
            several = isinstance(value, list) and not knobs[other].type.startswith("tuple")  # any one of them
            for one in value if several else [value]:
                knobs[other].check(one, "method")


@pytest.mark.parametrize("entry", ENVS, ids=by_name)
def test_cards_of_envs(entry):
    assert entry.card.get("title") and entry.card.get("summary") and entry.provides
    assert set(entry.card) <= {"title", "summary", "provides", "world", "kind", "paper", "data", "argument", "policy"}
    assert entry.source.is_file()
    assert set(entry.sizes) <= set(BOOK.names("size"))
    for size in entry.sizes.values():
        assert set(size) <= set(entry.provides)


@functools.cache
def every_key() -> set[str]:
    every = {"method": METHODS, "env": ENVS, "policy": BOOK.all("policy")}
    return ({f"{s}.{k.name}" for s, c in SECTIONS.items() for k in knobs_of(c)}
            | {f"{kind}.{k.name}" for kind, entries in every.items() for e in entries for k in catalogue.knobs(e)})


@pytest.mark.parametrize("entry", METHODS + ENVS, ids=by_name)
def test_values_of_yaml_are_settings(entry):
    knobs = {k.name: k for k in catalogue.knobs(entry)}
    for key, value in entry.values.items():
        assert key in knobs, f"{entry.yaml}: '{key}' is no setting"
        value = knobs[key].check(value, entry.kind)
        assert entry.kind == "env" or value != knobs[key].default, f"{entry.yaml}: '{key}' repeats the default"
    for size in entry.sizes.values():
        rows = size.values() if entry.kind == "env" else [size]
        for row in rows:
            assert set(row) <= every_key(), f"{entry.yaml}: {set(row) - every_key()}"


def test_every_py_has_its_yaml_and_the_reverse():
    for entry in METHODS + ENVS:
        assert entry.source.is_file(), entry.source
    with_yaml = {e.source for e in METHODS}
    for family in {e.family for e in METHODS}:
        for path in (ROOT / "methods" / family).glob("*.py"):
            text = path.read_text()
            if path not in with_yaml and path.stem not in ("__init__", "base"):
                classes = re.findall(r"^class (\w+)\((\w+)\)", text, re.M)
                known = {catalogue.main_class(e.source).name for e in METHODS}
                assert not [c for c, base in classes if base in known], f"{path} has a method but no yaml"


def test_names_are_unique_over_families_and_kinds():
    for kind in ("method", "env"):
        stems = [p.stem for p in (CONF / kind).glob("*/*.yaml")]
        assert len(stems) == len(set(stems))
    assert not set(BOOK.names("method")) & set(BOOK.names("env"))


def test_profiles_name_settings_only():
    for group, schema in (("hardware", settings.Hardware), ("logger", settings.Logger)):
        knobs = {k.name: k for k in knobs_of(schema)}
        for name in BOOK.names(group):
            for key, value in yaml.safe_load((CONF / group / f"{name}.yaml").read_text()).items():
                knobs[key].check(value, group)
    assert {"loop": settings.Loop, "hardware": settings.Hardware, "logger": settings.Logger} == SECTIONS


def test_lookup():
    assert BOOK.get("method", "preference/adpo") is BOOK.get("method", "adpo")
    for wrong in ("control/adpo", "adpoo", "", "preference/"):
        with pytest.raises(UserError, match="unknown method"):
            BOOK.get("method", wrong)
    assert [e.name for e in BOOK.methods("td3+ddpg")] == [e.name for e in BOOK.methods("ddpg+td3")] == ["ddpg", "td3"]
    for wrong in ("", "+", " + "):
        with pytest.raises(UserError, match="empty"):
            BOOK.methods(wrong)


def test_fitting_and_pairing_agree():
    for method in METHODS:
        fits = set(BOOK.fitting([method]))
        for env in ENVS:
            if env.name in fits:
                BOOK.check_pairing([method], env)
            else:
                with pytest.raises(UserError, match="does not fit"):
                    BOOK.check_pairing([method], env)


@pytest.mark.parametrize(("method", "policy"), [("flow_matching", "small"), ("dpo", "unet"), ("grpo", "mlp")])
def test_policies_of_another_kind_are_refused(method, policy):
    with pytest.raises(UserError, match="policies that fit: "):
        BOOK.policy(BOOK.methods(method), policy)
    assert policy not in BOOK.policies(BOOK.methods(method))
