"""Begins ranks that have their imports behind them: importing takes five seconds a process, forking none.

Reads a line of JSON for each rank: {"arguments": [script, ...], "environment": {...}, "output": file}. Writes a line
for each: {"pid": ...}, and when it has ended {"pid": ..., "code": ...}, negative where a signal did it.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import select
import sys
import traceback
from typing import NoReturn

# What every worker imports.
import lightning.fabric  # noqa: F401
import peft  # noqa: F401

import infctx.assemble  # noqa: F401


def main() -> None:
    """Until there is nothing more to read."""
    running: set[int] = set()
    while True:
        readable, _, _ = select.select([sys.stdin], [], [], 0.02 if running else None)
        if readable:
            line = sys.stdin.readline()
            if not line:
                return
            pid = os.fork()
            if pid == 0:
                _run(**json.loads(line))
            running.add(pid)
            _tell(pid=pid)
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                running.remove(pid)
                _tell(pid=pid, code=os.waitstatus_to_exitcode(status))


def _tell(**facts: int) -> None:
    print(json.dumps(facts), flush=True)


def _run(arguments: list[str], environment: dict[str, str], output: str) -> NoReturn:
    """What `python arguments` does in a process of its own."""
    with open(output, "w") as file, open(os.devnull) as nothing:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        os.dup2(nothing.fileno(), 0)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = arguments
    sys.path.insert(0, os.path.dirname(arguments[0]))
    code = 0
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
