"""What the README says is run."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from runner.cli import main

ROOT = Path(__file__).resolve().parent.parent


def test_the_method_of_the_readme_is_a_method(tmp_path, monkeypatch, capsys):
    """Its code and card, copied into a folder, compose with another method, train, and are td3 at neutral."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text()
    (tmp_path / "smallq.py").write_text(re.search(r"```python\n(.*?)```", text, re.S)[1])
    card = re.search(r"```yaml\n(.*?)```", text, re.S)[1]
    (tmp_path / "smallq.yaml").write_text(card)
    assert yaml.safe_load(card)["card"]["changes"] == ["critic_penalty"]
    common = ["env=pointmass", "size=smoke", "logger=none", "--quiet", f"--include={tmp_path}"]
    assert main(["method=smallq", *common]) == 0
    assert main(["method=smallq", "method.strength=0", *common]) == 0
    assert main(["method=td3", *common]) == 0
    capsys.readouterr()
    logs = {p.parent.name.split("-")[0]: [] for p in (tmp_path / "runs").glob("*/metrics.jsonl")}
    for p in sorted((tmp_path / "runs").glob("*/metrics.jsonl")):
        logs[p.parent.name.split("-")[0]].append(p.read_bytes())
    assert logs["td3"][0] in logs["smallq"] and len(set(logs["smallq"])) == 2


def test_commands_of_the_readme_compose(capsys):
    """Every `python -m runner method=…` line of the README passes `check`."""
    lines = re.findall(r"^    python -m runner (method=[^#\n]+)", (ROOT / "README.md").read_text(), re.M)
    assert lines
    for line in lines:
        assert main(["check", *line.split()]) == 0, line
