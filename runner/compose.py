"""From the words of a command line to one checked, complete, plain configuration. All use of Hydra is here.

Hydra composes the config groups and applies the overrides; nothing is instantiated. Precedence, weakest first:
Config defaults, the method's and env's yaml, the size, the env's and then the method's values for that size, the
command line. The result is a plain dict that holds every value, also the defaults, and so can be hashed.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
from typing import NamedTuple

from runner import catalogue, places, settings
from runner.errors import UserError, unknown
from runner.knobs import fill, knobs_of

SECTIONS = {"loop": settings.Loop, "hardware": settings.Hardware, "logger": settings.Logger}
TOP = ("method", "env", "policy", "hardware", "size", "logger", "loop", "seed", "runs")


class Job(NamedTuple):
    """One composed run. `config` is complete and plain; `id` is its identity."""

    config: dict
    methods: list
    env: catalogue.Entry
    id: str
    policy: catalogue.Entry | None = None  # where the method's family has policies to choose from

    @property
    def name(self) -> str:
        """The folder's name: readable first, then the identity."""
        return f"{self.config['method']['name']}-{self.config['env']['name']}-s{self.config['seed']}-{self.id}"


def identity(config: dict) -> str:
    """The hash of a complete config, without the keys that do not change what is computed."""
    kept = json.loads(json.dumps(config))
    for key in (*settings.EXCLUDED, *settings.LATER):
        *path, last = key.split(".")
        section = kept
        for step in path:
            section = section[step]
        if key in settings.EXCLUDED or section.get(last) == settings.LATER[key]:
            section.pop(last, None)
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def split_override(word: str) -> tuple[str, str]:
    key, eq, value = word.partition("=")
    if not eq or not key:
        raise UserError(f"'{word}' is not an override; write key=value, for example seed=1 or method.tau=0.5")
    return key, value


def compose(words: list[str], book: catalogue.Catalogue) -> Job:
    """`words`: overrides in Hydra's grammar, without sweeps. Raises UserError for anything that is not right."""
    given = [split_override(w) for w in words]
    for word in words:
        if _is_sweep(word):
            raise UserError(f"'{word}' gives several values; a sweep needs -m: python -m runner -m {' '.join(words)}\n"
                            "one value that is a list is written key=[a,b], a text with a comma key='a,b'")
    chosen = {k.lstrip("+"): v.strip("'\"").replace("\\:", ":") for k, v in given if k.lstrip("+") in catalogue.GROUPS}
    for group in ("method", "env"):
        if not chosen.get(group):
            known = book.names(group)
            raise UserError(f"no {group} chosen; write {group}=NAME\nknown: {', '.join(known[:12])}"
                            + (", …" if len(known) > 12 else "")
                            + "\nexample: python -m runner method=adpo env=halfcheetah")
    methods = book.methods(chosen["method"])
    env = book.get("env", chosen["env"])
    for group in ("hardware", "size", "logger"):
        if group in chosen and chosen[group] not in book.names(group):
            raise unknown(group, chosen[group], book.names(group))
    book.check_pairing(methods, env)
    policy = book.policy(methods, chosen.get("policy", ""), env)

    size = chosen.get("size", "claim")
    weak = [f"++{k}={json.dumps(v)}" for k, v in of_size(methods, env, policy, size)]
    profiles, strong = [], []
    if ":" in chosen["env"]:  # env=NAME:VALUE
        strong.append(f"++env.{env.card['argument']}={json.dumps(env.values[env.card['argument']])}")
    for (key, value), word in zip(given, words):
        bare = key.lstrip("+~")
        if bare in catalogue.KINDS:
            continue
        if bare in ("hardware", "size", "logger"):
            profiles.append(f"{bare}={value}")
            continue
        _check_key(bare, methods, env, policy)
        strong.append(word if word[0] in "~" else f"++{bare}={value}")
    raw = _hydra(methods, env, policy, profiles + weak, strong)
    return _finish(raw, methods, env, policy, size)


def of_size(methods, env, policy, size: str) -> list[tuple[str, object]]:
    """(key, value) of everything that the entries say of this size, later over earlier: the env, the policy, the methods."""
    has = {f"method.{k.name}" for k in catalogue.composed_knobs(methods)}
    has |= {f"policy.{k.name}" for k in catalogue.knobs(policy)} if policy else set()
    out = [(k, v) for k, v in env.sizes.get(size, {}).get(catalogue.stream_kind(methods, env), {}).items()
           if k in has or not k.startswith(("method.", "policy."))]  # an env's advice for settings that are not there
    for entry in [policy, *methods] if policy else methods:
        out += entry.sizes.get(size, {}).items()
    return out


def _is_sweep(word: str) -> bool:
    if not any(sign in word for sign in ",("):
        return False
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(word).is_sweep_override()
    except HydraException:
        return False  # it is refused later, with the reason


def _known_keys(methods, env, policy) -> list[str]:
    keys = list(TOP)
    keys += [f"policy.{k.name}" for k in catalogue.knobs(policy)] if policy else []
    keys += [f"method.{k.name}" for k in catalogue.composed_knobs(methods)]
    keys += [f"env.{k.name}" for k in catalogue.knobs(env)]
    keys += [f"{s}.{f.name}" for s, c in SECTIONS.items() for f in dataclasses.fields(c)]
    return keys


def _check_key(key, methods, env, policy):
    known = _known_keys(methods, env, policy)
    if key not in known:
        of = policy.name if policy and key.startswith("policy.") else methods[0].name
        raise unknown("key", key, known, f"`python -m runner show {of}` lists its settings")


@functools.cache
def _leave_out_hydras_own():
    """Hydra's settings of itself without their files (launcher, sweeper, logging, help pages): nobody reads them, and they take
    half of the time that composing takes."""
    from hydra.conf import HydraConf
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(group="hydra", name="config", node=HydraConf(defaults=[]), provider="hydra")


def _hydra(methods, env, policy, shared, own) -> dict:
    """`shared`: overrides that other runs of these entries have, too; `own`: those of the command line."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    entries = [("method", methods[0]), ("env", env), *([("+policy", policy)] if policy else [])]
    shared = list(shared)
    said: dict[str, tuple] = {key: (value, methods[0].name) for key, value in methods[0].values.items()}
    for entry in methods[1:]:  # a+b: b's changed values over a's
        for key, value in entry.values.items():
            before, name = said.setdefault(key, (value, entry.name))
            if before != value:
                raise UserError(f"{name} + {entry.name}: both set '{key}', differently; they cannot be combined")
            shared.insert(0, f"++method.{key}={json.dumps(value)}")
    try:
        # Hydra takes 30 ms for a composition, 2 for the words of one run alone: the runs of a sweep share the rest.
        config = copy.deepcopy(_composed(tuple((group, e.kind, e.name, json.dumps(e.values)) for group, e in entries),
                                         tuple(shared)))
        ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides(own), config)
        return OmegaConf.to_container(config, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        reason = str(error.__cause__ or error).strip().splitlines()
        raise UserError("this configuration cannot be composed: " + "; ".join(reason[:2])) from None


@functools.lru_cache(64)
def _composed(entries: tuple, overrides: tuple):
    """Hydra's composition of (group, kind, name, values) of each entry. Values are put in place of the yaml, whose card would
    take longer than they do."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore

    _leave_out_hydras_own()
    for _, kind, name, values in entries:
        ConfigStore.instance().store(group=f"{kind}/read", name=name, node=json.loads(values))
    with initialize_config_dir(str(catalogue.CONF), version_base="1.3"):
        return hydra_compose("config", overrides=[*(f"{group}=read/{name}" for group, _, name, _ in entries), *overrides])


def _finish(raw: dict, methods, env, policy, size) -> Job:
    """Check everything against the schemas and fill in the defaults."""
    for key in raw:
        if key not in TOP:
            raise unknown("key", key, TOP)
    sections = {}
    for section, schema in SECTIONS.items():
        if not isinstance(raw.get(section) or {}, dict):
            names = ", ".join(f"{section}.{f.name}" for f in dataclasses.fields(schema))
            raise UserError(f"{section}={raw[section]} sets a whole group; set one of: {names}")
        sections[section] = fill(knobs_of(schema), raw.get(section) or {}, section)
    method = {k: v for k, v in raw["method"].items() if k not in ("card", "sizes")}
    world = {k: v for k, v in raw["env"].items() if k not in ("card", "sizes")}
    seed = raw.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**31:
        raise UserError(f"seed={seed!r} must be a whole number from 0 to 2147483647")
    config = {
        "method": {"name": "+".join(e.name for e in methods), **fill(catalogue.composed_knobs(methods), method, "method")},
        "env": {"name": env.name, **fill(catalogue.knobs(env), world, "env")},
        **({"policy": {"name": policy.name, **fill(catalogue.knobs(policy), {
            k: v for k, v in raw["policy"].items() if k not in ("card", "sizes")}, "policy")}} if policy else {}),
        "size": size,
        **sections,
        "seed": seed,
        "runs": str(raw.get("runs") or "runs"),
    }
    if env.card.get("data") and config["env"].get("source") == "auto":  # the record tells which data it were
        config["env"]["source"] = places.choose_source(config["env"]["dataset"], config["env"]["data_size"])
    config = json.loads(json.dumps(config))  # tuples become lists, as they will be read back
    return Job(config, methods, env, identity(config), policy)


def rebuild(config: dict, book: catalogue.Catalogue) -> Job:
    """The Job of a recorded config (run.json): its methods and env are looked up again."""
    methods = book.methods(config["method"]["name"])
    policy = book.policy(methods, config["policy"]["name"]) if "policy" in config else None
    return Job(config, methods, book.get("env", config["env"]["name"]), identity(config), policy)


def expand(words: list[str]) -> list[list[str]]:
    """A sweep in Hydra's grammar -> one list of overrides a run: `method=a,b seed=range(0,3)` gives six."""
    from itertools import product

    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    axes = []
    for word in words:
        split_override(word)
        try:
            override = parser.parse_override(word)
            if override.is_sweep_override():
                axes.append([f"{override.get_key_element()}={v}" for v in override.sweep_string_iterator()])
            else:
                axes.append([word])
        except HydraException as error:
            raise UserError(f"'{word}' cannot be read: {str(error).strip().splitlines()[0]}") from None
    return [list(combination) for combination in product(*axes)]
