"""infctx doctor: what is here, missing or broken, with metadata that is made up."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

from infctx.doctor import facts as facts_module
from infctx.doctor import packages as packages_module
from infctx.doctor.facts import machine_facts
from infctx.doctor.packages import Package, asked_packages, look_at_packages
from infctx.doctor.screen import doctor_screen
from infctx_kernels.cpu import library


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let packages be of a version; None = not installed."""
    real = importlib.metadata.version

    def pretend(**versions: str | None) -> None:
        def version(name: str) -> str:
            found = versions[name] if name in versions else real(name)
            if found is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return found

        monkeypatch.setattr(importlib.metadata, "version", version)

    return pretend


def by_name() -> dict[str, Package]:
    return {package.name: package for package in look_at_packages()}


def test_what_is_asked_for_is_what_the_project_says() -> None:
    asked = {requirement.name: (str(requirement.specifier), extra) for requirement, extra in asked_packages()}
    assert asked["torch"] == (">=2.11", None)
    assert asked["deepspeed"] == ("<0.20,>=0.19", "deepspeed")
    assert "pytest" not in asked
    assert set(packages_module.BRINGS) <= {*asked, "triton"}


def test_the_same_without_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Where there is no pyproject.toml beside the package, its metadata says it."""
    texts = ["torch>=2.11", 'gguf>=0.17; extra == "gguf"', 'pytest>=8; extra == "test"', 'x>1; sys_platform == "none"']
    monkeypatch.setattr(packages_module.infctx, "__file__", str(tmp_path / "infctx" / "__init__.py"))
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: texts)
    extras = SimpleNamespace(get_all=lambda key: ["gguf", "test"])
    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: extras)
    found = [(one.name, extra) for one, extra in asked_packages()]
    assert found == [("torch", None), ("gguf", "gguf")]


def test_missing_optional_packages_say_what_they_bring(installed: Callable[..., None]) -> None:
    installed(gguf=None, triton=None)
    found = by_name()
    assert found["gguf"].state == found["triton"].state == "missing"
    assert found["gguf"].install == "pip install 'infctx[gguf]'"
    assert found["triton"].install == "pip install 'triton>=3.6'"
    told = machine_facts()
    assert told["packages"]["gguf"]["brings"] == "GGUF, for llama.cpp"
    assert not any(problem["of"] in ("gguf", "triton") for problem in told["problems"])
    (line,) = (line for line in doctor_screen(told) if line.startswith("  gguf"))
    assert "missing: pip install 'infctx[gguf]'" in line
    assert "GGUF" in line


@pytest.mark.parametrize(("name", "version", "is_core"), [("deepspeed", "0.20.1", False), ("peft", "0.11.0", True)])
def test_versions_that_were_not_asked_for(
    installed: Callable[..., None], name: str, version: str, is_core: bool
) -> None:
    installed(**{name: version})
    told = machine_facts()
    assert told["packages"][name]["state"] == "wrong version"
    (problem,) = (problem for problem in told["problems"] if problem["of"] == name)
    assert version in problem["what"]
    assert problem["is_core"] is is_core
    assert problem["do"].startswith("pip install")
    screen = "\n".join(doctor_screen(told))
    assert (screen.endswith("All that infctx needs is here.")) is not is_core


def test_packages_that_are_broken(monkeypatch: pytest.MonkeyPatch, installed: Callable[..., None]) -> None:
    installed(accelerate=None)
    assert by_name()["peft"].state == "broken"
    assert "accelerate" in (by_name()["peft"].problem or "")
    real = packages_module.importlib.util.find_spec
    monkeypatch.setattr(
        packages_module.importlib.util, "find_spec", lambda name: None if name == "gguf" else real(name)
    )
    assert "no module gguf" in (by_name()["gguf"].problem or "")

    def refuse(name: str) -> Any:
        raise ImportError("built for another Python\nmore")

    monkeypatch.setattr(packages_module.importlib, "import_module", refuse)
    assert by_name()["safetensors"].problem == "import safetensors fails: built for another Python"


def test_all_three_silently_wrong_combinations_are_named_where_deepspeed_is(installed: Callable[..., None]) -> None:
    installed(deepspeed=None)
    assert machine_facts()["silently_wrong"] == []
    installed(deepspeed="0.19.8")
    told = machine_facts()
    assert len(told["silently_wrong"]) == 3
    assert all(one.startswith("deepspeed 0.19.8, ") for one in told["silently_wrong"])
    screen = "\n".join(doctor_screen(told))
    assert all(one.partition(", ")[2] in screen for one in told["silently_wrong"])


def test_without_a_compiler_and_ninja(monkeypatch: pytest.MonkeyPatch, installed: Callable[..., None]) -> None:
    installed(deepspeed="0.19.8")
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    told = machine_facts()
    assert {problem["of"] for problem in told["problems"]} >= {"g++", "deepspeed"}
    (of_deepspeed,) = (problem for problem in told["problems"] if problem["of"] == "deepspeed")
    assert "g++ and ninja" in of_deepspeed["what"]
    assert not of_deepspeed["is_core"]


def test_torch_for_gpus_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(facts_module, "_backends", lambda programs, has_gpu: {"wkv6": {}})
    monkeypatch.setattr(shutil, "which", lambda name, path=None: f"/bin/{name}" if name != "nvidia-smi" else None)
    monkeypatch.setattr(facts_module.Path, "exists", lambda self: False)
    (problem,) = (problem for problem in machine_facts()["problems"] if problem["of"] == "cuda")
    assert "CUDA 13.0, but there is no NVIDIA driver" in problem["what"]


def test_gpus_with_memory_and_one_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="NVIDIA H200", total_memory=150_000_000_000, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)

    def memory(index: int) -> tuple[int, int]:
        if index:
            raise RuntimeError("CUDA error: out of memory\nlong story")
        return 120_000_000_000, properties.total_memory

    monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
    monkeypatch.setattr(
        facts_module,
        "_backends",
        lambda programs, has_gpu: (
            {"wkv6": {"triton": {"is_usable": True, "why_not": None}}}
            | {"device": "cuda", "chosen": "triton", "is_built": True}
        ),
    )
    told = machine_facts()
    assert [device["free_memory_bytes"] for device in told["devices"]] == [120_000_000_000, None]
    assert any(problem["of"] == "cuda:1" and "out of memory" in problem["what"] for problem in told["problems"])
    screen = doctor_screen(told)
    assert any("120 GB of 150 GB free" in line for line in screen)
    assert max(map(len, screen)) <= 80


def test_without_torch(monkeypatch: pytest.MonkeyPatch, installed: Callable[..., None]) -> None:
    installed(torch=None)
    monkeypatch.setattr(facts_module, "_torch_problem", lambda: "import torch fails: No module named 'torch'")
    told = machine_facts()
    assert next(problem["of"] for problem in told["problems"] if problem["is_core"]) == "torch"
    assert told["backends"]["wkv6"] == {}
    assert doctor_screen(told)[-1] == "Something that infctx needs is missing or broken."


def test_kernels_that_are_not_built_are_not_built_by_looking(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "_load", lambda: pytest.fail("it builds"))
    told = machine_facts()["backends"]
    assert told["device"] == "cpu"
    assert told["chosen"] == "cpp"
    assert not told["is_built"]
    assert not list(tmp_path.rglob("*.so"))
    assert any("built when it is first used" in line for line in doctor_screen(machine_facts()))


def test_one_screen_where_nothing_is_broken() -> None:
    told = machine_facts()
    screen = doctor_screen(told)
    assert len(screen) - 2 * len(told["problems"]) <= 24
    assert max(map(len, screen)) <= 80
    marked = doctor_screen(told, style=lambda text, kind: f"<{kind}>{text}</>")
    assert any(line.startswith("<label>") for line in marked)


def test_nothing_heavy_but_torch_is_imported() -> None:
    code = (
        "import sys\nfrom infctx.doctor.facts import machine_facts\nmachine_facts()\n"
        "print([name for name in ('lightning', 'peft', 'transformers', 'deepspeed', 'bitsandbytes', 'datasets', "
        "'pyarrow', 'gguf') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_requirements_with_markers_of_other_systems_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        packages_module.importlib.metadata, "requires", lambda name: ["nothing-like-it>1; sys_platform == 'none'"]
    )
    assert packages_module._look_at(Requirement("gguf>=0.1"), "gguf").state == "usable"
