"""Everything needed to resume a run, kept so that a crash at any instant leaves a checkpoint that loads.

FOLDER/checkpoints/step-000100/   GROUP.safetensors ..., state.json, MANIFEST.json (written last), renamed into place
FOLDER/checkpoints/step-000100+000017/   the same inside the step after it, 17 chunks of work later
FOLDER/checkpoints/latest         a text file for people and other tools: the name of the newest checkpoint
"""

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from infctx.checkpoint.atomic import (
    NewerSchemaError,
    remove_unfinished,
    replace_directory,
    set_aside,
    verify_manifest,
    write_file_atomically,
    write_manifest,
)
from infctx.checkpoint.run_lock import RunLock
from infctx.checkpoint.safetensors_file import read_safetensors, write_safetensors
from infctx.errors import CheckpointError

__all__ = ["LoadedRun", "RunLock", "RunState", "load_run_state", "save_run_state"]

STATE_SCHEMA = 1

_STEP_NAME = re.compile(r"step-(\d{6,})(?:\+(\d{6,}))?")
_GROUP_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """A run between two optimizer steps, or between two chunks of one.

    Attributes:
        step: optimizer steps taken.
        passes: chunks run since then, in either sweep.
        tensors: group name -> tensor name -> tensor, such as "trainable", "optimizer", "rows". One file a group.
        facts: what is not a tensor (cursor, tokens, recipe fingerprint, versions): JSON values with text as keys.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    facts: dict[str, object]
    passes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedRun:
    """A state that loaded, and one sentence for each newer checkpoint that did not."""

    state: RunState
    skipped: list[str] = field(default_factory=list)


def save_run_state(folder: Path, state: RunState, *, keep: int = 2) -> Path:
    """Write a checkpoint, read it back, name it in `latest`, and only then remove older ones beyond `keep`.

    A checkpoint of this place that is already there and whole is left as it is; a damaged one is replaced.
    Args: folder: the run folder. keep: how many checkpoints stay, this one included.
    Returns: the checkpoint's folder.
    Raises: OSError if the disk is full or fails; CheckpointError if what was written does not read back. The
    checkpoints before this one stay in both cases.
    """
    assert keep >= 1, f"keep={keep}: the new checkpoint itself has to stay"
    checkpoints = Path(folder) / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    remove_unfinished(checkpoints)
    final = checkpoints / (f"step-{state.step:06d}" + (f"+{state.passes:06d}" if state.passes else ""))
    if not _is_whole(final):
        set_aside(final)
        replace_directory(final, lambda unfinished: _write_state(unfinished, state))
        verify_manifest(final)
    if _read_latest(checkpoints) != final.name:
        write_file_atomically(checkpoints / "latest", lambda path: _write_text(path, f"{final.name}\n"))
    older = [path for place, path in _list_places(checkpoints) if place < (state.step, state.passes)]
    for path in older[keep - 1 :]:
        set_aside(path)
    return final


def load_run_state(folder: Path) -> LoadedRun | None:
    """Load the newest checkpoint that is whole.

    Returns: the state, its tensors mapped from the checkpoint's files, with a sentence for each newer checkpoint that
    was passed over; None if the run has no checkpoint.
    Raises: CheckpointError if there are checkpoints but none loads, or if a newer infctx wrote one.
    """
    checkpoints = Path(folder) / "checkpoints"
    skipped: list[str] = []
    places = _list_places(checkpoints)
    latest = _read_latest(checkpoints)
    if latest is not None and latest not in [path.name for _, path in places]:
        skipped.append(f"{checkpoints / 'latest'}: names {latest[:80]!r}, which is not there.")
    for place, path in places:
        try:
            verify_manifest(path)
            return LoadedRun(state=_read_state(path, place), skipped=skipped)
        except NewerSchemaError:
            raise
        except CheckpointError as error:
            skipped.append(str(error))
        except OSError as error:
            skipped.append(f"{path}: cannot be read: {error}")
    if skipped:
        reasons = "\n".join(f"  {reason}" for reason in skipped)
        raise CheckpointError(
            f"{checkpoints}: no checkpoint can be loaded:\n{reasons}\n"
            "Restore one from a copy, or start again in another run folder."
        )
    return None


def _write_state(folder: Path, state: RunState) -> None:
    reserved = sorted(state.facts.keys() & {"schema", "step", "passes"})
    assert not reserved, f"facts may not be called {reserved}"
    for group, tensors in sorted(state.tensors.items()):
        assert _GROUP_NAME.fullmatch(group), f"{group!r} does not make a file name"
        write_safetensors(folder / f"{group}.safetensors", tensors)
    content = {"schema": STATE_SCHEMA, "step": state.step, "passes": state.passes, **state.facts}
    _write_text(folder / "state.json", json.dumps(content, indent=1, sort_keys=True) + "\n")
    write_manifest(folder)


def _read_state(folder: Path, place: tuple[int, int]) -> RunState:
    path = folder / "state.json"
    try:
        facts = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged: {str(error)[:200]}.") from error
    schema = facts.pop("schema", None) if isinstance(facts, dict) else None
    if type(schema) is int and schema > STATE_SCHEMA:
        raise NewerSchemaError(
            f"{path}: has schema {schema}; this infctx reads up to {STATE_SCHEMA}. Use the infctx that wrote it."
        )
    step, passes = place
    if schema != STATE_SCHEMA or (facts.pop("step", None), facts.pop("passes", 0)) != place:
        raise CheckpointError(f"{path}: damaged: expected schema {STATE_SCHEMA}, step {step} and passes {passes}.")
    tensors = {file.stem: read_safetensors(file)[0] for file in sorted(folder.glob("*.safetensors"))}
    return RunState(step=step, passes=passes, tensors=tensors, facts=facts)


def _is_whole(checkpoint: Path) -> bool:
    """Whether there is such a checkpoint and it matches its manifest; an unreadable one counts as damaged."""
    if not os.path.lexists(checkpoint):
        return False
    try:
        verify_manifest(checkpoint)
    except NewerSchemaError:
        raise
    except (CheckpointError, OSError):
        return False
    return True


def _list_places(checkpoints: Path) -> list[tuple[tuple[int, int], Path]]:
    """Every checkpoint on the disk, whole or not, newest first: its step and passes, and its folder."""
    if not checkpoints.is_dir():
        return []
    matches = [(path, _STEP_NAME.fullmatch(path.name)) for path in checkpoints.iterdir()]
    return sorted((((int(match[1]), int(match[2] or 0)), path) for path, match in matches if match), reverse=True)


def _read_latest(checkpoints: Path) -> str | None:
    try:
        return (checkpoints / "latest").read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
