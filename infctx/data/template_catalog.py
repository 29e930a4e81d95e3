"""The templates that a recipe can name, and what it can change in them."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

from infctx.data.chat import ChatTemplate, TrainTurns, make_chat_template
from infctx.data.rendered import EmptyRowError, Rendered, WrongFieldsError, is_weight, scaled
from infctx.data.template_pieces import BUILT_IN_PIECES, PieceTemplate, make_piece_template
from infctx.errors import DataError

TEMPLATE_NAMES = (*BUILT_IN_PIECES, "chat")

_NONE: Mapping[str, Any] = MappingProxyType({})

# Raised when the same row and template come to another text or other weights: it is part of the key.
_RENDERING = 1


@dataclass(frozen=True, kw_only=True)
class Template:
    """How rows become text, with all that a recipe says about it.

    Attributes:
        name: for messages; None = the recipe's own pieces.
        weight_field: column of the row's weight.
        weight: of the whole set.
    """

    name: str | None
    layout: PieceTemplate | ChatTemplate
    weight_field: str | None = None
    weight: float = 1.0

    def render(self, fields: Mapping[str, object]) -> Rendered:
        """Render a row.

        Raises: WrongFieldsError, naming the template that the row fits; EmptyRowError; DataError for text that UTF-8
            cannot hold.
        """
        try:
            rendered = self.layout.render(fields)
            return scaled(rendered, self.weight * self._row_weight(fields))
        except _WrongWeightError:
            raise
        except WrongFieldsError as error:
            fitting = [name for name in looks_like(fields) if name != self.name]
            advice = f"; they fit data.template={' or '.join(fitting)}" if fitting else ""
            label = "data.template" if self.name is None else f"data.template={self.name}"
            raise WrongFieldsError(f"{label}: {error}{advice}") from None

    def key(self) -> str:
        """Give the canonical JSON of everything that the rendered rows depend on."""
        content = {
            "rendering": _RENDERING,
            type(self.layout).__name__: asdict(self.layout),
            "weight_field": self.weight_field,
            "weight": self.weight,
        }
        return json.dumps(content, sort_keys=True, separators=(",", ":"))

    def _row_weight(self, fields: Mapping[str, object]) -> float:
        if self.weight_field is None:
            return 1.0
        value = fields.get(self.weight_field)
        # The columns of a CSV are text.
        weight = _number_of(value) if isinstance(value, str) else value
        if not is_weight(weight):
            got = repr(value) if self.weight_field in fields else "no such column"
            raise _WrongWeightError(
                f"data.weight_field={self.weight_field}: expected a number from 0 to 1e9, got {got}"
            )
        return float(weight)  # type: ignore[arg-type]


class _WrongWeightError(WrongFieldsError):
    """A row whose weight is none; another template would not help."""


def _number_of(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def make_template(
    kind: str | Mapping[str, Any],
    *,
    fields: Mapping[str, str] = _NONE,
    weights: Mapping[str, float] = _NONE,
    train_turns: TrainTurns = "all",
    weight_field: str | None = None,
    weight: float = 1.0,
    roles: Mapping[str, str] = _NONE,
) -> Template:
    """Make a template; the arguments are the recipe keys of the same names, which is why they are many.

    Args:
        kind: a name in TEMPLATE_NAMES, or pieces (see `template_pieces`).
        fields: the file's column for a column of the template.
        weights: from 0, by column of the template, or by role of a conversation; 0 masks.
        train_turns, roles: of conversations only.
        weight_field: column that multiplies all weights of its row.
        weight: multiplies all weights.
    Raises: DataError naming the key for anything that the template cannot honour.
    """
    name = kind if isinstance(kind, str) else None
    if isinstance(kind, str) and kind not in TEMPLATE_NAMES:
        raise DataError(f"data.template={kind}: expected one of {', '.join(TEMPLATE_NAMES)}, or a mapping with pieces.")
    for key, value in [("weight", weight), *((f"weights.{key}", value) for key, value in weights.items())]:
        if not is_weight(value):
            raise DataError(f"data.{key}: expected a number from 0 to 1e9, got {value!r}.")
    for column, renamed in fields.items():
        if not isinstance(renamed, str):
            raise DataError(f"data.fields.{column}: expected the name of a column in the file, got {renamed!r}.")
    layout: PieceTemplate | ChatTemplate
    if name == "chat":
        layout = make_chat_template(fields=fields, weights=weights, train_turns=train_turns, roles=roles)
    else:
        if train_turns != "all" or roles:
            key = f"train_turns={train_turns}" if train_turns != "all" else "roles"
            raise DataError(f"data.{key}: only conversations have turns. Set data.template=chat, or leave it out.")
        pieces = BUILT_IN_PIECES[kind] if isinstance(kind, str) else kind
        layout = make_piece_template(pieces, fields=fields, weights=weights)
    return Template(name=name, layout=layout, weight_field=weight_field, weight=float(weight))


@cache
def _as_built_in() -> dict[str, Template]:
    return {name: make_template(name) for name in TEMPLATE_NAMES}


def looks_like(fields: Mapping[str, object]) -> list[str]:
    """Name the built-in templates whose columns a row has, with text in them or not."""
    return [name for name, template in _as_built_in().items() if _fits(template, fields)]


def _fits(template: Template, fields: Mapping[str, object]) -> bool:
    try:
        template.layout.render(fields)
    except EmptyRowError:
        return True
    except DataError:
        return False
    return True
