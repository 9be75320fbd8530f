"""Several processes for one run: how they are started, and how they share a method."""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import uuid

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
    """Start `number` processes on a frozen config, as torchrun does. Returns the exit code."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # rank 0 tells what a person needs
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as f:
        json.dump({"config": config, "include": [str(p) for p in include]}, f)
    group = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=number, run_id=uuid.uuid4().hex, max_restarts=0,
                         rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0", local_addr="127.0.0.1")
    try:
        elastic_launch(group, sys.executable)("-m", "runner", "worker", f.name, *arguments)
        return 0
    except ChildFailedError as error:
        return abs(error.get_first_failure()[1].exitcode)
    except SignalException:
        return 143
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
        entries = {name for cls in type(child).__mro__ if cls.__module__.startswith("methods.")
                   for name, member in vars(cls).items() if callable(member) and not name.startswith("_")}
        fully_shard(child, mesh=mesh, reshard_after_forward=True)
        # A network's other entry points (`log_prob`, `first`) need its parameters gathered as much as `forward` does.
        for name in entries - {"forward"}:
            register_fsdp_forward_method(child, name)
