"""GRPO steps beside TRL's GRPOTrainer: the same transformer shape, batch and lengths, both in one run.

    python scripts/bench/grpo_step.py [--shape tiny half-billion] [--steps 5] [--without-trl] [--device cuda] [--minibatches 1]
    torchrun --nproc-per-node 2 scripts/bench/grpo_step.py --shape half-billion --without-trl [--split]    data-parallel

    tiny          4 layers x 256, vocabulary 256, 256 rows (32 prompts x 8), prompt 32, completion 32
    half-billion  Qwen2-0.5B's shape: 24 x 896, 14 heads, 2 of keys, MLP 4864, vocabulary 151,936, 64 rows (8 x 8),
                  prompt 128, completion 256

Weights are random, so that responses are as long as they may be. Ours runs as in training: stream (sampling, verifying) and
update, with bf16 autocast on a GPU. Under torchrun every process has the shape's rows (or with --split its share of them), the
gradients are averaged as in a run, and tokens are counted over all processes. Prints seconds a step (median), completion tokens
a second, peak memory, and floors: the least time in which an H100 could read the weights once a token while decoding (bytes) and
do the arithmetic of scoring and backward (FLOPs).
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from envs.prompts.base import PromptWorld  # noqa: E402
from envs.prompts.task import Problem, Task, Verdict  # noqa: E402
from methods.reasoning.grpo import GRPO  # noqa: E402
from methods.tokens.small import Small  # noqa: E402
from runner.draws import Draws  # noqa: E402
from runner.interface import make_config  # noqa: E402
from runner.knobs import knobs_of  # noqa: E402
from runner.loop import FabricEngine  # noqa: E402
from runner.parallel import share  # noqa: E402

LETTERS = "abcdefghijklmnopqrstuvwxyz .,"
SHAPES = {
    "tiny": {"policy": {"layers": 4, "width": 256, "heads": 4, "mlp_width": 1024, "vocabulary": 256},
             "prompts": 32, "samples": 8, "prompt": 32, "completion": 32},
    "half-billion": {"policy": {"layers": 24, "width": 896, "heads": 14, "kv_heads": 2, "mlp_width": 4864, "vocabulary": 151_936,
                                "tied": True, "qkv_bias": True},
                     "prompts": 8, "samples": 8, "prompt": 128, "completion": 256},
}
BANDWIDTH, RATE = 2.99e12, 796e12  # bytes/s and bf16 FLOP/s of one H100, measured (docs/measurements.md)


class Letters(Task):
    """Random letters to continue; what is rewarded does not matter, but differs within groups."""

    alphabet, eos = LETTERS, "."

    def __init__(self, prompt: int, completion: int):
        self.prompt_length, self.response_length = prompt, completion

    def train(self):
        rng = random.Random(0)
        return [Problem("".join(rng.choices(LETTERS[:-3], k=self.prompt_length))) for _ in range(1000)]

    def verify(self, problem, response):
        return Verdict(float(response.count("a") % 2), None)


class World(PromptWorld):
    def __init__(self, task, device):
        super().__init__(make_config([PromptWorld.Config], {k.name: k.default for k in knobs_of(PromptWorld.Config)}), device)
        self.task = task

    def make_task(self):
        return None

    def _start(self):
        return {}


def ours(shape: dict, steps: int, device: str, minibatches: int, fabric=None) -> dict:
    policy = Small(make_config([Small.Config], {**{k.name: k.default for k in knobs_of(Small.Config)}, **shape["policy"]}))
    knobs = {k.name: k.default for k in knobs_of(GRPO.Config)}
    knobs |= {"prompts": shape["prompts"], "samples": shape["samples"], "minibatches": minibatches}
    world = World(Letters(shape["prompt"], shape["completion"]), device)
    torch.manual_seed(0)
    method = GRPO(make_config([GRPO.Config], knobs))
    method.blueprint = policy
    method.setup(world.spec())
    method.to(device)
    processes = 1
    if fabric is not None:
        processes, method.processes = fabric.world_size, (fabric.global_rank, fabric.world_size)
        share(method, fabric, "ddp")
        method.engine = FabricEngine(fabric)
    method.make_optimizers()
    method.draws = Draws(0, device)
    stream = world.stream(method, "prompts", 0)
    times, sampling, tokens = [], [], 0
    method.autocast = lambda: torch.autocast(device, torch.bfloat16, enabled=device == "cuda")
    for step in range(steps + 3):
        if fabric is not None:
            fabric.barrier()
        begin = now(device)
        batch = stream.next()
        middle = now(device)
        with method.autocast():  # anew for every update, as the loop does: while it is open it keeps casts of the weights
            method.update(batch)
        method.updates += 1
        if step >= 3:
            times.append(now(device) - begin)
            sampling.append(middle - begin)
            tokens += int(batch["mask"].sum())
        elif step == 0 and device == "cuda":
            torch.cuda.reset_peak_memory_stats()
    return {"seconds": statistics.median(times), "sampling": statistics.median(sampling),
            "tokens": processes * tokens / len(times),
            "memory": torch.cuda.max_memory_allocated() if device == "cuda" else 0,
            "parameters": sum(p.numel() for p in method.policy.parameters())}


def trl(shape: dict, steps: int, device: str) -> dict:
    """The same through TRL: a Qwen2 of this shape with random weights, its generate() of transformers."""
    import tempfile

    from _qwen2 import qwen2
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = qwen2(shape["policy"], LETTERS)
    rng, rows = random.Random(0), shape["prompts"] * shape["samples"]
    texts = ["".join(rng.choices(LETTERS[:-3], k=shape["prompt"])) for _ in range(shape["prompts"] * (steps + 3))]
    settings = GRPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=rows, num_generations=shape["samples"],
        max_completion_length=shape["completion"], max_steps=steps + 3, learning_rate=1e-6, bf16=device == "cuda",
        use_cpu=device == "cpu", report_to=[], logging_steps=1000, save_strategy="no", beta=0.0, gradient_checkpointing=False,
        disable_tqdm=True)
    times, made = [], []

    def reward(completions, completion_ids=None, **_):
        made.append(sum(map(len, completion_ids)))
        return [float(len(set(c)) % 2) for c in completions]

    class Timed(GRPOTrainer):
        def training_step(self, *args, **kwargs):
            begin = now(device)
            out = super().training_step(*args, **kwargs)
            times.append(now(device) - begin)
            return out

    trainer = Timed(model=model, reward_funcs=reward, args=settings, processing_class=tokenizer,
                    train_dataset=Dataset.from_dict({"prompt": texts}))
    trainer.train()
    return {"seconds": statistics.median(times[3:]), "tokens": statistics.mean(made[3:]),
            "memory": torch.cuda.max_memory_allocated() if device == "cuda" else 0}


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def floors(shape: dict, parameters: int) -> tuple[float, float]:
    """(seconds of decoding by bytes, seconds of scoring and backward by FLOPs) of one step with one minibatch."""
    rows, length = shape["prompts"] * shape["samples"], shape["prompt"] + shape["completion"]
    p = shape["policy"]
    kv = 2 * p["layers"] * p.get("kv_heads", p["heads"]) * (p["width"] // p["heads"]) * 2
    decode = shape["completion"] * (2 * parameters + rows * (shape["prompt"] + shape["completion"] / 2) * kv) / BANDWIDTH
    embedding = p["vocabulary"] * p["width"]
    trunk = parameters - embedding * (1 if p.get("tied") else 2)
    return decode, 6 * (trunk * rows * length + embedding * rows * shape["completion"]) / RATE


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="*", default=["tiny"], choices=list(SHAPES))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--trl-steps", type=int, default=3)
    parser.add_argument("--minibatches", type=int, default=1)
    parser.add_argument("--without-trl", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--split", action="store_true", help="under torchrun: the shape's rows are shared, not repeated")
    a = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    fabric, processes, device = None, int(os.environ.get("WORLD_SIZE", 1)), a.device
    if processes > 1:
        from lightning.fabric import Fabric

        fabric = Fabric(accelerator="gpu" if a.device == "cuda" else "cpu", devices=processes, strategy="ddp")
        fabric.launch()
        a.without_trl = True
    for name in a.shape:
        shape = SHAPES[name]
        if a.split:
            shape = {**shape, "prompts": shape["prompts"] // processes}
        mine = ours(shape, a.steps, device, a.minibatches, fabric)
        if fabric is not None and fabric.global_rank > 0:
            continue
        decode, train = floors(shape, mine["parameters"])
        print(f"{name}{f', {processes} processes' * (processes > 1)}: {mine['parameters']:,} parameters; ours "
              f"{mine['seconds']:.4f} s/step (sampling {mine['sampling']:.4f}), "
              f"{mine['tokens'] / mine['seconds']:,.0f} completion tokens/s, peak {mine['memory'] / 2**30:.1f} GiB; floors on an "
              f"H100: decoding {decode:.4f} s, scoring and backward {train:.4f} s", flush=True)
        if not a.without_trl:
            if a.device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            peer = trl(shape, a.trl_steps, a.device)
            print(f"{name}: TRL {peer['seconds']:.4f} s/step, {peer['tokens'] / peer['seconds']:,.0f} completion tokens/s, peak "
                  f"{peer['memory'] / 2**30:.1f} GiB; ratio {peer['seconds'] / mine['seconds']:.1f}", flush=True)


if __name__ == "__main__":
    main()
