"""Conversations in the World format: which turns are trained on, and where each part begins and ends.

    System: ...

    User: ...

    Assistant: ...

Turns are separated by a blank line, which no turn has inside it (`clean_text`). A trained turn is its text with the
space before it and, as the signal to stop, the blank line after it; of the last turn, the closing end of text. The
labels are never trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from infctx.data.chat_rows import CHAT_FIELDS, CHAT_ROLES, ChatReader
from infctx.data.rendered import Rendered, RenderedPart, TextBuilder
from infctx.data.template_pieces import check_names
from infctx.errors import DataError

TrainTurns = Literal["all", "last"]

_LABELS = {"system": "System:", "user": "User:", "assistant": "Assistant:", "tool": "Tool:"}
_DEFAULT_WEIGHTS = {"system": 0.0, "user": 0.0, "assistant": 1.0, "tool": 0.0}
assert tuple(_LABELS) == tuple(_DEFAULT_WEIGHTS) == CHAT_ROLES


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """The template of conversations.

    Attributes:
        weights: (role, weight) of every role; 0 = masked.
        train_turns: all of the assistant's turns, or the last of them only.
    """

    reader: ChatReader = field(default_factory=ChatReader)
    weights: tuple[tuple[str, float], ...] = tuple(_DEFAULT_WEIGHTS.items())
    train_turns: TrainTurns = "all"

    @cached_property
    def _weights(self) -> dict[str, float]:
        return dict(self.weights)

    def render(self, fields: Mapping[str, object]) -> Rendered:
        """Render a row.

        Raises: WrongFieldsError and EmptyRowError: see `ChatReader.read`; DataError for text that UTF-8 cannot hold.
        """
        builder = TextBuilder()
        weight = 0.0
        for text, weight, _ in self.parts(fields):
            builder.add(text, weight)
        return builder.finish(end_weight=weight)

    def parts(self, fields: Mapping[str, object]) -> list[RenderedPart]:
        """The texts that `render` joins, each with where it comes from. Raises: as `render`."""
        turns = self.reader.read(fields)
        weights = self._weights
        last_of_assistant = max((place for place, turn in enumerate(turns) if turn.role == "assistant"), default=-1)
        parts = []
        for place, turn in enumerate(turns):
            weight = weights[turn.role] * turn.weight
            if self.train_turns == "last" and turn.role == "assistant" and place != last_of_assistant:
                weight = 0.0
            source = f"turn {place + 1} ({turn.role})"
            parts.append(RenderedPart(_LABELS[turn.role], 0.0, f"label of {source}"))
            text = f" {turn.text}" if place == len(turns) - 1 else f" {turn.text}\n\n"
            parts.append(RenderedPart(text, weight, source))
        return parts


def make_chat_template(
    *, fields: Mapping[str, str], weights: Mapping[str, float], train_turns: TrainTurns, roles: Mapping[str, str]
) -> ChatTemplate:
    """Make the template.

    Args:
        fields: the file's name for a column or key in CHAT_FIELDS.
        weights: of roles, instead of 1 for the assistant and 0 for the others.
        roles: the role of a name in the file, beside ROLE_OF_NAME.
    Raises: DataError for a name that does not exist.
    """
    check_names("data.fields", fields, list(CHAT_FIELDS), "columns and keys")
    check_names("data.weights", weights, list(CHAT_ROLES), "roles")
    for name, role in roles.items():
        if role not in CHAT_ROLES:
            raise DataError(f"data.roles.{name}: expected one of {', '.join(CHAT_ROLES)}, got {role!r}.")
    if train_turns not in ("all", "last"):
        raise DataError(f"data.train_turns={train_turns}: expected all or last.")
    merged = _DEFAULT_WEIGHTS | {role: float(weight) for role, weight in weights.items()}
    return ChatTemplate(
        reader=ChatReader(fields=tuple(sorted(fields.items())), roles=tuple(sorted(roles.items()))),
        weights=tuple(merged.items()),
        train_turns=train_turns,
    )
