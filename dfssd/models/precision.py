"""In which precision a network computes: what the hardware does natively, on purpose and said.

float32 stays: weights of the student, losses, anchor points, decoded boxes, optimiser. On NVIDIA cards from Ampere on,
"fp32" multiplies in TF32 (10 bits of mantissa) unless `--no-tf32`; validation never does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dfssd.errors import DfssdError

# What each precision of `dfssd.config.choices` but auto is; None is float32.
DTYPES: dict[str, torch.dtype | None] = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}
NATIVE_BF16 = (8, 0)  # compute capability; `torch.cuda.is_bf16_supported()` also says yes to emulation


def autocast_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """Type of the forward pass: None is float32.

    'auto' takes bfloat16 where it is native (compute capability 8.0, AVX512-BF16, AMX), else float16 on a GPU and
    float32 on a CPU.

    Raises:
        DfssdError: bf16 is asked for on a GPU that only emulates it.
    """
    if amp != "auto":
        if amp == "bf16" and device.type == "cuda" and not bf16_is_native(device):
            raise DfssdError(
                f"--amp bf16: {torch.cuda.get_device_name(device)} computes it only by emulation, slower than fp32",
                todo="take --amp auto (fp16 on this card) or --amp fp32",
            )
        return DTYPES[amp]
    if bf16_is_native(device):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else None


def bf16_is_native(device: torch.device) -> bool:
    """Does the device compute bfloat16 itself? On a CPU it pays only with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= NATIVE_BF16
    flags = Path("/proc/cpuinfo")
    known = flags.read_text() if flags.exists() else ""
    return "avx512_bf16" in known or "amx_bf16" in known


@contextmanager
def for_training(device: torch.device, tf32: bool) -> Iterator[None]:
    """Settings of cuDNN and cuBLAS for a loop of constant shapes; nothing on a CPU."""
    with _cuda(device, tf32=tf32, benchmark=True):
        yield


@contextmanager
def for_validation(device: torch.device) -> Iterator[None]:
    """Exact float32, and no search for the fastest kernel: rectangular batches have many shapes."""
    with _cuda(device, tf32=False, benchmark=False):
        yield


@contextmanager
def _cuda(device: torch.device, tf32: bool, benchmark: bool) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = tf32, tf32, benchmark
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = before


def describe(dtype: torch.dtype | None, device: torch.device, tf32: bool) -> str:
    """The precision in words, for the log."""
    name = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16, gradients scaled"}[dtype]
    coarse = device.type == "cuda" and tf32 and torch.cuda.get_device_capability(device) >= NATIVE_BF16
    return f"{name} (TF32 where it multiplies)" if coarse and dtype is None else name
