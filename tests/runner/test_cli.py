"""The command line without training: what it prints, what it refuses and how, and that it stays light."""

from __future__ import annotations

import json
import os

import pytest

from runner import catalogue

BASE = ("method=adpo", "env=halfcheetah")


def nothing_written(cwd) -> bool:
    return not any(cwd.iterdir())


def refused(result, *fragments):
    assert result.code == 2, result.text
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert "Traceback" not in result.err
    for fragment in fragments:
        assert fragment in result.err, result.err


# ---- light: neither torch nor lightning, and hydra only to compose -------------------------------------------------

LIGHT = """
import sys
from runner.cli import main
code = main({words!r})
heavy = [m for m in {heavy!r} if m in sys.modules]
assert not heavy, f"imported: {{heavy}}"
sys.exit(code)
"""


@pytest.mark.parametrize("words, heavy, wanted", [
    (["list"], ["hydra"], "adpo"),
    (["list", "envs", "--json"], ["hydra"], '"halfcheetah"'),
    (["list", "hardware", "sizes", "loggers"], ["hydra"], "fsdp"),
    (["show", "adpo"], ["hydra"], "2510.18913"),
    (["show", "halfcheetah"], ["hydra"], "transitions"),
    (["--help"], ["hydra"], "python -m runner"),
    ([], ["hydra"], "python -m runner"),
    (["diff", "adpo"], ["hydra"], "adpo: "),
    (["status"], ["hydra"], "no runs"),
    (["results"], ["hydra"], "no runs"),
    (["completion", "bash"], ["hydra"], "complete "),
    (["check", *BASE], [], "ok: adpo on halfcheetah"),
], ids=lambda v: "-".join(v) if isinstance(v, list) else None)
def test_looking_imports_nothing_heavy(shell, words, heavy, wanted):
    program = LIGHT.format(words=words, heavy=["torch", "lightning", "wandb", "numpy", "gymnasium", *heavy])
    result = shell("-c", program, python=())
    assert result.code == 0, result.text
    assert wanted in result.out
    assert nothing_written(shell.cwd)


def test_module_and_exit_codes_of_the_real_process(shell):
    good = shell("list", "envs", "--json")
    assert good.code == 0 and good.err == ""
    names = [e["name"] for e in json.loads(good.out)]
    assert "halfcheetah" in names and names == sorted(names)
    bad = shell("method=adpo", "env=halfcheetah", "method.tua=1")
    refused(bad, "method.tua", "method.tau")
    assert nothing_written(shell.cwd)


def test_a_reader_that_goes_away_is_no_error(shell):
    result = shell("-c", "import subprocess, sys\n"
                         "p = subprocess.Popen([sys.executable, '-m', 'runner', 'list', '--json'], "
                         "stdout=subprocess.PIPE, stderr=subprocess.PIPE)\n"
                         "p.stdout.close()\nsys.stdout.write(p.stderr.read().decode())\n", python=())
    assert "Traceback" not in result.text and "BrokenPipe" not in result.text


# ---- what is shown -------------------------------------------------------------------------------------------------

def test_list_tables(cli):
    result = cli("list")
    assert result.code == 0
    for name in ("methods", "envs", "td3", "pointmass", "candidates"):
        assert name in result.out
    everything = json.loads(cli("list", "methods", "envs", "hardware", "sizes", "loggers", "--json").out)
    assert set(everything) == {"methods", "envs", "hardware", "sizes", "loggers"}
    assert {e["name"] for e in everything["sizes"]} == {"smoke", "claim", "paper"}
    assert all(e["summary"] for e in everything["methods"] + everything["envs"])


def test_show(cli):
    text = cli("show", "adpo").out
    for wanted in ("formula", "baseline  kd", "needs     candidates", "halfcheetah", "tau", "1e-06", "copy_every_n",
                   "methods/preference/adpo.py"):
        assert wanted in text, text
    as_json = json.loads(cli("show", "td3", "--json").out)
    assert as_json["kind"] == "method" and as_json["parts_changed"] == ["next_action"]
    settings = {s["name"]: s for s in as_json["settings"]}
    assert settings["critics"]["value"] == 2 and "pointmass" in as_json["fits"]
    env = json.loads(cli("show", "pointmass", "--json").out)
    assert {s["name"]: s["value"] for s in env["settings"]}["reward_scale"] == 0.01  # the yaml's, not the default's
    assert set(env["fits"]) >= {"adpo", "td3"}


def test_diff(cli):
    text = cli("diff", "td3").out
    assert "actor_delay" in text and "target_noise" in text and "td3: next_action" in text
    assert "critic_penalty" not in text
    same = cli("diff", "kd", "kd").out
    assert same.count("(the same)") == 2
    refused(cli("diff", "kd"), "no baseline", "second method")
    refused(cli("diff", "adpo", "kdd"), "kdd", "kd")
    refused(cli("diff"), "example")


def test_check_says_the_id_and_writes_nothing(cli):
    result = cli("check", *BASE, "size=smoke")
    assert result.code == 0 and "ok: adpo on halfcheetah, size smoke, 12 steps, seed 0" in result.out
    job = json.loads(cli("check", *BASE, "size=smoke", "--json").out)
    assert job["id"] in result.out and job["status"] is None and job["config"]["loop"]["steps"] == 12
    assert nothing_written(cli.cwd)


@pytest.mark.parametrize("words", [("-h",), ("help",), ("list", "--help"), (*BASE, "-h")])
def test_help(cli, words):
    result = cli(*words)
    assert result.code == 0 and "python -m runner" in result.out and nothing_written(cli.cwd)


# ---- what is refused -----------------------------------------------------------------------------------------------

BAD = {
    # names
    "method": (["method=adpoo", "env=halfcheetah"], ["unknown method 'adpoo'", "did you mean: adpo"]),
    "env": (["method=adpo", "env=halfchetah"], ["unknown env 'halfchetah'", "did you mean: halfcheetah"]),
    "size": ([*BASE, "size=smok"], ["unknown size 'smok'", "did you mean: smoke"]),
    "hardware": ([*BASE, "hardware=cpuu"], ["unknown hardware 'cpuu'", "did you mean: cpu"]),
    "logger": ([*BASE, "logger=wandbb"], ["unknown logger 'wandbb'", "did you mean: wandb"]),
    "key": ([*BASE, "method.tua=1"], ["unknown key 'method.tua'", "did you mean: method.tau", "show adpo"]),
    "env key": ([*BASE, "env.episode=1"], ["unknown key 'env.episode'", "env.episodes"]),
    "loop key": ([*BASE, "loop.step=1"], ["unknown key 'loop.step'", "loop.steps"]),
    "top key": ([*BASE, "sede=1"], ["unknown key 'sede'", "seed"]),
    "hydra key": ([*BASE, "hydra.run.dir=x"], ["unknown key 'hydra.run.dir'"]),
    "card key": ([*BASE, "method.card=3"], ["unknown key 'method.card'"]),
    "name key": ([*BASE, "method.name=x"], ["unknown key 'method.name'"]),
    "family": (["method=control/adpo", "env=halfcheetah"], ["unknown method 'control/adpo'", "adpo"]),
    # types
    "text for float": ([*BASE, "method.tau=abc"], ["method.tau='abc'", "float"]),
    "fraction for int": ([*BASE, "loop.steps=1.5"], ["loop.steps=1.5", "int"]),
    "text for list": ([*BASE, "method.hidden=foo"], ["method.hidden='foo'", "int"]),
    "number for list": ([*BASE, "method.hidden=64"], ["method.hidden=64", "int"]),
    "text in list": ([*BASE, "method.hidden=[64,foo]"], ["method.hidden='foo'", "int"]),
    "truth for int": ([*BASE, "env.episodes=true"], ["env.episodes=True", "int"]),
    "number for truth": ([*BASE, "method.adaptive=2"], ["method.adaptive=2", "bool"]),
    "a group of settings": ([*BASE, "loop=3"], ["loop", "loop.steps"]),
    # ranges
    "negative tau": ([*BASE, "method.tau=-1"], ["method.tau=-1", "out of range", "1e-06", "temperature"]),
    "no steps": ([*BASE, "loop.steps=0"], ["loop.steps=0", "out of range"]),
    "negative width": ([*BASE, "method.hidden=[64,0]"], ["method.hidden", "out of range"]),
    "negative seed": ([*BASE, "seed=-1"], ["seed=-1", "from 0"]),
    "fractional seed": ([*BASE, "seed=1.5"], ["seed=1.5", "whole number"]),
    "huge seed": ([*BASE, "seed=3000000000"], ["seed=3000000000", "2147483647"]),
    "empty seed": ([*BASE, "seed="], ["seed="]),
    "nan": ([*BASE, "method.tau=nan"], ["method.tau=nan"]),
    "nan without bounds": ([*BASE, "method.log_std=nan"], ["method.log_std=nan"]),
    "infinite": ([*BASE, "method.tau=inf"], ["method.tau=inf"]),
    "choice": ([*BASE, "method.anchor=emma"], ["method.anchor", "'emma'", "did you mean: ema", "copy_every_n"]),
    "precision": ([*BASE, "hardware.precision=bf16"], ["hardware.precision", "bf16-mixed"]),
    # what does not go together
    "does not fit": (["method=adpo", "env=pendulum"],
                     ["needs candidates", "'pendulum' does not provide", "transitions", "that fit", "halfcheetah"]),
    "no method": (["env=halfcheetah"], ["no method chosen", "method=NAME", "adpo"]),
    "no env": (["method=adpo"], ["no env chosen", "env=NAME", "halfcheetah"]),
    "empty method": (["method=", "env=halfcheetah"], ["no method chosen"]),
    "no common base": (["method=adpo+td3", "env=halfcheetah"], ["adpo + td3", "cannot be combined", "ActorCritic"]),
    "unknown in a sum": (["method=adpo+nosuch", "env=halfcheetah"], ["unknown method 'nosuch'"]),
    "force and fork": ([*BASE, "--force", "--fork"], ["--force", "--fork", "choose one"]),
    # words
    "command": (["lst"], ["unknown command 'lst'", "did you mean: list"]),
    "command and word": (["chekc", *BASE], ["unknown command 'chekc'", "did you mean: check"]),
    "option": ([*BASE, "--forse"], ["unknown option '--forse'", "did you mean: --force"]),
    "short option": ([*BASE, "-x"], ["unknown option '-x'"]),
    "no value": ([*BASE, "--include"], ["--include needs a value"]),
    "malformed": ([*BASE, "seed"], ["'seed' is not an override", "seed=1"]),
    "no key": ([*BASE, "=3"], ["'=3' is not an override"]),
    "open bracket": ([*BASE, "method.hidden=[64,64"], ["[64,64"]),
    "list what": (["list", "method"], ["method", "did you mean: methods"]),
    "show what": (["show", "adpoo"], ["unknown method, env or policy 'adpoo'", "adpo"]),
    "show nothing": (["show"], ["show adpo"]),
    "shell": (["completion", "fish"], ["unknown shell 'fish'", "zsh"]),
    "no shell": (["completion"], ["bash or zsh"]),
    "no such run": (["eval", "nosuch"], ["no run 'nosuch'", "no runs in runs"]),
    "eval nothing": (["eval"], ["give one run", "example"]),
    "export without a place": (["export", "x"], ["--to FILE.safetensors"]),
    "export suffix": (["export", "x", "--to", "a.txt"], ["a.txt", ".safetensors"]),
    "video nothing": (["video"], ["give one run"]),
    # options that belong to another command: ignoring them would train something else than what was asked for
    "size as an option": ([*BASE, "--size=smoke"], ["--size", "size=smoke"]),
    "seed as an option": ([*BASE, "--seed", "3"], ["--seed", "seed=3"]),
    "steps as an option": ([*BASE, "--steps=10"], ["--steps"]),
    "runs as an option": ([*BASE, "--runs", "elsewhere"], ["--runs", "runs=elsewhere"]),
    "to as an option": (["list", "--to", "x"], ["--to"]),
    "force a look": (["status", "--force"], ["--force"]),
    "jobs without a sweep": ([*BASE, "--jobs", "2"], ["--jobs", "runner -m"]),
    "worker by hand": (["worker"], ["worker"]),
}


@pytest.mark.parametrize("words, fragments", BAD.values(), ids=BAD.keys())
def test_refused(cli, words, fragments):
    refused(cli(*words), *fragments)
    assert nothing_written(cli.cwd)


@pytest.mark.parametrize("words", [
    [*BASE, "seed=0,1"], [*BASE, "seed=range(0,3)"], [*BASE, "seed=choice(0,1)"], ["method=adpo,kd", "env=halfcheetah"],
    ["method=adpo", "env=halfcheetah,pointmass"], [*BASE, "method.tau=0.1,0.2"], [*BASE, "size=smoke,claim"],
], ids=" ".join)
@pytest.mark.parametrize("command", [[], ["check"]], ids=["run", "check"])
def test_a_sweep_without_m_is_refused_with_the_hint(cli, command, words):
    refused(cli(*command, *words), "runner -m")
    assert nothing_written(cli.cwd)


@pytest.mark.parametrize("word", ["method.hidden=[32,32]", "logger.project='a,b'"])
def test_commas_inside_brackets_or_quotes_are_no_sweep(cli, word):
    result = cli("check", *BASE, word)
    assert result.code == 0, result.text


@pytest.mark.parametrize("word", ["hardware=gpu", "hardware.accelerator=gpu"])
def test_no_gpu(cli, monkeypatch, word):
    import runner.run

    monkeypatch.setattr(runner.run, "gpus_present", lambda: False)
    for command in ([], ["check"]):
        refused(cli(*command, *BASE, word), "no GPU", "hardware=cpu")
    refused(cli("-m", *BASE, word, "seed=0,1"), "no GPU")
    assert nothing_written(cli.cwd)


@pytest.mark.parametrize("words, fragments", [
    (["method=adpo,nosuch", "env=halfcheetah"], ["unknown method 'nosuch'"]),
    (["method=adpo", "env=halfcheetah,pendulum"], ["needs candidates", "pendulum"]),
    ([*BASE, "seed=0,-1"], ["seed=-1"]),
    ([*BASE, "method.tau=1,abc"], ["method.tau='abc'"]),
    ([*BASE, "method.tua=1,2"], ["method.tua", "method.tau"]),
    ([*BASE, "seed=rnge(0,3)"], ["seed=rnge(0,3)"]),
    ([*BASE, "seed=range(0,3"], ["seed=range(0,3"]),
    ([*BASE, "seed=0,1", "--jobs=0"], ["--jobs", "at least 1"]),
    ([*BASE, "seed=0,1", "--jobs", "x"], ["--jobs", "whole number"]),
    ([*BASE, "seed=0,1", "--fork"], ["--fork", "sweep"]),
    ([*BASE, "seed"], ["'seed' is not an override"]),
    (["seed=0,1"], ["no method chosen"]),
], ids=lambda v: " ".join(v))
def test_one_bad_member_refuses_the_whole_sweep(cli, words, fragments, monkeypatch):
    import runner.plan

    monkeypatch.setattr(runner.plan, "execute", lambda *a, **k: pytest.fail("a run was started"))
    refused(cli("-m", *words), *fragments)
    assert nothing_written(cli.cwd)


# ---- --include -----------------------------------------------------------------------------------------------------

def test_include_dir_missing(cli, tmp_path_factory):
    gone = tmp_path_factory.mktemp("x") / "gone"
    for words in (["list"], ["show", "adpo"], ["check", *BASE], [*BASE], ["-m", *BASE]):
        refused(cli(*words, "--include", gone), "--include", "gone")
    assert nothing_written(cli.cwd)


@pytest.mark.parametrize("text, fragments", [
    ("card: [unclosed\n", ["mine.yaml", "not valid yaml"]),
    ("card: {title: mine}\n", ["mine.yaml", "kind: method"]),
    ("weight: 3\n", ["mine.yaml", "kind: method"]),
    ("card: {kind: methd}\n", ["mine.yaml", "kind: method"]),
    ("- a\n- b\n", ["mine.yaml"]),
    ("just words\n", ["mine.yaml"]),
    ("card: words\n", ["mine.yaml"]),
    ("", ["mine.yaml", "kind: method"]),
], ids=["broken", "no kind", "no card", "kind misspelt", "a list", "a text", "card a text", "empty"])
def test_include_card_wrong(cli, own, text, fragments):
    own.card("mine", text).code("mine", "class Mine: pass\n")
    refused(cli("list", own.option), *fragments)
    refused(cli("method=mine", "env=pointmass", own.option), *fragments)
    assert nothing_written(cli.cwd)


def test_include_name_taken(cli, own, tmp_path_factory):
    own.method("td3")
    refused(cli("list", own.option), "td3", "exists already", "rename")
    again = type(own)(tmp_path_factory.mktemp("again")).method("mine")
    own.folder.joinpath("td3.yaml").unlink()
    own.method("mine")
    refused(cli("list", own.option, again.option), "mine", "exists already")


@pytest.mark.parametrize("code, fragments", [
    (None, ["mine.py", "missing"]),
    ("class Mine(\n", ["mine.py", "line 1"]),
    ("x = 1\n", ["mine.py", "no class"]),
    ("from methods.control.td3 import TD33\nclass Mine(TD33):\n    pass\n", ["TD33"]),
    ("from methods.control.td3 import TD3\nfrom runner.interface import knob\nclass Mine(TD3):\n"
     "    class Config(TD3.Config):\n        weight: float = knob(2 * PI, 'w')\n", ["mine.py", "line 5", "literal"]),
    ("from methods.control.td3 import TD3\nclass Mine(TD3):\n    class Config(TD3.Config):\n"
     "        weight: float = 2.0\n", ["mine.py", "line 4", "knob("]),
], ids=["missing", "syntax", "no class", "no base", "not literal", "no knob"])
def test_include_code_wrong(cli, own, code, fragments):
    own.method("mine")
    path = own.folder / "mine.py"
    path.unlink()
    if code is not None:
        path.write_text(code)
    for words in (["show", "mine"], ["check", "method=mine", "env=pointmass"], ["method=mine", "env=pointmass"]):
        refused(cli(*words, own.option), *fragments)
    assert nothing_written(cli.cwd)


def test_include_is_listed_shown_checked(cli, own):
    own.method("mine")
    listed = {e["name"]: e for e in json.loads(cli("list", "methods", "--json", own.option).out)}
    assert listed["mine"]["family"] == "include" and set(listed) > {"td3", "adpo"}
    assert "mine" not in cli("list", "methods").out
    shown = cli("show", "mine", own.option).out
    for wanted in ("mine of my own", "critic_penalty", "mine_weight", "0.1", "baseline  td3", "pointmass",
                   str(own.folder / "mine.py")):
        assert wanted in shown, shown
    assert cli("show", "mine", own.option, "--json").code == 0
    compared = cli("diff", "mine", own.option).out
    assert "mine_weight" in compared and "mine: critic_penalty" in compared and "next_action" not in compared
    result = cli("check", "method=mine", "env=pointmass", "method.mine_weight=0.5", own.option)
    assert result.code == 0 and "ok: mine on pointmass" in result.out
    refused(cli("check", "method=mine", "env=pointmass", "method.mine_wieght=1", own.option), "method.mine_weight")
    refused(cli("check", "method=mine", "env=pointmass", "method.mine_weight=-1", own.option), "out of range")
    refused(cli("check", "method=mine", "env=pointmass"), "unknown method 'mine'")
    assert nothing_written(cli.cwd)


def test_a_relative_include_and_an_empty_one(cli, own, tmp_path_factory):
    own.method("mine")
    relative = os.path.relpath(own.folder, cli.cwd)
    assert cli("show", "mine", "--include", relative).code == 0
    assert cli("list", "--include", tmp_path_factory.mktemp("empty")).code == 0


# ---- composition of methods: by their code, nothing runs -----------------------------------------------------------

def check_id(cli, own, *words) -> dict:
    result = cli("check", *words, own.option, "--json")
    assert result.code == 0, result.text
    return json.loads(result.out)


def test_additive_parts_compose_in_either_order(cli, own, bodies):
    own.method("mine").method("yours").method("third", bodies["actor_penalty"], "actor_penalty", base="DDPG")
    one = check_id(cli, own, "method=mine+yours", "env=pointmass")
    two = check_id(cli, own, "method=yours+mine", "env=pointmass")
    assert one["id"] == two["id"]
    assert one["config"]["method"]["name"] == "mine+yours"
    assert {"mine_weight", "yours_weight", "critics", "target_noise"} <= set(one["config"]["method"])
    orders = ["mine+third+yours", "third+yours+mine", "yours+mine+third"]
    assert len({check_id(cli, own, f"method={o}", "env=pointmass")["id"] for o in orders}) == 1
    assert check_id(cli, own, "method=mine+mine", "env=pointmass")["config"]["method"]["name"] == "mine"


def test_composed_with_a_house_method(cli, own):
    own.method("mine").method("slim", base="DDPG")
    assert "mine_weight" in check_id(cli, own, "method=td3+mine", "env=pointmass")["config"]["method"]
    both = check_id(cli, own, "method=td3+slim", "env=pointmass")["config"]["method"]
    assert both["critics"] == 2 and both["target_noise"] == 0.2 and both["slim_weight"] == 0.1
    alone = check_id(cli, own, "method=slim", "env=pointmass")["config"]["method"]
    assert alone["critics"] == 1 and "target_noise" not in alone


def test_two_that_change_one_part_are_refused_by_name(cli, own, bodies):
    own.method("mine", bodies["target"], "target").method("yours", bodies["target"], "target")
    for words in ("mine+yours", "yours+mine", "td3+yours+mine"):
        refused(cli("check", f"method={words}", "env=pointmass", own.option), "part 'target'", "mine", "yours",
                "choose one")
    refused(cli("method=mine+yours", "env=pointmass", own.option), "part 'target'")
    assert nothing_written(cli.cwd)


def test_one_setting_with_two_defaults_is_refused(cli, own):
    own.method("mine", knob="weight", default=0.1).method("yours", knob="weight", default=0.2)
    refused(cli("check", "method=mine+yours", "env=pointmass", own.option), "weight", "mine", "yours")


def test_one_setting_with_two_yaml_values_is_refused(cli, own, bodies):
    third = bodies["actor_penalty"]
    own.method("a", third, "actor_penalty").method("b", more="discount: 0.9\n").method("c", more="discount: 0.8\n")
    refused(cli("check", "method=b+c", "env=pointmass", own.option), "discount", "b", "c")
    refused(cli("check", "method=a+b+c", "env=pointmass", own.option), "discount", "b", "c")
    assert check_id(cli, own, "method=a+b", "env=pointmass")["config"]["method"]["discount"] == 0.9


def test_the_catalogue_is_where_the_tests_are():
    assert (catalogue.ROOT / "tests" / "conftest.py").is_file()
