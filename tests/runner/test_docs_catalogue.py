"""docs/catalogue.md is what scripts/catalogue.py writes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from runner.catalogue import ROOT, Catalogue
from runner.html import read_claims

spec = importlib.util.spec_from_file_location("catalogue_script", ROOT / "scripts" / "catalogue.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def test_the_committed_catalogue_is_current():
    claims, broken = read_claims(ROOT / "claims")
    assert not broken
    assert script.TARGET.read_text(encoding="utf-8") == script.document(Catalogue(), claims), \
        "run: python scripts/catalogue.py"


def test_every_method_has_a_line_with_its_verdicts():
    claims = [{"methods": ["adpo", "kd"], "verdict": "undecided", "file": Path("claims/a.json")},
              {"methods": ["adpo"], "verdict": "supported", "file": Path("claims/b.json")}]
    lines = script.document(Catalogue(), claims).splitlines()
    for m in Catalogue().all("method"):
        line, = [l for l in lines if l.startswith(f"| [{m.name}](")]
        assert line.count(" | ") == 5 and f"/{m.family}/{m.source.name})" in line
        end = {"adpo": "[undecided](../claims/a.json), [supported](../claims/b.json)", "kd": "[undecided](../claims/a.json)"}
        assert line.endswith(f"| {end.get(m.name, '-')} |")


def test_text_cannot_break_the_table():
    assert script._cell("a | b\n<i> *c* d_e") == r"a \| b \<i\> \*c\* d\_e"
