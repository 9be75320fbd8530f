"""Pipelines of diffusers, tiny and random, written to disk and read: their steps are diffusers' own."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from token_methods import bare

from methods.diffusion.adaptive_guidance import AdaptiveGuidance
from methods.diffusion.apg import APG
from methods.diffusion.cfg import CFG
from methods.diffusion.diffusers import Diffusers
from methods.diffusion.flow_matching import FlowMatching
from runner.errors import UserError
from runner.interface import Spec

K = 20
SPEC = Spec(sample_shape=(1, 8, 8), classes=10)


def shake(network):
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return network.eval()


def tiny_unet(**more):
    import diffusers

    torch.manual_seed(0)
    return shake(diffusers.UNet2DModel(**{
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 8), "layers_per_block": 1,
        "norm_num_groups": 4, "attention_head_dim": 4, "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2, "num_class_embeds": 11, **more}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A class-conditional DDPM pipeline of 20 steps."""
    import diffusers

    place = tmp_path_factory.mktemp("ddpm")
    diffusers.DDPMPipeline(tiny_unet(), diffusers.DDPMScheduler(num_train_timesteps=K)).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1, sample_size=4, patch_size=2,
        num_embeds_ada_norm=10, norm_num_groups=4)
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
                                  down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    place = tmp_path_factory.mktemp("dit")
    diffusers.DiTPipeline(shake(transformer), vae.eval(), diffusers.DDIMScheduler(
        num_train_timesteps=K, clip_sample=False, timestep_spacing="trailing")).save_pretrained(place)
    return place


def changed(folder, tmp_path, file="scheduler/scheduler_config.json", drop=(), **values):
    """A copy of a pipeline with other values in one of its files."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    held = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps({k: v for k, v in {**held, **values}.items() if k not in drop}))
    return copy


def built(folder, spec=SPEC, **values):
    return Diffusers(Diffusers.Config(path=str(folder), **values)).build(spec)


def method(cls, folder, spec=SPEC, policy=(), **values):
    out = bare(cls, **{"model": "given", "sampler_steps": 5, **values})
    out.blueprint = Diffusers(Diffusers.Config(path=str(folder), **dict(policy)))
    out.setup(spec)
    out.make_optimizers()
    return out


def noises(number=4, shape=SPEC.sample_shape):
    return torch.randn(number, *shape, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def theirs(scheduler, network, noise, labels, steps, w=1.0, null=10, **settings):
    """diffusers' own generation."""
    scheduler.set_timesteps(steps)
    x, more = noise, torch.Generator().manual_seed(7)
    for k in scheduler.timesteps:
        def ask(c, x=x, k=k):
            return network(x, k.expand(len(x)), class_labels=c).sample[:, :x.shape[1]]
        out = ask(labels)
        if w != 1:
            nothing = ask(torch.full_like(labels, null))
            out = nothing + w * (out - nothing)
        x = scheduler.step(out, k, x, generator=more, **settings).prev_sample
    return x


@pytest.mark.parametrize(("eta", "steps", "more"), [
    (0.0, 5, {}), (1.0, 5, {}), (0.0, K, {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}),
    (1.0, 10, {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}), (1.0, 10, {"num_train_timesteps": 1000}),
    (0.0, 5, {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
    (0.0, 4, {"trained_betas": [0.01 * (k + 1) for k in range(K)]})])
def test_generation_is_ddims(folder, tmp_path, eta, steps, more):
    import diffusers

    place = changed(folder, tmp_path, **more)
    mine = method(FlowMatching, place, sampler="ddim" if eta else "ode", sampler_noise=eta or 0.7, sampler_steps=steps)
    scheduler = diffusers.DDIMScheduler.from_pretrained(place, subfolder="scheduler", clip_sample=False,
                                                        timestep_spacing="trailing")
    noise, labels = noises(), torch.tensor([0, 3, 9, 10])
    true = theirs(scheduler, tiny_unet(), noise, labels, steps, eta=eta)
    drawn = mine.draw(noise, labels, torch.Generator().manual_seed(7), path=True)
    torch.testing.assert_close(drawn.x, true, rtol=1e-4, atol=1e-4 * true.abs().max().item())
    assert drawn.path.shape == (steps + 1, 4, 1, 8, 8) and drawn.calls.tolist() == [steps] * 4


def test_clipped_it_is_ddpms_ancestral_sampling(folder):
    import diffusers

    mine = method(FlowMatching, folder, policy={"clip": True}, sampler="ddim", sampler_noise=1.0, sampler_steps=K)
    noise, labels = noises(), torch.tensor([0, 3, 9, 10])
    true = theirs(diffusers.DDPMScheduler(num_train_timesteps=K), tiny_unet(), noise, labels, K)
    torch.testing.assert_close(mine.draw(noise, labels, torch.Generator().manual_seed(7)).x, true, rtol=1e-4, atol=1e-4)


def test_guidance_runs_and_is_diffusers_own(folder):
    import diffusers

    noise, labels = noises(), torch.tensor([0, 3, 9, 1])
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=K, clip_sample=False, timestep_spacing="trailing")
    true = theirs(scheduler, tiny_unet(), noise, labels, 5, w=3.0)
    found = {cls: method(cls, folder, guidance=3.0).draw(noise, labels) for cls in (CFG, APG, AdaptiveGuidance)}
    torch.testing.assert_close(found[CFG].x, true, rtol=1e-4, atol=1e-4 * true.abs().max().item())
    assert not torch.allclose(found[APG].x, true, atol=1e-2) and found[APG].x.isfinite().all()
    assert found[AdaptiveGuidance].calls.max() <= 10
    linear = method(AdaptiveGuidance, folder, guidance=3.0, linear=True).draw(noise, labels)
    assert linear.x.isfinite().all()


def test_latents_are_generated_as_by_the_pipeline_and_decoded(dit, tmp_path):
    import diffusers

    pipe = diffusers.DiTPipeline.from_pretrained(dit, low_cpu_mem_usage=False)
    spec = Spec(sample_shape=(3, 8, 8), classes=3)
    mine = method(CFG, dit, spec, policy={"labels": (4, 0, 9)}, guidance=3.0)
    noise, labels = noises(2, (3, 8, 8)), torch.tensor([2, 0])
    latents = theirs(pipe.scheduler, pipe.transformer, noise.flatten(1)[:, :64].view(2, 4, 4, 4), torch.tensor([9, 4]), 5, w=3.0)
    with torch.no_grad():
        true = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    drawn = mine.draw(noise, labels, path=True)
    torch.testing.assert_close(drawn.x, true, rtol=1e-3, atol=1e-3 * true.abs().max().item())
    assert drawn.path.shape == (6, 2, 3, 8, 8) and torch.equal(drawn.path[-1], drawn.x)
    with pytest.raises(UserError, match="method.model=given"):
        method(CFG, dit, spec, model="trained")
    with pytest.raises(UserError, match="makes images of 3 x 8 x 8"):
        method(CFG, dit, Spec(sample_shape=(3, 4, 4), classes=3))
    old = built(changed(dit, tmp_path, "model_index.json", transformer=["diffusers", "Transformer2DModel"]), spec)
    assert old.guided and old.labels.tolist() == [0, 1, 2, 10]


def test_networks_without_classes_or_without_one_for_none(tmp_path):
    import diffusers

    scheduler = diffusers.DDIMScheduler(num_train_timesteps=K)
    diffusers.DDIMPipeline(tiny_unet(num_class_embeds=None), scheduler).save_pretrained(tmp_path / "plain")
    mine = method(FlowMatching, tmp_path / "plain")
    a, b = (mine.draw(noises(), torch.full((4,), c)).x for c in (0, 5))
    assert torch.equal(a, b)
    with pytest.raises(UserError, match="has no classes"):
        method(CFG, tmp_path / "plain", guidance=3.0)
    diffusers.DDIMPipeline(tiny_unet(num_class_embeds=10), scheduler).save_pretrained(tmp_path / "ten")
    with pytest.raises(UserError, match="policy.null"):
        method(CFG, tmp_path / "ten", guidance=3.0)
    assert method(CFG, tmp_path / "ten", guidance=3.0, policy={"null": 9}).network.labels.tolist() == [*range(10), 9]
    with pytest.raises(UserError, match="the env has 12 classes, the pipeline 10"):
        built(tmp_path / "ten", Spec(sample_shape=(1, 8, 8), classes=12))


def test_the_files_may_lie_beside_the_index(folder, tmp_path):
    """As in pipelines of old."""
    shutil.copytree(folder, tmp_path / "old")
    for name in ("unet", "scheduler"):
        for file in (tmp_path / "old" / name).iterdir():
            file.rename(tmp_path / "old" / file.name)
    x, t, labels = noises(), torch.tensor([0.0, 0.2, 0.5, 1.0]), torch.tensor([0, 3, 9, 10])
    found = built(tmp_path / "old")(x, t, labels)
    assert torch.equal(found, built(folder)(x, t, labels)) and found.isfinite().all()


def test_a_pipeline_is_trained_further(folder):
    mine = method(FlowMatching, folder, model="trained")
    before = {k: v.clone() for k, v in mine.network.state_dict().items()}
    batch = {"x": noises(), "condition": torch.tensor([0, 1, 2, 3])}
    assert mine.update(batch)["loss"].isfinite()
    assert any(not torch.equal(before[k], v) for k, v in mine.network.state_dict().items())


def test_what_does_not_serve_is_refused(folder, tmp_path, monkeypatch):
    index, unet = "model_index.json", "unet/config.json"
    for place, said in [
            (tmp_path / "nowhere", "no such folder"), (folder / "unet", "no model_index.json there; it holds: config.json"),
            (changed(folder, tmp_path / "a", index, unet=["diffusers", "UNet2DConditionModel"]), "unet is a UNet2DCond"),
            (changed(folder, tmp_path / "b", index, vqvae=["diffusers", "VQModel"]), r"component 'vqvae' \(VQModel\)"),
            (changed(folder, tmp_path / "c", index, drop=["unet"]), "names no unet"),
            (changed(folder, tmp_path / "d", index, scheduler=["diffusers", "FlowMatchLCMScheduler"]), "scheduler is a FlowM"),
            (changed(folder, tmp_path / "e", index, unet=["mine", "UNet2DModel"]), "not supported"),
            (changed(folder, tmp_path / "f", beta_schedule="sigmoid"), "beta_schedule is sigmoid"),
            (changed(folder, tmp_path / "g", prediction_type="flow"), "prediction_type is flow"),
            (changed(folder, tmp_path / "h", rescale_betas_zero_snr=True), "noise alone"),
            (changed(folder, tmp_path / "i", unet, time_embedding_type="fourier"), "time_embedding_type=fourier"),
            (changed(folder, tmp_path / "j", unet, in_channels=3), "can't read")]:
        with pytest.raises(UserError, match=said):
            built(place)
    for shape in ((3, 8, 8), (1, 16, 16), (2,)):
        with pytest.raises(UserError, match="makes images of 1 x 8 x 8"):
            built(folder, Spec(sample_shape=shape, classes=10))
    (changed(folder, tmp_path / "k") / "unet" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "k/copy/unet/other.bin")
    with pytest.raises(UserError, match="safetensors"):
        built(tmp_path / "k" / "copy")
    with pytest.raises(UserError, match="21 steps of generation: the pipeline's schedule has 20"):
        method(FlowMatching, folder, sampler_steps=21)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"pip install -e '.\[diffusers\]'"):
        built(folder)


def test_it_is_sampled_judged_and_drawn_from_the_command_line(cli, folder, tmp_path):
    import diffusers

    classes_alone = tmp_path / "classes"
    diffusers.DDPMPipeline(tiny_unet(num_class_embeds=10), diffusers.DDPMScheduler(num_train_timesteps=K)).save_pretrained(
        classes_alone)
    words = ["env=digits", "size=smoke", "logger=none", "policy=diffusers", f"policy.path={folder}"]
    done = cli("method=apg", *words, "method.model=given", "loop.steps=1")
    assert done.code == 0, done.text
    run, = (cli.cwd / "runs").iterdir()
    told = json.loads((run / "run.json").read_text())
    assert told["metrics"]["calls"] == 2 * told["config"]["method"]["sampler_steps"] and "frechet" in told["metrics"]
    assert sorted(p.name for p in run.rglob("*.png")) == ["paths.png", "samples.png"]
    assert cli("eval", run).code == 0
    tuned = cli("method=rlg", *words, "method.steps=3", "method.weight=1.5")
    assert tuned.code == 0, tuned.text
    refused = cli("method=rlg", *words, "method.model=given")
    assert refused.code == 2 and "the two are one" in refused.text
    assert "policy.path=FOLDER" in cli("method=cfg", "env=digits", "policy=diffusers", "size=smoke").text
    assert "schedule of its own" in cli("method=ddpm", *words).text
    assert "this policy has a schedule" in cli("method=consistency_distillation", *words).text
    assert cli("method=dmd", *words, "method.initial=start", "loop.steps=2").code == 0
    lacking = cli("method=dmd", *words[:-1], f"policy.path={classes_alone}", "method.initial=start",
                  "method.teacher_guidance=2.0")
    assert lacking.code == 2 and "method.teacher_guidance=2.0: this pipeline has no class that stands for none" in lacking.text
