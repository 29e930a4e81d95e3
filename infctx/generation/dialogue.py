"""The text of a conversation up to where the model answers: that of the template a model was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from infctx.data.chat import ChatTemplate
from infctx.data.template_catalog import Template
from infctx.data.template_pieces import PieceTemplate, clean_text
from infctx.errors import InfctxError

# Stands where the answer will: what is before it is the prompt.
_ANSWER = "x"


class Turn(NamedTuple):
    """What a person said, and the answer."""

    user: str
    answer: str


class Dialogue(Protocol):
    """How turns become text.

    Attributes:
        stops: texts that end an answer.
        in_words: what a person is told of it.
        has_system, has_history: whether it has a place for a system text, and for the turns before.
    """

    @property
    def stops(self) -> tuple[str, ...]: ...
    @property
    def in_words(self) -> str: ...
    @property
    def has_system(self) -> bool: ...
    @property
    def has_history(self) -> bool: ...

    def prompt(self, turns: Sequence[Turn], user: str, *, system: str = "") -> str:
        """The text up to the next answer. Raises DataError for a user text that is empty or no UTF-8."""
        ...


@dataclass(frozen=True)
class WorldDialogue:
    """`User: …`, `Assistant: …` with a blank line between turns, which no turn has inside it."""

    stops = ("\n\n",)
    in_words = "the World form, User: … Assistant: …"
    has_system = True
    has_history = True

    def prompt(self, turns: Sequence[Turn], user: str, *, system: str = "") -> str:
        """See `Dialogue`."""
        messages = [{"role": "system", "content": system}]
        for turn in turns:
            messages.append({"role": "user", "content": turn.user})
            # Training leaves out no turn; an answer that was stopped before its first word has none.
            if clean_text(turn.answer):
                messages.append({"role": "assistant", "content": turn.answer})
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": _ANSWER}]
        return ChatTemplate().render({"messages": messages}).text.removesuffix(f" {_ANSWER}")


@dataclass(frozen=True, kw_only=True)
class PieceDialogue:
    """One question and its answer, in the pieces of a template; what was said before has no place in it.

    Attributes:
        before_answer: the template up to the piece with the answer.
        question: the column that a person fills.
    """

    before_answer: PieceTemplate
    question: str
    stops: tuple[str, ...]
    in_words: str

    has_system = False
    has_history = False

    def prompt(self, turns: Sequence[Turn], user: str, *, system: str = "") -> str:
        """See `Dialogue`; the turns before are left out, as they were in training."""
        return self.before_answer.render({self.question: user}).text


def dialogue_of(template: Template | None) -> Dialogue:
    """The dialogue of a template that a model was trained with; None, and plain text, = the World form.

    Raises: InfctxError for pieces that one text of a person cannot fill.
    """
    if template is None or isinstance(template.layout, ChatTemplate) or template.name == "text":
        return WorldDialogue()
    layout = template.layout
    name = template.name or "a template of its own"
    places = [place for place, piece in enumerate(layout.pieces) if piece.columns]
    answer = places[-1]
    before = replace(layout, pieces=layout.pieces[:answer])
    # A column in a `when` is one that may be missing.
    needed = {column for piece in before.pieces if piece.when is None for column in piece.columns}
    if len(needed) != 1 or needed & set(layout.pieces[answer].columns):
        raise InfctxError(
            f"This model was trained on {name} ({', '.join(layout.columns)}), where an answer follows "
            f"{len(needed)} texts; infctx chat has one, what you type. Use infctx generate with the whole text."
        )
    (question,) = needed
    stops = ("\n\n",) if layout.is_clean else ()
    form = before.render({question: "…"}).text.replace("\n\n", " ")
    return PieceDialogue(
        before_answer=before,
        question=question,
        stops=stops,
        in_words=f"the form it was trained on, {form} …; every question stands alone",
    )
