"""Everything infctx doctor tells, as plain values."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import infctx
from infctx.doctor.packages import Package, look_at_packages

HEAD_SIZE = 64
COMPILERS = ("g++", "clang++", "c++")
PROGRAMS = (*COMPILERS, "ninja")
# What the processor has beside the vector width that torch names.
INSTRUCTIONS = {"avx512_bf16": "bf16", "amx_bf16": "AMX"}

# Found by driving each engine on two ranks beside the gradient of one process, relative error 6e-2, no exception.
SILENTLY_WRONG = (
    "ZeRO-1 and ZeRO-2: several backward passes a step, the last of them not marked",
    "ZeRO-3: chunks run through engine.module instead of the engine",
    "ZeRO-3 under Lightning's Trainer, however the passes are marked",
)


def machine_facts() -> dict[str, Any]:
    """What is here and what is not; nothing but torch is imported that takes long.

    Returns:
        versions: of infctx, Python and every package asked for; None = missing. machine: processor, memory, disk.
        devices: the GPUs. backends: of WKV6, with the reason where one is not usable. packages: state of each, and what
        it brings. programs: paths of compilers and ninja. silently_wrong: combinations of what is installed that give
        wrong gradients without a word, outside of infctx. problems: what is broken, and what to do.
    """
    packages = look_at_packages()
    torch_problem = _torch_problem()
    problems = _package_problems(packages)
    programs = {name: _path_of(name) for name in PROGRAMS}
    devices: list[dict[str, Any]] = []
    backends: dict[str, Any] = {"device": None, "chosen": None, "wkv6": {}}
    if torch_problem is not None:
        if not any(problem["of"] == "torch" for problem in problems):
            what = f"torch: {torch_problem}"
            problems.append({"of": "torch", "what": what, "do": "pip install torch", "is_core": True})
    else:
        devices, device_problems = _devices()
        backends = _backends(programs, has_gpu=bool(devices))
        problems += device_problems
    problems += _program_problems(packages, programs)
    versions = {"infctx": infctx.__version__, "python": platform.python_version()}
    return {
        "versions": {**versions, **{package.name: package.version for package in packages}},
        "machine": _machine(with_torch=torch_problem is None),
        "devices": devices,
        "backends": backends,
        "packages": {package.name: _as_values(package) for package in packages},
        "programs": programs,
        "silently_wrong": _silently_wrong(packages),
        "problems": problems,
    }


def _torch_problem() -> str | None:
    try:
        import torch  # noqa: F401
    except Exception as error:
        return f"import torch fails: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return None


def _as_values(package: Package) -> dict[str, Any]:
    return {
        "state": package.state,
        "version": package.version,
        "asked": package.asked,
        "extra": package.extra,
        "is_core": package.is_core,
        "brings": package.brings,
        "install": package.install,
    }


def _package_problems(packages: Sequence[Package]) -> list[dict[str, Any]]:
    problems = []
    for package in packages:
        if package.problem is not None or (package.is_core and package.state == "missing"):
            what = f"{package.name}: {package.problem or 'missing'}"
            problems.append({"of": package.name, "what": what, "do": package.install, "is_core": package.is_core})
    return problems


def _machine(*, with_torch: bool) -> dict[str, Any]:
    folder = Path.cwd()
    threads, vectors = None, None
    if with_torch:
        import torch

        threads, vectors = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    total, free = _memory_bytes()
    lines = _proc("cpuinfo")
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "instructions": [
            *([vectors] if vectors else []),
            *(name for flag, name in INSTRUCTIONS.items() if flag in flags),
        ],
        "memory_bytes": total,
        "free_memory_bytes": free,
        "folder": str(folder),
        "free_disk_bytes": shutil.disk_usage(folder).free,
    }


def _memory_bytes() -> tuple[int | None, int | None]:
    """All, and what can be used without pushing anything out; None where the system does not tell."""
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in _proc("meminfo") if line.endswith("kB")}
    return sizes.get("MemTotal"), sizes.get("MemAvailable")


def _proc(name: str) -> list[str]:
    try:
        return (Path("/proc") / name).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _path_of(program: str) -> str | None:
    """Where a program is: on the path, or beside this Python, where pip puts programs."""
    return shutil.which(program) or shutil.which(program, path=str(Path(sys.executable).parent))


def _devices() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The GPUs, and what keeps them from being used."""
    import torch

    devices, problems = [], []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free = None
        try:
            free, _ = torch.cuda.mem_get_info(index)
        except RuntimeError as error:
            what = f"cuda:{index} ({properties.name}) cannot be used: {str(error).splitlines()[0]}"
            do = "end what else uses it, or look at nvidia-smi"
            problems.append({"of": f"cuda:{index}", "what": what, "do": do, "is_core": False})
        devices.append(
            {
                "name": f"cuda:{index}",
                "model": properties.name,
                "memory_bytes": properties.total_memory,
                "free_memory_bytes": free,
                "compute_capability": f"{properties.major}.{properties.minor}",
            }
        )
    if devices:
        return devices, problems
    has_driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    if torch.version.cuda is not None:
        why = "no GPU answers" if has_driver else "there is no NVIDIA driver"
        what = f"torch is built for CUDA {torch.version.cuda}, but {why}: it computes on the CPU"
        do = "with a GPU, install or mend its driver; without, torch's CPU build is several GB smaller"
        problems.append({"of": "cuda", "what": what, "do": do, "is_core": False})
    elif has_driver and torch.version.hip is None:
        what = "an NVIDIA driver is here, but torch is a build for CPUs: the GPU is not used"
        problems.append({"of": "cuda", "what": what, "do": "install torch's CUDA build", "is_core": False})
    return devices, problems


def _backends(programs: dict[str, str | None], *, has_gpu: bool) -> dict[str, Any]:
    """Which WKV6 backends can run; C++ kernels that are not built yet are left so, building takes up to a minute."""
    import torch

    from infctx_kernels.cpu import library
    from infctx_kernels.dispatch import FASTEST_FIRST, RUNS_ON, Backend, choose_backend

    device = torch.device("cuda" if has_gpu else "cpu")
    is_unbuilt = not has_gpu and any(programs[name] for name in COMPILERS) and not library.is_built()
    told: dict[str, dict[str, Any]] = {}
    for backend in FASTEST_FIRST:
        waits = is_unbuilt and backend is Backend.CPP
        reason = None if waits else RUNS_ON[backend](device, HEAD_SIZE, torch.float32)
        told[str(backend)] = {"is_usable": reason is None, "why_not": reason}
    chosen = Backend.CPP if is_unbuilt else choose_backend(None, device=device, head_size=HEAD_SIZE)
    return {"device": device.type, "chosen": str(chosen), "is_built": not is_unbuilt, "wkv6": told}


def _program_problems(packages: Sequence[Package], programs: dict[str, str | None]) -> list[dict[str, Any]]:
    has_compiler = any(programs[name] for name in COMPILERS)
    problems = []
    if not has_compiler:
        what = "no C++ compiler: training on a CPU takes several times as long without the C++ kernels"
        problems.append(
            {"of": "g++", "what": what, "do": "install g++, as: sudo apt-get install g++", "is_core": False}
        )
    has_deepspeed = any(package.name == "deepspeed" and package.version for package in packages)
    missing = [name for name, is_there in (("g++", has_compiler), ("ninja", bool(programs["ninja"]))) if not is_there]
    if has_deepspeed and missing:
        what = f"deepspeed builds its parts when it starts, and {' and '.join(missing)} is missing"
        do = "pip install ninja" if missing == ["ninja"] else "install g++ and ninja"
        problems.append({"of": "deepspeed", "what": what, "do": do, "is_core": False})
    return problems


def _silently_wrong(packages: Sequence[Package]) -> list[str]:
    """Combinations of what is installed; infctx itself does none of them."""
    version = next((package.version for package in packages if package.name == "deepspeed"), None)
    if version is None:
        return []
    return [f"deepspeed {version}, {combination}" for combination in SILENTLY_WRONG]
