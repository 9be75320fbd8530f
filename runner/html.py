"""The report: one HTML file that needs nothing but itself, from the catalogue, the claims and the runs.

    claims/<name>.json   what was claimed and what came of it; shown with its method
    runs/*/run.json      finished runs, summed up for each env; all others are listed with their status
    metrics.jsonl        one figure of each run's training, thinned

What cannot be read is told on the page, never left out in silence. A run whose figure is no number counts as worse than
every other. Drawing lies in html_charts.py, style and script in html_assets.py.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np

from runner import catalogue
from runner import record as records
from runner.catalogue import Catalogue, Entry
from runner.errors import UserError
from runner.html_assets import CSS, JS
from runner.html_charts import SERIES, Row, Series, figure, intervals, lines, numbers, text, thin
from runner.html_pictures import gallery

VERDICTS = ("supported", "not supported", "undecided")
MARKS = {"supported": "✓", "not supported": "✕", "undecided": "?"}
SECONDARY = ("seed", "runs", "logger", "hardware", "loop.save_steps", "loop.save_seconds", "loop.keep")


def write_report(target: Path, runs: Path, claims: Path, book: Catalogue) -> Path:
    """Write the page to `target`; returns it."""
    target = Path(target)
    page = _page(target, Path(runs), Path(claims), book)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.write_bytes(page.encode("utf-8", "replace"))
    os.replace(temporary, target)
    return target


# ---- claims -----------------------------------------------------------------------------------------------------------

def read_claims(folder: Path) -> tuple[list[dict], list[tuple[Path, str]]]:
    """(claims, in the order of their files' names; files that are none, and why)."""
    found, broken = [], []
    for path in sorted(Path(folder).glob("*.json")):
        try:
            found.append(_claim(json.loads(path.read_text(encoding="utf-8")), path))
        except (ValueError, TypeError, AttributeError, KeyError, OSError) as error:
            broken.append((path, f"{type(error).__name__}: {error}"))
    return found, broken


def verdicts(claims: list[dict]) -> dict[str, list[dict]]:
    """The claims about each method."""
    out: dict[str, list[dict]] = defaultdict(list)
    for claim in claims:
        for name in dict.fromkeys(claim["methods"]):
            out[name].append(claim)
    return out


def _claim(read: dict, path: Path) -> dict:
    """A claim as the page needs it: every key there, lists where lists are meant."""
    if read["verdict"] not in VERDICTS:
        raise ValueError(f"verdict {read['verdict']!r} is none of {', '.join(VERDICTS)}")
    arms = {}
    for name, arm in dict(read.get("arms") or {}).items():
        arms[name] = {"method": arm.get("method", ""), "overrides": list(arm.get("overrides") or []),
                      "role": arm.get("role", ""), "values": list(arm.get("values") or []), "mean": arm.get("mean"),
                      "iqm": arm.get("iqm"), "interval": _pair(arm.get("interval")), "runs": list(arm.get("runs") or []),
                      "failed": list(arm.get("failed") or [])}
    comparisons = [{"arm": c["arm"], "against": c["against"], "difference": c.get("difference"),
                    "interval": _pair(c.get("interval")), "chance": c.get("probability_of_improvement"),
                    "verdict": c.get("verdict", "")} for c in read.get("comparisons") or []]
    curves = {arm: {"metric": str(c.get("metric", "")), **{k: list(c.get(k) or []) for k in ("step", "mean", "low", "high")}}
              for arm, c in dict(read.get("curves") or {}).items()}
    plain = {k: read.get(k) for k in ("hypothesis", "family", "metric", "direction", "margin", "env", "size", "refuted_by",
                                      "command", "commit", "dirty", "hardware", "wall_seconds", "date")}
    return {**plain, "claim": str(read.get("claim") or path.stem), "methods": [str(m) for m in read["methods"]],
            "verdict": read["verdict"], "seeds": list(read.get("seeds") or []), "arms": arms, "comparisons": comparisons,
            "curves": curves, "warnings": [str(w) for w in read.get("warnings") or []], "file": path}


def _pair(value) -> tuple:
    low, high = value if isinstance(value, (list, tuple)) else (None, None)
    return low, high


# ---- runs -------------------------------------------------------------------------------------------------------------

class Run(NamedTuple):
    """What the page keeps of a run."""

    folder: Path
    status: str
    error: str
    method: str
    env: str
    size: str
    seed: object
    settings: dict       # dotted key: value as text; only what tells configurations apart
    gold: str            # the metric that the env is about; "" unless the run is done
    direction: str
    value: float         # NaN if it is no number
    references: dict
    curve: tuple         # (metric, steps, values)
    commit: str
    finished: str


def read_runs(folder: Path) -> tuple[list[Run], list[tuple[Path, str]]]:
    """(runs; folders whose record cannot be read, and why)."""
    found, broken = [], []
    for path in records.folders(folder):
        try:
            found.append(_run(path, records.Record(path).read()))
        except (UserError, ValueError, TypeError, AttributeError, KeyError, OSError) as error:
            broken.append((path, str(error).splitlines()[0] if isinstance(error, UserError)
                           else f"{type(error).__name__}: {error}"))
    return found, broken


def _run(folder: Path, run: dict) -> Run:
    config, status = run["config"], str(run["status"])
    if records.killed(folder, run):
        status = "killed"
    gold, direction, value, curve, references = "", "max", float("nan"), ("", [], []), {}
    if status == "done":
        meaning = run.get("metric_meaning") or {}
        metrics = run.get("metrics") or {}
        gold = next((m for m in metrics if meaning.get(m, ["none"])[0] in ("max", "min")), next(iter(metrics), ""))
        direction = "min" if meaning.get(gold, ["max"])[0] == "min" else "max"
        value = float(numbers([metrics.get(gold)])[0])
        references = {str(k): v.get(gold) for k, v in (run.get("references") or {}).items()}
        curve = _curve(folder / "metrics.jsonl", gold)
    return Run(folder, status, str(run.get("error") or ""), str(config["method"]["name"]), str(config["env"]["name"]),
               str(config.get("size", "")), run.get("seed"), _settings(config), gold, direction, value, references, curve,
               str(run.get("commit") or ""), str(run.get("finished") or ""))


def _settings(config: dict, prefix="") -> dict:
    out = {}
    for key, value in config.items():
        key = prefix + str(key)
        if key in SECONDARY or key in ("method.name", "env.name", "size"):
            continue
        if isinstance(value, dict):
            out.update(_settings(value, key + "."))
        else:
            out[key] = value if isinstance(value, str) else json.dumps(value)
    return out


def _curve(path: Path, gold: str) -> tuple:
    """One figure over a run's training: the gold metric where it was logged, else its nearest kin; thinned."""
    try:
        raw = path.read_bytes().splitlines()
    except OSError:
        return "", [], []
    for pattern in (f'"(eval/{re.escape(gold)})"', f'"(train_{re.escape(gold)})"', f'"({re.escape(gold)})"',
                    r'"(validation[^"]*)"'):
        probe = re.compile(pattern.encode())
        if not any(probe.search(line) for line in raw[:50]):
            continue
        key = next(m[1].decode() for m in map(probe.search, raw) if m)
        fitting = [line for line in raw if f'"{key}"'.encode() in line]
        steps, values = [], []
        for i in thin(len(fitting)):
            try:
                line = json.loads(fitting[i])
                steps.append(float(line["step"]))
                values.append(line[key])
            except (ValueError, KeyError, TypeError):  # a torn line
                continue
        return key, steps, numbers(values).tolist()
    return "", [], []


def _bands(curves: list[tuple]) -> tuple:
    """(steps, mean, least, greatest) of several runs' curves at the steps of the longest one; no run is extrapolated."""
    grid = np.array(max((c[1] for c in curves), key=len))
    rows = []
    for _, steps, values in curves:
        steps, values = np.array(steps), np.array(values)
        fine = np.isfinite(values)
        rows.append(np.interp(grid, steps[fine], values[fine], left=np.nan, right=np.nan) if fine.any()
                    else np.full(len(grid), np.nan))
    table = np.ma.masked_invalid(rows)
    return (grid, *(f(axis=0).filled(np.nan) for f in (table.mean, table.min, table.max)))


def _iqm(values: np.ndarray) -> float:
    """The 25 % trimmed mean, floor(n / 4) values cut from each end."""
    cut = len(values) // 4
    return float(np.sort(values)[cut:len(values) - cut].mean()) if len(values) else float("nan")


def _wilson(share: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's 95 % interval of a share of n."""
    z = 1.96
    middle, half = share + z * z / (2 * n), z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


# ---- pieces of a page -------------------------------------------------------------------------------------------------

def _slug(prefix: str, name: str) -> str:
    """An id of a name: readable, and different for different names."""
    plain = f"{prefix}-" + re.sub(r"[^A-Za-z0-9_-]+", "-", name)
    return plain if plain == f"{prefix}-{name}" else f"{plain}-{hashlib.sha256(name.encode('utf-8', 'replace')).hexdigest()[:6]}"


def _link(target: str, words: str, kind="") -> str:
    return f'<a{kind} href="{text(target)}">{words}</a>'


def _paper(address) -> str:
    """A link to a paper; anything that is no web address stands as text."""
    address = str(address or "")
    if not re.match(r"https?://[^\s]+$", address):
        return text(address)
    short = re.sub(r"^https?://(www\.)?", "", address).rstrip("/")
    return _link(address, text(re.sub(r"^arxiv\.org/(abs|pdf)/", "arXiv:", short)))


def _badge(verdict: str, target="", more="") -> str:
    kind = {"supported": "supported", "not supported": "not", "undecided": "undecided"}.get(verdict, "none")
    words = f"{MARKS.get(verdict, '')} {text(verdict)}{more}".strip()
    if target:
        return f'<a class="badge {kind}" href="#{text(target)}">{words}</a>'
    return f'<span class="badge {kind}">{words}</span>'


def _table(caption: str, head: list[str], rows: list[list[str]], numeric=(), foot: list[str] | None = None,
           attributes="", wide=()) -> str:
    """A table of ready-made cells; the first of a row is its header. `\\0` in a cell parts its sort key from it."""
    def cell(words, i, tag):
        key, zero, words = words.rpartition("\0")
        kind = "n" if i in numeric else "wide" if i in wide else ""
        return (f"<{tag}" + (' scope="row"' if tag == "th" else "") + (f' class="{kind}"' if kind else "")
                + (f' data-v="{text(key)}"' if zero else "") + f">{words}</{tag}>")

    def line(cells):
        return "<tr>" + "".join(cell(c, i, "td" if i else "th") for i, c in enumerate(cells)) + "</tr>"

    top = "".join(f'<th scope="col"{_n(i in numeric)}>{text(h)}</th>' for i, h in enumerate(head))
    label = text(re.sub(r"<[^>]*>", "", caption))
    return (f'<div class="scroll" role="region" tabindex="0" aria-label="{label}"><table{attributes}>'
            f"<caption>{caption}</caption><thead><tr>{top}</tr></thead><tbody>{''.join(map(line, rows))}</tbody>"
            + (f"<tfoot>{line(foot)}</tfoot>" if foot else "") + "</table></div>")


def _n(numeric: bool) -> str:
    return ' class="n"' if numeric else ""


def _chart(caption: str, drawing: str) -> str:
    return f"<figure><figcaption>{caption}</figcaption>{drawing}</figure>"


def _terms(pairs) -> str:
    return "<dl>" + "".join(f"<dt>{k}</dt><dd>{v}</dd>" for k, v in pairs if v) + "</dl>"


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:]


def _codes(words) -> str:
    return ", ".join(f"<code>{text(w)}</code>" for w in words)


def _more(summary: str, inner: str) -> str:
    return f"<details><summary>{summary}</summary>{inner}</details>"


_TOKEN = re.compile(r"(?P<mark>[_^])(?:\{(?P<braced>[^{}]*)\}|(?P<run>[^\W_]+|\*))"
                    r"|(?P<word>[^\W\d_]+)|(?P<minus>-)|(?P<rest>.)", re.S)


def formula(source: str) -> str:
    """A formula written in plain unicode, set: variables italic, names upright, _x and ^x low and high. One line for
    each statement (they are parted by `;` and two spaces)."""
    return "".join(f"<span>{_statement(part)}</span>" for part in re.split(r"(?<=;)\s{2,}|\n+", str(source).strip()) if part)


def _statement(part: str) -> str:
    out = []
    for found in _TOKEN.finditer(part):
        if found["mark"]:
            tag = "sub" if found["mark"] == "_" else "sup"
            inner = found["braced"] if found["braced"] is not None else found["run"]
            out.append(f"<{tag}>{_statement(inner)}</{tag}>")
        elif found["word"]:
            out.append(_word(found["word"], part[found.end():found.end() + 1].isdigit()))
        elif found["minus"]:
            before, after = part[:found.start()][-2:], part[found.end():][:2]
            joins = before.isalpha() and after.isalpha() and len(before + after) == 4 and (before + after).isascii()
            out.append("-" if joins else "−")
        else:
            out.append({"'": "′"}.get(found["rest"], text(found["rest"])))
    return "".join(out)


def _word(word: str, digit: bool) -> str:
    greek = all("α" <= c <= "ω" or c in "ϕϵϑ" for c in word)
    if greek or len(word) == 1 and word not in "∇ΣΠ" and word.isalpha():
        return "".join(f"<i>{text(c)}</i>" for c in word)
    return text(word)


def _plain(value) -> str:
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(_plain, value)) + "]"
    return {None: "null", True: "true", False: "false"}.get(value, str(value)) if isinstance(value, (bool, type(None))) \
        else str(value) or "''"


# ---- the page ---------------------------------------------------------------------------------------------------------

class _View(NamedTuple):
    """What every section needs to know."""

    target: Path
    book: Catalogue
    claims: dict[str, list[dict]]       # by method
    anchors: dict[str, str]             # of a claim: its id on the page
    envs: set[str]                      # envs that have a section
    fits: dict[tuple, list[str]]        # envs that provide what is needed
    folders: dict[str, Path]            # run folders by id

    def file(self, path: Path, words: str = "") -> str:
        path = Path(path)
        shown = path.relative_to(catalogue.ROOT) if path.is_relative_to(catalogue.ROOT) else path
        there = os.path.relpath(path.absolute(), self.target.parent.absolute())
        return _link(quote(there), words or f"<code>{text(shown)}</code>")


def _page(target: Path, runs: Path, claims: Path, book: Catalogue) -> str:
    found, broken_claims = read_claims(claims)
    done, broken_runs = read_runs(runs)
    methods = book.all("method")
    by_method = verdicts(found)
    fits: dict[tuple, list[str]] = {}
    for m in methods:
        fits.setdefault(tuple(m.needs), book.fitting([m]))
    anchors = {c["file"].name: _slug("claim", c["file"].stem) for c in found}
    view = _View(target, book, by_method, anchors, {r.env for r in done}, fits,
                 {r.folder.name.rpartition("-")[2]: r.folder for r in done})
    shown: set[str] = set()
    families = defaultdict(list)
    for m in methods:
        families[m.family].append(m)
    body = [_overview(families, by_method, found), _methods(methods, view)]
    for family, members in sorted(families.items()):
        members.sort(key=lambda m: (m.card.get("baseline") is not None, m.name))
        body.append(f'<section aria-labelledby="{_slug("family", family)}"><h2 class="family" id="{_slug("family", family)}">'
                    f"{text(family.capitalize())}</h2>" + "".join(_method(m, view, shown) for m in members) + "</section>")
    rest = [c for c in found if c["file"].name not in shown]
    if rest or broken_claims:
        body.append('<section aria-labelledby="others"><h2 id="others">Other claims</h2>'
                    + "".join(f"<p>About {_codes(c['methods']) or 'no method'}: not in the catalogue.</p>"
                              + _claim_card(c, view) for c in rest)
                    + _broken("Files of claims that could not be read", broken_claims, view) + "</section>")
    body += [_environments(done, view), _unfinished(done, broken_runs, view)]
    counts = Counter(r.status for r in done)
    told = f"{len(methods)} methods in {len(families)} families, {len(found)} recorded claims, {counts['done']:,} finished " \
           f"runs" + (f" and {len(done) - counts['done'] + len(broken_runs):,} others" if len(done) + len(broken_runs)
                      > counts["done"] else "") + "."
    links = [("overview", "Overview"), ("methods", "All methods"),
             *((_slug("family", f), text(f.capitalize())) for f in sorted(families)),
             *([("others", "Other claims")] if rest or broken_claims else []),
             ("envs", "Environments"), ("unfinished", "Unfinished runs")]
    commit = records.commit(catalogue.ROOT)
    state = (f", at commit <code>{text(commit['commit'][:12])}</code>" + (" with changes" if commit["dirty"] else "")) \
        if commit else ""
    digest = base64.b64encode(hashlib.sha256(JS.encode()).digest()).decode()
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; \
script-src 'sha256-{digest}'">
<meta name="color-scheme" content="light dark">
<title>Ballast: methods, claims, runs</title>
<style>{CSS}</style>
</head>
<body>
<a class="skip" href="#methods">Skip to the methods</a>
<header>
<h1>Methods, claims, runs</h1>
<p class="lead">{told}</p>
<nav aria-label="Sections"><ul>{"".join(f'<li><a href="#{i}">{w}</a></li>' for i, w in links)}</ul></nav>
</header>
<main>
{"".join(f"{part}{chr(10)}" for part in body)}</main>
<footer><p>Written by Ballast on {text(records.now())}{state}. Records are the truth; this page is a view of them.</p></footer>
<script>{JS}</script>
</body>
</html>
"""


def _overview(families: dict, by_method: dict, claims: list[dict]) -> str:
    rows, total = [], Counter()
    for family, members in sorted(families.items()):
        own = {c["file"].name: c["verdict"] for m in members for c in by_method.get(m.name, ())}
        counts = Counter(own.values())
        bare = sum(not by_method.get(m.name) for m in members)
        rows.append([_link("#" + _slug("family", family), text(family)), str(len(members)),
                     *(str(counts[v] or "–") for v in VERDICTS), str(bare or "–")])
        total.update({"methods": len(members), "bare": bare})
    every = Counter(c["verdict"] for c in claims)
    foot = ["all", str(total["methods"]), *(str(every[v] or "–") for v in VERDICTS), str(total["bare"] or "–")]
    return ('<section aria-labelledby="overview"><h2 id="overview">Overview</h2>'
            + _table("Claims of each family by their verdict. A claim is supported if the whole 95\u00a0% interval of the "
                     "improvement lies beyond its margin; not supported if the interval rules such an improvement out.",
                     ["family", "methods", *(f"{MARKS[v]} {v}" for v in VERDICTS), "methods without a claim"], rows, range(1, 6),
                     foot) + "</section>")


def _methods(methods: list[Entry], view: _View) -> str:
    rows = []
    for m in methods:
        claims = view.claims.get(m.name, [])
        counts = Counter(c["verdict"] for c in claims)
        badges = " ".join(_badge(v, next(view.anchors[c["file"].name] for c in claims if c["verdict"] == v),
                                 f" ×{counts[v]}" if counts[v] > 1 else "") for v in VERDICTS if counts[v])
        order = next((str(i) for i, v in enumerate(VERDICTS) if counts[v]), "")
        base = m.card.get("baseline")
        rows.append([_link("#" + _slug("method", m.name), f"<code>{text(m.name)}</code>"), text(m.family),
                     text(m.card.get("title", "")), _method_link(base, view) if base else "–", f"{order}\0{badges or '–'}"])
    return ('<section aria-labelledby="methods"><h2 id="methods">All methods</h2>'
            '<form class="search" role="search" hidden><label for="search">Search</label>'
            '<input id="search" type="search" autocomplete="off" spellcheck="false" aria-controls="method-table">'
            '<output class="quiet" aria-live="polite" for="search"></output></form>'
            + _table("Every method of the catalogue; a verdict leads to its claim.",
                     ["name", "family", "title", "baseline", "verdict"], rows,
                     attributes=' id="method-table" data-sortable', wide=(2,)) + "</section>")


def _method_link(name, view: _View) -> str:
    if str(name) in view.book.paths["method"]:
        return _link("#" + _slug("method", str(name)), f"<code>{text(name)}</code>")
    return f"<code>{text(name)}</code>"


def _method(m: Entry, view: _View, shown: set[str]) -> str:
    card, base = m.card, m.card.get("baseline")
    fits = [_link("#" + _slug("env", e), f"<code>{text(e)}</code>") if e in view.envs else f"<code>{text(e)}</code>"
            for e in view.fits[tuple(m.needs)]]
    parts = catalogue.changed_parts(m)
    neutral = ", ".join(f"{k}={_plain(v)}" for k, v in (card.get("neutral") or {}).items())
    out = [f'<article class="method" aria-labelledby="{_slug("method", m.name)}"><h3 id="{_slug("method", m.name)}">'
           f'{text(card.get("title", m.name))} <code>{text(m.name)}</code></h3>',
           '<p class="meta">' + "".join(f"<span>{w}</span>" for w in (
               _paper(card.get("paper")), f"baseline {_method_link(base, view)}" if base else "base algorithm",
               view.file(m.source)) if w) + "</p>",
           f'<p>{text(_sentence(card.get("summary", "")))}</p>']
    if card.get("formula"):
        out.append(f'<div class="formula" role="math" aria-label="{text(card["formula"])}">{formula(card["formula"])}</div>')
    out.append(_terms([("changes", _codes(parts) or "no part: the base algorithm"),
                       ("neutral", f"<code>{text(neutral)}</code>, and it is {_method_link(base, view)} bit for bit"
                        if neutral and base else ""),
                       ("needs", text(" or ".join(m.needs))), ("envs", ", ".join(fits) or "none fits yet")]))
    knobs = catalogue.knobs(m)
    rows = []
    for k in knobs:
        value = k.check(m.values[k.name], m.kind) if k.name in m.values else k.default
        span = ", ".join(map(_plain, k.choices)) if k.choices else "" if k.low is None and k.high is None else \
            f"{'−∞' if k.low is None else figure(k.low)} … {'∞' if k.high is None else figure(k.high)}"
        when = "" if not k.when else " Only with " + ", ".join(
            f"{n} = {' or '.join(map(_plain, v)) if isinstance(v, list) else _plain(v)}" for n, v in k.when.items()) + "."
        meaning = _sentence(k.help) + ("" if not when or k.help.endswith(".") else ".") + when
        rows.append([f"<code>{text(k.name)}</code>", f"<code>{text(_plain(value))}</code>", text(span) or "–", text(meaning),
                     text(k.source) or "–"])
    out.append(_more(f"{len(rows)} hyper-parameters",
                     _table(f"Hyper-parameters of {text(m.name)}: <code>method.NAME=VALUE</code>",
                            ["name", "default", "range", "meaning", "source"], rows, wide=(2, 3))))
    claims = view.claims.get(m.name, [])
    for claim in claims:
        if claim["file"].name in shown:
            out.append(f'<p>{_badge(claim["verdict"])} {_link("#" + view.anchors[claim["file"].name], text(claim["hypothesis"]))}'
                       ' <span class="quiet">(shown above)</span></p>')
        else:
            shown.add(claim["file"].name)
            out.append(_claim_card(claim, view))
    if not claims:
        out.append('<p class="quiet">No claim about this method is recorded.</p>')
    return "".join(out) + "</article>"


def _interval(pair) -> str:
    low, high = pair
    return "–" if low is None and high is None else f"[{figure(low)}, {figure(high)}]"


def _claim_card(c: dict, view: _View) -> str:
    direction = "lower" if c["direction"] == "min" else "higher"
    margin = numbers([c["margin"]])[0]
    margin = 0.0 if np.isnan(margin) else float(margin)
    name = view.anchors[c["file"].name]
    out = [f'<section class="claim" aria-labelledby="{name}"><p class="meta"><span>{_badge(c["verdict"])}</span>'
           f"<span>claim <code>{text(c['claim'])}</code></span></p>"
           f'<h4 id="{name}">{text(c["hypothesis"])}</h4>',
           '<p class="meta">' + "".join(f"<span>{w}</span>" for w in (
               f"env {_link('#' + _slug('env', str(c['env'])), text(c['env'])) if c['env'] in view.envs else text(c['env'])}",
               f"size {text(c['size'])}", f"{text(c['metric'])} ({direction} is better)", f"margin {text(figure(c['margin']))}",
               f"{len(c['seeds'])} seeds")) + "</p>"]
    if c["refuted_by"]:
        out.append(f"<p>It would be refuted by: {text(c['refuted_by'])}</p>")
    failed = {arm: a["failed"] for arm, a in c["arms"].items() if a["failed"]}
    if failed:
        out.append('<p><span class="badge failed">failed</span> ' + "; ".join(
            f"{text(arm)}: seed{'s' if len(seeds) > 1 else ''} {text(', '.join(map(str, seeds)))}"
            for arm, seeds in failed.items()) + "</p>")
    if c["warnings"]:
        out.append('<ul class="warn">' + "".join(f"<li>{text(w)}</li>" for w in c["warnings"]) + "</ul>")
    charts = []
    if c["comparisons"]:
        rows = [Row(f"{x['arm']} − {x['against']}", x["difference"], *x["interval"]) for x in c["comparisons"]]
        lower = c["direction"] == "min"
        charts.append(_chart(
            "<b>Effect</b>: difference of the arms with its 95\u00a0% interval. Dashed: the margin; on the tinted side the "
            "claim holds.", intervals(rows, "Differences between arms: " + "; ".join(
                f"{x['arm']} minus {x['against']}: {figure(x['difference'])}, interval {_interval(x['interval'])}"
                for x in c["comparisons"]), f"difference in {c['metric']}", zero=True, margin=-margin if lower else margin,
                better="left" if lower else "right")))
    if c["arms"]:
        rows = [Row(arm, a["mean"], *a["interval"], a["values"]) for arm, a in c["arms"].items()]
        charts.append(_chart("<b>Arms</b>: every seed (rings), mean (diamond) and 95\u00a0% interval.",
                             intervals(rows, f"Arms: {c['metric']} of every seed, mean and interval", str(c["metric"]))))
    if c["curves"] and len(charts) > 1:  # beside the curves
        charts = [f"<div>{''.join(charts)}</div>"]
    for metric in dict.fromkeys(k["metric"] for k in c["curves"].values()):
        of = {arm: k for arm, k in c["curves"].items() if k["metric"] == metric}
        left = f" Not drawn: {text(', '.join(list(of)[SERIES:]))}." if len(of) > SERIES else ""
        charts.append(_chart(f"<b>Learning curves</b>: {text(metric)}, mean and interval over seeds.{left}", lines(
            [Series(arm, k["step"], k["mean"], k["low"], k["high"]) for arm, k in of.items()],
            f"Learning curves of {', '.join(of)}: {metric} by step", "step", metric)))
    out.append(f'<div class="charts">{"".join(charts)}</div>' if charts else "")
    if c["comparisons"]:
        out.append(_table("Comparisons; the first one is the claim's own.",
                          ["difference of", "difference", "95\u00a0% interval", "probability of improvement", "verdict"],
                          [[f"{text(x['arm'])} − {text(x['against'])}", text(figure(x["difference"])),
                            text(_interval(x["interval"])), text(figure(x["chance"])),
                            _badge(str(x["verdict"])) if x["verdict"] else "–"]
                           for x in c["comparisons"]], (1, 2, 3)))
    if c["arms"]:
        rows = []
        for arm, a in c["arms"].items():
            settings = " ".join([f"method={a['method']}", *map(str, a["overrides"])])
            rows.append([text(arm), text(a["role"]), f"<code>{text(settings)}</code>", text(figure(a["mean"])),
                         text(figure(a["iqm"])), text(_interval(a["interval"])), _seeds(c["seeds"], a)])
        out.append(_table(f"Arms: {text(c['metric'])}, {direction} is better.",
                          ["arm", "role", "settings", "mean", "IQM", "95\u00a0% interval", "seed: value"], rows, (3, 4, 5),
                          wide=(2, 6)))
    runs = "".join(f"<li>{text(arm)}: " + ", ".join(
        view.file(view.folders[r], f"<code>{text(r)}</code>") if r in view.folders else f"<code>{text(r)}</code>"
        for r in map(str, a["runs"])) + "</li>" for arm, a in c["arms"].items() if a["runs"])
    seconds = numbers([c["wall_seconds"]])[0]
    took = "" if np.isnan(seconds) else f"{seconds:,.0f} s" if seconds < 600 else f"{seconds / 60:,.0f} min"
    out.append(_more("How it was run", f'<pre tabindex="0">{text(c["command"] or "(not recorded)")}</pre>' + _terms([
        ("commit", f"<code>{text(c['commit'])}</code>" + (" with uncommitted changes" if c["dirty"] else "")
         if c["commit"] else "not recorded"),
        ("date", text(c["date"] or "")), ("hardware", text(c["hardware"] or "")), ("wall time", took),
        ("record", view.file(c["file"])), ("runs", f"<ul>{runs}</ul>" if runs else "")])))
    return "".join(out) + "</section>"


def _seeds(seeds: list, arm: dict) -> str:
    """`0: 12.3`, … in the order of the seeds; one without a value says so."""
    out = []
    for i, seed in enumerate(seeds or range(len(arm["values"]))):
        value = arm["values"][i] if i < len(arm["values"]) else None
        fine = np.isfinite(numbers([value])[0])
        told = text(figure(value)) if fine else \
            f'<span class="badge failed">{"failed" if seed in arm["failed"] else "no value"}</span>'
        out.append(f'<span class="name">{text(seed)}: {told}</span>')
    return ", ".join(out)


# ---- environments and runs --------------------------------------------------------------------------------------------

def _variants(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs of one env and size by method and, where a method was run with several settings, by the settings that vary."""
    by_method = defaultdict(list)
    for r in runs:
        by_method[r.method].append(r)
    out: dict[str, list[Run]] = defaultdict(list)
    for method in sorted(by_method):
        own = by_method[method]
        seen: dict[str, set] = defaultdict(set)
        for r in own:
            for k, v in r.settings.items():
                seen[k].add(v)
        varying = [k for k in seen if len(seen[k]) > 1 or any(k not in r.settings for r in own)]
        for r in own:
            words = [f"{k.removeprefix('method.')}={r.settings.get(k, '(none)')}" for k in varying]
            out[" ".join([method, *words])].append(r)
    return out


def _environments(runs: list[Run], view: _View) -> str:
    out = ['<section aria-labelledby="envs"><h2 id="envs">Environments</h2>']
    by_env = defaultdict(list)
    for r in runs:
        by_env[r.env].append(r)
    for env in sorted(by_env):
        card = view.book.get("env", env).card if env in view.book.paths["env"] else {}
        out.append(f'<article class="method" aria-labelledby="{_slug("env", env)}"><h3 id="{_slug("env", env)}">'
                   f'{text(card.get("title", env))} <code>{text(env)}</code></h3>'
                   f'<p>{text(_sentence(card.get("summary", "")))}</p>')
        for size in sorted({r.size for r in by_env[env]}):
            of_size = [r for r in by_env[env] if r.size == size]
            for gold, direction in sorted({(r.gold, r.direction) for r in of_size if r.status == "done"}):
                out.append(_profile(env, size, gold, direction, of_size, view))
        done = [r for r in by_env[env] if r.status == "done"]
        out.append(gallery({label: max(rs, key=lambda r: r.finished).folder for label, rs in _variants(done).items()}))
        if not done:
            out.append(f'<p class="quiet">No run is finished; {_link("#unfinished", f"{len(by_env[env])} others")}.</p>')
        out.append("</article>")
    without = [e for e in view.book.names("env") if e not in by_env]
    if without:
        out.append(f'<p class="quiet">Without runs: {_codes(without)}.</p>')
    return "".join(out) + "</section>"


def _profile(env: str, size: str, gold: str, direction: str, runs: list[Run], view: _View) -> str:
    """One env and size: performance profile, training curves, a table, the runs."""
    variants = {label: [r for r in rs if r.status == "done" and r.gold == gold and r.direction == direction]
                for label, rs in _variants(runs).items()}
    failed = {label: sum(r.status != "done" for r in rs) for label, rs in _variants(runs).items()}
    variants = {label: rs for label, rs in variants.items() if rs}
    drawn = sorted(sorted(variants), key=lambda v: -len(variants[v]))[:SERIES]
    drawn.sort()
    done = [r for v in variants.values() for r in v]
    anchors: dict[str, list] = defaultdict(list)
    for r in done:
        for k, v in r.references.items():
            anchors[k].append(v)
    references = {k: float(np.mean(fine)) for k, v in anchors.items() if (fine := (n := numbers(v))[np.isfinite(n)]).size}
    pooled = numbers([r.value for label in drawn for r in variants[label]])
    pooled = pooled[np.isfinite(pooled)]
    charts, better = [], "lower" if direction == "min" else "higher"
    rest = "" if len(variants) <= SERIES else f" Drawn are the {SERIES} settings with the most runs of {len(variants)}."
    if pooled.size:
        low, high = pooled.min(), pooled.max()
        pad = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
        grid = np.unique(np.r_[np.linspace(low - pad, high + pad, 120), pooled if pooled.size <= 40 else [],
                         list(references.values())])
        series = []
        for label in drawn:
            values = numbers([r.value for r in variants[label]])
            values = np.where(np.isnan(values), np.inf if direction == "min" else -np.inf, values)
            share = (values[:, None] < grid if direction == "min" else values[:, None] > grid).mean(0)
            series.append(Series(f"{label} ({len(values)})", grid, share,
                                 *(_wilson(share, len(values)) if len(values) >= 5 else (None, None))))
        charts.append(_chart(
            f"<b>Performance profile</b>: share of finished runs whose {text(gold)} is "
            f"{'below' if direction == 'min' else 'above'} the value on the axis; up and to the "
            f"{'left' if direction == 'min' else 'right'} is better. Bands: 95\u00a0%, from five runs.{rest}",
            lines(series, f"Performance profile on {env}, size {size}: {', '.join(drawn)}", gold, "share of runs", (0.0, 1.0),
                  references)))
    metrics = Counter(r.curve[0] for r in done if r.curve[0])
    for metric, _ in metrics.most_common(2):
        series = []
        for label in drawn:
            curves = [r.curve for r in variants[label] if r.curve[0] == metric]
            if curves:
                series.append(Series(label, *_bands(curves)))
        if series:
            charts.append(_chart(f"<b>Training</b>: {text(metric)} as logged, mean and range over runs.", lines(
                series, f"Training on {env}, size {size}: {metric}", "step", metric)))
    rows = []
    for label, rs in variants.items():
        values = numbers([r.value for r in rs])
        fine = values[np.isfinite(values)]
        span = f"{figure(fine.min())} … {figure(fine.max())}" if fine.size else "–"
        whole = fine.size == values.size
        rows.append([f"<code>{text(label)}</code>", str(len(rs)), text(figure(float(fine.mean()))) if whole else "–",
                     text(figure(_iqm(fine))) if whole else "–", text(span), str(len(rs) - fine.size or "–"),
                     str(failed[label] or "–")])
    for label, count in failed.items():
        if label not in variants and count:
            rows.append([f"<code>{text(label)}</code>", "0", "–", "–", "–", "–", str(count)])
    table = _table(f"{text(gold)} ({better} is better) of finished runs on {text(env)} at size {text(size)}."
                   + (" References: " + ", ".join(f"{text(k)} {text(figure(v))}" for k, v in references.items()) + "."
                      if references else ""),
                   ["method and settings", "runs", "mean", "IQM", "least … greatest", "no number", "unfinished"], rows,
                   range(1, 7))
    listed = _table(f"Finished runs on {text(env)}, size {text(size)}", ["run", "seed", gold, "commit", "finished"],
                    [[view.file(r.folder, text(r.folder.name)), text(r.seed), text(figure(r.value)), text(r.commit[:10]) or "–",
                      text(r.finished[:10]) or "–"] for r in sorted(done, key=lambda r: r.folder.name)], (1, 2))
    return (f'<h4>Size {text(size)}</h4><div class="charts">{"".join(charts)}</div>{table}'
            + _more(f"{len(done):,} finished run{'s' if len(done) > 1 else ''}", listed))


def _unfinished(runs: list[Run], broken: list[tuple[Path, str]], view: _View) -> str:
    kinds = {"failed": "failed", "killed": "failed"}
    rows = [[view.file(r.folder, text(r.folder.name)),
             f'<span class="badge {kinds.get(r.status, "")}">{text(r.status)}</span>',
             text(r.error[:300] + ("…" if len(r.error) > 300 else "")) or "–"]
            for r in sorted(runs, key=lambda r: (r.status, r.folder.name)) if r.status != "done"]
    out = ['<section aria-labelledby="unfinished"><h2 id="unfinished">Unfinished runs</h2>']
    if rows:
        counts = Counter(r.status for r in runs if r.status != "done")
        told = ", ".join(f"{n:,} {text(s)}" for s, n in sorted(counts.items()))
        out.append(_table(f"Runs without a result: {told}.", ["run", "status", "error"], rows, wide=(2,)))
    elif not broken:
        out.append('<p class="quiet">None.</p>')
    out.append(_broken("Runs whose record could not be read", broken, view))
    return "".join(out) + "</section>"


def _broken(caption: str, broken: list[tuple[Path, str]], view: _View) -> str:
    if not broken:
        return ""
    return _table(caption + ".", ["file", "why"], [[view.file(p, text(p.name)), text(why[:300])] for p, why in broken], wide=(1,))
