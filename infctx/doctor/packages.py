"""The packages that infctx asks for: there, missing, of another version than asked for, or broken.

What is asked for is read from the package's own metadata, so that it is written in one place. Nothing heavy is
imported: a broken package is found by its files, by what it needs itself, and, where that is quick, by importing it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import InvalidRequirement, Requirement

import infctx

State = Literal["usable", "missing", "wrong version", "broken"]

BRINGS = {
    "datasets": "sets of the Hugging Face hub",
    "pyarrow": "Parquet files",
    "zstandard": ".zst files",
    "gguf": "GGUF, for llama.cpp",
    "bitsandbytes": "8-bit AdamW; nf4 and bnb-int8 bases",
    "deepspeed": "ZeRO, offload to host memory",
    "lm-eval": "infctx eval --tasks",
    "tensorboard": "run.loggers: [tensorboard]",
    "wandb": "run.loggers: [wandb]",
    "triton": "the kernels for NVIDIA GPUs",
}
# Each imports in a few hundredths of a second; what is left out takes seconds.
QUICK_TO_IMPORT = {
    "numpy",
    "safetensors",
    "pyrwkv-tokenizer",
    "pydantic",
    "pyyaml",
    "jsonlines",
    "jaxtyping",
    "fsspec",
    "rich",
    "typer",
}
MODULE_OF = {"pyyaml": "yaml"}
FOR_DEVELOPERS = ("test", "dev", "docs")


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """A package as it is here.

    Attributes:
        asked: the versions that infctx works with, as ">=0.19,<0.20"; "" = any.
        extra: of infctx, that brings it; None = it comes with infctx, or with torch.
        is_core: whether nothing works without it.
        version: None where it is missing.
        problem: what is wrong with it; None where it is usable or just missing.
        brings: what it is for; "" for the core.
    """

    name: str
    asked: str
    extra: str | None
    is_core: bool
    state: State
    version: str | None
    problem: str | None
    brings: str

    @property
    def install(self) -> str:
        """The command that puts it right."""
        if self.extra is not None:
            return f"pip install 'infctx[{self.extra}]'"
        return f"pip install '{self.name}{self.asked}'"


def asked_packages() -> list[tuple[Requirement, str | None]]:
    """What infctx asks for, each with the extra that brings it; None = always."""
    project = Path(infctx.__file__).resolve().parent.parent / "pyproject.toml"
    # In a checkout the file is newer than what was installed from it.
    found = tomllib.loads(project.read_text(encoding="utf-8")).get("project", {}) if project.is_file() else {}
    if found.get("name") == "infctx":
        extras = found.get("optional-dependencies", {})
        texts = [(text, None) for text in found.get("dependencies", [])]
        texts += [(text, extra) for extra, of_extra in extras.items() for text in of_extra]
        asked = [(Requirement(text), extra) for text, extra in texts]
    else:
        asked = [_from_metadata(text) for text in importlib.metadata.requires("infctx") or []]
    return [
        (one, extra)
        for one, extra in asked
        if extra not in FOR_DEVELOPERS and (one.marker is None or one.marker.evaluate({"extra": extra or ""}))
    ]


def _from_metadata(text: str) -> tuple[Requirement, str | None]:
    requirement = Requirement(text)
    marker = requirement.marker
    if marker is None or marker.evaluate({"extra": ""}):
        return requirement, None
    extras = importlib.metadata.metadata("infctx").get_all("Provides-Extra") or []
    return requirement, next((extra for extra in extras if marker.evaluate({"extra": extra})), None)


def look_at_packages() -> list[Package]:
    """Every package that infctx asks for, in that order, and Triton, which comes with torch for GPUs."""
    asked = asked_packages()
    found: dict[str, Package] = {}
    for requirement, extra in asked:
        if requirement.name not in found:
            found[requirement.name] = _look_at(requirement, extra)
    if "triton" not in found:
        found["triton"] = _look_at(Requirement("triton>=3.6"), None, is_core=False)
    return list(found.values())


def _look_at(requirement: Requirement, extra: str | None, *, is_core: bool | None = None) -> Package:
    name, asked = requirement.name, str(requirement.specifier)
    version, state, problem = _version_of(name), "usable", None
    if version is None:
        state = "missing"
    elif not requirement.specifier.contains(version, prereleases=True):
        state, problem = "wrong version", f"{version} is here, infctx asks for {asked}"
    elif (broken := _what_is_broken(name)) is not None:
        state, problem = "broken", broken
    return Package(
        name=name,
        asked=asked,
        extra=extra,
        is_core=extra is None if is_core is None else is_core,
        state=state,  # type: ignore[arg-type]
        version=version,
        problem=problem,
        brings=BRINGS.get(name, "" if extra is None else f"the extra {extra}"),
    )


def _version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _what_is_broken(name: str) -> str | None:
    module = MODULE_OF.get(name, name.replace("-", "_"))
    try:
        is_there = importlib.util.find_spec(module) is not None
        if is_there and name in QUICK_TO_IMPORT:
            importlib.import_module(module)
    except Exception as error:
        return f"import {module} fails: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    if not is_there:
        return f"its files are gone: there is no module {module}"
    unmet = list(_unmet(name))
    return f"it needs {', '.join(unmet)}" if unmet else None


def _unmet(name: str) -> Iterable[str]:
    """What a package asks for itself and does not find, its own extras aside."""
    for text in importlib.metadata.requires(name) or []:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version_of(requirement.name)
        if version is None:
            yield f"{requirement.name}{requirement.specifier}, which is missing"
        elif not requirement.specifier.contains(version, prereleases=True):
            yield f"{requirement.name}{requirement.specifier}, and {version} is here"
