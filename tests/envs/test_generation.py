"""Worlds of things to generate: planes, digits, drawn shapes, folders of images with broken ones among them; bad input."""

from __future__ import annotations

import hashlib
import json
import math

import pytest
import torch
from PIL import Image

from envs.generation import pictures
from envs.generation.base import Samples
from envs.generation.classifier import fitted, margin
from envs.generation.images import Images
from envs.generation.metrics import effective
from envs.generation.plane import Plane
from runner.errors import UserError
from runner.interface import Drawn, Spec


def numbers(seed=0):
    g = torch.Generator().manual_seed(seed)
    return lambda name, shape, kind="normal": (torch.randn if kind == "normal" else torch.rand)(shape, generator=g)


def plane(**values):
    return Plane(Plane.Config(start="none", **values))


class Truth:
    """A method that generates the truth, or another condition's."""

    def __init__(self, world, other=0):
        self.world, self.other = world, other

    def draw(self, noise, condition, more=None, path=False):
        classes = self.world.spec().classes
        x = self.world.sample((condition + self.other) % classes, numbers(5))
        return Drawn(x, torch.ones(len(x)), torch.stack([noise, x]) if path else None)

    def inspect(self, batch):
        return {}


@pytest.mark.parametrize("shape", ["ring", "checkerboard", "moons"])
def test_the_truth_is_judged_to_be_true(shape):
    world = plane(shape=shape, proxy="side", eval_samples=2000)
    right, wrong = world.evaluate(Truth(world), 0), world.evaluate(Truth(world, 1), 0)
    assert abs(right["energy"]) < 0.02 < 0.3 < wrong["energy"]
    assert right["proxy"] > wrong["proxy"] and right["calls"] == 1
    if shape == "ring":
        assert right["adherence"] > 0.99 and right["modes"] > 3.95 and right["precision"] > 0.98 and right["local"] < 0.02
        assert wrong["adherence"] < 0.02


def test_the_checkerboard_fills_every_other_square():
    world = plane(shape="checkerboard", proxy="side")
    condition = torch.arange(4000) % 2
    x = world.sample(condition, numbers())
    square = x.floor().long()
    assert ((square.sum(1) % 2) == 0).all() and x.abs().max() <= 2
    assert len({tuple(s) for s in square.tolist()}) == 8 and ((x[:, 0] >= 0) == condition.bool()).all()


def test_proxies_by_hand():
    x, condition = torch.tensor([[1.5, 0.0], [0.3, 0.4]]), torch.tensor([0, 1])
    coarse = plane(proxy="coarse").reward(x, condition)
    assert coarse[0].item() == pytest.approx(0.75, abs=1e-5)
    modes = [(1.5 * math.cos(k * math.pi / 4), 1.5 * math.sin(k * math.pi / 4)) for k in range(4, 8)]
    nearest = min(math.dist((0.3, 0.4), m) for m in modes)
    assert coarse[1].item() == pytest.approx(-nearest + 0.15, abs=1e-5)
    ripple = plane().reward(x, condition)
    expected = torch.tanh(torch.tensor(-0.6)) + 0.5 * torch.cos(torch.tensor(2 * torch.pi * 0.7 / (2 ** 0.5 * 0.3)))
    assert ripple[1].item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("env", ["moons", "ring env.shape=checkerboard env.proxy=side"])
def test_the_rings_start_is_no_start_of_another_shape(cli, env):
    done = cli("method=flow_grpo", *f"env={env}".split(), "size=smoke", "logger=none")
    assert done.code == 2 and "were trained on the ring" in done.text and "env.start=own" in done.text, done.text


def test_flips_turn_that_share_of_the_conditions():
    world = plane(flips=0.3, batch_size=4000)
    batch = Samples(world, None, 0, {}).next()
    half = (batch["x"] @ torch.tensor([0.3826834, 0.9238795]) < 0).long()  # the line between them, at -22.5 degrees
    assert (half != batch["condition"]).float().mean().item() == pytest.approx(0.3, abs=0.03)


def test_batches_are_a_function_of_seed_and_number():
    world = plane(batch_size=16)
    a, b, other = (Samples(world, None, s, {}) for s in (3, 3, 4))
    first = a.next()
    assert torch.equal(first["x"], b.next()["x"]) and not torch.equal(first["x"], other.next()["x"])
    resumed = Samples(world, None, 3, {})
    resumed.load_state_dict(a.state_dict())
    assert torch.equal(a.next()["x"], resumed.next()["x"])


def test_effective_number():
    assert effective(torch.ones(4)).item() == pytest.approx(4)
    assert effective(torch.tensor([5.0, 0, 0])).item() == pytest.approx(1)


# ---- images ------------------------------------------------------------------------------------------------------------------

def test_digits_are_those_of_the_package_and_the_gold_classifier_knows_them():
    world = Images(Images.Config(start="none"))
    assert world.spec() == Spec(sample_shape=(1, 8, 8), classes=10, proxies=(world.reward,))
    assert sum(len(x) for x, _ in world.parts.values()) == 1797 and len(world.parts["generator"][0]) == 899
    assert all(x.abs().max() <= 1 for x, _ in world.parts.values())
    reference, label = world.parts["reference"]
    seen = world.judge(reference, None, label)
    assert seen["accuracy"] > 0.9 and abs(seen["frechet"]) < 1e-3 and seen["outside"] == 0
    wrong = world.judge(reference.roll(1, 0) * 1.2, None, (label + 1) % 10)
    assert wrong["accuracy"] < 0.1 and wrong["frechet"] > 1 and wrong["outside"] > 0.1
    assert world.reward(reference, label).mean() > world.reward(reference, (label + 1) % 10).mean()
    condition = torch.arange(200) % 10
    x = world.sample(condition, numbers())
    own = sum(g(x).softmax(1) for g in world.gold).argmax(1)
    assert (own == condition).float().mean() > 0.8  # 899 images that it was not trained on


def test_the_proxy_is_trained_on_false_labels_and_can_be_hacked():
    world = Images(Images.Config(start="none"))
    reference, label = world.parts["reference"]
    proxy = (world.proxy(reference).argmax(1) == label).float().mean()
    gold = (sum(g(reference).softmax(1) for g in world.gold).argmax(1) == label).float().mean()
    assert 0.4 < proxy < gold - 0.1
    x = reference.clone().requires_grad_()
    gradient, = torch.autograd.grad(world.reward(x, label).sum(), x)
    assert gradient.abs().sum() > 0  # it may be differentiated


def test_classifiers_leave_no_trace_and_come_out_the_same():
    x, label = torch.randn(40, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 2
    torch.manual_seed(1)
    before = torch.get_rng_state()
    nets = [fitted(x, label, (8, 8), 2, seed=3, steps=5) for _ in range(2)]
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters()))
    assert margin(torch.tensor([[1.0, 4.0, 2.0]]), torch.tensor([1])).item() == 2


def test_shapes_lie_in_their_quadrants():
    condition = torch.arange(160) % 16
    x = pictures.shapes(condition, torch.rand(160, 4, generator=torch.Generator().manual_seed(0)), 16)
    assert x.shape == (160, 1, 16, 16) and x.min() == -1 and x.max() <= 1
    ink = (x + 1).view(160, 2, 8, 2, 8).sum((2, 4))
    assert torch.equal(ink.flatten(1).argmax(1), condition % 4)
    assert (ink.flatten(1).max(1).values / ink.flatten(1).sum(1) > 0.97).all()
    circle, square = (x[condition // 4 == k].add(1).sum((1, 2, 3)).mean() for k in (0, 1))
    assert square > 0.85 * circle


@pytest.fixture
def images(tmp_path):
    """Two classes of 24 images of several formats and sizes, and what is no image."""
    for i, kind in enumerate(("cats", "dogs")):
        (tmp_path / kind).mkdir()
        for k in range(24):
            size, suffix = (40 + k, 30), ("png", "jpg", "bmp")[k % 3]
            Image.new("RGB", size, (200 * i, 10 * k, 50)).save(tmp_path / kind / f"{k}.{suffix}")
    (tmp_path / "cats" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (tmp_path / "dogs" / "cut.jpg").write_bytes((tmp_path / "dogs" / "1.jpg").read_bytes()[:200])
    (tmp_path / "dogs" / "notes.txt").write_text("not an image")
    return tmp_path


def folder(path, **values):
    return Images(Images.Config(source="folder", path=str(path), side=8, start="none", **values))


def test_a_folder_is_read_and_broken_files_are_named_and_counted(images):
    world = folder(images)
    assert world.spec() == Spec(sample_shape=(3, 8, 8), classes=2, proxies=(world.reward,))
    assert sum(len(x) for x, _ in world.parts.values()) == 48
    told = world.provenance()
    assert told["skipped"] == 2 and any("broken.png" in s for s in told["skipped_first"])
    assert any("cut.jpg" in s for s in told["skipped_first"])
    x, label = world.parts["generator"]
    assert ((x[:, 0].mean((1, 2)) > 0) == (label == 1)).all()  # red is the dogs'


def test_images_directly_in_a_folder_have_one_condition(images):
    world = folder(images / "cats")
    assert world.classes == 1 and world.proxy is None and not world.gold
    judged = world.judge(world.parts["generator"][0], None, world.parts["generator"][1])
    assert "accuracy" not in judged and judged["frechet"] < 10


@pytest.mark.parametrize(("make", "said"), [
    (lambda p: p / "nowhere", "no such folder"), (lambda p: p / "empty", "holds 0 readable images"),
    (lambda p: p / "few", "holds 3 readable images")])
def test_folders_that_do_not_serve_are_refused(images, make, said):
    (images / "empty").mkdir()
    (images / "few").mkdir()
    for k in range(3):
        Image.new("RGB", (8, 8)).save(images / "few" / f"{k}.png")
    with pytest.raises(UserError, match=said):
        folder(make(images))


def test_too_few_of_a_class_are_refused(images):
    (images / "birds").mkdir()
    Image.new("RGB", (8, 8)).save(images / "birds" / "1.png")
    with pytest.raises(UserError, match="too few images of some class: 'birds' has 1 of"):
        folder(images)


def test_images_are_read_as_a_person_sees_them(tmp_path):
    """16 bits, transparency, a camera held upside down; and one that no class has."""
    upper = torch.zeros(16, 16, dtype=torch.uint8)
    upper[:8] = 255
    (tmp_path / "a").mkdir()
    for i in range(8):
        Image.fromarray(upper.to(torch.int32).mul(257).numpy().astype("uint16")).save(tmp_path / "a" / f"0{i}.png")
    Image.merge("LA", [Image.new("L", (16, 16)), Image.fromarray(255 - upper.numpy())]).save(tmp_path / "a" / "1.png")
    turned = Image.Exif()
    turned[0x112] = 3
    Image.fromarray(255 - upper.numpy()).save(tmp_path / "a" / "2.png", exif=turned)
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    x, _, kinds, skipped = pictures.folder(str(tmp_path), 4)
    assert kinds == ["a"] and len(x) == 10 and len(skipped) == 1 and "belong to no class" in skipped[0]
    expected = torch.ones(3, 4, 4)
    expected[:, 2:] = -1
    for image in x:  # the edge between the halves is smoothed
        torch.testing.assert_close(image[:, [0, 3]], expected[:, [0, 3]], atol=0.2, rtol=0)


@pytest.mark.parametrize(("policy", "env", "said"), [
    ("unet", "ring", "policy=unet is for images"), ("dit", "ring", "policy=dit is for images"),
    ("unet", "digits policy.channels=[8,8,8,8,8]", "whose sides 16 divides"),
    ("dit", "digits policy.patch=3", "policy.patch=3 divides"),
    ("dit", "digits policy.heads=3", "must divide it"), ("unet", "digits policy.channels=[12]", "multiple of 8"),
    ("unet", "digits method=flow_grpo", "another shape than this network")])
def test_networks_that_do_not_fit_are_refused(cli, policy, env, said):
    name, *more = env.split()
    method = [] if any(w.startswith("method=") for w in more) else ["method=flow_matching"]
    done = cli(*method, f"env={name}", f"policy={policy}", "size=smoke", "logger=none", *more)
    assert done.code == 2 and said in done.text, done.text
    assert not (cli.cwd / "runs").exists()


@pytest.mark.parametrize("policy", ["unet policy.channels=[8,8]", "dit policy.width=16 policy.depth=1"])
def test_images_are_learned_by_other_networks(cli, policy):
    done = cli("method=flow_matching", "env=digits", *f"policy={policy}".split(), "size=smoke", "logger=none", "loop.steps=3")
    assert done.code == 0, done.text


@pytest.mark.parametrize("words", ["method=flow_grpo env=moons", "method=flow_dpo env=checkerboard",
                                   "method=flow_rwr env=shapes"])
def test_a_start_is_built_where_none_is_shipped(cli, words):
    done = cli(*words.split(), "size=smoke", "logger=none", "loop.steps=2", "env.start=own")
    assert done.code == 0, done.text


@pytest.mark.parametrize("method", ["r0", "diff_instruct_star"])
def test_an_images_proxy_can_be_differentiated(cli, method):
    done = cli(f"method={method}", "env=digits", "size=smoke", "logger=none", "loop.steps=2")
    assert done.code == 0 and "reward" in done.text, done.text


def test_a_folders_images_have_no_start(cli, tmp_path):
    from PIL import Image

    for kind in "ab":
        (tmp_path / kind).mkdir()
        for i in range(30):
            Image.new("L", (32, 32), 4 * i + (100 if kind == "a" else 0)).save(tmp_path / kind / f"{i}.png")
    done = cli("method=flow_grpo", "env=imagefolder", f"env.path={tmp_path}", "size=smoke", "logger=none")
    assert done.code == 2 and "comes with no starting weights" in done.text, done.text


@pytest.mark.parametrize(("words", "said"), [
    ("method=flow_grpo env=ring policy.depth=2", "another shape than this network (blocks.1."),  # fewer blocks
    ("method=dmd env=ring method.teacher=start policy.width=64", "another shape than this network (enter.weight)"),
    ("method=consistency_distillation env=ring method.teacher=start policy.depth=2", "another shape than this network"),
    ("method=dmd env=shapes", "no starting weights of this env are shipped: shapes.safetensors\nbuild them: env.start=own"),
    ("method=flow_grpo env=moons", "name a finished run on this env: policy.path=FOLDER"),
    ("method=dmd env=shapes env.start=none", "a finished run of flow_matching on this env (policy.path=FOLDER)"),
    ("method=rlg env=checkerboard method.model=exact", "take env=ring or env=moons"),
    ("method=flow_grpo env=moons env.tilt=1", "env.tilt=1.0 is for env.shape=ring"),
    ("method=rlg env=ring method.model=exact method.guidance=4", "both velocities are taken as they are"),
    ("method=r0 env=ring method.initial=random", "set method.initial=start, or anchor=0"),
    ("method=dmd env=ring method.lowest=20", "no level below method.highest"),
    ("method=ict env=ring method.lowest=20", "no level below method.highest"),
    ("method=ict env=ring method.middle=20 method.sampler_steps=2", "does not lie between"),
    ("method=f_distill env=ring method.lowest_ratio=30", "is not below method.highest_ratio"),
    ("method=flow_matching env=digits policy=unet policy.channels=[]", "one is needed"),
    ("method=flow_matching env=ring env.groups=3", "env.groups=3 does not divide the ring's 8 modes")])
def test_starts_and_settings_that_do_not_serve_are_refused(cli, words, said):
    done = cli(*words.split(), "size=smoke", "logger=none")
    assert done.code == 2 and said in done.text, done.text


@pytest.mark.parametrize("method", ["dmd method.initial=start", "consistency_distillation", "r0 method.reward_weight=0.0 "
                                    "method.match_weight=1.0"])
def test_a_finished_run_is_a_teacher_where_the_world_knows_none(cli, method):
    common = ["env=shapes", "size=smoke", "logger=none", "loop.steps=2"]
    assert cli("method=flow_matching", *common).code == 0
    run = next((cli.cwd / "runs").iterdir())
    done = cli(f"method={method.split()[0]}", *method.split()[1:], *common, f"policy.path={run}")
    assert done.code == 0, done.text
    begun = [json.loads((r / "run.json").read_text()).get("begun_from") for r in (cli.cwd / "runs").iterdir()]
    digest = hashlib.sha256((run / "weights.safetensors").read_bytes()).hexdigest()
    assert sorted(map(str, begun)) == sorted(["None", digest[:16]])
    done = cli("method=dmd", *common, f"policy.path={run}")
    assert done.code == 2 and "set method.initial=start" in done.text


def test_a_run_whose_network_tells_another_thing_is_not_begun_from(cli):
    common = ["env=ring", "size=smoke", "logger=none", "loop.steps=1"]
    runs = {}
    for name in ("flow_matching", "ddpm", "dmd", "ict"):
        assert cli(f"method={name}", *common).code == 0
        runs[name], = (cli.cwd / "runs").glob(f"{name}-*")
    assert cli("export", runs["ddpm"], "--to", "ddpm.safetensors").code == 0
    for path, said in ((runs["ddpm"], "epsilon"), ("ddpm.safetensors", "epsilon"), (runs["dmd"], "edm_denoiser"),
                       (runs["ict"], "consistency")):
        done = cli("method=flow_matching", *common, f"policy.path={path}")
        assert done.code == 2 and f"tells another thing ({said})" in done.text
    for name, path in (("flow_grpo", "flow_matching"), ("ddpm", "ddpm"), ("ict", "ict"),
                       ("consistency_distillation method.teacher=start", "flow_matching")):
        done = cli(*f"method={name}".split(), *common, f"policy.path={runs[path]}")
        assert done.code == 0, done.text


def test_true_samples_are_the_same_whatever_numbers_a_method_draws(monkeypatch):
    world, seen = Plane(Plane.Config(eval_samples=40)), []
    monkeypatch.setattr(world, "judge", lambda x, true, condition: seen.append(true) or {})

    class Made:
        def __init__(self, greedy):
            self.greedy = greedy

        def draw(self, noise, condition, more=None, path=False):
            torch.randn(self.greedy, generator=more)
            return Drawn(noise, torch.ones(len(noise)))

        def inspect(self, batch):
            return {}

    for greedy in (1, 1000):
        world.evaluate(Made(greedy), 0)
    assert torch.equal(*seen)


@pytest.mark.parametrize(("env", "number"), [("ring", 120), ("digits", 10)])
def test_ways_are_kept_of_the_samples_that_are_shown_alone(cli, monkeypatch, env, number):
    from methods.diffusion.flow_matching import FlowMatching

    followed, draw = [], FlowMatching.draw

    def watched(self, noise, condition, more=None, path=False):
        followed.extend([len(noise)] if path else [])
        return draw(self, noise, condition, more, path)

    monkeypatch.setattr(FlowMatching, "draw", watched)
    words = ("method=flow_matching", f"env={env}", "size=smoke", "logger=none", "loop.steps=1", "env.eval_samples=200")
    assert cli(*words).code == 0
    assert followed == [number]
    assert len(list(cli.cwd.glob("runs/*/pictures/*.png"))) == 2


def test_a_reward_that_is_nan_ends_the_run(cli, monkeypatch):
    from envs.generation.plane import Plane as World

    monkeypatch.setattr(World, "reward", lambda self, x, condition: x.sum(1) * float("nan"))
    done = cli("method=flow_grpo", "env=ring", "size=smoke", "logger=none")
    assert done.code != 0 and "non-finite" in done.text and "reward" in done.text


def test_more_steps_than_the_schedule_has_are_its_own(cli):
    done = cli("method=ddpm", "env=ring", "size=smoke", "method.schedule_steps=6", "method.sampler_steps=50", "logger=none")
    assert done.code == 2 and "method.sampler_steps=50" in done.text, done.text


def test_show_says_under_which_settings_a_setting_acts(cli):
    shown = cli("show", "flow_grpo").out
    assert "only with sampler=flow or dance or cps or ddim" in shown and "only with a setting such as window=1" in shown
