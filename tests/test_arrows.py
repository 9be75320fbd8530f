"""Imports run one way (see docs/design.md): asserted over every file, without importing any."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(p for top in ("runner", "methods", "envs") for p in (ROOT / top).rglob("*.py"))


def imports(path: Path):
    """(module, line) of everything of this house that a file imports, at any depth of nesting."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            base = node.module
            names = [f"{base}.{a.name}" if (ROOT / base.replace(".", "/") / f"{a.name}.py").exists() else base
                     for a in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] in ("runner", "methods", "envs", "scripts", "tests", "conf"):
                yield name, node.lineno


def allowed(path: Path) -> tuple[str, ...]:
    top, *rest = path.relative_to(ROOT).with_suffix("").parts
    if top == "runner":
        return ("runner",)
    if top == "methods":
        family = rest[0] if len(rest) > 1 else ""
        return ("runner.interface", "runner.errors", "methods.common", "methods.tokens", f"methods.{family}")
    kind = rest[0] if len(rest) > 1 else ""
    builds_on = {"pairs": ("envs.prompts", "envs.lists")}  # preferences over the responses of prompts, over stored lists
    return ("runner.interface", "runner.draws", "runner.errors", "runner.starts", f"envs.{kind}", *builds_on.get(kind, ()))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    for name, line in imports(path):
        assert any(name == a or name.startswith(a + ".") for a in allowed(path)), \
            f"{path.relative_to(ROOT)}:{line} imports {name}; allowed: {', '.join(allowed(path))}"


def test_the_contract_stands_below_everything_else():
    below = {"interface": ("runner.draws", "runner.errors", "runner.knobs", "runner.places"),
             "draws": (), "places": (), "errors": (),
             "knobs": ("runner.errors",), "settings": ("runner.knobs",),
             "catalogue": ("runner.errors", "runner.knobs"), "checkpoint": ()}
    for name, may in below.items():
        found = {n for n, _ in imports(ROOT / "runner" / f"{name}.py")}
        assert found <= set(may), f"runner/{name}.py imports {found - set(may)}"


def test_methods_mention_no_devices_files_or_loggers():
    checkpoints = ROOT / "methods" / "tokens" / "checkpoint.py"  # reads and writes the models that a person names
    stored = ROOT / "methods" / "common" / "stored.py"           # so does this
    for path in set((ROOT / "methods").rglob("*.py")) - {checkpoints, stored}:
        text = path.read_text()
        for word in ("torch.distributed", "wandb", "open(", "Path(", '.to("cuda")', "'cuda'", '"cuda"', "os.environ"):
            assert word not in text, f"{path.relative_to(ROOT)} mentions {word}"


def test_updates_hold_no_host_round_trip():
    """No .item(), .cpu(), .numpy() or .tolist() in any method file: one of them stalls a GPU at every update. (The files of
    token policies turn tokens into texts, which live on the host.)"""
    tokens = ROOT / "methods" / "tokens"
    for path in set((ROOT / "methods").rglob("*.py")) - set(tokens.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert node.func.attr not in ("item", "cpu", "numpy", "tolist"), f"{path.name}:{node.lineno}"
