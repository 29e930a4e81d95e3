"""Runs `infctx` commands in processes of their own without paying for the imports each time.

Started once, it imports everything and forks for each line of JSON it is sent; it answers with the child's pid, and
later with the status the child ended with.
"""

import json
import os
import resource
import signal
import sys
import traceback


def run_child(request: dict) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        descriptor = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, number)
        os.close(descriptor)
    if request["nobody_reads"]:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 2)
    if request["encoding"] is not None:
        sys.stdout.reconfigure(encoding=request["encoding"])
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    if request["max_file_bytes"] is not None:
        # Python's own bytecode would be cut off too, and be read so by the next process.
        sys.dont_write_bytecode = True
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["max_file_bytes"], request["max_file_bytes"]))
    code = 99
    try:
        from infctx.cli import main

        main(request["arguments"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 98
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import peft  # noqa: F401
    import torch

    import infctx.assemble
    import infctx.export.catalog
    import infctx.training.progress  # noqa: F401

    torch.set_num_threads(1)
    print("ready", file=replies)
    # readline rather than iteration: nothing may be read ahead into a buffer that a child would inherit.
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "wait" in request:
            try:
                print(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]), file=replies)
            except ChildProcessError:
                print(97, file=replies)
            continue
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            run_child(request)
        print(pid, file=replies)


if __name__ == "__main__":
    serve()
