"""What this machine can do."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

import infctx
from infctx_kernels.dispatch import FASTEST_FIRST, RUNS_ON, choose_backend

PACKAGES = (
    "torch",
    "lightning",
    "peft",
    "safetensors",
    "pyrwkv-tokenizer",
    "pydantic",
    "triton",
    "deepspeed",
    "bitsandbytes",
)
HEAD_SIZE = 64


def machine_facts() -> dict[str, dict[str, Any]]:
    """Versions, devices, and for each WKV6 backend "usable", "usable, chosen by default" or the reason why not."""
    versions: dict[str, Any] = {"infctx": infctx.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    devices: dict[str, Any] = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fastest = choose_backend(None, device=device, head_size=HEAD_SIZE)
    backends: dict[str, Any] = {}
    for backend in FASTEST_FIRST:
        refusal = RUNS_ON[backend](device, HEAD_SIZE, torch.float32)
        backends[str(backend)] = refusal or ("usable, chosen by default" if backend is fastest else "usable")
    return {"versions": versions, "devices": devices, f"backends on {device.type}": backends}
