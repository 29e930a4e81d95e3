"""A small model, small data, and three ways to run a command: here, in a forked process, in a fresh one."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import infctx
from infctx.cli import main

SERVER = Path(__file__).with_name("fork_server.py")
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Stdout, which must be exactly one JSON object on one or more lines, strict JSON."""

        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is not JSON: {self.out}")

        value = json.loads(self.out, parse_constant=refuse)
        assert isinstance(value, dict), self.out
        return value

    def ok(self) -> Ended:
        assert self.code == 0, f"exit {self.code}\n{self.out}\n{self.err}"
        return self

    def refused(self, *words: str, code: int = 2) -> Ended:
        """The user's mistake: exit code, no traceback, nothing on stdout, every word in the message."""
        assert "Traceback" not in self.err, self.err
        assert self.code == code, f"exit {self.code}\n{self.out}\n{self.err}"
        assert self.out == ""
        for word in words:
            assert word in self.err, f"{word!r} is not in: {self.err}"
        return self


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The forked processes have one thread; sums are to be added up in the same order here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Run a command in this process."""

    def run(*arguments: object) -> Ended:
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return Ended(code=end.value.code, out=out, err=err)

    return run


class Process:
    """A command in a process of its own."""

    def __init__(self, server: ForkServer, pid: int, stdout: Path, stderr: Path) -> None:
        self._server, self.pid, self._stdout, self._stderr = server, pid, stdout, stderr

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    @property
    def err(self) -> str:
        return self._stderr.read_text() if self._stderr.exists() else ""

    def wait(self) -> Ended:
        code = int(self._server.ask({"wait": self.pid}))
        return Ended(code=code, out=self._stdout.read_text(), err=self.err)

    def wait_for(self, is_there: Callable[[], bool], *, seconds: float = 60.0) -> None:
        """Look until something is there, which must happen before the process ends."""
        deadline = time.monotonic() + seconds
        while not is_there():
            assert time.monotonic() < deadline, f"waited {seconds} s: {self.err}"
            time.sleep(0.001)


class ForkServer:
    """See fork_server.py."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._process = subprocess.Popen(
            [sys.executable, str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self._is_ready = False

    def ask(self, request: dict[str, object]) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if not self._is_ready:
            assert self._process.stdout.readline() == "ready\n"
            self._is_ready = True
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()

    def start(
        self,
        *arguments: object,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        max_file_bytes: int | None = None,
        encoding: str | None = None,
        nobody_reads: bool = False,
    ) -> Process:
        """encoding: of stdout. nobody_reads: stderr is a pipe whose other end is closed, as of `| head -1`."""
        self._count += 1
        stdout, stderr = (self._folder / f"{self._count}.{name}" for name in ("out", "err"))
        request = {
            "arguments": [str(argument) for argument in arguments],
            "cwd": str(cwd or self._folder),
            "env": env or {},
            "max_file_bytes": max_file_bytes,
            "encoding": encoding,
            "nobody_reads": nobody_reads,
            "stdout": str(stdout),
            "stderr": str(stderr),
        }
        return Process(self, int(self.ask(request)), stdout, stderr)

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        assert self._process.stdout is not None
        self._process.stdout.close()


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    server = ForkServer(tmp_path_factory.mktemp("forks"))
    yield server
    server.stop()


@pytest.fixture
def fresh_process() -> Callable[..., Ended]:
    """Run Python in a new process: slow, for what depends on how a process begins."""

    def run(*arguments: object, cwd: Path = ROOT, env: dict[str, str] | None = None, stdin: str = "") -> Ended:
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            input=stdin,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=120,
            check=False,
        )
        return Ended(code=done.returncode, out=done.stdout, err=done.stderr)

    return run


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, make_finch: Callable[..., Any]) -> dict[str, Path]:
    """The same random byte model in both formats ("pth", "safetensors"), and one of another seed ("other")."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"n_layer": 2, "n_embd": 16, "vocab_size": 257, "head_size": 8, "dim_ffn": 32, "decay_rank": 4}
    paths = {}
    for name, format, seed in (("pth", "pth", 0), ("safetensors", "safetensors", 0), ("other", "pth", 5)):
        paths[name] = folder / f"{name}.{format}"
        infctx.save_model(make_finch(**sizes, seed=seed), paths[name], format=format, dtype=torch.float32)
    return paths


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fourteen short documents."""
    generator = random.Random(3)
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lengths = [generator.randint(3, 70) for _ in range(14)]
    texts = ["".join(generator.choice("abcdef é\n") for _ in range(length)) for length in lengths]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


Nested = dict[str, dict[str, Any]]


@pytest.fixture
def make_recipe(tmp_path: Path, models: dict[str, Path], rows: Path) -> Callable[..., Path]:
    """Write a recipe; keyword arguments are sections whose keys are put over the usual ones, None leaves one out."""

    def make(name: str = "recipe.yaml", **sections: dict[str, Any]) -> Path:
        recipe: Nested = {
            "model": {"path": str(models["pth"])},
            "data": {"path": str(rows)},
            "bptt": {"chunk_tokens": 8, "window": 2},
            "optimizer": {"lr": 0.003, "warmup_steps": 2},
            "run": {"folder": str(tmp_path / "run"), "steps": 4, "rows": 2},
        }
        for section, keys in sections.items():
            recipe.setdefault(section, {}).update(keys)
        kept = {
            section: {key: value for key, value in keys.items() if value is not None}
            for section, keys in recipe.items()
        }
        path = tmp_path / name
        # JSON is YAML; a section a line, so that line numbers can be asked for.
        lines = [f"{json.dumps(section)}: {json.dumps(keys)}" for section, keys in kept.items()]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return make


@pytest.fixture
def snapshot() -> Callable[[Path], dict[str, tuple[bytes, int]]]:
    """Every file and folder below one: content, and when it was last written."""

    def take(folder: Path) -> dict[str, tuple[bytes, int]]:
        return {
            str(path.relative_to(folder)): (path.read_bytes() if path.is_file() else b"", path.stat().st_mtime_ns)
            for path in sorted(folder.rglob("*"))
        }

    return take
