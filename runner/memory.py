"""Results of costly computations that several runs share, kept beside the data sets: such as a reference policy's
log-probabilities of a data set. A file's name is the digest of all that the result depends on."""

from __future__ import annotations

import hashlib
import os
import tempfile

import torch
from torch import Tensor

from runner.places import data_root

LEAST = 50_000_000  # numbers in `of`, weights above all, from which computing again costs more than keeping


class Memory:
    """`precision`: of the run, on which results depend. `writes`: one process of several does."""

    def __init__(self, precision: str, writes: bool = True, least: int = LEAST):
        self.precision, self.writes, self.least = precision, writes, least

    def __call__(self, name: str, of: dict[str, Tensor], compute) -> dict[str, Tensor]:
        if sum(t.numel() for t in of.values()) < self.least:
            return compute()
        from safetensors.torch import load_file, save_file

        device = next(iter(of.values())).device
        path = data_root().parent / "remembered" / f"{name}-{self.digest(of)}.safetensors"
        try:
            return {k: v.to(device) for k, v in load_file(path).items()}
        except FileNotFoundError:
            pass
        except Exception:  # a file that was cut off: it is written anew
            path.unlink(missing_ok=True)
        out = compute()
        if self.writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, part = tempfile.mkstemp(dir=path.parent)
            os.close(handle)
            save_file({k: v.detach().cpu().contiguous() for k, v in out.items()}, part)
            os.replace(part, path)  # readers see all of it or nothing
        return out

    def digest(self, of: dict[str, Tensor]) -> str:
        out = hashlib.sha256(f"{self.precision}/{torch.__version__}".encode())
        for name, tensor in sorted(of.items()):
            out.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            plain = tensor.detach().cpu().contiguous()
            out.update(plain.view(torch.uint8).numpy().data if plain.dim() else plain.unsqueeze(0).view(torch.uint8).numpy().data)
        return out.hexdigest()[:24]
