"""Products with an epilogue that torch does not offer, from the cuBLASLt library that torch itself runs on: gelu that also keeps
what it was given, and gelu's derivative.

Matrices are torch's, rows first, in half precision; cuBLASLt counts columns first, so that every product here is handed over
transposed. Reference: NVIDIA's cuBLAS library documentation, cublasLtMatmul.
"""

from __future__ import annotations

import ctypes as c
import functools

import torch
from torch import Tensor

_FLOAT, _TYPES = 0, {torch.float16: 2, torch.bfloat16: 14}  # cudaDataType
_COMPUTE = 68                                       # CUBLAS_COMPUTE_32F
_TRANSPOSE_A, _TRANSPOSE_B, _EPILOGUE, _BIAS, _AUX, _AUX_STRIDE = 3, 4, 7, 8, 11, 12  # cublasLtMatmulDescAttributes_t
_GELU_AUX_BIAS, _DGELU = 164, 192  # cublasLtEpilogue_t
WORKSPACE = 32 << 20


class _Found(c.Structure):
    """cublasLtMatmulHeuristicResult_t"""
    _fields_ = [("algorithm", c.c_uint64 * 8), ("workspace", c.c_size_t), ("state", c.c_int), ("waves", c.c_float),
                ("reserved", c.c_int * 4)]


def _check(code: int):
    if code:
        raise RuntimeError(f"cuBLASLt gave back status {code}")


@functools.cache
def _library():
    version = (torch.version.cuda or "0").split(".")[0]
    try:
        library = c.CDLL(f"libcublasLt.so.{version}")
    except OSError:
        return None
    return library


def available() -> bool:
    return _library() is not None


@functools.cache
def _handle(device: int):
    handle = c.c_void_p()
    with torch.cuda.device(device):
        _check(_library().cublasLtCreate(c.byref(handle)))
    return handle, torch.empty(WORKSPACE, dtype=torch.uint8, device=f"cuda:{device}")


class _Plan:
    """op(a) op(b) in columns-first terms, a and b given as (rows, columns, stride of columns, whether transposed)."""

    def __init__(self, dtype: torch.dtype, a: tuple[int, int, int, int], b: tuple[int, int, int, int], out: tuple[int, int],
                 epilogue: int):
        library, self.description = _library(), c.c_void_p()
        _check(library.cublasLtMatmulDescCreate(c.byref(self.description), c.c_int(_COMPUTE), c.c_int(_FLOAT)))
        for attribute, value in ((_TRANSPOSE_A, a[3]), (_TRANSPOSE_B, b[3]), (_EPILOGUE, epilogue)):
            self.set(attribute, c.c_int32(value))
        self.set(_AUX_STRIDE, c.c_int64(out[0]))
        self.layouts = [self._layout(dtype, *shape) for shape in (a[:3], b[:3], (*out, out[0]))]
        self.found = None

    def set(self, attribute: int, value):
        _check(_library().cublasLtMatmulDescSetAttribute(self.description, c.c_int(attribute), c.byref(value),
                                                         c.c_size_t(c.sizeof(value))))

    @staticmethod
    def _layout(dtype: torch.dtype, rows: int, columns: int, stride: int):
        out = c.c_void_p()
        _check(_library().cublasLtMatrixLayoutCreate(c.byref(out), c.c_int(_TYPES[dtype]), c.c_uint64(rows), c.c_uint64(columns),
                                                     c.c_int64(stride)))
        return out

    def _algorithm(self, handle):
        """The library's first choice: always the same for a shape."""
        if self.found is None:
            library, preference, found, number = _library(), c.c_void_p(), _Found(), c.c_int()
            a, b, out = self.layouts
            _check(library.cublasLtMatmulPreferenceCreate(c.byref(preference)))
            _check(library.cublasLtMatmulPreferenceSetAttribute(preference, c.c_int(1), c.byref(c.c_size_t(WORKSPACE)),
                                                                c.c_size_t(8)))
            _check(library.cublasLtMatmulAlgoGetHeuristic(handle, self.description, a, b, out, out, preference, c.c_int(1),
                                                          c.byref(found), c.byref(number)))
            _check(library.cublasLtMatmulPreferenceDestroy(preference))
            if not number.value:
                raise RuntimeError("cuBLASLt knows no algorithm for this product")
            self.found = found
        return self.found.algorithm

    def __call__(self, a: Tensor, b: Tensor, out: Tensor):
        handle, workspace = _handle(out.device.index)
        one, zero, at = c.c_float(1.0), c.c_float(0.0), (lambda t: c.c_void_p(t.data_ptr()))
        _check(_library().cublasLtMatmul(
            handle, self.description, c.byref(one), at(a), self.layouts[0], at(b), self.layouts[1], c.byref(zero), at(out),
            self.layouts[2], at(out), self.layouts[2], c.byref(self._algorithm(handle)), at(workspace), c.c_size_t(WORKSPACE),
            c.c_void_p(torch.cuda.current_stream(out.device).cuda_stream)))


@functools.cache
def _plan(kind: str, rows: int, inner: int, stride: int, outputs: int, dtype: torch.dtype, device: int) -> _Plan:
    weight = (inner, outputs, inner, 1) if kind == "gelu" else (outputs, inner, outputs, 0)
    return _Plan(dtype, weight, (inner, rows, stride, 0), (outputs, rows), _GELU_AUX_BIAS if kind == "gelu" else _DGELU)


def gelu(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """x (rows, inputs), whose rows may lie apart, weight (outputs, inputs), bias (outputs,) -> gelu(x W^T + b), by its
    approximation with tanh, and what gelu was given, (rows, outputs) each."""
    (rows, inner), outputs = x.shape, len(weight)
    out, before = (x.new_empty(rows, outputs) for _ in range(2))
    plan = _plan("gelu", rows, inner, x.stride(0), outputs, x.dtype, x.device.index)
    plan.set(_BIAS, c.c_void_p(bias.data_ptr()))
    plan.set(_AUX, c.c_void_p(before.data_ptr()))
    plan(weight, x, out)
    return out, before


def gelu_backward(gradient: Tensor, weight: Tensor, before: Tensor) -> Tensor:
    """gradient (rows, inner), weight (inner, outputs): (gradient W) gelu'(before), (rows, outputs)."""
    (rows, inner), outputs = gradient.shape, weight.shape[1]
    out = torch.empty_like(before)
    plan = _plan("gelu backward", rows, inner, inner, outputs, gradient.dtype, gradient.device.index)
    plan.set(_AUX, c.c_void_p(before.data_ptr()))
    plan(weight, gradient, out)
    return out

