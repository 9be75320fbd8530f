"""A pipeline that diffusers' save_pretrained wrote, as a network of velocities: policy=diffusers policy.path=FOLDER.

| pipeline | components | samples |
|---|---|---|
| DDPMPipeline, DDIMPipeline | unet: UNet2DModel, with class labels or without | images |
| DiTPipeline | transformer: DiTTransformer2DModel; vae: AutoencoderKL | latents, decoded at the end |

Of the scheduler its schedule alone is read: betas, prediction_type and whether the last step is noise alone
(methods/diffusion/schedule.py); which steps are made is the method's to say (`sampler`: ode is DDIM with eta 0, ddim with
sampler_noise=1 DDPM's ancestral sampling). At a time between two steps the network is asked for the upper one, beyond the first
and the last for these.

Generation begins at the last step of the schedule and goes by strides of K / sampler_steps (diffusers' timestep_spacing
"trailing"), whatever the scheduler's own spacing is. Dropout is off, in training too: a method's random numbers are its own.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from methods.common.stored import folder_of, read_json
from methods.diffusion import flow, schedule
from runner.errors import UserError
from runner.interface import Spec, knob

WANTED = "the folder that diffusers' save_pretrained wrote for a DDPMPipeline, a DDIMPipeline or a DiTPipeline"
NETWORKS = {"unet": ("UNet2DModel",), "transformer": ("DiTTransformer2DModel", "Transformer2DModel")}  # the latter: old DiTs
SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler")
DECODED = 64  # latents that are decoded at once


class Pipeline(nn.Module):
    """(x (n, *shape), t (n,), condition (n,)) -> velocity (n, *shape). The condition `classes` means none.

    times (K,): t of the schedule's steps; labels: the network's class for each condition, None where it knows no classes;
    vae: what decodes latents; clip: bound of predicted data, 0: none."""

    def __init__(self, inner: nn.Module, times: Tensor, prediction: str, labels: tuple[int, ...] | None = None,
                 guided: bool = False, vae: nn.Module | None = None, clip: float = 0.0):
        super().__init__()
        self.inner, self.vae, self.prediction, self.clip = inner, vae, prediction, clip
        self.guided = guided               # whether there is a class that stands for none
        self.labelled = labels is not None
        self.latent = vae is not None
        self.register_buffer("times", times, persistent=False)
        self.register_buffer("labels", torch.tensor(labels or [0]), persistent=False)
        self.train(False)

    def train(self, mode: bool = True):
        return super().train(False)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        t = torch.clamp(t, self.times[0], self.times[-1])
        classes = {"class_labels": self.labels[condition]} if self.labelled else {}
        out = self.inner(x / schedule.size(x, t), schedule.place(self.times, t), **classes).sample
        v = schedule.velocity(self.prediction, x, t, out[:, :x.shape[1]].float())  # behind it: a learned variance
        if self.clip:
            v = flow.from_data(x, flow.to_data(x, v, t).clamp(-self.clip, self.clip), t)
        return v

    # -- what generation asks
    def grid(self, steps: int, shift: float) -> Tensor:
        if steps > len(self.times):
            raise UserError(f"{steps} steps of generation: the pipeline's schedule has {len(self.times)}\ntake at most that many "
                            "(method.sampler_steps, method.steps)")
        return schedule.trailing(self.times, steps, shift)

    def begin(self, noise: Tensor) -> Tensor:
        """Standard normal `noise`, at least as many numbers as a sample has -> x at the grid's first time."""
        if self.latent:
            shape = latent_shape(self.inner)
            noise = noise.flatten(1)[:, :math.prod(shape)].view(-1, *shape)
        return noise * schedule.size(noise, self.times[-1])

    def finish(self, x: Tensor) -> Tensor:
        """What the world is shown of x (…, n, C, H, W)."""
        if not self.latent:
            return x
        c = self.vae.config
        flat = x.flatten(0, -4) / c.scaling_factor + (c.shift_factor or 0.0)
        return torch.cat([self.vae.decode(part).sample.float() for part in flat.split(DECODED)]).unflatten(0, x.shape[:-3])


class Diffusers:
    @dataclasses.dataclass(frozen=True)
    class Config:
        path: str = knob("", "folder of the pipeline: model_index.json, a scheduler's and a network's folder")
        labels: tuple[int, ...] = knob((), "the pipeline's class for each class of the env; empty: 0, 1, 2, …", low=0)
        null: int = knob(-1, "the pipeline's class that stands for none; -1: the one after a DiT's classes, the last of a U-Net "
                         "that has one class more than the env", low=-1)
        clip: bool = knob(False, "each predicted image is clipped to the range that the scheduler names (1 unless it does)")

    own_weights = True  # the env's starting weights are not for it

    def __init__(self, config):
        self.config = config
        if not config.path:
            raise UserError(f"policy=diffusers needs a pipeline on disk: policy.path=FOLDER, {WANTED}")

    def build(self, spec: Spec) -> Pipeline:
        folder = folder_of(self.config.path, "model_index.json", WANTED)
        parts = {k: v for k, v in read_json(folder / "model_index.json").items()
                 if isinstance(v, list) and len(v) == 2 and v[0]}
        name = next((k for k in NETWORKS if k in parts), "unet")
        check_parts(folder, name, parts)
        times, prediction, bound = read_schedule(below(folder, "scheduler", "scheduler_config.json"))
        inner = read_network(folder, name, {"unet": "UNet2DModel", "transformer": "DiTTransformer2DModel"}[name])
        vae = read_network(folder, "vae", "AutoencoderKL").requires_grad_(False) if name == "transformer" else None
        check_shape(inner, vae, spec)
        labels, guided = self.classes(inner, spec)
        return Pipeline(inner, times, prediction, labels, guided, vae, bound if self.config.clip else 0.0)

    def classes(self, inner, spec: Spec) -> tuple[tuple[int, ...] | None, bool]:
        """The network's class for each condition, the null class last, and whether there is one."""
        c, config = self.config, inner.config
        transformer = "num_embeds_ada_norm" in config
        known = config.num_embeds_ada_norm if transformer else config.num_class_embeds
        if not known:
            return None, False
        labels = c.labels or tuple(range(spec.classes))
        if len(labels) != spec.classes or max(labels) >= known:
            raise UserError(f"policy.labels={list(c.labels)}: the env has {spec.classes} classes, the pipeline {known} (0 to "
                            f"{known - 1})\nname one of them for each of the env's: policy.labels=[…]")
        null = c.null if c.null >= 0 else known if transformer else known - 1 if known == spec.classes + 1 else -1
        if null >= known + transformer:
            raise UserError(f"policy.null={null}: the pipeline's classes are 0 to {known + transformer - 1}")
        return (*labels, *([null] if null >= 0 else [])), null >= 0


def latent_shape(inner) -> tuple[int, int, int]:
    return (inner.config.in_channels, inner.config.sample_size, inner.config.sample_size)


def below(folder, name: str, file: str):
    """The component's folder; old pipelines keep the files of their only network beside model_index.json."""
    return folder / name if (folder / name / file).is_file() else folder


def check_parts(folder, name: str, parts: dict):
    """Refuse what a velocity can't be made of, by name."""
    kinds = {name: NETWORKS[name], "scheduler": SCHEDULERS, **({"vae": ("AutoencoderKL",)} if name == "transformer" else {})}
    for part, (library, kind) in parts.items():
        if part not in kinds:
            raise UserError(f"{folder}: the pipeline's component '{part}' ({kind}) is not supported\ngive {WANTED}")
        if library != "diffusers" or kind not in kinds[part]:
            raise UserError(f"{folder}: the pipeline's {part} is a {kind}, which is not supported\nsupported: "
                            f"{', '.join(kinds[part])}\ngive {WANTED}")
    missing = [k for k in kinds if k not in parts]
    if missing:
        raise UserError(f"{folder}: model_index.json names no {missing[0]}\ngive {WANTED}")


def read_schedule(folder) -> tuple[Tensor, str, float]:
    """(times (K,), what the network predicts, bound of clipped data) of a scheduler's folder."""
    c = read_json(folder / "scheduler_config.json")
    kind, prediction = c.get("beta_schedule", "linear"), c.get("prediction_type", "epsilon")
    for key, value, known in (("beta_schedule", kind, schedule.BETAS), ("prediction_type", prediction, schedule.PREDICTIONS)):
        if value not in known:
            raise UserError(f"{folder}: the scheduler's {key} is {value}, which is not supported\nsupported: {', '.join(known)}")
    beta = schedule.betas(kind, c.get("num_train_timesteps", 1000), c.get("beta_start", 1e-4), c.get("beta_end", 0.02))
    if c.get("trained_betas") is not None:
        beta = torch.tensor(c["trained_betas"], dtype=torch.float64)
    to_noise = bool(c.get("rescale_betas_zero_snr"))
    if to_noise and prediction == "epsilon":
        raise UserError(f"{folder}: the scheduler's last step is noise alone (rescale_betas_zero_snr), where predicted noise "
                        "(prediction_type epsilon) tells nothing of the data\ncorrect one of the two in scheduler_config.json")
    return schedule.table(beta, to_noise), prediction, float(c.get("clip_sample_range") or 1.0)


def read_network(folder, name: str, kind: str) -> nn.Module:
    """One component, in float32, from safetensors."""
    try:
        import diffusers
    except ImportError:
        raise UserError("policy=diffusers needs the package diffusers, which is not installed\n"
                        "install it: pip install -e '.[diffusers]'") from None
    diffusers.utils.logging.disable_progress_bar()  # a run shows progress of its own
    place = below(folder, name, "config.json")
    config = read_json(place / "config.json")
    unsupported = {"class_embed_type": (None,), "time_embedding_type": (None, "positional", "learned"),
                   "norm_type": (None, "ada_norm_zero"), "latents_mean": (None,)}
    for key, known in unsupported.items():
        if config.get(key) not in known:
            raise UserError(f"{place}: {kind} with {key}={config[key]} is not supported")
    try:
        return getattr(diffusers, kind).from_pretrained(str(place), use_safetensors=True, local_files_only=True,
                                                        low_cpu_mem_usage=False, torch_dtype=torch.float32)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as e:
        raise UserError(f"diffusers can't read {place}: {str(e).splitlines()[0]}\ncopy the folder again; weights have to be "
                        "safetensors (pickles are never read)") from None


def check_shape(inner, vae, spec: Spec):
    c, shape = inner.config, spec.sample_shape
    if vae is not None:
        times = 2 ** (len(vae.config.block_out_channels) - 1)
        channels, side = vae.config.out_channels, (c.sample_size * times,) * 2
        if vae.config.latent_channels != c.in_channels:
            raise UserError(f"policy.path: the transformer's latents have {c.in_channels} channels, those of the vae "
                            f"{vae.config.latent_channels}")
    else:
        channels = c.in_channels
        side = shape[1:] if c.sample_size is None else (c.sample_size,) * 2 if isinstance(c.sample_size, int) else \
            tuple(c.sample_size)
    if len(shape) != 3 or tuple(shape) != (channels, *side):
        made, wanted = (" x ".join(map(str, s)) for s in ((channels, *side), shape))
        raise UserError(f"policy.path: the pipeline makes images of {made} (channels, height, width); this env's samples are "
                        f"{wanted}\ntake another env, or another size of it: env.side=…")
