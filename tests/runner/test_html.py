"""The report: one file, complete, well formed, quick; and in a real browser, where one is installed, it works."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser

import pytest

from runner import html_charts
from runner.catalogue import ROOT, Catalogue
from runner.html import _slug, formula, read_claims, read_runs, write_report

HOSTILE = ("<script>document.title='owned'</script> & \"quotes\" 'single' ü → 𝔼 \u202e\x00 </style> --> "
           "<img src=x onerror=alert(1)>")
VOID = {"meta", "input", "br", "link", "img", "hr"}
STEPS = list(range(0, 5000, 10))


# ---- a synthetic world --------------------------------------------------------------------------------------------------

def claim(name="adpo-better", **changes) -> dict:
    arm = lambda method, role, shift, failed=(): {  # noqa: E731
        "method": method, "overrides": ["method.tau=0.5"] if role == "method" else [], "role": role,
        "values": [None if s in failed else 1000 + shift + 40 * s for s in range(5)], "mean": 1080.0 + shift,
        "iqm": 1080.0 + shift, "interval": [1030.0 + shift, 1130.0 + shift], "runs": [f"{i:012x}" for i in range(2)],
        "failed": list(failed)}
    curve = lambda shift: {"metric": "eval/return", "step": STEPS,  # noqa: E731
                           **{k: [shift + 2 * math.sqrt(s) + d for s in STEPS]
                              for k, d in (("mean", 0), ("low", -20), ("high", 20))}}
    return {"claim": name, "hypothesis": "ADPO's return is higher than distillation's by more than 100", "family": "preference",
            "methods": ["adpo"], "verdict": "supported", "metric": "return", "direction": "max", "margin": 100.0,
            "env": "halfcheetah", "size": "claim", "seeds": [0, 1, 2, 3, 4], "refuted_by": "an interval that ends below 100",
            "arms": {"kd": arm("kd", "baseline", 0), "adpo": arm("adpo", "method", 400)},
            "comparisons": [{"arm": "adpo", "against": "kd", "difference": 400.0, "interval": [310.0, 490.0],
                             "probability_of_improvement": 0.98, "verdict": "supported"}],
            "curves": {"kd": curve(900), "adpo": curve(1300)}, "warnings": [],
            "command": "python -m runner claim adpo-better", "commit": "ac6a9ff" + "0" * 33, "dirty": False,
            "hardware": "2 cores", "wall_seconds": 912.4, "date": "2026-11-20", **changes}


def hostile_claim() -> dict:
    out = claim("td3-hostile", hypothesis=HOSTILE, family="control", methods=["td3", "ddpg"], verdict="not supported",
                metric="kl & <b>", direction="min", env=HOSTILE, refuted_by=HOSTILE, warnings=[HOSTILE], command=HOSTILE,
                hardware=HOSTILE, dirty=True, date=HOSTILE)
    out["arms"] = {HOSTILE: {**out["arms"]["kd"], "overrides": [HOSTILE], "runs": [HOSTILE]}}
    out["comparisons"] = [{"arm": HOSTILE, "against": "<kd>", "difference": 5.0, "interval": [-math.inf, math.inf],
                           "probability_of_improvement": None, "verdict": "not supported"}]
    out["curves"] = {HOSTILE: {"metric": "<x>", "step": [0, 1, 2, 3], "mean": [1, None, math.nan, 1e308], "low": [], "high": []}}
    return out


def failed_claim() -> dict:
    out = claim("kd-failed-seed", hypothesis="Distillation with one seed lost", methods=["kd"], verdict="undecided", margin=0.0)
    out["arms"]["adpo"]["values"][3], out["arms"]["adpo"]["failed"] = None, [3]
    out["comparisons"][0].update(difference=-12.0, interval=[-80.0, 56.0], verdict="undecided")
    return out


def write_runs(folder, count: int):
    template = {"error": None, "command": "python -m runner …", "commit": "ac6a9ff", "dirty": False, "step": 5000,
                "evaluated_step": 5000, "metric_meaning": {"return_std": ["none", "", ""], "return": ["max", "reward", ""]},
                "references": {"teacher": {"return": 7651.8}, "random policy": {"return": -313.5}}, "seconds": 12.0,
                "finished": "2026-11-20T00:00:00+0000"}
    cases = [(m, e) for e in ("halfcheetah", "pendulum") for m in ("adpo", "kd", "td3")]
    log = "".join(json.dumps({"step": s, "loss": 0.1, "train_return": 10.0 * s ** 0.5, "validation_kl": 3.0}) + "\n"
                  for s in range(50, 5001, 50))
    for i in range(count):
        (method, env), seed = cases[i % len(cases)], i // len(cases)
        config = {"method": {"name": method, "tau": 1.0 if seed % 3 else 0.5, "hidden": [64, 64]},
                  "env": {"name": env, "episodes": 10}, "size": "claim", "loop": {"steps": 5000, "select": "best"},
                  "hardware": {"threads": 1}, "seed": seed, "runs": "runs"}
        name = f"{method}-{env}-s{seed}-{i:012x}"
        path = folder / name
        path.mkdir(parents=True)
        value = 3000 + 500 * (method == "adpo") + 37 * (i * 7919 % 41)
        run = {**template, "id": f"{i:012x}", "name": name, "status": "done", "config": config, "seed": seed,
               "metrics": {"return_std": 1.0, "return": float(value) if i != 5 else None}}
        if i % 50 == 49:
            run.update(status="failed", error=f"ValueError('{HOSTILE}')")
            del run["metrics"]
        (path / "run.json").write_text(json.dumps(run))
        (path / "metrics.jsonl").write_text(log)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """(path, text, seconds, peak megabytes) of the report on 1,000 runs and three claims, written by a process of its own."""
    home = tmp_path_factory.mktemp("report")
    write_runs(home / "runs", 1000)
    torn = home / "runs" / "torn-run-s0-ffffffffffff"
    torn.mkdir()
    (torn / "run.json").write_text('{"status": "do')
    (home / "claims").mkdir()
    for c in (claim(), hostile_claim(), failed_claim()):
        (home / "claims" / f"{c['claim']}.json").write_text(json.dumps(c))
    (home / "claims" / "nonsense.json").write_text('{"verdict": "certainly", "methods": []}')
    (home / "claims" / "stranger.json").write_text(json.dumps(claim("stranger", methods=["no-such-method"])))
    # (the peak that rusage tells a child of is its parent's, if that is larger)
    code = ("import re, sys; from pathlib import Path; from runner.catalogue import Catalogue; from runner.html import "
            "write_report; write_report(*map(Path, sys.argv[1:]), Catalogue()); "
            "print(int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) / 1000)")
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, home / "out" / "report.html", home / "runs", home / "claims"], cwd=ROOT,
                          capture_output=True, text=True, timeout=120)
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    path = home / "out" / "report.html"
    return path, path.read_text(encoding="utf-8"), seconds, float(done.stdout)


class Checker(HTMLParser):
    """Tags balance; ids are unique; what each tag says."""

    def __init__(self, source: str):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.words, self.wrong = [], [], [], []
        self.feed(source)
        self.close()
        self.wrong += [f"<{t}> is never closed" for t in self.open]

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs), tuple(self.open)))
        if len({k for k, _ in attrs}) < len(attrs):
            self.wrong.append(f"an attribute twice in {self.get_starttag_text()}")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs), tuple(self.open)))

    def handle_endtag(self, tag):
        if not self.open or self.open[-1] != tag:
            self.wrong.append(f"</{tag}> at {self.getpos()} closes {self.open[-1:]}")
        else:
            self.open.pop()

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.words.append(data)

    def ids(self):
        return [a["id"] for _, a, _ in self.tags if "id" in a]

    def texts(self):
        return "".join(self.words)


# ---- the file ---------------------------------------------------------------------------------------------------------

def test_a_thousand_runs_are_quick_and_small(page):
    path, _, seconds, megabytes = page
    size = path.stat().st_size / 1e6
    print(f"1,000 runs: {seconds:.1f} s, {megabytes:.0f} MB at most, {size:.2f} MB of HTML")
    assert seconds < 20 and megabytes < 1000 and size < 20


def test_the_page_is_well_formed_and_needs_nothing_but_itself(page):
    path, source, *_ = page
    checker = Checker(source)
    assert not checker.wrong, checker.wrong[:5]
    assert len(set(checker.ids())) == len(checker.ids())
    allowed = {"html", "head", "meta", "title", "style", "script", "body"}
    assert {t for t, _, _ in checker.tags if t in ("img", "iframe", "link", "object", "embed", "base", "video", "audio")} == set()
    for tag, attributes, _ in checker.tags:
        for key, value in attributes.items():
            assert not key.startswith("on"), (tag, key)
            if key in ("src", "srcset", "action", "data", "poster", "xlink:href") or key == "href" and tag != "a":
                raise AssertionError((tag, key, value))
            if "://" in (value or "") and not (tag == "a" and key == "href"):
                assert tag not in allowed, (tag, key, value)
        if tag == "a" and attributes["href"].startswith("#"):
            assert attributes["href"][1:] in checker.ids(), attributes
        elif tag == "a":
            assert re.match(r"https?://|[^:]*$", attributes["href"]), attributes
    style = re.search(r"<style>(.*?)</style>", source, re.S)[1]
    assert "@import" not in style and "url(" not in style and "prefers-color-scheme:dark" in style
    assert [t for t, _, _ in checker.tags].count("script") == 1
    names = {a.get("name"): a.get("content") for t, a, _ in checker.tags if t == "meta"}
    assert "width=device-width" in names["viewport"]
    assert 'charset="utf-8"' in source and "\x00" not in source


def test_tables_tell_what_they_are(page):
    checker = Checker(page[1])
    tables = [i for i, (t, _, _) in enumerate(checker.tags) if t == "table"]
    for i in tables:
        assert "div" in checker.tags[i][2] and checker.tags[i + 1][0] == "caption"
        assert checker.tags[i - 1][1].get("class") == "scroll" and checker.tags[i - 1][1]["tabindex"] == "0"
    assert len(tables) > 15
    assert all(a.get("scope") in ("col", "row") for t, a, _ in checker.tags if t == "th")
    assert all(a.get("aria-label") or a.get("aria-hidden") for t, a, _ in checker.tags if t == "svg")


def test_links_to_files_lead_to_files(page):
    path, source, *_ = page
    checked = 0
    for tag, attributes, _ in Checker(source).tags:
        if tag == "a" and not re.match(r"https?:|#", attributes["href"]):
            assert (path.parent / attributes["href"]).exists(), attributes
            checked += 1
    assert checked > 1000


def test_every_method_and_every_claim_is_there(page):
    _, source, *_ = page
    checker = Checker(source)
    for m in Catalogue().all("method"):
        assert _slug("method", m.name) in checker.ids()
        for words in (m.card["title"], m.card["summary"], m.card.get("paper")):
            assert not words or html.escape(words)[1:] in source
    for name in ("adpo-better", "td3-hostile", "kd-failed-seed", "stranger"):
        assert _slug("claim", name) in checker.ids()
    words = checker.texts()
    assert "no-such-method" in words and "nonsense.json" in words and "certainly" in words
    assert "method.tau=0.5" in words and "python -m runner claim adpo-better" in words and "912 s" not in words


def test_hostile_text_stays_text(page):
    _, source, *_ = page
    assert "<script>document.title" not in source and "<img" not in source
    shown = html.escape(HOSTILE.replace("\x00", "\ufffd").replace("\u202e", "\ufffd"))
    assert source.count(shown) > 10
    assert "owned" in Checker(source).texts()


def test_failed_seeds_and_runs_are_told(page):
    path, source, *_ = page
    words = Checker(source).texts()
    assert "adpo: seed 3" in words and "3: failed" in words
    assert "20 failed" in words and "torn-run-s0-ffffffffffff" in words and "run.json cannot be read" in words
    assert words.count("-s16-") >= 1 and "980 finished runs and 21 others" in words
    runs, broken = read_runs(path.parent.parent / "runs")
    assert len(runs) == 1000 and len(broken) == 1
    assert math.isnan(next(r.value for r in runs if r.folder.name.endswith(f"{5:012x}")))


def test_charts_are_thin(page):
    for points in re.findall(r'points="([^"]*)"', page[1]):
        assert len(points.split()) <= 2 * html_charts.POINTS and "nan" not in points and "inf" not in points
    assert page[1].count("<polyline") > 8 and 'class="margin"' in page[1]


def test_an_empty_world_has_a_page(tmp_path):
    source = write_report(tmp_path / "r.html", tmp_path / "none", tmp_path / "none", Catalogue()).read_text()
    assert not Checker(source).wrong and "No claim about this method" in source and "0 finished runs" in source


def test_claims_that_are_none_are_told(tmp_path):
    for i, content in enumerate(["[]", "3", "{", '{"verdict": "supported"}',
                                 '{"verdict": "undecided", "methods": ["kd"], "arms": [1]}',
                                 '{"verdict": "supported", "methods": ["kd"]}']):
        (tmp_path / f"{i}.json").write_text(content)
    (tmp_path / "6.json").write_bytes(b"\xff\xfe")
    found, broken = read_claims(tmp_path)
    assert [c["file"].name for c in found] == ["5.json"] and len(broken) == 6
    source = write_report(tmp_path / "r.html", tmp_path, tmp_path, Catalogue()).read_text()
    assert not Checker(source).wrong


def test_formulas():
    assert formula("L_Q = (Q(s,a) - y)²;  L_π = -Q(s)") == (
        "<span><i>L</i><sub><i>Q</i></sub> = (<i>Q</i>(<i>s</i>,<i>a</i>) − <i>y</i>)²;</span>"
        "<span><i>L</i><sub><i>π</i></sub> = −<i>Q</i>(<i>s</i>)</span>")
    assert formula("π_anchor^{a+b} Q_i'(s') <b>") == (
        "<span><i>π</i><sub>anchor</sub><sup><i>a</i>+<i>b</i></sup> <i>Q</i><sub><i>i</i></sub>′(<i>s</i>′) &lt;<i>b</i>&gt;"
        "</span>")
    assert "actor-critic" in formula("an actor-critic x")


@pytest.mark.parametrize("value, words", [(None, "–"), (math.nan, "–"), (-math.inf, "−∞"), (7651.76, "7,651.8"), (-0.25, "−0.25"),
                                          (123456.7, "123,457"), (1e-5, "1e−5"), (5, "5"), (2.5e9, "2.5e9"), (0.0, "0")])
def test_figures(value, words):
    assert html_charts.figure(value) == words


def test_extreme_values_are_drawn():
    wild = [math.nan, math.inf, -math.inf, 1e308, -1e308, None, "x", 0]
    out = html_charts.lines([html_charts.Series("a", range(8), wild, wild, wild)], "t", "x", "y")
    out += html_charts.lines([html_charts.Series("a", [], [])], "t", "x", "y")
    row = html_charts.Row("a", 1e308, -math.inf, math.nan, wild)
    out += html_charts.intervals([row], "t", "x", zero=True, margin=-1.0, better="left")
    assert not Checker(out).wrong and "nan" not in out and "inf" not in out


# ---- in a browser -----------------------------------------------------------------------------------------------------

PROBE = """<script>
addEventListener("load",function(){
  var told={},rows=function(){return [].slice.call(document.querySelectorAll("#method-table tbody tr")).filter(
      function(r){return !r.hidden}).map(function(r){return r.cells[0].textContent})};
  var type=function(words){var i=document.getElementById("search");i.value=words;i.dispatchEvent(new Event("input"))};
  var heads=document.querySelectorAll("#method-table thead th");
  told.title=document.title; told.scripts=document.scripts.length; told.images=document.images.length;
  told.form=!document.querySelector("form.search").hidden; told.all=rows();
  type("ADPO anchored"); told.found=rows(); told.count=document.querySelector("output").textContent;
  type("nothing like this"); told.none=rows(); type(""); told.cleared=rows().length;
  heads[0].querySelector("button").click(); told.up=rows(); told.aria=heads[0].getAttribute("aria-sort");
  heads[0].querySelector("button").click(); told.down=rows(); told.aria2=heads[0].getAttribute("aria-sort");
  var b=heads[4].querySelector("button"); b.focus(); told.focused=document.activeElement===b; b.click();
  told.verdicts=rows(); told.aria3=[].map.call(heads,function(h){return h.getAttribute("aria-sort")});
  told.width=innerWidth; told.overflow=document.documentElement.scrollWidth-document.documentElement.clientWidth;
  told.loaded=performance.getEntriesByType("resource").length;
  parent.postMessage(JSON.stringify(told),"*");
})</script>"""
PHONE = """<!DOCTYPE html><script>addEventListener("message",function(m){
  var pre=document.createElement("pre");pre.id="told";pre.textContent=m.data;document.body.append(pre)})</script>
<iframe src="copy.html" style="border:0;width:390px;height:800px"></iframe>"""  # a window of its own is 500 wide at least
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]


def browser(page, folder, *flags) -> subprocess.CompletedProcess:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    return subprocess.run([program, *FLAGS, f"--user-data-dir={folder / 'profile'}", *flags, page.as_uri()], capture_output=True,
                          text=True, timeout=120)


def test_search_and_sort_work_in_a_browser(page, tmp_path, capsys):
    """The page itself, with a probe that types and clicks; its security policy, which would stop the probe, is taken out of
    that copy. Where no browser is installed, the script's static side is all that is looked at, and that is said aloud."""
    path, source, *_ = page
    script = re.search(r"<script>(.*?)</script>", source, re.S)[1]
    for word in ("data-sortable", "form.search", "aria-sort", '"input"', "localeCompare", "aria-controls"):
        assert word in script
    assert 'id="method-table" data-sortable' in source and 'aria-controls="method-table"' in source
    assert re.search(r'<form class="search" role="search" hidden>', source)  # dead without the script, so not shown
    if not (shutil.which("chromium") or shutil.which("google-chrome")):
        with capsys.disabled():
            print("\nNOT EXERCISED: search and sort in a browser (neither chromium nor google-chrome is installed)")
        return
    copy = tmp_path / "copy.html"
    copy.write_text(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", source).replace("</body>", PROBE + "</body>"))
    (tmp_path / "phone.html").write_text(PHONE)
    done = browser(tmp_path / "phone.html", tmp_path, "--dump-dom", "--virtual-time-budget=5000")
    told = json.loads(html.unescape(re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.S)[1]))
    names = [m.name for m in Catalogue().all("method")]
    natural = sorted(names, key=lambda n: n.replace("_", " "))  # a browser puts _ before digits
    assert told["title"] == "Ballast: methods, claims, runs" and told["scripts"] == 2 and told["images"] == 0
    assert told["form"] and told["all"] == names and told["cleared"] == len(names)
    assert told["found"] == ["adpo", "adpo_online"] and told["count"] == f"2 of {len(names)}" and told["none"] == []
    assert told["up"] == natural and told["down"] == natural[::-1]
    assert (told["aria"], told["aria2"], told["aria3"]) == ("ascending", "descending", [None] * 4 + ["ascending"])
    assert told["focused"] and told["verdicts"][:4] in (["adpo", "ddpg", "td3", "kd"], ["adpo", "td3", "ddpg", "kd"])
    assert told["width"] == 390 and told["overflow"] <= 0, "the page is wider than a phone"
    assert told["loaded"] == 0


def test_the_untouched_page_has_no_errors_in_a_browser(page, tmp_path, capsys):
    path, source, *_ = page
    policy = re.search(r"script-src '([^']+)'", source)
    assert policy and policy[1].startswith("sha256-")  # only the page's own script may run
    if not (shutil.which("chromium") or shutil.which("google-chrome")):
        with capsys.disabled():
            print("\nNOT EXERCISED: the page's console in a browser (neither chromium nor google-chrome is installed)")
        return
    done = browser(path, tmp_path, "--dump-dom", "--enable-logging=stderr", "--v=0")
    assert "CONSOLE" not in done.stderr, [l for l in done.stderr.splitlines() if "CONSOLE" in l]
    assert "<title>Ballast: methods, claims, runs</title>" in done.stdout
    assert done.stdout.count("<button") == 5  # the page's script ran under its policy
