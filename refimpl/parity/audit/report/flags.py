"""What of PyTorch's settings decides how operations compute, as it is in force now."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch

READING = (
    ("backends.cuda.matmul.allow_tf32", "FP32 products on the GPU read 10 bits of each operand's fraction"),
    ("backends.cuda.matmul.fp32_precision", "the same, as newer versions of PyTorch call it"),
    ("backends.cuda.matmul.allow_fp16_reduced_precision_reduction", "sums of FP16 products may be added up in FP16"),
    ("backends.cuda.matmul.allow_bf16_reduced_precision_reduction", "sums of BF16 products may be added up in BF16"),
    ("backends.cuda.matmul.allow_fp16_accumulation", "FP16 products are summed in FP16"),
    ("backends.cudnn.allow_tf32", "FP32 convolutions and RNNs on the GPU use TF32"),
    ("backends.cudnn.enabled", "cuDNN's kernels are used"),
    ("backends.cudnn.benchmark", "cuDNN chooses its convolution kernels by timing them"),
    ("backends.mkldnn.enabled", "oneDNN's kernels are used on the CPU"),
    ("backends.mkldnn.matmul.fp32_precision", "the precision of FP32 products of oneDNN"),
)  # fmt: skip
"""(setting, what it means where it is on)."""
CALLED = (
    ("get_float32_matmul_precision", "highest: FP32; high: TF32 or three BF16 products; medium: one BF16 product"),
    ("get_default_dtype", "the format of tensors that are made without one"),
    ("are_deterministic_algorithms_enabled", "only kernels that give the same bits each time"),
    ("backends.cuda.flash_sdp_enabled", "attention may take the flash kernel"),
    ("backends.cuda.mem_efficient_sdp_enabled", "attention may take the memory-efficient kernel"),
    ("backends.cuda.math_sdp_enabled", "attention may be computed from its parts"),
    ("backends.cuda.cudnn_sdp_enabled", "attention may take cuDNN's kernel"),
    ("backends.cuda.fp16_bf16_reduction_math_sdp_allowed", "attention from its parts may add up in 16 bits"),
)  # fmt: skip
"""(function, what it says)."""
VARIABLES = (
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "CUBLAS_WORKSPACE_CONFIG",
    "ONEDNN_DEFAULT_FPMATH_MODE",
)
"""Variables of the environment that change what the libraries below PyTorch compute."""


def flags_in_force() -> list[dict[str, Any]]:
    """Return the settings as plain data: name, value, meaning. Those that this version of PyTorch lacks are left out."""
    return [{"name": f"torch.{name}", "value": value, "meaning": meaning} for name, value, meaning in _settings()] + [
        {"name": name, "value": os.environ[name], "meaning": "environment variable"}
        for name in VARIABLES
        if name in os.environ
    ]


def versions() -> dict[str, str]:
    """Return what the audit ran on."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
    found["threads"] = str(torch.get_num_threads())
    found["cpu capability"] = torch.backends.cpu.get_cpu_capability()
    if torch.cuda.is_available():
        found |= {
            "gpu": torch.cuda.get_device_name(),
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),
        }
    return found


def _settings() -> Iterator[tuple[str, Any, str]]:
    for name, meaning in READING:
        with suppress(Exception):
            yield name, _value(_named(name)), meaning
    for name, meaning in CALLED:
        with suppress(Exception):
            yield name, _value(_named(name)()), meaning


def _named(name: str) -> Any:
    found: Any = torch
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _value(value: Any) -> Any:
    return value if isinstance(value, bool | int | str) else str(value).removeprefix("torch.")
