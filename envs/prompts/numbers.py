"""Final answers that are numbers: found in free text, compared by value."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

FIGURE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
MONEY = r"(?:[$€£¥₹]|USD|EUR|GBP|Rs\.?)\s?"
NUMBER = re.compile(rf"(?<![A-Za-z0-9_^])(?P<sign>(?<![0-9)%])[-+])?(?:{MONEY})?(?P<sign2>(?<![0-9)%])[-+])?"
                    rf"(?:(?P<whole>[0-9]{{1,9}}) (?=[0-9]+/[0-9]))?(?P<top>{FIGURE})"
                    rf"(?:(?P<exponent>[eE][-+]?[0-9]{{1,2}})(?![0-9A-Za-z])|\s?/\s?(?P<bottom>{FIGURE}))?(?P<percent>\s?%)?")
FRACTION = re.compile(r"(?P<whole>[0-9]?) ?\\[dt]?frac ?(?:\{(?P<a>[^{}]{1,40})\}|(?P<c>[0-9])) ?"
                      r"(?:\{(?P<b>[^{}]{1,40})\}|(?P<d>[0-9]))")
GROUPS = re.compile(r"(?<=[0-9])(?:\{,\}|\\[,!;: ]|[\u00a0\u202f\u2009])(?=[0-9]{3})")
DIGITS = 40  # no longer number is read


class Number(NamedTuple):
    value: Fraction
    percent: bool = False

    def __eq__(self, other):
        """Equal by value; 50 % is both 50 and 0.5, as data sets write either."""
        if self.percent == other.percent:
            return self.value == other.value
        plain, share = (other, self) if self.percent else (self, other)
        return plain.value in (share.value, share.value / 100)

    __hash__ = None


def plain(text: str) -> str:
    """LaTeX and typography reduced to what NUMBER reads."""
    text = text.replace("\u2212", "-").replace("\\$", "$").replace("\\%", "%")
    text = GROUPS.sub(",", text)
    return FRACTION.sub(lambda m: f"{m['whole'] and m['whole'] + ' '}{m['a'] or m['c']}/{m['b'] or m['d']}", text)


def read(match: re.Match) -> Number | None:
    parts = [(match[k] or "").replace(",", "") for k in ("whole", "top", "bottom")]
    if max(map(len, parts)) > DIGITS:
        return None
    whole, top, bottom = (Fraction(x) if x else None for x in parts)
    if bottom == 0:
        return None
    value = top / (bottom or 1) * Fraction(10) ** int((match["exponent"] or "e0")[1:]) + (whole or 0)
    negative = "-" in (match["sign"], match["sign2"])
    return Number(-value if negative else value, bool(match["percent"]))


def number(text: str, last: bool = True) -> Number | None:
    """The last (or first) number in a text."""
    matches = list(NUMBER.finditer(plain(text)))
    return read(matches[-1 if last else 0]) if matches else None


def boxed(text: str) -> str | None:
    r"""What the last \boxed{…} holds, None if there is none or it is not closed."""
    begin = text.rfind("\\boxed{")
    if begin < 0:
        return None
    begin, depth = begin + len("\\boxed{"), 1
    for i in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if not depth:
            return text[begin:i]
    return None


def final(text: str, marker: str = "####") -> tuple[Number | None, bool]:
    r"""(the final answer, whether it was marked): the number after the last `marker` on its line, else in the last \boxed{…},
    else the last number of all."""
    if marker in text:
        rest = text.rpartition(marker)[2].strip().partition("\n")[0]
        return number(rest, last=False), True
    if (inside := boxed(text)) is not None:
        return number(inside), True
    return number(text), False


def spelled(found: Number) -> str:
    """One spelling for each value: "72", "-3/4", "50%"."""
    return f"{found.value}{'%' if found.percent else ''}"
