"""Cards and the registry: which methods, envs and policies exist, what they need and provide, where their code lies.

Reads yaml and parses (never imports) Python, so that `list`, `show`, `check` and completion need neither torch nor
Hydra. A method is conf/method/<family>/<name>.yaml + methods/<family>/<name>.py; an env likewise; a policy (for families
whose networks are chosen apart from the learning rule) is conf/policy/<family>/<name>.yaml + methods/<family>/<name>.py. A
user's own is one .yaml + one .py in a folder given by --include; its card says `kind: method` or `kind: env`.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import NamedTuple

import yaml

from runner.errors import UserError, unknown
from runner.knobs import Knob

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_CODE = {"method": "methods", "env": "envs", "policy": "methods"}
KINDS = tuple(_CODE)
GROUPS = (*KINDS, "hardware", "size", "logger")


class Entry(NamedTuple):
    """One method, env or policy: its card, the values its yaml changes, its source file."""

    name: str
    kind: str          # "method", "env" or "policy"
    family: str        # the folder: control, preference, …; "include" for a user's own
    card: dict
    values: dict       # changed values, card and sizes left out
    sizes: dict        # {size: {dotted key: value}}; an env's may hold one such mapping per stream
    yaml: Path
    source: Path       # the .py that holds the class

    @property
    def needs(self):
        return list(self.card.get("needs", []))

    @property
    def provides(self):
        return list(self.card.get("provides", []))


def load_yaml(path: Path) -> dict:
    try:
        text = yaml.load(path.read_text(), Loader=_Loader) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid yaml: {str(error).splitlines()[0]}") from None
    if not isinstance(text, dict) or not all(isinstance(text.get(k) or {}, dict) for k in ("card", "sizes")):
        raise UserError(f"{path}: write `key: value` lines, and mappings under `card:` and `sizes:`")
    return text


def _entry(path: Path, kind: str, family: str, source: Path | None) -> Entry:
    text = load_yaml(path)
    card = text.pop("card", None) or {}
    sizes = text.pop("sizes", None) or {}
    if source is None:  # an env's card may name the world that several envs share
        module = card.get("world") or f"{family}.{path.stem}"
        source = ROOT / _CODE[kind] / (module.replace(".", "/") + ".py")
    return Entry(path.stem, kind, family, card, text, sizes, path, source)


class Catalogue:
    """Every method and env. `include` are folders with a user's own."""

    def __init__(self, include=()):
        self.paths: dict[str, dict[str, tuple]] = {kind: {} for kind in KINDS}
        for kind in KINDS:
            for path in sorted((CONF / kind).glob("*/*.yaml")):
                self.paths[kind][path.stem] = (path, path.parent.name, None)
        self.include = [Path(d).resolve() for d in include]
        for folder in self.include:
            if not folder.is_dir():
                raise UserError(f"--include {folder}: no such folder")
            for path in sorted(folder.glob("*.yaml")):
                kind = (load_yaml(path).get("card") or {}).get("kind")
                if kind not in self.paths:
                    raise UserError(f"{path}: its card must say `kind: method` or `kind: env` (or `kind: policy`)")
                if path.stem in self.paths[kind]:
                    raise UserError(f"{path}: a {kind} named '{path.stem}' exists already; rename yours")
                self.paths[kind][path.stem] = (path, "include", path.with_suffix(".py"))
        self._entries: dict[tuple, Entry] = {}

    def names(self, group: str) -> list[str]:
        if group in self.paths:
            return sorted(self.paths[group])
        return sorted(p.stem for p in (CONF / group).glob("*.yaml"))

    def get(self, kind: str, name: str) -> Entry:
        """The entry called `name`; `family/name` means the same. `name:value` sets the knob that its card's `argument` names."""
        name, colon, value = str(name).partition(":")
        family, _, short = str(name).rpartition("/")
        found = self.paths[kind].get(short)
        if found is None or (family and family != found[1]):
            raise unknown(kind, name, self.names(kind), f"`python -m runner list {plural(kind)}` shows all")
        key = (kind, short)
        if key not in self._entries:
            self._entries[key] = _entry(found[0], kind, found[1], found[2])
        entry = self._entries[key]
        if not colon:
            return entry
        knob = entry.card.get("argument")
        if not knob or not value:
            raise UserError(f"{kind} '{name}' " + (f"is followed by a {knob}: {name}:{knob.upper()}" if knob else
                            f"takes nothing after a colon; write {kind}={name}"))
        return entry._replace(values={**entry.values, knob: value})

    def all(self, kind: str) -> list[Entry]:
        return [self.get(kind, n) for n in self.names(kind)]

    def methods(self, name: str) -> list[Entry]:
        """`a+b` -> the entries of a and b, in one canonical order (composition does not depend on it)."""
        parts = sorted({p.strip() for p in str(name).split("+") if p.strip()}, key=lambda p: p.rpartition("/")[2])
        if not parts:
            raise UserError("method is empty; `python -m runner list methods` shows what there is")
        entries = [self.get("method", p) for p in parts]
        if len(entries) > 1:
            check_composition(entries)
        return entries

    def policy(self, methods: list[Entry], name: str = "", env: Entry | None = None) -> Entry | None:
        """The policy that these methods train, for families where it is chosen apart (the card's `policy` is the default, the
        env's before the method's); None for methods that build their own."""
        default = next((m.card["policy"] for m in methods if m.card.get("policy")), None)
        if default is None:
            if name:
                raise UserError(f"policy={name}: method '{methods[0].name}' builds its own networks; leave policy out")
            return None
        chosen = self.get("policy", name or (env.card.get("policy") if env else None) or default)
        if chosen.name not in (fits := self.policies(methods)):
            raise UserError(f"policy={chosen.name} is not what method '{methods[0].name}' trains\n"
                            f"policies that fit: {', '.join(fits)}")
        return chosen

    def policies(self, methods: list[Entry]) -> list[str]:
        """Names of the policies that these methods can train: those of their default's kind, and a user's own."""
        default = next((m.card["policy"] for m in methods if m.card.get("policy")), None)
        kinds = {self.get("policy", default).family, "include"} if default else set()
        return [p.name for p in self.all("policy") if p.family in kinds]

    def fitting(self, methods: list[Entry]) -> list[str]:
        """Names of the envs that provide a kind of batches that all these methods can learn from."""
        return [e.name for e in self.all("env") if stream_kind(methods, e)]

    def check_pairing(self, methods: list[Entry], env: Entry):
        """Refuse a method on an env that lacks what it needs; say what, and which envs have it."""
        for method in [[m] for m in methods] + ([methods] if len(methods) > 1 else []):
            if not stream_kind(method, env):
                fits, name = self.fitting(methods), " + ".join(m.name for m in method)
                common = [n for n in method[0].needs if all(n in m.needs for m in method)]
                raise UserError(
                    f"method '{name}' does not fit env '{env.name}': it needs {' or '.join(common) or 'no common kind'}, "
                    f"which '{env.name}' does not provide (it provides {', '.join(env.provides) or 'nothing'})\n"
                    + (f"envs that fit: {', '.join(fits)}" if fits else "no env in the catalogue fits"))


def plural(kind: str) -> str:
    return "policies" if kind == "policy" else f"{kind}s"


def stream_kind(methods: list[Entry], env: Entry) -> str | None:
    """The kind of batches these methods learn from on this env: the first in the methods' `needs` that all of them can
    use and the env provides."""
    return next((n for n in methods[0].needs if n in env.provides and all(n in m.needs for m in methods)), None)


# ---- reading Python without running it -----------------------------------------------------------------------------

class Class(NamedTuple):
    name: str
    node: ast.ClassDef
    path: Path
    text: str

    def methods(self) -> dict[str, ast.FunctionDef]:
        return {n.name: n for n in self.node.body if isinstance(n, ast.FunctionDef)}

    def source(self, function: str) -> str:
        return ast.get_source_segment(self.text, self.methods()[function])

    def constant(self, name: str):
        for n in self.node.body:
            if isinstance(n, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in n.targets):
                if not isinstance(n.value, ast.Tuple):
                    return ast.literal_eval(n.value)
                out = []
                for e in n.value.elts:
                    if isinstance(e, ast.Starred) and isinstance(e.value, ast.Attribute):  # (*Base.PARTS, "one_more")
                        out += inherited(_find(self.path, e.value.value.id), e.value.attr)
                    else:
                        out.append(ast.literal_eval(e))
                return tuple(out)
        return None


def inherited(cls: Class, name: str) -> tuple:
    """A constant of a class, or of the nearest of its bases that has it."""
    return next((v for c in lineage(cls) if (v := c.constant(name)) is not None), ())


@functools.cache
def _module(path: Path) -> tuple[str, ast.Module]:
    if not path.is_file():
        raise UserError(f"{path} is missing: every yaml of a method or env needs its .py")
    text = path.read_text()
    try:
        return text, ast.parse(text)
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg}") from None


def _find(path: Path, name: str) -> Class:
    """The class `name` as seen from the file `path`: defined there or imported there from methods/, envs/ or runner/."""
    text, tree = _module(path)
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return Class(name, node, path, text)
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    target = ROOT / (node.module.replace(".", "/") + ".py")
                    if target.is_file():
                        return _find(target, alias.name)
    raise UserError(f"{path}: class {name} not found there")


def main_class(path: Path) -> Class:
    """The class a method's or env's file is about: the last one at its top level."""
    text, tree = _module(path)
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef)]
    if not classes:
        raise UserError(f"{path} defines no class")
    return Class(classes[-1].name, classes[-1], path, text)


def _bases(cls: Class) -> list[str]:
    return [b.id for b in cls.node.bases if isinstance(b, ast.Name)]


def added(cls: Class) -> list[Class]:
    """`cls` and what it mixes into its base: the last base named goes on with the line, those before it are mixins (plain
    classes, which two methods on different bases share)."""
    return [cls, *(_find(cls.path, name) for name in _bases(cls)[:-1])]


def lineage(cls: Class) -> list[Class]:
    """`cls` and its bases inside this house, nearest first: one line of descent, mixins where they come in."""
    out = []
    while True:
        out += added(cls)
        bases = _bases(cls)
        if not bases or bases[-1] in ("Method", "World", "Stream"):
            return out
        cls = _find(cls.path, bases[-1])


def knobs(entry: Entry) -> list[Knob]:
    """The knobs of an entry's Config, inherited ones first; a redefined knob keeps its place."""
    return composed_knobs([entry])


@functools.cache
def _own_knobs(cls: Class) -> tuple[Knob, ...]:
    return tuple(_knob(line, cls.path) for node in cls.node.body
                 if isinstance(node, ast.ClassDef) and node.name == "Config"
                 for line in node.body if isinstance(line, ast.AnnAssign))


def composed_knobs(entries: list[Entry]) -> list[Knob]:
    """The knobs of `a+b`: what the common base defines, then each method's own lines; refused where they disagree."""
    lines = [list(reversed(lineage(main_class(e.source)))) for e in entries]
    shared = [classes for classes in lines[0] if all(classes.name in [c.name for c in other] for other in lines)]
    found = {k.name: k for cls in shared for k in _own_knobs(cls)}
    owner: dict[str, str] = {}
    for entry, classes in zip(entries, lines):
        for knob in [k for cls in classes if cls.name not in [s.name for s in shared] for k in _own_knobs(cls)]:
            if owner.get(knob.name, entry.name) != entry.name and found[knob.name].default != knob.default:
                raise UserError(f"{' + '.join(e.name for e in entries)}: both define the setting '{knob.name}', "
                                f"with different defaults; they cannot be combined")
            found[knob.name], owner[knob.name] = knob, entry.name
    return list(found.values())


def _knob(line: ast.AnnAssign, path: Path) -> Knob:
    name, kind = line.target.id, ast.unparse(line.annotation)
    try:
        call = line.value
        args = [ast.literal_eval(a) for a in call.args]
        extra = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    except (ValueError, AttributeError):
        raise UserError(f"{path}, line {line.lineno}: write `{name}: {kind} = knob(default, \"meaning\", …)` "
                        "with literal arguments, so that it can be read without importing the file") from None
    choices = tuple(extra["choices"]) if extra.get("choices") else None
    return Knob(name, kind, args[0], args[1], extra.get("low"), extra.get("high"), choices, extra.get("source", ""),
                extra.get("when"))


def parts(entry: Entry) -> tuple[list[str], list[str]]:
    """(all named parts of the family's base algorithm, those of them that add up over composed methods)."""
    cls = main_class(entry.source)
    return list(inherited(cls, "PARTS")), list(inherited(cls, "ADDITIVE"))


def changed_parts(entry: Entry) -> list[str]:
    """The parts that an entry's own class, or a mixin of it, overrides (what its card must say, too)."""
    own = {name for cls in added(main_class(entry.source)) for name in cls.methods()}
    return [p for p in parts(entry)[0] if p in own]


def check_composition(entries: list[Entry]):
    """Methods combine when they change different parts, or the same additive ones. Else a UserError names the part."""
    families = {e.family for e in entries}
    roots = {lineage(main_class(e.source))[-1].name for e in entries}
    if len(roots) > 1:
        raise UserError(f"{' + '.join(e.name for e in entries)}: these do not share a base algorithm "
                        f"({', '.join(sorted(roots))}; families {', '.join(sorted(families))}) and cannot be combined")
    _, additive = parts(entries[0])
    changed: dict[str, str] = {}
    for entry in entries:
        # Everything an entry has changed on its way from the root, its ancestors' changes included.
        for cls in lineage(main_class(entry.source))[:-1]:
            for part in cls.methods():
                if part not in parts(entry)[0] or part in additive:
                    continue
                owner = f"{cls.path.stem}.{cls.name}"
                other = changed.setdefault(part, owner)
                if other != owner and not _descends(entries, other, owner):
                    raise UserError(
                        f"{' + '.join(e.name for e in entries)}: both change the part '{part}' "
                        f"({other.split('.')[0]} and {owner.split('.')[0]}), which does not add up; choose one of them")


def _descends(entries, a, b) -> bool:
    """True if in some entry's lineage both classes occur: then one refines the other and they do not compete."""
    for entry in entries:
        names = {f"{c.path.stem}.{c.name}" for c in lineage(main_class(entry.source))}
        if a in names and b in names:
            return True
    return False


def metrics(env: Entry) -> dict[str, list]:
    """{gold metric: [direction, unit]} of an env's world, read from its `metrics = {name: Metric(…)}`, where `**Base.metrics`
    stands for what its bases define."""
    out: dict[str, list] = {}
    for cls in lineage(main_class(env.source)):
        for n in cls.node.body:
            if isinstance(n, (ast.Assign, ast.AnnAssign)) and isinstance(n.value, ast.Dict):
                target = n.targets[0] if isinstance(n, ast.Assign) else n.target
                if isinstance(target, ast.Name) and target.id == "metrics":
                    for k, v in zip(n.value.keys, n.value.values):
                        if k is not None:
                            out.setdefault(k.value, [a.value for a in v.args[:2]])
                    if None not in n.value.keys:
                        return out
    return out


# ---- importing, once a job starts -----------------------------------------------------------------------------------

def load_class(entry: Entry):
    """Import an entry's module and return its class (this is where torch comes in)."""
    name = main_class(entry.source).name
    if entry.family == "include":
        key = f"_include_{entry.kind}_{entry.name}"
        if key not in sys.modules:
            spec = importlib.util.spec_from_file_location(key, entry.source)
            module = importlib.util.module_from_spec(spec)
            sys.modules[key] = module
            spec.loader.exec_module(module)
        return getattr(sys.modules[key], name)
    module = ".".join(entry.source.relative_to(ROOT).with_suffix("").parts)
    return getattr(importlib.import_module(module), name)
