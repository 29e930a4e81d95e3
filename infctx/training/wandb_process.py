"""The process that holds a run at Weights & Biases: numbers come in as lines of JSON and go out through the package.

Started by `logger_writers.WandbWriter`, and by nobody else. It ends when its input does, also where the training was
killed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any, TextIO


def serve(lines: Iterable[str], answers: TextIO) -> None:
    """Open the run that the first line describes, say where it is, and log every further line.

    Args:
        lines: JSON objects; the first with folder, id, config, project, entity, name, offline.
        answers: gets one JSON object: where, or the problem.
    """
    reader = iter(lines)
    told = json.loads(next(reader))
    try:
        run = _open(told)
        where = run.url or f"offline in {run.dir.removesuffix('/files')}; wandb sync uploads it"
        answer = {"where": where}
    except Exception as error:
        answer = {"problem": " ".join(str(error).split()) or type(error).__name__}
    print(json.dumps(answer), file=answers, flush=True)
    if "problem" in answer:
        return
    # An axis of our own instead of the package's, which takes no step twice: a resumed run writes some again.
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    for line in reader:
        run.log(json.loads(line))
    run.finish()


def _open(told: Mapping[str, Any]) -> Any:
    import wandb

    mode = "offline" if told["offline"] else None
    settings = wandb.Settings(console="off", silent=True, init_timeout=60)
    if mode is None and not (wandb.api.api_key or settings.mode in ("offline", "disabled")):
        raise RuntimeError("not logged in: run wandb login, or set run.wandb.offline: true")
    return wandb.init(
        project=told["project"],
        entity=told["entity"],
        name=told["name"],
        dir=told["folder"],
        id=told["id"],
        resume=None if mode == "offline" else "allow",
        config=told["config"],
        mode=mode,
        settings=settings,
    )


if __name__ == "__main__":
    answers = sys.stdout
    # Whatever the package prints is not an answer.
    sys.stdout = sys.stderr
    serve(sys.stdin, answers)
