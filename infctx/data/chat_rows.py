"""Conversations in the shapes that data sets keep them in, read as turns of four roles.

The list of turns is the first of the columns "messages", "conversations" and "conversation" that is not null. A turn is
read by the first of these pairs of keys whose former it has: role/content, from/value, sender/message; and otherwise as
{input, output}, a user's and the assistant's turn in one, either of which may be missing, with an optional {system}
before them. A "system" column beside the list is put first where the list has no system turn of its own.

A content is a string or a list of {type: text, text: ...}. The assistant's `tool_calls` become lines of JSON below it.
A turn's "weight", as OpenAI writes it, multiplies its role's.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from infctx.data.rendered import EmptyRowError, WrongFieldsError, found_fields, is_weight
from infctx.data.template_pieces import clean_text

CHAT_ROLES = ("system", "user", "assistant", "tool")

_NAMES_OF_ROLES = {
    "system": ("system",),
    "user": ("user", "human", "prompter", "question"),
    "assistant": ("assistant", "gpt", "bot", "model", "chatgpt", "answer", "function_call", "tool_call"),
    "tool": ("tool", "function", "observation", "tool_response", "function_response"),
}
ROLE_OF_NAME = {name: role for role, names in _NAMES_OF_ROLES.items() for name in names}
"""What data sets call the four roles; matched with and without regard to case."""

_LISTS = ("messages", "conversations", "conversation")
_SHAPES = (("role", "content"), ("from", "value"), ("sender", "message"))
_PAIR = (("system", "system"), ("input", "user"), ("output", "assistant"))

CHAT_FIELDS = (
    *_LISTS,
    *(key for shape in _SHAPES for key in shape),
    "input",
    "output",
    "system",
    "tool_calls",
    "weight",
)
"""Columns and keys that `data.fields` can give other names."""


class Turn(NamedTuple):
    """One turn. text: cleaned, not empty. weight: its own factor."""

    role: str
    text: str
    weight: float


@dataclass(frozen=True, kw_only=True)
class ChatReader:
    """Reads a row's turns.

    Attributes:
        fields: (name in CHAT_FIELDS, name in the file).
        roles: (name in the file, role), beside ROLE_OF_NAME.
    """

    fields: tuple[tuple[str, str], ...] = ()
    roles: tuple[tuple[str, str], ...] = ()

    @cached_property
    def _names(self) -> dict[str, str]:
        return {name: name for name in CHAT_FIELDS} | dict(self.fields)

    @cached_property
    def _shapes(self) -> list[tuple[str, str]]:
        return [(self._names[speaker], self._names[text]) for speaker, text in _SHAPES]

    @cached_property
    def _roles(self) -> dict[str, str]:
        return ROLE_OF_NAME | dict(self.roles)

    def read(self, fields: Mapping[str, object]) -> list[Turn]:
        """Read a row's turns in order; a system turn without text is left out.

        Raises: WrongFieldsError for a row of another shape; EmptyRowError for a turn without text.
        """
        turns: list[Turn] = []
        for number, item in enumerate(self._list(fields), start=1):
            turns += self._turns(item, number)
        system = fields.get(self._names["system"])
        if system is not None and all(turn.role != "system" for turn in turns):
            if not isinstance(system, str):
                raise WrongFieldsError(f'"{self._names["system"]}": expected a string, got {type(system).__name__}')
            if text := clean_text(system):
                turns.insert(0, Turn("system", text, 1.0))
        return turns

    def _list(self, fields: Mapping[str, object]) -> list[object]:
        columns = [self._names[name] for name in _LISTS]
        column = next((column for column in columns if fields.get(column) is not None), None)
        turns = None if column is None else fields[column]
        if not isinstance(turns, list | tuple):
            wanted = ", ".join(f'"{name}"' for name in columns[:-1])
            raise WrongFieldsError(
                f'expected {wanted} or "{columns[-1]}" as a list of turns, found the fields: {found_fields(fields)}'
            )
        if not turns:
            raise EmptyRowError(f'"{column}" has no turns')
        return list(turns)

    def _turns(self, item: object, number: int) -> list[Turn]:
        if not isinstance(item, dict):
            raise WrongFieldsError(f"turn {number}: expected an object, got {type(item).__name__}")
        for speaker, text in self._shapes:
            if item.get(speaker) is not None:
                return self._spoken(item, speaker, text, number)
        return self._pair(item, number)

    def _spoken(self, item: dict[str, object], speaker: str, text: str, number: int) -> list[Turn]:
        role = self._role(item[speaker], number)
        if text not in item and self._names["tool_calls"] not in item:
            raise WrongFieldsError(
                f'turn {number}: expected "{text}" beside "{speaker}", found: {found_fields(item)}; '
                "data.fields can name it"
            )
        content = _content(item.get(text), number)
        calls = item.get(self._names["tool_calls"])
        if calls:
            if role != "assistant":
                raise WrongFieldsError(f"turn {number} ({role}): only the assistant can have tool_calls")
            content = "\n".join([content, *_call_lines(calls, number)])
        return _cleaned(role, content, self._weight(item, number), number)

    def _pair(self, item: dict[str, object], number: int) -> list[Turn]:
        turns = []
        is_pair = False
        for name, role in _PAIR:
            value = item.get(self._names[name])
            if value is None:
                continue
            is_pair = True
            turns += _cleaned(role, _content(value, number), self._weight(item, number), number)
        if not is_pair:
            wanted = ", ".join(f"{speaker}/{text}" for speaker, text in self._shapes)
            wanted += f" or {self._names['input']}/{self._names['output']}"
            raise WrongFieldsError(f"turn {number}: expected {wanted}, found: {found_fields(item)}")
        return turns

    def _role(self, name: object, number: int) -> str:
        role = None
        if isinstance(name, str):
            role = self._roles.get(name) or self._roles.get(name.lower())
        if role is None:
            raise WrongFieldsError(
                f"turn {number}: unknown role {name!r}. Say with data.roles which it is, e.g. "
                f"data.roles: {{{name}: user}} (one of {', '.join(CHAT_ROLES)})"
            )
        return role

    def _weight(self, item: dict[str, object], number: int) -> float:
        weight = item.get(self._names["weight"])
        if weight is None:
            return 1.0
        if not is_weight(weight):
            raise WrongFieldsError(f"turn {number}: weight: expected a number from 0 to 1e9, got {weight!r}")
        return float(weight)  # type: ignore[arg-type]


def _cleaned(role: str, content: str, weight: float, number: int) -> list[Turn]:
    text = clean_text(content)
    if not text and role != "system":
        raise EmptyRowError(f"turn {number} ({role}) is empty")
    return [Turn(role, text, weight)] if text else []


def _content(content: object, number: int) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if not isinstance(content, list | tuple):
        raise WrongFieldsError(
            f"turn {number}: expected its content as a string or a list of text parts, got {type(content).__name__}"
        )
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        text = part.get("text") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(text, str):
            raise WrongFieldsError(f"turn {number}: expected parts {{type: text, text: ...}}, got one of type {kind}")
        texts.append(text)
    return "".join(texts)


def _call_lines(calls: object, number: int) -> list[str]:
    lines = []
    for call in calls if isinstance(calls, list | tuple) else [calls]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise WrongFieldsError(
                f"turn {number}: tool_calls: expected {{function: {{name, arguments}}}}, got {call!r}"
            )
        arguments = _arguments(function.get("arguments"))
        try:
            line = json.dumps(
                {"name": function["name"], "arguments": arguments}, ensure_ascii=False, separators=(",", ":")
            )
        except (TypeError, ValueError, RecursionError) as error:
            raise WrongFieldsError(f"turn {number}: tool_calls: arguments that JSON cannot hold: {error}") from None
        lines.append(line)
    return lines


def _arguments(arguments: object) -> object:
    """OpenAI's arguments are a string of JSON; one that is not JSON stays a string."""
    if not isinstance(arguments, str):
        return arguments
    try:
        parsed: object = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return parsed
