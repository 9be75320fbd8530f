"""Several processes for one run: how they are started, and how they share a method."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

import torch
from torch import nn

from runner.errors import UserError


def device_count(hardware: dict) -> int:
    """Processes that a hardware profile asks for; refuses more GPUs than there are."""
    gpus = torch.cuda.device_count() if hardware["accelerator"] in ("auto", "gpu") else 0
    if hardware["devices"] == 0:
        return gpus or os.cpu_count() or 1
    if gpus and hardware["devices"] > gpus:
        raise UserError(f"hardware.devices={hardware['devices']}, but this machine has {gpus} GPUs")
    return hardware["devices"]


def launch(config: dict, number: int, include=(), arguments=()) -> int:
    """Start `number` processes on a frozen config through torchrun. Returns the exit code."""
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as f:
        json.dump({"config": config, "include": [str(p) for p in include]}, f)
    try:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
                   "--nproc-per-node", str(number), "-m", "runner", "worker", f.name, *arguments]
        env = {**os.environ, "OMP_NUM_THREADS": str(config["hardware"]["threads"])}
        return subprocess.run(command, env=env).returncode
    finally:
        os.unlink(f.name)


def share(method: nn.Module, fabric, strategy: str):
    """Before the optimisers are made: equal weights on every rank; for fsdp every network is sharded."""
    for tensor in method.state_dict().values():
        tensor.copy_(fabric.broadcast(tensor, 0))
    if strategy != "fsdp":
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(fabric.device.type, (fabric.world_size,))
    for child in method.children():
        fully_shard(child, mesh=mesh)
        # A network's other entry points (`log_prob`, `first`) need its parameters gathered as much as `forward` does.
        for name, member in vars(type(child)).items():
            if callable(member) and not name.startswith("_") and name not in vars(nn.Module):
                register_fsdp_forward_method(child, name)
