"""Completion, asked of a real bash."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import signal
import subprocess
import time

import pytest

from runner.catalogue import Catalogue
from runner.completion import candidates, script

needs_bash = pytest.mark.skipif(not shutil.which("bash"), reason="no bash")


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory):
    path = tmp_path_factory.mktemp("completion") / "ballast.sh"
    path.write_text(script("bash"))
    return path


def ask(path, line: str, cwd=None, breaks=" \t\n\"'><=;|&(:") -> list[str]:
    """COMPREPLY of a non-interactive bash for `line`."""
    program = ('source "$1"; COMP_WORDBREAKS="$3"; COMP_LINE="$2"; COMP_POINT=${#COMP_LINE}; compopt() { :; }; '
               '_ballast; printf "%s\\n" "${COMPREPLY[@]}"')
    done = subprocess.run(["bash", "--noprofile", "--norc", "-c", program, "bash", str(path), line, breaks],
                          capture_output=True, text=True, cwd=cwd, timeout=30)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.split()


@needs_bash
def test_bash_completes(bash_script):
    names = Catalogue().names("method")
    with_ad = [n for n in names if n.startswith("ad")]
    assert ask(bash_script, "python -m runner method=ad") == with_ad and "adpo" in with_ad
    assert ask(bash_script, "python -m runner method=") == names
    assert ask(bash_script, "ballast method=td3 env=inver") == ["inverted_pendulum"]
    assert ask(bash_script, "python -m runner method=adpo size=") == ["claim", "paper", "smoke"]
    assert ask(bash_script, "python -m runner method=adpo hardware=f") == ["fsdp"]
    assert set(ask(bash_script, "python -m runner method=adpo method.anchor=")) >= {"ema", "teacher", "on_policy"}
    assert ask(bash_script, "python -m runner method=adpo loop.select=b") == ["best"]
    assert ask(bash_script, "python -m runner method=adpo method.target_t") == ["method.target_temperature="]
    assert "check" in ask(bash_script, "python -m runner ch")
    assert "--force" in ask(bash_script, "python -m runner --for")
    assert "worker" not in ask(bash_script, "python -m runner w")
    assert "adpo" in ask(bash_script, "python -m runner show a")
    assert "td3" in ask(bash_script, "python -m runner diff adpo t")
    assert ask(bash_script, "python -m runner list si") == ["sizes"]
    assert ask(bash_script, "/usr/bin/python3 -m runner method=kd env=inver") == ["inverted_pendulum"]


@needs_bash
def test_whole_words_where_bash_does_not_split_at_equals(bash_script):
    assert ask(bash_script, "python -m runner env=inver", breaks=" \t\n") == ["env=inverted_pendulum"]


@needs_bash
def test_other_programs_are_left_alone(bash_script):
    for line in ("python other.py method=ad", "python -m pytest -", "python "):
        assert ask(bash_script, line) == []


@needs_bash
def test_runs_are_completed(bash_script, tmp_path):
    (tmp_path / "runs" / "kd-inverted_pendulum-s0-abc").mkdir(parents=True)
    assert ask(bash_script, "python -m runner eval kd", cwd=tmp_path) == ["kd-inverted_pendulum-s0-abc"]
    assert ask(bash_script, "python -m runner eval kd-", cwd=tmp_path.parent) == []


@needs_bash
def test_a_tab_in_an_interactive_bash(bash_script):
    leader, follower = pty.openpty()
    process = subprocess.Popen(["bash", "--noprofile", "--norc", "-i"], stdin=follower, stdout=follower,
                               stderr=follower, env={**os.environ, "PS1": "$ ", "TERM": "dumb",
                                                     "INPUTRC": "/dev/null", "HISTFILE": ""},
                               start_new_session=True)
    os.close(follower)
    seen = ""

    def until(pattern, seconds=20):
        nonlocal seen
        deadline = time.monotonic() + seconds
        while not re.search(pattern, seen) and time.monotonic() < deadline:
            if select.select([leader], [], [], 0.2)[0]:
                seen += os.read(leader, 4096).decode(errors="replace")
        assert re.search(pattern, seen), seen

    try:
        os.write(leader, f"source {bash_script}; echo read''y\n".encode())
        until(r"\nready")
        os.write(leader, b"python -m runner env=inver\t")
        until(r"env=inverted_pendulum ")
        os.write(leader, b"method=kd method.target_t\t")
        until(r"method\.target_temperature=")
        assert "env=env=" not in seen
    finally:
        process.kill()
        process.wait()
        os.close(leader)


def test_zsh(tmp_path):
    """In a real interactive zsh, with a real Tab, where there is one; its text else."""
    text = script("zsh")
    assert "compdef _ballast python" in text and "method=adpo" in text and "complete -o" not in text
    if not shutil.which("zsh"):
        print("NOT EXERCISED: no zsh on this machine")
        return
    import pty
    import select
    import time

    (tmp_path / "c.zsh").write_text(text)
    pid, fd = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm", ZDOTDIR=str(tmp_path))
        os.execvp("zsh", ["zsh", "-f", "-i"])

    def type_(keys, until):
        os.write(fd, keys.encode())
        seen, deadline = "", time.time() + 15
        while until not in seen and time.time() < deadline:
            if select.select([fd], [], [], 0.2)[0]:
                seen += os.read(fd, 65536).decode(errors="replace")
        return seen

    type_(f"autoload -Uz compinit; compinit -u -D; source {tmp_path}/c.zsh; print rea''dy\n", "ready")
    for typed, wanted in (("python -m runner method=adp\t", "method=adpo"), ("python -m runner sho\t", "show"),
                          ("ballast method=adpo env=halfc\t", "env=halfcheetah"),
                          ("python -m runner claim adpo_d\t", "adpo_distillation")):
        assert wanted in type_(typed, wanted)
        type_("\x15", "")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(fd)


def test_candidates_are_what_the_command_line_knows():
    c = candidates()
    assert {"list", "show", "check", "--force", "--include", "-m"} <= set(c["words"])
    assert {"method=", "env=", "seed=", "runs=", "loop.steps=", "method.tau=", "env.episodes="} <= set(c["keys"])
    assert len(c["keys"]) == len(set(c["keys"]))
    book = Catalogue()
    assert c["values"]["method="] == book.names("method") and c["values"]["env="] == book.names("env")
