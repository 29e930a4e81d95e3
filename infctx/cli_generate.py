"""`infctx generate`: continue a text, or many, also behind a text that was read before."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infctx.cli_output import LARGEST_SEED, AsJson, answer, leave, say
from infctx.cli_voice import (
    Decay,
    Device,
    Dtype,
    Frequency,
    LastWeights,
    OpenedVoice,
    Presence,
    ReadingProgress,
    Seed,
    Source,
    Speed,
    Stop,
    Temperature,
    TokenizerName,
    TopK,
    TopP,
    interruptible,
    open_state,
    open_voice,
    random_seed,
    read_text,
    stops_of,
    told,
)
from infctx.errors import CheckpointError, InfctxError
from infctx.exit_codes import EXIT_INTERRUPTED, EXIT_STOPPED

if TYPE_CHECKING:
    from infctx.generation.prompt_file import PromptRow
    from infctx.generation.prompt_state import PromptState
    from infctx.generation.row import Row, Wish

Prompt = Annotated[str | None, typer.Option(help="The text to continue.")]
PromptFile = Annotated[Path | None, typer.Option(help="A file with it, of any length; - is stdin.")]
Prompts = Annotated[Path | None, typer.Option(help='JSON lines of {"prompt": ...}, each continued by itself.')]
Output = Annotated[Path | None, typer.Option(help="Where --prompts' results go, as JSON lines; else to stdout.")]
NumRows = Annotated[int, typer.Option("--rows", min=1, help="Of --prompts, written at once.")]
StateFile = Annotated[Path | None, typer.Option(help="Go on behind what --save-state kept.")]
SaveState = Annotated[Path | None, typer.Option(help="Keep what was read of the prompt in this file.")]
Force = Annotated[bool, typer.Option(help="Replace an --output or --save-state that holds something else.")]
MaxTokens = Annotated[int, typer.Option(min=0, help="Tokens to generate at most; 0 only with --save-state.")]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Asked:
    """Where the text comes from and what is kept."""

    prompt: str | None
    prompt_file: Path | None
    prompts: Path | None
    output: Path | None
    state: Path | None
    save_state: Path | None
    force: bool


# The options of a command are its parameters, which is why they are many.
def generate(
    source: Source,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    prompts: Prompts = None,
    output: Output = None,
    rows: NumRows = 8,
    max_tokens: MaxTokens = 100,
    temperature: Temperature = 1.0,
    top_p: TopP = 0.7,
    top_k: TopK = 0,
    presence_penalty: Presence = 0.0,
    frequency_penalty: Frequency = 0.0,
    penalty_decay: Decay = 0.996,
    stop: Stop = None,
    seed: Seed = None,
    state: StateFile = None,
    save_state: SaveState = None,
    tokenizer: TokenizerName = None,
    last_weights: LastWeights = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Continue a text.

    A long document is read once with --save-state FILE --max-tokens 0 (stopped, the same command goes on), and then
    asked with --state FILE --prompt QUESTION. Each row of --prompts may have a "seed"; otherwise it is --seed plus its
    number from 0. End of text always ends an answer. The speed is told on stderr.
    """
    asked = _Asked(
        prompt=prompt,
        prompt_file=prompt_file,
        prompts=prompts,
        output=output,
        state=state,
        save_state=save_state,
        force=force,
    )
    _check(asked, max_tokens)
    from infctx.generation.row import Wish
    from infctx.generation.sampling import LogitsError, SamplingOptions

    sampling = SamplingOptions(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        penalty_decay=penalty_decay,
    )
    chosen_seed = random_seed() if seed is None else seed
    wish = Wish(sampling=sampling, seed=chosen_seed, max_tokens=max_tokens, stops=stops_of(stop))
    opened = open_voice(source, tokenizer=tokenizer, last_weights=last_weights, device=device, dtype=dtype)
    before = None if state is None else open_state(state, opened)
    try:
        if prompts is not None:
            _generate_many(opened, asked, wish, before, num_rows=rows, as_json=as_json)
        else:
            _generate_one(opened, asked, wish, before, as_json=as_json)
    except LogitsError as error:
        raise CheckpointError(f"{source}: {error}") from error


def _check(asked: _Asked, max_tokens: int) -> None:
    texts = [asked.prompt is not None, asked.prompt_file is not None, asked.prompts is not None]
    if sum(texts) > 1 or (not any(texts) and asked.state is None):
        raise InfctxError("Expected one of --prompt, --prompt-file and --prompts, or --state alone. Give one of them.")
    if asked.prompts is None and asked.output is not None:
        raise InfctxError(
            "--output: only --prompts has one; a single text goes to stdout. Leave it out, or use > FILE."
        )
    if asked.prompts is not None and asked.save_state is not None:
        raise InfctxError("--save-state: keeps one text, and --prompts has many. Leave one of them out.")
    if asked.save_state is not None and not any(texts):
        raise InfctxError("--save-state: there is no text to read. Give --prompt or --prompt-file.")
    if max_tokens == 0 and asked.save_state is None:
        raise InfctxError("--max-tokens 0: expected 1 or more; 0 is for --save-state FILE, which keeps what was read.")
    for path in (asked.save_state, asked.output):
        if path is not None and not path.absolute().parent.is_dir():
            raise InfctxError(f"{path}: its folder is not there. Make it, or give another name.")
    if asked.output is not None and asked.output.exists() and not asked.force:
        raise InfctxError(f"{asked.output}: exists already. Give another name, or --force.")


def _generate_one(opened: OpenedVoice, asked: _Asked, wish: Wish, before: PromptState | None, *, as_json: bool) -> None:
    from infctx.generation.row import Row, write_text

    text = read_text(asked.prompt_file) if asked.prompt_file is not None else asked.prompt or ""
    speed = Speed()
    place = _read(opened, asked, text, before, speed)
    row = Row(opened.voice, wish)
    is_shown = not as_json and wish.max_tokens > 0
    if is_shown and asked.prompt is not None:
        print(asked.prompt, end="", flush=True)
    is_interrupted = False
    try:
        for piece in told(write_text(opened.voice, row, place.reading), speed, row.tokens):
            if is_shown:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        is_interrupted = True
        row.finish("interrupted")
    if is_shown:
        print()
    say(speed.in_words())
    facts: dict[str, Any] = {"prompt": asked.prompt, "text": row.text, "tokens": len(row.tokens), "ended": row.ended}
    answer(facts | {"seed": wish.seed, "state_tokens": place.reading.num_tokens, "speed": speed.as_json()}, as_json)
    if is_interrupted:
        leave(EXIT_INTERRUPTED, "Interrupted.")


def _read(opened: OpenedVoice, asked: _Asked, text: str, before: PromptState | None, speed: Speed) -> PromptState:
    """Read the prompt, with progress and into --save-state where it is wanted."""
    from infctx.generation.long_reading import LongText, read_long_text
    from infctx.generation.row import check_ids

    tokens = opened.voice.tokenizer.encode(text)
    check_ids(tokens, opened.voice)
    if not len(tokens):
        if before is not None:
            return before
        # An empty prompt is a new document: what comes before one is the end of another.
        tokens = _end_of_text()
    long_text = LongText(tokens=tokens, before=before, file=asked.save_state, may_replace=asked.force)
    with interruptible(asked.save_state is not None) as signals:
        progress = ReadingProgress(len(tokens), signals)
        place = read_long_text(opened.voice.model, opened.reader, long_text, goes_on=progress.goes_on)
        if not place.is_whole:
            at = f"{place.text_tokens:,} of {len(tokens):,} tokens"
            told_of = f"Stopped by {signals.name} at {at}; {asked.save_state} holds them."
            leave(EXIT_STOPPED, f"{told_of} The same command goes on from there.")
    speed.read(len(tokens) - (progress.first or 0))
    if asked.save_state is not None:
        say(f"{asked.save_state} holds {place.reading.num_tokens:,} tokens; ask with --state {asked.save_state}.")
    return place


def _generate_many(
    opened: OpenedVoice, asked: _Asked, wish: Wish, before: PromptState | None, *, num_rows: int, as_json: bool
) -> None:
    from infctx.generation.batch import Prompt as BatchPrompt
    from infctx.generation.batch import write_texts
    from infctx.generation.prompt_file import read_prompts
    from infctx.generation.row import check_ids

    assert asked.prompts is not None
    given = read_prompts(asked.prompts, wish, largest_seed=LARGEST_SEED)
    batch = []
    for entry in given:
        tokens = opened.voice.tokenizer.encode(entry.prompt)
        check_ids(tokens, opened.voice)
        tokens = _end_of_text() if not len(tokens) and before is None else tokens
        batch.append(BatchPrompt(tokens=tokens, wish=entry.wish))
    speed = Speed()
    results = _Results(given, is_printed=asked.output is None and not as_json)
    is_interrupted = False
    reading = None if before is None else before.reading
    try:
        for number, row in write_texts(opened.voice, batch, num_rows=num_rows, before=reading):
            results.put(number, row)
            speed.wrote(results.num_tokens)
    except KeyboardInterrupt:
        is_interrupted = True
    if asked.output is not None:
        results.write(asked.output)
    say(f"[{len(results.done)} of {len(given)} texts, {speed.in_words().strip('[]')}; reading is in the time]")
    facts: dict[str, Any] = {"prompts": len(given), "written": len(results.done), "speed": speed.as_json()}
    found = {"output": str(asked.output)} if asked.output is not None else {"results": results.done}
    answer(facts | found, as_json)
    if is_interrupted:
        leave(EXIT_INTERRUPTED, f"Interrupted: the first {len(results.done)} of {len(given)} texts are there.")


class _Results:
    """Finished rows, given out in the order of the prompts. done: those, as they are written."""

    def __init__(self, given: list[PromptRow], *, is_printed: bool) -> None:
        self._given, self._is_printed = given, is_printed
        self._waiting: dict[int, Row] = {}
        self.done: list[dict[str, Any]] = []
        self.num_tokens = 0

    def put(self, number: int, row: Row) -> None:
        """A row has ended."""
        self._waiting[number] = row
        self.num_tokens += len(row.tokens)
        while (ended := self._waiting.pop(len(self.done), None)) is not None:
            entry = self._given[len(self.done)]
            facts = {"text": ended.text, "tokens": len(ended.tokens), "ended": ended.ended, "seed": entry.wish.seed}
            self.done.append(entry.columns | facts)
            if self._is_printed:
                print(json.dumps(self.done[-1], ensure_ascii=False), flush=True)

    def write(self, path: Path) -> None:
        """Write the file, whole."""
        from infctx.checkpoint.atomic import write_file_atomically

        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.done)
        write_file_atomically(path, lambda unfinished: _write(unfinished, lines))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _end_of_text() -> Any:
    import numpy as np

    return np.zeros(1, dtype=np.int32)
