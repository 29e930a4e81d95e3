"""`infctx chat`: talk with a model in the form it was trained on."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from infctx.cli_output import AsJson, answer, say
from infctx.cli_voice import (
    Decay,
    Device,
    Dtype,
    Frequency,
    LastWeights,
    OpenedVoice,
    Presence,
    Seed,
    Source,
    Speed,
    Temperature,
    TokenizerName,
    TopK,
    TopP,
    open_state,
    open_voice,
    random_seed,
    stops_of,
)
from infctx.errors import InfctxError

if TYPE_CHECKING:
    from infctx.data.template_catalog import Template
    from infctx.generation.chat import ChatSession

HELP = """\
/undo              take back the last turn
/again             answer it anew
/reset             forget all turns; the system text stays
/system TEXT       what the model is told first; without TEXT, show it
/set NAME=VALUE    draw answers otherwise; /set shows NAMEs and values
/save FILE         keep the conversation
/load FILE         go on with one, or behind a text of generate --save-state
/help  /quit       Ctrl-C stops an answer, Ctrl-D ends
A line that ends in \\ goes on in the next one."""


def chat(
    source: Source,
    system: Annotated[str, typer.Option(help="What the model is told before the first turn.")] = "",
    state: Annotated[
        Path | None, typer.Option(help="Talk behind a text that generate --save-state kept, or go on with a /save.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 500,
    temperature: Temperature = 1.0,
    top_p: TopP = 0.5,
    top_k: TopK = 0,
    presence_penalty: Presence = 0.3,
    frequency_penalty: Frequency = 0.3,
    penalty_decay: Decay = 0.996,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="A text that ends an answer, instead of the template's (a blank line); \\n is a newline."),
    ] = None,
    seed: Seed = None,
    tokenizer: TokenizerName = None,
    last_weights: LastWeights = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Talk with a model; /help tells what else can be typed.

    A run is asked in the form of its recipe's template, everything else as World models are. Lines may also come from a
    file or a pipe. With --json the turns are printed when it ends, and the answers go to stderr until then.
    """
    from infctx.generation.chat import ChatSession
    from infctx.generation.dialogue import dialogue_of
    from infctx.generation.row import Wish
    from infctx.generation.sampling import SamplingOptions

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
    dialogue = dialogue_of(_template_of(source))
    opened = open_voice(source, tokenizer=tokenizer, last_weights=last_weights, device=device, dtype=dtype)
    session = ChatSession(opened.voice, dialogue, wish, system=system)
    if state is not None:
        session.begin_behind(open_state(state, opened))
        if system:
            session.set_system(system)
    if sys.stdin.isatty():
        say(f"Talking in {dialogue.in_words}. /help tells more, Ctrl-D ends.")
    talk = _Talk(session, opened, out=sys.stderr if as_json else sys.stdout)
    talk.run()
    turns = [{"user": turn.user, "answer": turn.answer} for turn in session.turns]
    answer({"system": session.system, "turns": turns, "seed": chosen_seed}, as_json)


def _template_of(source: Path) -> Template | None:
    """The template of a run: that of its conversations, else of its first set that is no plain text."""
    from infctx.recipe.load import RECIPE_FILE, load_recipe
    from infctx.run_data import set_spec

    if not (source / RECIPE_FILE).is_file():
        return None
    sets = load_recipe(source / RECIPE_FILE).data.sources()
    templates = [set_spec(name, section).template for name, section in sets]
    chats = [template for template in templates if template.name == "chat"]
    others = [template for template in templates if template.name not in ("chat", "text")]
    return next(iter([*chats, *others]), None)


class _Talk:
    """The lines of a person, and what becomes of them."""

    def __init__(self, session: ChatSession, opened: OpenedVoice, *, out: TextIO) -> None:
        self._session, self._opened, self._out = session, opened, out
        self._commands: dict[str, Callable[[str], None]] = {
            "/undo": self._undo,
            "/again": self._again,
            "/reset": self._reset,
            "/system": self._system,
            "/set": self._set,
            "/save": self._save,
            "/load": self._load,
            "/help": self._help,
        }

    def run(self) -> None:
        """Until /quit, or the end of the input."""
        if sys.stdin.isatty():
            # Gives input() a history and keys to edit with; not everywhere.
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401
        while True:
            try:
                line = _read_line()
                if line is None or line.strip() in ("/quit", "/exit"):
                    return
                if line.strip():
                    self._take(line)
            except KeyboardInterrupt:
                say("\nStopped. /quit or Ctrl-D ends.")
            except InfctxError as error:
                say(f"Error: {error}")
            except OSError as error:
                say(f"Error: {error.filename}: {error.strerror}.")

    def _take(self, line: str) -> None:
        name, _, rest = line.strip().partition(" ")
        if not name.startswith("/"):
            self._answer(line)
        elif name in self._commands:
            self._commands[name](rest.strip())
        else:
            raise InfctxError(f"{name}: expected one of {', '.join(self._commands)}, /quit.")

    def _answer(self, text: str) -> None:
        speed, session = Speed(), self._session
        pieces = session.answer(text)
        try:
            for piece in pieces:
                if speed.first_token_seconds is None:
                    speed.read(session.tokens_read)
                speed.wrote(1 if session.row is None else len(session.row.tokens))
                print(piece, end="", file=self._out, flush=True)
        finally:
            # Of an answer that was stopped here, what was shown is kept.
            pieces.close()
            print(file=self._out, flush=True)
        say(speed.in_words())

    def _undo(self, rest: str) -> None:
        turn = self._session.undo()
        say(f"Taken back: {turn.user[:60]}")

    def _again(self, rest: str) -> None:
        self._answer(self._session.undo().user)

    def _reset(self, rest: str) -> None:
        self._session.reset()
        say("All turns are forgotten.")

    def _system(self, rest: str) -> None:
        if rest:
            self._session.set_system(rest)
        say(f"System: {self._session.system or '(nothing)'}")

    def _set(self, rest: str) -> None:
        name, _, value = (part.strip() for part in rest.partition("="))
        wish = self._session.wish
        if not name:
            values = {**dataclasses.asdict(wish.sampling), "max_tokens": wish.max_tokens}
            say("\n".join(f"{key}={value:g}" for key, value in values.items()))
            return
        options = {option.name: option.type for option in dataclasses.fields(wish.sampling)}
        try:
            if name == "max_tokens":
                self._session.wish = dataclasses.replace(wish, max_tokens=max(1, int(value)))
            elif name in options:
                number = int(value) if options[name] == "int" else float(value)
                sampling = dataclasses.replace(wish.sampling, **{name: number})
                self._session.wish = dataclasses.replace(wish, sampling=sampling)
            else:
                raise InfctxError(f"/set {name}: expected one of {self._names()}, as in /set temperature=0.5.")
        except ValueError:
            raise InfctxError(f"/set {name}: expected a number, got {value!r}.") from None

    def _save(self, rest: str) -> None:
        if not rest:
            raise InfctxError("/save: expected a file, as in /save talk.state.")
        path = Path(rest)
        if path.exists() and not _is_state(path):
            raise InfctxError(f"{path}: exists, and is no state. Give another name.")
        self._session.save(path, self._opened.reader)
        say(f"Saved {len(self._session.turns)} turns. /load {path} or --state {path} goes on with them.")

    def _load(self, rest: str) -> None:
        if not rest:
            raise InfctxError("/load: expected a file, as in /load talk.state.")
        self._session.begin_behind(open_state(Path(rest), self._opened))
        say(f"Going on behind {rest}: {len(self._session.turns)} turns.")

    def _help(self, rest: str) -> None:
        say(HELP)

    def _names(self) -> str:
        names = [option.name for option in dataclasses.fields(self._session.wish.sampling)]
        return ", ".join([*names, "max_tokens"])


def _read_line() -> str | None:
    """What a person says: a line, with those it goes on in. None at the end of the input."""
    is_terminal = sys.stdin.isatty()
    lines: list[str] = []
    while True:
        try:
            line = input(("... " if lines else "> ") if is_terminal else "")
        except EOFError:
            return "\n".join(lines) if lines else None
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])


def _is_state(path: Path) -> bool:
    from infctx.checkpoint.safetensors_file import read_safetensors
    from infctx.generation.prompt_state import SCHEMA_KEY

    try:
        return SCHEMA_KEY in read_safetensors(path)[1]
    except InfctxError:
        return False
