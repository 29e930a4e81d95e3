"""What is known of input files: each is hashed once, and again when anything about it has changed."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infctx.data.sources.catalog import Scan, scan
from infctx.data.sources.records import Unit
from infctx.errors import DataError

HASHES_FILE = "files.json"


def scan_files(files: Sequence[tuple[str, str]], cache: Path, *, unit_bytes: int) -> list[Scan]:
    """Hash every file and find its units; what has not changed since the last time is not read again."""
    memory = cache / HASHES_FILE
    known = _known_scans(memory)
    scans, added = [], False
    for path, kind in files:
        stamp = stamp_of(path, kind)
        found = known.get(stamp) if stamp is not None else None
        if found is None:
            found = _scan_to_json(scan(path, format=kind, unit_bytes=unit_bytes))
            if stamp is not None and stamp == stamp_of(path, kind):
                known[stamp], added = found, True
        scans.append(_scan_from_json(found, path, kind))
    if added:
        _write_whole(memory, json.dumps(known))
    return scans


def stamp_of(path: str, kind: str) -> str | None:
    """What changes whenever a local file is written; None = look at the contents every time."""
    if "://" in path or kind in ("huggingface", "code_repository"):
        return None
    stamps = [kind]
    for name in [path, f"{path.removesuffix('.idx')}.bin"] if kind == "binidx" else [path]:
        try:
            facts = os.stat(name)
        except OSError as error:
            raise DataError(f"{name}: expected a readable file, got: {error.strerror}.") from error
        # The change time moves with every write, and no program sets it.
        stamps.append(f"{facts.st_dev} {facts.st_ino} {facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns}")
    return " ".join(stamps)


def _known_scans(memory: Path) -> dict[str, Any]:
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # Nothing is lost but the time to hash the files.
        return {}
    return known if isinstance(known, dict) else {}


def _scan_to_json(found: Scan) -> dict[str, Any]:
    units = [[unit.begin, unit.end, unit.first_line] for unit in found.units]
    return {"digest": found.digest, "num_bytes": found.num_bytes, "units": units}


def _scan_from_json(found: dict[str, Any], path: str, kind: str) -> Scan:
    units = [Unit(format=kind, path=path, begin=begin, end=end, first_line=line) for begin, end, line in found["units"]]
    return Scan(digest=found["digest"], num_bytes=found["num_bytes"], units=units)


def _write_whole(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
