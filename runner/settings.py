"""What a run is told besides its method and its env: the loop, the hardware, the logger."""

from __future__ import annotations

import dataclasses

from runner.knobs import knob


@dataclasses.dataclass(frozen=True)
class Loop:
    steps: int = knob(1000, "updates to make: one stream.next() and one method.update() each", low=1)
    log_every: int = knob(100, "updates between two lines of metrics.jsonl", low=1)
    eval_every: int = knob(0, "updates between evaluations while training; 0: only at the end", low=0)
    validate_every: int = knob(0, "updates between validations (held-out, never the gold metric); 0: none", low=0)
    select: str = knob("last", "weights that are evaluated at the end: the last ones, or those of the best validation",
                       choices=["last", "best"])
    save_steps: int = knob(0, "updates between checkpoints; 0: by time alone", low=0)
    save_seconds: float = knob(60.0, "seconds between checkpoints; 0: by steps alone", low=0.0)
    keep: int = knob(2, "checkpoints kept; the older ones are the fall-back for a corrupt one", low=1)


@dataclasses.dataclass(frozen=True)
class Hardware:
    accelerator: str = knob("auto", "where tensors live", choices=["auto", "cpu", "gpu", "mps"])
    devices: int = knob(1, "processes, one device each; 0: every device of this machine", low=0)
    strategy: str = knob("auto", "how several devices share a run", choices=["auto", "ddp", "fsdp"])
    precision: str = knob("32-true", "arithmetic of the networks: float32, or bfloat16 products under float32 weights",
                          choices=["32-true", "bf16-mixed"])
    seeds: int = knob(1, "seeds trained at once in this process, from `seed` on; each leaves a run of its own", low=1)
    graph: bool = knob(True, "record updates in CUDA graphs where GPU, method and batches allow it")
    compile: bool = knob(False, "networks of transformer blocks through torch.compile: up to a minute more at the start, then "
                         "about a seventh faster where arithmetic takes the time")
    threads: int = knob(1, "CPU threads of a process; 1 is 3 to 5 times faster than 2 for small nets", low=1)


@dataclasses.dataclass(frozen=True)
class Logger:
    kind: str = knob("none", "mirror of metrics.jsonl", choices=["none", "csv", "wandb"])
    mode: str = knob("offline", "W&B: offline needs no account; online uploads", choices=["offline", "online"])
    project: str = knob("ballast", "W&B project")
    entity: str | None = knob(None, "W&B team or user")


# Keys that do not change what is computed and so do not enter a run's identity.
LATER = {"hardware.compile": False}  # added when runs existed: at these values they are left out, too, and old runs keep their id
EXCLUDED = ("runs", "logger", "loop.save_steps", "loop.save_seconds", "loop.keep")
