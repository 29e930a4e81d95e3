"""One supervisor, and a process for each rank of this machine: started together, ended together, none left behind.

Fabric starts ranks itself where nobody has done so; when one of them ends with any code but 0, it kills the others
within seconds and says nothing: no checkpoint, no reason. Where LOCAL_RANK is set, as here, it starts none.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from infctx.errors import RecipeError
from infctx.exit_codes import EXIT_BUG, EXIT_DONE, EXIT_INTERRUPTED, EXIT_MACHINE, EXIT_STOPPED, EXIT_USER
from infctx.signal_queue import SignalQueue

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2).
# A process that waits for a device may outlive a SIGKILL; nobody should wait for it.
_SECONDS_TO_DIE = 10.0


@dataclass(kw_only=True, slots=True)
class RankProcess:
    """A rank of this machine; `code` is negative where a signal ended it, as subprocess has it."""

    rank: int
    pid: int
    code: int | None = None
    is_killed_by_us: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid})"

    @property
    def end(self) -> str:
        """How it ended, in words."""
        assert self.code is not None
        if self.code >= 0:
            return f"ended with code {self.code}"
        with suppress(ValueError):
            return f"was killed by {signal.Signals(-self.code).name}"
        return f"was killed by signal {-self.code}"


def launch(command: Sequence[str], *, processes: int, num_nodes: int = 1, grace_seconds: float = 20.0) -> int:
    """Run a command once for each rank of this machine, and wait until all of them have ended.

    To be called in the main thread, of a process that is no rank itself. A rank that ends otherwise than with code 0
    gives the others `grace_seconds` to end by themselves. On Linux no rank outlives this process, however it ends.

    Args:
        command: a program and its arguments; every rank runs the same.
        processes: ranks of this machine.
        num_nodes: machines; this function is called on each of them.
        grace_seconds: between the first end that is not a good one and the end of all.

    Returns:
        The exit code of the whole, from how those ended that were not killed here: 0 if all did with it, 3 if all did
        with it, 130 if a signal that was passed on ended them; else 4 if a signal ended one, 1 if a bug did, 2 if a
        mistake did, and 4.

    Raises:
        RecipeError: several machines, and the environment does not say which one this is, or where the first one is.
    """
    with ExitStack() as stack:
        environ = dict(os.environ)
        if num_nodes == 1:
            port = stack.enter_context(_reserved_port())
            environ.update(NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port.getsockname()[1]))
        else:
            check_nodes(command, num_nodes, environ)
        environ["WORLD_SIZE"] = str(processes * num_nodes)
        environ.setdefault("OMP_NUM_THREADS", str(max(1, _num_processors() // processes)))
        # torch's stores print a C++ stack for each peer that is gone, around the one sentence that says which.
        environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        signals = stack.enter_context(SignalQueue(*_FORWARDED, signal.SIGCHLD, signal.SIGTSTP))
        supervisor = _Supervisor(command, processes, environ, grace_seconds)
        try:
            supervisor.start()
            supervisor.wait(signals)
        finally:
            supervisor.kill()
        return supervisor.result()


def check_nodes(command: Sequence[str], num_nodes: int, environ: Mapping[str, str]) -> None:
    """See that the environment says which of several machines this is, and where the first one is.

    Raises:
        RecipeError: it does not; the message has the commands that do.
    """
    wanted = ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    problems = [f"{name} is not set" for name in wanted if not environ.get(name)]
    for name, least, most in (("NODE_RANK", 0, num_nodes - 1), ("MASTER_PORT", 1, 65535)):
        value = environ.get(name)
        if value and not (value.isascii() and value.isdigit() and least <= int(value) <= most):
            problems.append(f"{name} is {value!r}, not a number from {least} to {most}")
    if problems:
        address = environ.get("MASTER_ADDR") or socket.gethostname()
        lines = [
            f"NODE_RANK={node} MASTER_ADDR={address} MASTER_PORT=29500 {shlex.join(command)}"
            for node in (0, num_nodes - 1)
        ]
        raise RecipeError(
            f"{num_nodes} machines: {'; '.join(problems)}. Type this on the first machine, whose name or address all "
            f"others must reach (here {address}):\n  {lines[0]}\nand this on the last, with NODE_RANK counting "
            f"between:\n  {lines[1]}\nor start the ranks with torchrun or srun."
        )


def is_launched(environ: Mapping[str, str]) -> bool:
    """Whether torchrun, srun, this launcher or a person has already started this process as one rank of several."""
    # The script of a batch job is its one task.
    is_slurm_task = environ.get("SLURM_NTASKS", "1") != "1" and environ.get("SLURM_JOB_NAME") not in (
        "bash",
        "interactive",
    )
    return "LOCAL_RANK" in environ or "TORCHELASTIC_RUN_ID" in environ or is_slurm_task


class _Supervisor:
    def __init__(
        self, command: Sequence[str], processes: int, environ: Mapping[str, str], grace_seconds: float
    ) -> None:
        self._command, self._processes, self._environ = list(command), processes, environ
        self._grace_seconds = grace_seconds
        self._running: dict[subprocess.Popen[bytes], RankProcess] = {}
        self._ended: list[RankProcess] = []  # In the order in which they ended.
        self._forwarded: set[int] = set()
        self._is_first_told = False

    def start(self) -> None:
        before_exec = _tied_to_parent()
        first = int(self._environ["NODE_RANK"]) * self._processes
        for local_rank in range(self._processes):
            rank = first + local_rank
            process = subprocess.Popen(
                self._command,
                env={**self._environ, "RANK": str(rank), "LOCAL_RANK": str(local_rank)},
                stdin=subprocess.DEVNULL,
                stdout=None if rank == 0 else subprocess.DEVNULL,
                # A terminal sends its signals to a whole group: each rank would get them twice, and end at once.
                process_group=0,
                preexec_fn=before_exec,
            )
            self._running[process] = RankProcess(rank=rank, pid=process.pid)

    def wait(self, signals: SignalQueue) -> None:
        deadline: float | None = None
        while self._running:
            for number in signals.wait(None if deadline is None else deadline - time.monotonic()):
                self._pass_on(number)
            self._reap()
            if deadline is None and any(rank.code != EXIT_DONE for rank in self._ended):
                deadline = time.monotonic() + self._grace_seconds
            elif deadline is not None and time.monotonic() >= deadline:
                if any(rank.is_killed_by_us for rank in self._running.values()):
                    return
                self.kill()
                deadline = time.monotonic() + _SECONDS_TO_DIE

    def _pass_on(self, number: int) -> None:
        if number in _FORWARDED:
            self._forwarded.add(number)
            for process in self._running:
                process.send_signal(number)
        elif number == signal.SIGTSTP:
            # Ctrl-Z reaches this process only; the ranks are stopped with it, and go on with it.
            self._send_groups(signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGSTOP)
            self._send_groups(signal.SIGCONT)

    def _reap(self) -> None:
        for process, rank in list(self._running.items()):
            rank.code = process.poll()
            if rank.code is None:
                continue
            del self._running[process]
            self._ended.append(rank)
            is_expected = rank.is_killed_by_us or rank.code in (EXIT_DONE, EXIT_USER, EXIT_STOPPED)
            # After a signal to all, they end in many ways; the result says the rest.
            if not is_expected and not self._forwarded and not self._is_first_told:
                self._is_first_told = True
                _tell(f"{rank} {rank.end}; the other ranks have {self._grace_seconds:g} s to end by themselves.")

    def kill(self) -> None:
        """Kill the ranks that have not ended, with all that they started."""
        for rank in self._running.values():
            rank.is_killed_by_us = True
        self._send_groups(signal.SIGKILL)

    def _send_groups(self, number: int) -> None:
        for process in self._running:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    def result(self) -> int:
        """Say what has not been said yet; the exit code of the whole."""
        ranks = [*self._ended, *self._running.values()]
        by_us = [rank for rank in ranks if rank.is_killed_by_us]
        by_themselves = [rank for rank in ranks if not rank.is_killed_by_us]
        bad = [rank for rank in by_themselves if rank.code != EXIT_DONE]
        if by_us or len({rank.code for rank in by_themselves}) > 1:
            untold = bad[1:] if self._is_first_told else bad
            if untold:
                _tell(f"{'Then ' if self._is_first_told else ''}{'; '.join(f'{rank} {rank.end}' for rank in untold)}.")
        if by_us:
            _tell(f"Killed {self._grace_seconds:g} s after that, not having ended: {', '.join(map(str, by_us))}.")
        for rank in self._running.values():
            _tell(f"{rank} did not end even so; nobody waits for it any longer.")
        code = code_of([rank.code or 0 for rank in by_themselves], forwarded=self._forwarded)
        if code == EXIT_INTERRUPTED:
            _tell("Interrupted; nothing since the last checkpoint was saved.")
        return code


def code_of(codes: Sequence[int], *, forwarded: Collection[int] = ()) -> int:
    """The exit code of several ranks that ended by themselves.

    In which order they ended says nothing: who loses a rank may be gone before the one that is the cause.

    Args:
        codes: of each; negative where a signal ended it.
        forwarded: signals that were passed on to all.
    """
    bad = set(codes) - {EXIT_DONE}
    if not bad:
        return EXIT_DONE
    interrupted = {EXIT_INTERRUPTED, *(-number for number in forwarded)} if forwarded else set()
    if bad & interrupted and bad <= interrupted | {EXIT_STOPPED}:
        return EXIT_INTERRUPTED
    bad -= interrupted
    if any(code < 0 for code in bad):
        return EXIT_MACHINE
    if bad - {EXIT_USER, EXIT_STOPPED, EXIT_MACHINE, EXIT_INTERRUPTED}:
        return EXIT_BUG
    # A mistake that only one rank meets, as a file that its machine does not have, costs the others that rank.
    if EXIT_USER in bad:
        return EXIT_USER
    return EXIT_STOPPED if set(codes) == {EXIT_STOPPED} else EXIT_MACHINE


def _tied_to_parent() -> Callable[[], None]:
    """What a child does between fork and exec, so that it does not outlive the thread that started it."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    parent = os.getpid()

    def before_exec() -> None:
        # In a group of its own it would be stopped for writing to a terminal that forbids it to the background.
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        if library is not None:
            library.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
            if os.getppid() != parent:  # It died before the call.
                os._exit(EXIT_MACHINE)

    return before_exec


def _reserved_port() -> socket.socket:
    """A free port that nobody is given while this socket is open; a server that sets SO_REUSEADDR can listen there."""
    reserved = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved


def _num_processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tell(text: str) -> None:
    with suppress(OSError, ValueError):  # Nobody may be reading any more.
        sys.stderr.write(f"infctx: {text}\n")
        sys.stderr.flush()
