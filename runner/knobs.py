"""Hyper-parameters: one line declares type, default, meaning, range and source.

    tau: float = knob(1.0, "temperature of the anchored score", low=0.0, source="paper")

A Config is a frozen dataclass of such lines: the only schema and the only defaults. The same lines are read
without importing anything (runner/catalogue.py parses the file), so that `show` and `check` need no torch;
hence every argument of `knob` must be a literal.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

from runner.errors import UserError, unknown


def knob(default: Any, help: str, *, low=None, high=None, choices=None, source: str = "", when: dict | None = None):
    """A dataclass field with its meaning. `low` and `high` are inclusive bounds; `when` names the settings under which
    it has an effect at all, as {knob: [every such value]} or {knob: one of them} (a test holds every knob to it)."""
    meta = {"help": help, "low": low, "high": high, "choices": choices, "source": source, "when": when}
    return dataclasses.field(default=default, metadata=meta)


class Knob(NamedTuple):
    """One hyper-parameter, as read from a Config. `type` is the annotation's text."""

    name: str
    type: str
    default: Any
    help: str = ""
    low: Any = None
    high: Any = None
    choices: tuple | None = None
    source: str = ""
    when: dict | None = None

    def check(self, value, where: str):
        """`value` as this knob's type, or a UserError that names the range. `where` is the dotted key."""
        key = f"{where}.{self.name}" if where else self.name
        value = _coerce(value, self.type, key)
        if self.choices and value not in self.choices:
            raise unknown(f"value for {key}:", value, self.choices, f"choices: {', '.join(map(str, self.choices))}")
        numbers = value if isinstance(value, tuple) else (value,)
        for number in numbers:
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                if not math.isfinite(number):
                    raise UserError(f"{key}={value} must be finite")
                if (self.low is not None and not number >= self.low) or (self.high is not None and not number <= self.high):
                    low = "-inf" if self.low is None else self.low
                    high = "inf" if self.high is None else self.high
                    raise UserError(f"{key}={value} is out of range: it must lie in [{low}, {high}]\n{self.help}")
        return value


def _coerce(value, type_, key):
    """`value` as `type_`: bool, int, float, str, tuple[int, ...], tuple[float, ...] or `X | None`."""
    base = type_.replace(" ", "")
    if base.endswith("|None"):
        if value is None:
            return None
        base = base[: -len("|None")]
    if base.startswith("tuple["):
        inner = base[len("tuple["):].split(",")[0].rstrip("]")
        if isinstance(value, (list, tuple)):
            return tuple(_coerce(v, inner, key) for v in value)
    elif base == "bool":
        if isinstance(value, bool):
            return value
    elif base == "int":
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, float) and value.is_integer():  # 1e5 on the command line is a float
            return int(value)
    elif base == "float":
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, str):  # YAML 1.1 reads 3e-4 as text
            try:
                return float(value)
            except ValueError:
                pass
    elif base == "str":
        if isinstance(value, str):
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
    else:
        raise TypeError(f"knob {key}: type {type_!r} is not supported")
    raise UserError(f"{key}={value!r} has the wrong type: {type_} is needed")


def knobs_of(config_class) -> list[Knob]:
    """The knobs of an imported Config dataclass, in order."""
    out = []
    for f in dataclasses.fields(config_class):
        meta = f.metadata
        choices = tuple(meta["choices"]) if meta.get("choices") else None
        out.append(Knob(f.name, f.type if isinstance(f.type, str) else f.type.__name__, f.default,
                        meta.get("help", ""), meta.get("low"), meta.get("high"), choices, meta.get("source", ""),
                        meta.get("when")))
    return out


def fill(knobs: list[Knob], given: dict, where: str, extra_known=()) -> dict:
    """All values of a Config: defaults, then `given`, each checked. Unknown keys are refused by name."""
    names = [k.name for k in knobs]
    for key in given:
        if key not in names:
            raise unknown("key", f"{where}.{key}" if where else key,
                          [f"{where}.{n}" if where else n for n in [*names, *extra_known]])
    return {k.name: k.check(given[k.name], where) if k.name in given else k.default for k in knobs}
