"""DPO steps beside TRL's DPOTrainer: the same transformer shape, batch and lengths, both in one run.

    python scripts/bench/dpo_step.py [--shape tiny half-billion] [--steps 30] [--compile] [--without-trl] [--device cuda]
                                     [--profile]

    tiny          4 layers x 256, vocabulary 256, 64 pairs, prompt 32, responses 32
    half-billion  Qwen2-0.5B's shape: 24 x 896, 14 heads, 2 of keys, MLP 4864, vocabulary 151,936, 16 pairs, prompt 256,
                  responses 256

Weights and tokens are random; responses are full. Ours runs as in training: a stored batch, its reference log-probabilities made
before training (TRL: precompute_ref_log_probs), one update; bf16 autocast on a GPU. Prints seconds a step (median), pairs a
second, peak memory, and the least time in which an H100 could do the arithmetic: forward and backward of the trunk over the
prompt once and both responses, and of the head over the responses.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from envs.pairs.base import Stored, encode_pairs  # noqa: E402
from envs.pairs.task import Pair  # noqa: E402
from methods.preference.dpo import DPO  # noqa: E402
from methods.tokens.small import Small  # noqa: E402
from runner.capture import Graphs  # noqa: E402
from runner.draws import Draws  # noqa: E402
from runner.interface import Spec, make_config  # noqa: E402
from runner.knobs import knobs_of  # noqa: E402

LETTERS = "abcdefghijklmnopqrstuvwxyz .,"
SHAPES = {
    "tiny": {"policy": {"layers": 4, "width": 256, "heads": 4, "mlp_width": 1024, "vocabulary": 256},
             "pairs": 64, "prompt": 32, "response": 32},
    "half-billion": {"policy": {"layers": 24, "width": 896, "heads": 14, "kv_heads": 2, "mlp_width": 4864, "vocabulary": 151_936,
                                "tied": True, "qkv_bias": True}, "pairs": 16, "prompt": 256, "response": 256},
}
RATE = 796e12  # bf16 FLOP/s of one H100, measured (docs/measurements.md)


def texts(shape: dict, number: int) -> list[Pair]:
    rng = random.Random(0)
    draw = lambda n: "".join(rng.choices(LETTERS[:-3], k=n))  # noqa: E731
    return [Pair(draw(shape["prompt"]), draw(shape["response"]), draw(shape["response"])) for _ in range(number)]


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def defaults(cls) -> dict:
    return {k.name: k.default for k in knobs_of(cls)}


def ours(shape: dict, steps: int, device: str, profile: bool, compiled: bool) -> dict:
    torch.manual_seed(0)
    method = DPO(make_config([DPO.Config], defaults(DPO.Config)))
    method.blueprint = Small(make_config([Small.Config], {**defaults(Small.Config), **shape["policy"]}))
    method.setup(Spec(alphabet=LETTERS, end=".", prompt_length=shape["prompt"], response_length=shape["response"]))
    method.to(device)
    if compiled:
        method.compile_networks()
    method.make_optimizers()
    method.draws = Draws(0, device)
    stream = Stored(encode_pairs(method, texts(shape, 4 * shape["pairs"])), {}, shape["pairs"], 0)
    def update(batch):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return method.update(batch)

    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        stream.replace(method.prepare(stream.data()))
    graphs = Graphs(method, stream, update) if device == "cuda" and method.capturable else None  # as the loop does

    def advance(step: int) -> int:
        if graphs:
            return graphs.advance(step, 10 ** 9)[0]
        update(stream.next())
        method.updates += 1
        return 1

    times, step = [], 0
    while len(times) < steps:
        if not times and device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begin = now(device)
        made = advance(step)
        step += made
        if step > (40 if graphs else 5):  # by then updates are captured
            times.append((now(device) - begin) / made)
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    if profile:
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile as record

        with record(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
            for _ in range(3):
                step += advance(step)
            now(device)
        print(prof.key_averages().table(sort_by="self_cuda_time_total" if device == "cuda" else "self_cpu_time_total",
                                        row_limit=30, max_name_column_width=60))
    return {"seconds": statistics.median(times), "memory": memory,
            "parameters": sum(p.numel() for p in method.policy.parameters())}


def trl(shape: dict, steps: int, device: str) -> dict:
    """The same through TRL: a Qwen2 of this shape with random weights."""
    import tempfile

    from _qwen2 import qwen2
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    model, tokenizer = qwen2(shape["policy"], LETTERS)
    pairs = texts(shape, (steps + 5) * shape["pairs"])
    cut = shape["response"] - 1  # it adds the end
    data = Dataset.from_dict({"prompt": [q.prompt for q in pairs], "chosen": [q.chosen[:cut] for q in pairs],
                              "rejected": [q.rejected[:cut] for q in pairs]})
    times = []

    class Timed(DPOTrainer):
        def training_step(self, *args, **kwargs):
            times.append(-now(device))
            return super().training_step(*args, **kwargs)

    from transformers import TrainerCallback

    class Ends(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            times[-1] += now(device)

    settings = DPOConfig(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=shape["pairs"], max_steps=steps + 5,
                         learning_rate=1e-6, bf16=device == "cuda", use_cpu=device == "cpu", report_to=[], logging_steps=1000,
                         save_strategy="no", gradient_checkpointing=False, disable_tqdm=True, precompute_ref_log_probs=True,
                         max_length=shape["prompt"] + shape["response"])
    trainer = Timed(model=model, args=settings, processing_class=tokenizer, train_dataset=data, callbacks=[Ends()])
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    return {"seconds": statistics.median(times[5:]), "memory": torch.cuda.max_memory_allocated() if device == "cuda" else 0}


def floor(shape: dict, parameters: int) -> float:
    """Seconds of the step's arithmetic on an H100 at the rate of a large matrix product."""
    p = shape["policy"]
    embedding = p["vocabulary"] * p["width"]
    trunk = parameters - embedding * (1 if p.get("tied") else 2)
    responses = 2 * shape["response"]
    return 6 * shape["pairs"] * (trunk * (shape["prompt"] + responses) + embedding * responses) / RATE


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="*", default=["tiny"], choices=list(SHAPES))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--without-trl", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--compile", action="store_true", help="as hardware.compile=true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    for name in a.shape:
        shape = SHAPES[name]
        mine = ours(shape, a.steps, a.device, a.profile, a.compile)
        print(f"{name}: {mine['parameters']:,} parameters; ours {mine['seconds']:.5f} s/step, "
              f"{shape['pairs'] / mine['seconds']:,.0f} pairs/s, peak {mine['memory'] / 2**30:.1f} GiB; floor of arithmetic on "
              f"an H100 {floor(shape, mine['parameters']):.5f} s", flush=True)
        if not a.without_trl:
            if a.device == "cuda":
                torch.cuda.empty_cache()
            peer = trl(shape, a.steps, a.device)
            print(f"{name}: TRL {peer['seconds']:.5f} s/step, {shape['pairs'] / peer['seconds']:,.0f} pairs/s, peak "
                  f"{peer['memory'] / 2**30:.1f} GiB; ratio {peer['seconds'] / mine['seconds']:.1f}", flush=True)


if __name__ == "__main__":
    main()
