"""How to use the result: commands with the run's own paths, as a shell takes them; how far the gradient reached."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator

from infctx.recipe.schema import Recipe
from infctx.report.curves import finite
from infctx.report.facts import RunFacts

PROMPT_CHARACTERS = 40


def commands(facts: RunFacts) -> Iterator[tuple[str, str]]:
    """What to do with the run, and the command that does it; paths are absolute, so that they work from anywhere."""
    folder = os.path.abspath(facts.folder)
    run = shlex.quote(folder)
    exported = shlex.quote(f"{folder.rstrip('/')}.pth")
    if facts.checkpoint is None:
        yield "The run has no checkpoint yet. Its recipe as it was resolved:", f"infctx check {_recipe(folder)}"
        return
    if facts.state == "stopped":
        yield "Go on with the run:", f"infctx train {_recipe(folder)}"
    yield "Continue a text:", f"infctx generate {run} --prompt {shlex.quote(_prompt(facts))}"
    yield "Talk to it:", f"infctx chat {run}"
    data = "" if facts.val_losses else " --data FILE"
    yield "Measure it by position and against a reset state:", f"infctx eval {run}{data}"
    yield (
        "Write a plain model, the adapter merged, that every RWKV runtime reads; it is read back and compared:",
        f"infctx export {run} --format pth --output {exported}",
    )
    if (facts.folder / "adapter").is_dir():
        yield (
            "The adapter alone, in peft's layout, on its base (Python):",
            "model = infctx.load_model("
            f"{facts.recipe.model.path!r})\ninfctx.load_adapter(model, {os.path.join(folder, 'adapter')!r})",
        )
    yield "Write this page again:", f"infctx report {run}"


def gradient_in_words(recipe: Recipe) -> list[str]:
    """How far back the gradient of a step reaches, and what that means."""
    window, chunk = recipe.bptt.window, recipe.bptt.chunk_tokens
    if window == "document":
        return [
            "Exact: the gradient of every step crosses all chunks of its documents, however long they are. Nothing is "
            "truncated.",
            f"A chunk has {chunk:,} tokens; its length decides memory and speed, not the result.",
        ]
    reach = (
        f"Truncated at every border between chunks of {chunk:,} tokens"
        if window == 1
        else f"Exact across {window:,} chunks of {chunk:,} tokens, {window * chunk:,} tokens together, and truncated "
        "between such windows"
    )
    return [
        f"{reach}. The state itself is carried across every border.",
        "What a token does to the loss beyond its own window is in no gradient. bptt.window: document is exact across "
        "the whole document.",
    ]


def gradient_as_run(facts: RunFacts) -> list[str]:
    """What the steps themselves tell of it."""
    told = []
    chunks = [value for record in facts.steps if (value := finite(record.get("chunks"))) is not None]
    if chunks:
        chunks_of = "1 chunk" if max(chunks) == 1 else f"{max(chunks):,.0f} chunks"
        told.append(f"The longest step of this run had {chunks_of}.")
    lengths = {int(value) for record in facts.steps if (value := finite(record.get("chunk_tokens"))) is not None}
    shorter = sorted(length for length in lengths if length < facts.recipe.bptt.chunk_tokens)
    if shorter:
        told.append(
            f"Where the memory ran out, chunks of {shorter[0]:,} tokens were taken, with windows as long as before: "
            "the gradient is the same."
        )
    differences = [value for record in facts.steps if (value := finite(record.get("recompute_difference"))) is not None]
    if differences and max(differences) > 0:
        told.append(
            f"States that were computed twice differed by {max(differences):.1e} at most, relative to the largest."
        )
    told.append("To measure it on this model and its data:")
    return told


def check_command(facts: RunFacts) -> str:
    """Compares the chunked gradient with the unchunked one."""
    return f"infctx check {_recipe(os.path.abspath(facts.folder))} --gradient"


def _recipe(folder: str) -> str:
    return shlex.quote(os.path.join(folder, "recipe.yaml"))


def _prompt(facts: RunFacts) -> str:
    """The beginning of a prompt that was sampled from, of one line."""
    samples = (facts.after or facts.before or {}).get("samples") or []
    line = samples[0]["prompt"].strip().split("\n")[0][:PROMPT_CHARACTERS].strip() if samples else ""
    return line if line.isprintable() and line else "It was"
