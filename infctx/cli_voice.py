"""What `infctx generate` and `infctx chat` share: options, the model that is opened, long texts, the speed."""

from __future__ import annotations

import math
import os
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from infctx.cli_output import LARGEST_SEED, say
from infctx.errors import DataError, InfctxError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from infctx.generation.prompt_state import PromptState, Reader
    from infctx.generation.row import Voice
    from infctx.training.signals import StopSignals

DTYPES = ("auto", "fp32", "bf16", "fp16")
_SECONDS_BEFORE_PROGRESS = 2.0
_SECONDS_BETWEEN_LINES = 30.0

Source = Annotated[Path, typer.Argument(metavar="MODEL_OR_RUN", help="A model file or a run folder.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 = always the most probable token.")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Draw from the fewest tokens that make up this much.")]
TopK = Annotated[int, typer.Option(min=0, help="Draw from this many of the most probable tokens; 0 = all.")]
Presence = Annotated[float, typer.Option(help="Taken from the logit of every token drawn before.")]
Frequency = Annotated[float, typer.Option(help="Taken once more for each time it was drawn.")]
Decay = Annotated[float, typer.Option(min=0.0, max=1.0, help="Those counts are multiplied by it at each token.")]
Stop = Annotated[list[str] | None, typer.Option(help="A text that ends the answer; \\n is a newline. Again for more.")]
Seed = Annotated[int | None, typer.Option(min=0, max=LARGEST_SEED, help="The same seed gives the same text.")]
TokenizerName = Annotated[
    str | None, typer.Option(help="world, bytes or a tokenizer JSON, where the model does not say.")
]
LastWeights = Annotated[
    bool, typer.Option("--last-weights", help="Of a run that averages its weights, take the last ones instead.")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda; auto is cuda where there is one.")]
Dtype = Annotated[str, typer.Option(help="fp32, bf16, fp16, or auto: bf16 on a GPU, else fp32. States stay fp32.")]


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenedVoice:
    """A model that can write, and how its states are known again."""

    voice: Voice
    reader: Reader


def open_voice(source: Path, *, tokenizer: str | None, last_weights: bool, device: str, dtype: str) -> OpenedVoice:
    """Open a model or a run to write with; tells the notes of a run.

    Raises: InfctxError for a device or dtype that is not there, CheckpointError and DataError for the rest.
    """
    import torch

    from infctx.data.tokenizer import tokenizer_by_name, tokenizer_for_vocab
    from infctx.generation.prompt_state import Reader
    from infctx.generation.row import Voice
    from infctx.model.single_token import SingleTokenStep
    from infctx.trained import open_trained

    if device not in ("auto", "cpu", "cuda"):
        raise InfctxError(f"--device {device}: expected auto, cpu or cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise InfctxError("--device cuda: there is no CUDA device that this torch can use. infctx doctor says more.")
    if dtype not in DTYPES:
        raise InfctxError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}.")
    chosen_device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    automatic = "bf16" if chosen_device == "cuda" else "fp32"
    chosen = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[
        automatic if dtype == "auto" else dtype
    ]
    trained = open_trained(source, last_weights=last_weights, dtype=chosen, device=chosen_device)
    for note in trained.notes:
        say(note)
    model = trained.model
    name = tokenizer or trained.tokenizer or tokenizer_for_vocab(model.config.vocab_size)
    found = tokenizer_by_name(name)
    reader = Reader(fingerprint=trained.fingerprint, tokenizer=found.digest, dtype=str(chosen).removeprefix("torch."))
    return OpenedVoice(voice=Voice(model=model, step=SingleTokenStep(model), tokenizer=found), reader=reader)


def open_state(path: Path, opened: OpenedVoice) -> PromptState:
    """Read a state file for this model. Raises CheckpointError naming the file."""
    from infctx.generation.prompt_state import read_prompt_state

    model = opened.voice.model
    found = read_prompt_state(path, reader=opened.reader, config=model.config, device=model.embedding.weight.device)
    if not found.is_whole:
        say(f"{path}: reading was stopped before the end of its text; it holds {found.reading.num_tokens:,} tokens.")
    if found.reader.dtype != opened.reader.dtype:
        say(f"{path}: was read in {found.reader.dtype}, and goes on in {opened.reader.dtype}.")
    return found


def read_text(path: Path) -> str:
    """The text of a file; - is stdin. Raises DataError for what is no UTF-8."""
    name = "stdin" if str(path) == "-" else str(path)
    data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}: expected UTF-8 text, found byte {data[error.start]:#04x} at {error.start:,}. Convert the file."
        ) from None


def stops_of(given: list[str] | None) -> tuple[str, ...]:
    """The texts of --stop, in which \\n is a newline: shells make it hard to write one."""
    return tuple(stop.replace("\\n", "\n") for stop in given or [])


def random_seed() -> int:
    """A seed for whoever gave none; short enough to be typed again."""
    return int.from_bytes(os.urandom(4), "little")


@dataclass(kw_only=True)
class Speed:
    """How fast a prompt was read and a text was written."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    first_token_seconds: float | None = None
    started: float = field(default_factory=time.monotonic)

    def read(self, num_tokens: int) -> None:
        """The prompt has been read."""
        self.prompt_tokens, self.prompt_seconds = num_tokens, time.monotonic() - self.started

    def wrote(self, num_tokens: int) -> None:
        """So many tokens are there."""
        now = time.monotonic() - self.started
        if self.first_token_seconds is None and num_tokens:
            self.first_token_seconds = now
        self.tokens, self.seconds = num_tokens, now - self.prompt_seconds

    def as_json(self) -> dict[str, float | int | None]:
        """For programs."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "prompt_seconds": round(self.prompt_seconds, 4),
            "prompt_tokens_per_second": _rate(self.prompt_tokens, self.prompt_seconds),
            "first_token_seconds": None if self.first_token_seconds is None else round(self.first_token_seconds, 4),
            "tokens": self.tokens,
            "seconds": round(self.seconds, 4),
            "tokens_per_second": _rate(self.tokens, self.seconds),
        }

    def in_words(self) -> str:
        """One line for people, at most 80 columns."""
        parts = []
        if self.prompt_tokens:
            parts.append(f"read {self.prompt_tokens:,} tokens at {_rate_text(self.prompt_tokens, self.prompt_seconds)}")
        if self.first_token_seconds is not None:
            parts.append(f"first after {self.first_token_seconds:.2f} s")
            parts.append(f"wrote {self.tokens:,} at {_rate_text(self.tokens, self.seconds)}")
        return "[" + ", ".join(parts or ["nothing was read or written"]) + "]"


def _rate(count: int, seconds: float) -> float | None:
    return round(count / seconds, 2) if count and seconds > 0 else None


def _rate_text(count: int, seconds: float) -> str:
    rate = _rate(count, seconds)
    return "– tokens/s" if rate is None else f"{rate:,.0f} tokens/s" if rate >= 10 else f"{rate:.2g} tokens/s"


class ReadingProgress:
    """Tells how far a long text has been read, on stderr: a line that changes, or where that is no terminal a few."""

    def __init__(self, total: int, signals: StopSignals) -> None:
        self._total, self._signals = total, signals
        self._started = self._told = time.monotonic()
        self.first: int | None = None

    def goes_on(self, num_read: int) -> bool:
        """Tell, if it is time to; False where a signal has come."""
        now = time.monotonic()
        if self.first is None:
            self.first = num_read
            if num_read:
                say(f"{num_read:,} of {self._total:,} tokens had been read before; going on from there.")
        is_terminal = sys.stderr.isatty()
        due = _SECONDS_BEFORE_PROGRESS / 4 if is_terminal else _SECONDS_BETWEEN_LINES
        if now - self._started >= _SECONDS_BEFORE_PROGRESS and now - self._told >= due:
            self._told = now
            line = self.line(num_read, now - self._started)
            before, after = ("\r", "") if is_terminal else ("", "\n")
            print(f"{before}{line:<79}", end=after, file=sys.stderr, flush=True)
        if is_terminal and num_read == self._total and self._told > self._started:
            print("\r" + " " * 79 + "\r", end="", file=sys.stderr, flush=True)
        return self._signals.name is None

    def line(self, num_read: int, seconds: float) -> str:
        """How far, how fast, how long still."""
        from infctx.training.progress_numbers import clock_text

        rate = (num_read - (self.first or 0)) / seconds if seconds > 0 else math.nan
        left = clock_text((self._total - num_read) / rate) if rate > 0 else "?"
        return f"read {num_read:,} of {self._total:,} tokens, {rate:,.0f} tokens/s, {left} left"


def interruptible(is_wanted: bool) -> AbstractContextManager[StopSignals]:
    """Signals as wishes, where there is a file to keep what was read; else they mean what they always do."""
    from contextlib import nullcontext

    from infctx.training.signals import StopSignals

    signals = StopSignals()
    return signals if is_wanted else nullcontext(signals)


def told(pieces: Iterator[str], speed: Speed, count: list[int]) -> Iterator[str]:
    """The same pieces, timed; count is the list of drawn tokens, which grows."""
    for piece in pieces:
        speed.wrote(len(count))
        yield piece
