"""Everything needed to resume a run, kept so that a crash at any instant leaves a checkpoint that loads.

FOLDER/checkpoints/step-000100/   GROUP.safetensors ..., state.json, MANIFEST.json (written last), renamed into place
FOLDER/checkpoints/step-000100+000017/   the same inside the step after it, 17 chunks of work later
FOLDER/checkpoints/latest         a text file for people and other tools: the name of the newest checkpoint

Several ranks write one checkpoint together, each the tensors that it owns, whole; rank 0 makes the folder, the facts,
the manifest and the name. What is in a checkpoint does not depend on their number: any number of them reads it.
"""

import json
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from infctx.checkpoint.atomic import (
    ManifestEntry,
    OtherSchemaError,
    read_manifest,
    remove_unfinished,
    replace_directory,
    set_aside,
    verify_file,
    verify_manifest,
    write_file_atomically,
    write_manifest,
)
from infctx.checkpoint.group_files import name_files, read_groups, write_groups
from infctx.checkpoint.run_lock import RunLock
from infctx.checkpoint.writers import ALONE, FolderNotSharedError, Share, Writers, owners, this_host, together
from infctx.errors import CheckpointError

__all__ = ["LoadedRun", "RunLock", "RunState", "load_run_state", "save_run_state"]

# 2: a carried state's rows are tensors of their own.
STATE_SCHEMA = 2

_STEP_NAME = re.compile(r"step-(\d{6,})(?:\+(\d{6,}))?")
_STATE_FILE = "state.json"
# Network file systems show a new folder to other machines a little later.
_WAIT_FOR_FOLDER_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """A run between two optimizer steps, or between two chunks of one.

    Attributes:
        step: optimizer steps taken.
        passes: chunks run since then, in either sweep.
        tensors: group name -> tensor name -> tensor, such as "trainable", "optimizer", "rows". Of several ranks each
            saves what it owns, which may be nothing of a group; whoever loads has all of it.
        facts: what is not a tensor (cursor, tokens, recipe fingerprint, versions): JSON values with text as keys. Of
            several ranks those of rank 0 are saved.
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


def save_run_state(folder: Path, state: RunState, *, keep: int = 2, writers: Writers = ALONE) -> Path:
    """Write a checkpoint, read it back, name it in `latest`, and only then remove older ones beyond `keep`.

    A checkpoint of this place that is already there and whole is left as it is; a damaged one is replaced.

    Args:
        folder: the run folder; of several ranks, one that all of them see.
        keep: how many checkpoints stay, this one included.
        writers: the ranks, all of which call this, with the same step and passes.
    Returns: the checkpoint's folder.
    Raises:
        OSError if the disk is full or fails; CheckpointError if what was written does not read back. With several
        ranks the same error on all of them, see `together`. The checkpoints before this one stay in any case.
    """
    assert keep >= 1, f"keep={keep}: the new checkpoint itself has to stay"
    checkpoints = Path(folder) / "checkpoints"
    final = checkpoints / (f"step-{state.step:06d}" + (f"+{state.passes:06d}" if state.passes else ""))
    with together(writers) as share:
        if writers.rank == 0:
            _lead(final, state, keep=keep, share=share)
        else:
            _follow(checkpoints, state, writers.rank, share=share)
        share("done")
    return final


def load_run_state(folder: Path, *, writers: Writers = ALONE) -> LoadedRun | None:
    """Load the newest checkpoint that is whole.

    Args: writers: ranks that all call this; they divide the checking, and all load the same checkpoint.
    Returns: the state, its tensors mapped from the checkpoint's files, with a sentence for each newer checkpoint that
    was passed over; None if the run has no checkpoint. With several ranks the whole state, on each.
    Raises: CheckpointError if there are checkpoints but none loads, or if a newer or an older infctx wrote one.
    """
    checkpoints = Path(folder) / "checkpoints"
    with together(writers) as share:
        names = [path.name for _, path in _list_places(checkpoints)]
        host, names, latest = share([this_host(), names, _read_latest(checkpoints)])[0]
        skipped: list[str] = []
        if latest is not None and latest not in names:
            skipped.append(f"{checkpoints / 'latest'}: names {latest[:80]!r}, which is not there.")
        for name in names:
            if writers.rank > 0 and not (checkpoints / name).is_dir():
                raise _not_shared(checkpoints / name, writers.rank, f"which rank 0 on host {host} sees")
            read = _read_or_reason(checkpoints / name, writers, skipped)
            reasons = [reason for reason in share(read if isinstance(read, str) else None) if reason]
            if isinstance(read, RunState) and not reasons:
                return LoadedRun(state=read, skipped=skipped)
            skipped.append(reasons[0])
        if skipped:
            lines = "\n".join(f"  {reason}" for reason in skipped)
            raise CheckpointError(
                f"{checkpoints}: no checkpoint can be loaded:\n{lines}\n"
                "Restore one from a copy, or start again in another run folder."
            )
    return None


def _lead(final: Path, state: RunState, *, keep: int, share: Share) -> None:
    """What rank 0 does."""
    checkpoints = final.parent
    checkpoints.mkdir(parents=True, exist_ok=True)
    remove_unfinished(checkpoints)
    if _is_whole(final):
        _check_place(share({"folder": None, **_outline(state)}))
    else:
        set_aside(final)
        own: set[str] = set()
        replace_directory(final, lambda unfinished: own.update(_write_state(unfinished, state, share)))
        # The other ranks have read theirs again.
        verify_manifest(final, hashed={*own, _STATE_FILE})
    if _read_latest(checkpoints) != final.name:
        write_file_atomically(checkpoints / "latest", lambda path: _write_text(path, f"{final.name}\n"))
    older = [path for place, path in _list_places(checkpoints) if place < (state.step, state.passes)]
    for path in older[keep - 1 :]:
        set_aside(path)


def _write_state(folder: Path, state: RunState, share: Share) -> dict[str, ManifestEntry]:
    """Fill the folder, together with the other ranks; returns the files that rank 0 wrote of the groups."""
    reserved = sorted(state.facts.keys() & {"schema", "step", "passes"})
    assert not reserved, f"facts may not be called {reserved}"
    told = share({"folder": folder.name, "host": this_host(), **_outline(state)})
    _check_place(told)
    share("seen")
    own = write_groups(folder, state.tensors, name_files([rank["names"] for rank in told])[0])
    written: dict[str, ManifestEntry] = {}
    for files in share(own):
        written.update(files)
    content = {"schema": STATE_SCHEMA, "step": state.step, "passes": state.passes, **state.facts}
    _write_text(folder / _STATE_FILE, json.dumps(content, indent=1, sort_keys=True) + "\n")
    write_manifest(folder, written)
    return own


def _follow(checkpoints: Path, state: RunState, rank: int, *, share: Share) -> None:
    """What every other rank does: a share for each of rank 0's."""
    told = share(_outline(state))
    _check_place(told)
    if told[0]["folder"] is None:
        return
    folder = checkpoints / told[0]["folder"]
    deadline = time.monotonic() + _WAIT_FOR_FOLDER_SECONDS
    while not folder.is_dir():
        if time.monotonic() > deadline:
            raise _not_shared(folder, rank, f"which rank 0 on host {told[0]['host']} made")
        time.sleep(0.05)
    share("seen")
    own = write_groups(folder, state.tensors, name_files([rank["names"] for rank in told])[rank])
    for file, entry in own.items():
        verify_file(folder, file, entry)
    share(own)


def _outline(state: RunState) -> dict[str, Any]:
    """What the other ranks have to know of this rank's part."""
    names = {group: sorted(tensors) for group, tensors in state.tensors.items()}
    return {"place": [state.step, state.passes], "names": names}


def _check_place(told: list[dict[str, Any]]) -> None:
    places = [rank["place"] for rank in told]
    assert all(place == places[0] for place in places), f"ranks are at different [step, passes]: {places}"


def _not_shared(folder: Path, rank: int, whose: str) -> FolderNotSharedError:
    return FolderNotSharedError(
        f"run.folder: rank {rank} on host {this_host()} does not see {folder}, {whose}. "
        "Put run.folder on a file system that all machines share."
    )


def _read_or_reason(folder: Path, writers: Writers, skipped: list[str]) -> RunState | str:
    """A checkpoint's state, of which this rank has checked its part; or why not."""
    try:
        manifest = sorted(read_manifest(folder).items())
        rank_of = owners([int(entry["bytes"]) for _, entry in manifest], writers.size)
        pairs = zip(manifest, rank_of, strict=True)
        verify_manifest(folder, hashed={name for (name, _), rank in pairs if rank == writers.rank})
        return _read_state(folder)
    except OtherSchemaError as error:
        raise OtherSchemaError("\n".join([str(error), *skipped])) from error
    except CheckpointError as error:
        reason = str(error)
    except OSError as error:
        reason = f"{folder}: cannot be read: {error}"
    return reason if writers.size == 1 else f"{reason} (rank {writers.rank} on host {this_host()})"


def _read_state(folder: Path) -> RunState:
    path = folder / _STATE_FILE
    try:
        facts = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged: {str(error)[:200]}.") from error
    schema = facts.pop("schema", None) if isinstance(facts, dict) else None
    if type(schema) is int and schema > STATE_SCHEMA:
        raise OtherSchemaError(
            f"{path}: has schema {schema}; this infctx reads up to {STATE_SCHEMA}. Use the infctx that wrote it."
        )
    if type(schema) is int and 1 <= schema < STATE_SCHEMA:
        raise OtherSchemaError(
            f"{path}: written by an older infctx: it has schema {schema}, and this one reads {STATE_SCHEMA}. Finish or "
            "export this run with the infctx that wrote it, or start anew beside it with --fresh."
        )
    step, passes = place = _place_of(folder.name)
    if schema != STATE_SCHEMA or (facts.pop("step", None), facts.pop("passes", 0)) != place:
        raise CheckpointError(f"{path}: damaged: expected schema {STATE_SCHEMA}, step {step} and passes {passes}.")
    return RunState(step=step, passes=passes, tensors=read_groups(folder), facts=facts)


def _is_whole(checkpoint: Path) -> bool:
    """Whether there is such a checkpoint and it matches its manifest; an unreadable one counts as damaged."""
    if not os.path.lexists(checkpoint):
        return False
    try:
        verify_manifest(checkpoint)
    except OtherSchemaError:
        raise
    except (CheckpointError, OSError):
        return False
    return True


def _list_places(checkpoints: Path) -> list[tuple[tuple[int, int], Path]]:
    """Every checkpoint on the disk, whole or not, newest first: its step and passes, and its folder."""
    if not checkpoints.is_dir():
        return []
    paths = [path for path in checkpoints.iterdir() if _STEP_NAME.fullmatch(path.name)]
    return sorted(((_place_of(path.name), path) for path in paths), reverse=True)


def _place_of(name: str) -> tuple[int, int]:
    match = _STEP_NAME.fullmatch(name)
    assert match, f"{name!r} is not the name of a checkpoint"
    return int(match[1]), int(match[2] or 0)


def _read_latest(checkpoints: Path) -> str | None:
    try:
        return (checkpoints / "latest").read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
