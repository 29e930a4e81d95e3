"""The numbers of every step as lines of JSON, which a crash, a full disk or a restart leave readable."""

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import jsonlines

from infctx.checkpoint.atomic import write_file_atomically
from infctx.errors import DataError

logger = logging.getLogger(__name__)


class MetricsLog:
    """Appends one JSON object a step to a file.

    Metrics are worth less than the run: a disk that cannot be written is warned of once, and training goes on.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._has_warned = False
        # After a failed or interrupted write the file may end in half a line, which the next one must not be glued to.
        self._may_be_torn = True

    def append(self, record: Mapping[str, object]) -> None:
        """Write one object, readable by others when this returns; NaN and infinity become null."""
        try:
            if self._may_be_torn:
                _cut_torn_line(self.path)
                self._may_be_torn = False
            # Opened anew each time: no half-written buffer survives an error.
            with jsonlines.open(self.path, "a", dumps=_dumps, flush=True) as writer:
                writer.write(dict(record))
        except OSError as error:
            self._may_be_torn = True
            self._warn(f"cannot write {self.path} ({error.strerror or error})")

    def truncate_after(self, step: int) -> None:
        """Drop the lines of steps after `step`, which a resumed run will write again, and lines that are torn."""
        try:
            if not self.path.exists():
                return
            content = self.path.read_bytes()
            kept = b"".join(line + b"\n" for line in content.split(b"\n") if _is_up_to(line, step))
            if kept != content:
                write_file_atomically(self.path, lambda path: path.write_bytes(kept))
        except OSError as error:
            self._warn(f"cannot shorten {self.path} ({error.strerror or error})")

    def _warn(self, problem: str) -> None:
        if not self._has_warned:
            logger.warning("%s: training goes on, steps may be missing there.", problem)
        self._has_warned = True


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, object]]:
    """Every whole line of a metrics file; a last line without its end is left out.

    Raises: DataError naming file and line where a whole line is not a JSON object.
    """
    # Bytes cut in the middle of a character can only be in the torn line.
    text = Path(path).read_bytes().decode("utf-8", errors="replace")
    whole_lines = text.split("\n")[:-1]
    return list(_objects(whole_lines, Path(path)))


def _objects(lines: list[str], path: Path) -> Iterator[dict[str, object]]:
    with jsonlines.Reader(lines) as reader:
        try:
            yield from reader.iter(type=dict)
        except jsonlines.InvalidLineError as error:
            found = repr(error.line[:80])
            raise DataError(f"{path}:{error.lineno}: expected a JSON object, got {found}.") from None


def _dumps(record: object) -> str:
    return json.dumps(_finite(record), allow_nan=False)


def _finite(value: object) -> object:
    """The value with every float that JSON cannot hold replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _is_up_to(line: bytes, step: int) -> bool:
    """Whether a line is whole, and of this step or one before it."""
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return isinstance(record, dict) and isinstance(record.get("step"), int) and record["step"] <= step


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)
