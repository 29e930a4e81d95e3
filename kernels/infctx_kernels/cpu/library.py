"""The C++ kernels: compiled for this machine's CPU on first use, then loaded from a cache.

Nothing but a compiler is needed: plain C functions, called through ctypes. OpenMP comes from torch, which has it loaded
already, so that both share one set of threads.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCES = ("wkv6.cpp", "surrounding.cpp")
HEADERS = ("vector.h",)
COMPILERS = ("g++", "clang++", "c++")
COMPILE_SECONDS = 300
LIBRARY_NAME = "kernels.so"
# -ffast-math would change the whole process's treatment of denormals when the library is loaded.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
# The first that can be built and loaded: some compilers take no -march on their architecture, and Apple's takes
# -fopenmp in its own way only.
CPU_FLAGS = (("-march=native",), ("-mcpu=native",), ())
# Where the system's OpenMP is left out, its functions are found in the one that torch has loaded: one set of threads.
WITHOUT_OPENMP = ("-nodefaultlibs", "-lstdc++", "-lm", "-lc", "-lgcc_s", "-lgcc")
OPENMP_FLAGS = (
    (("-fopenmp",), WITHOUT_OPENMP),
    (("-Xpreprocessor", "-fopenmp"), ("-undefined", "dynamic_lookup")),
    (("-fopenmp",), ()),
    ((), ()),
)

_log = logging.getLogger("infctx_kernels")


class LibraryError(Exception):
    """The kernels could not be built or loaded here; the message says what would help."""


@functools.cache
def load_library() -> ctypes.CDLL:
    """Build the library if this machine has none of this version, and load it.

    Raises:
        LibraryError: no compiler, or it failed.
    """
    result = _load_or_reason()
    if isinstance(result, str):
        raise LibraryError(result)
    return result


@functools.cache
def why_not() -> str | None:
    """The reason why there is no library here, or None; tried once in a process."""
    result = _load_or_reason()
    return result if isinstance(result, str) else None


def is_built() -> bool:
    """Whether the library of this version is in the cache; builds nothing."""
    compiler = _compiler()
    if os.name != "posix" or compiler is None:
        return False
    try:
        return (_cache_folder() / _build_key(compiler) / LIBRARY_NAME).exists()
    except LibraryError:
        return False


@functools.cache
def _load_or_reason() -> ctypes.CDLL | str:
    try:
        return _load()
    except LibraryError as error:
        return str(error)


def _compiler() -> str | None:
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


def _load() -> ctypes.CDLL:
    if os.name != "posix":
        raise LibraryError("the C++ kernels are built on Linux and macOS only")
    compiler = _compiler()
    if compiler is None:
        raise LibraryError(
            "no C++ compiler found (g++ or clang++). With one, training on a CPU is several times as fast; "
            "on Debian or Ubuntu: sudo apt-get install g++"
        )
    folder = _cache_folder() / _build_key(compiler)
    library = folder / LIBRARY_NAME
    # One builds, the others wait for it; the lock dies with its process.
    with _locked(folder):
        if library.exists():
            try:
                return ctypes.CDLL(str(library))
            except OSError as error:
                _log.warning("%s cannot be loaded (%s): building it again", library, error)
        return _build(compiler, library)


def _build(compiler: str, library: Path) -> ctypes.CDLL:
    here = Path(__file__).parent
    sources = [str(here / name) for name in SOURCES]
    failure = ""
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        built = Path(scratch) / library.name
        for openmp, libraries in OPENMP_FLAGS:
            for cpu in CPU_FLAGS:
                command = [compiler, *FLAGS, *cpu, *openmp, "-o", str(built), *sources, *libraries]
                try:
                    # In a scratch folder, for a compiler leaves files behind when it is stopped.
                    done = subprocess.run(command, capture_output=True, text=True, cwd=scratch, timeout=COMPILE_SECONDS)
                except (OSError, subprocess.TimeoutExpired) as error:
                    raise LibraryError(f"{compiler} could not be run to build the kernels: {error}") from error
                if done.returncode != 0:
                    failure = failure or done.stderr.strip()
                    continue
                try:
                    loaded = ctypes.CDLL(str(built))
                except OSError as error:
                    failure = failure or str(error)
                    continue
                os.replace(built, library)
                return loaded
    raise LibraryError(f"{compiler} could not build the kernels: {failure[:2000]}")


def _build_key(compiler: str) -> str:
    """A name for what the library depends on: sources, options, compiler, CPU and the OpenMP it will use."""
    here = Path(__file__).parent
    parts = [(here / name).read_bytes() for name in (*SOURCES, *HEADERS)]
    parts += [repr((FLAGS, CPU_FLAGS, OPENMP_FLAGS)).encode(), _cpu_description().encode()]
    try:
        parts.append(subprocess.run([compiler, "--version"], capture_output=True, timeout=COMPILE_SECONDS).stdout)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LibraryError(f"{compiler} could not be run to build the kernels: {error}") from error
    parts += [compiler.encode(), torch.__version__.encode()]
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:24]


def _cpu_description() -> str:
    """What -march=native depends on: code for one CPU may stop another with an illegal instruction."""
    description = [platform.machine(), platform.processor()]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return " ".join(description)
    names = ("model name", "flags", "Features", "CPU part")
    return " ".join(description + sorted({line for line in lines if line.startswith(names)}))


def _cache_folder() -> Path:
    """A folder of this user's alone: whoever can write there can have code run here."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for folder in (home / "infctx_kernels", Path(tempfile.gettempdir()) / f"infctx_kernels-{os.getuid()}"):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = folder.stat()
            if found.st_uid == os.getuid() and not found.st_mode & 0o022 and os.access(folder, os.W_OK):
                return folder
        except OSError:
            continue
    raise LibraryError(f"no folder to keep the built kernels in: {home} cannot be written to by this user alone")


class _locked:
    """Hold the lock of a folder, made if need be."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            self.file = (self.folder / "lock").open("w")
            fcntl.flock(self.file, fcntl.LOCK_EX)
        except OSError as error:
            raise LibraryError(f"the built kernels cannot be kept in {self.folder}: {error}") from error

    def __exit__(self, *exc: object) -> None:
        self.file.close()
