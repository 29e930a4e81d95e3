"""Devices that a plan can be for: a few by name, and the one of this machine."""

from __future__ import annotations

import difflib
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from infctx.errors import RecipeError
from infctx.free_memory import free_host_bytes
from infctx.planning.activations import Device
from infctx_kernels.linear import linear

Place = Literal["device", "host", "disk"]
# Of a data sheet's rate, in the matrix products of a training step. Assumed, not measured on a GPU.
SHARE_OF_PEAK = 0.35
# Of the rate of one large matrix product on a CPU, the median of benchmarks/results/memory_plan.json.
CPU_SHARE_OF_PRODUCT = 0.63
# Plans are right to about this share: what misses by less is tried.
UNCERTAIN_SHARE = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceSpec:
    """A kind of device.

    memory_bytes: None = not told. flops_per_second: bf16 with float32 sums, dense, of the data sheet; on a CPU measured
    in float32. bytes_per_second: of its memory; None = not told. is_here: it is a device of this machine.
    """

    name: str
    kind: Device
    memory_bytes: int | None
    flops_per_second: float | None = None
    bytes_per_second: float | None = None
    is_here: bool = False


def _gpu(name: str, gigabytes: int, teraflops: float, gigabytes_per_second: float) -> DeviceSpec:
    return DeviceSpec(
        name=name,
        kind="cuda",
        memory_bytes=gigabytes * 10**9,
        flops_per_second=teraflops * 1e12,
        bytes_per_second=gigabytes_per_second * 1e9,
    )


# Memory, bf16 rate without sparsity and memory bandwidth of NVIDIA's data sheets.
CATALOG = (
    _gpu("rtx-3060", 12, 25.5, 360),
    _gpu("rtx-3090", 24, 71, 936),
    _gpu("rtx-4090", 24, 165, 1008),
    _gpu("l40s", 48, 362, 864),
    _gpu("a100-40gb", 40, 312, 1555),
    _gpu("a100-80gb", 80, 312, 2039),
    _gpu("h100", 80, 989, 3350),
    _gpu("h200", 141, 989, 4800),
)


def device_names() -> list[str]:
    """What `device_named` knows."""
    return ["cpu", *(spec.name for spec in CATALOG)]


def device_named(name: str) -> DeviceSpec:
    """A device of the catalogue; cpu is this machine's.

    Raises:
        RecipeError: there is none of this name; names the nearest and all.
    """
    wanted = name.strip().lower().replace("_", "-").replace(" ", "-")
    for spec in CATALOG:
        if spec.name == wanted:
            return spec
    if wanted == "cpu":
        return cpu_here()
    nearest = [name for name in device_names() if name.startswith(wanted)]
    nearest = nearest or difflib.get_close_matches(wanted, device_names(), n=1, cutoff=0.3)
    guess = f" Did you mean {nearest[0]}?" if nearest else ""
    raise RecipeError(
        f"--device {name}: there is no such device here.{guess} Expected one of {', '.join(device_names())}; for "
        "another, give its --memory, and its rate as --tflops."
    )


def device_here() -> DeviceSpec:
    """This machine's GPU, or its CPU."""
    if not torch.cuda.is_available():
        return cpu_here()
    properties = torch.cuda.get_device_properties(0)
    squeezed = properties.name.lower().replace(" ", "").replace("-", "")
    # "NVIDIA A100-SXM4-80GB" is an a100-80gb, "NVIDIA H200" an h200.
    known = [spec for spec in CATALOG if all(part in squeezed for part in spec.name.split("-"))]
    return DeviceSpec(
        name=properties.name,
        kind="cuda",
        memory_bytes=torch.cuda.mem_get_info(0)[0],
        flops_per_second=known[0].flops_per_second if known else None,
        bytes_per_second=known[0].bytes_per_second if known else None,
        is_here=True,
    )


def cpu_here() -> DeviceSpec:
    """This machine's CPU, with the memory that is free now."""
    return DeviceSpec(name="cpu", kind="cpu", memory_bytes=free_host_bytes(), is_here=True)


def cpu_flops_per_second(*, seconds: float = 0.15) -> float:
    """The rate of float32 matrix products on this CPU, measured now, with the threads that torch has.

    Args:
        seconds: to measure for, about.
    """
    x, weight = torch.ones(512, 768), torch.ones(2688, 768)
    linear(x, weight)
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < seconds:
        before = time.perf_counter()
        linear(x, weight)
        best = min(best, time.perf_counter() - before)
    return 2 * x.shape[0] * weight.numel() / best


def free_disk_bytes(folder: Path) -> int:
    """Of the disk that a folder is on, or will be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """Bytes of each device, and of a machine's host memory and disk; None = not told, and room for everything.

    Of a CPU the device is all of its memory.
    """

    device: int | None = None
    host: int | None = None
    disk: int | None = None

    def of(self, place: Place) -> int | None:
        """What there is of one of them."""
        return {"device": self.device, "host": self.host, "disk": self.disk}[place]
