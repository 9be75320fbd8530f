"""Write docs/catalogue.md anew: every method by family, with its paper, its difference, and what claims/ say of it.

    python scripts/catalogue.py            (a test holds the file to what this writes)
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TARGET = ROOT / "docs" / "catalogue.md"

HEAD = """# The catalogue

Every method: what its paper changes, which parts of its family's base algorithm that is, which kinds of batches it needs, and
the verdicts of the recorded claims about it. `python -m runner show NAME` tells more. Written by `scripts/catalogue.py`.
"""


def document(book, claims: list[dict]) -> str:
    from runner.catalogue import changed_parts
    from runner.html import verdicts

    about, families = verdicts(claims), {}
    for m in book.all("method"):
        families.setdefault(m.family, []).append(m)
    out = [HEAD]
    for family, members in sorted(families.items()):
        out += [f"## {family}\n", "| method | paper | difference | parts changed | needs | verdict |",
                "|---|---|---|---|---|---|"]
        for m in sorted(members, key=lambda m: (m.card.get("baseline") is not None, m.name)):
            source = Path("..") / m.source.relative_to(ROOT)
            told = [f"[{c['verdict']}](../claims/{c['file'].name})" for c in about.get(m.name, ())]
            cells = [f"[{m.name}]({source.as_posix()})", _paper(m.card), _cell(m.card.get("summary", "")),
                     ", ".join(f"`{p}`" for p in changed_parts(m)) or "-", ", ".join(m.needs) or "-", ", ".join(told) or "-"]
            out.append(f"| {' | '.join(cells)} |")
        out.append("")
    return "\n".join(out).rstrip() + "\n"


def _paper(card: dict) -> str:
    title, paper = _cell(card.get("title", "")), str(card.get("paper") or "")
    return f"[{title}]({paper})" if paper.startswith(("https://", "http://")) else title or "-"


def _cell(words) -> str:
    """Text as Markdown shows it, on one line of a table."""
    out = " ".join(str(words).split())
    for mark in "\\|<>[]*_`":
        out = out.replace(mark, "\\" + mark)
    return out


def main():
    from runner.catalogue import Catalogue
    from runner.html import read_claims

    claims, broken = read_claims(ROOT / "claims")
    for path, why in broken:
        print(f"left out: {path}: {why}", file=sys.stderr)
    TARGET.write_text(document(Catalogue(), claims), encoding="utf-8")
    print(TARGET.relative_to(ROOT))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
