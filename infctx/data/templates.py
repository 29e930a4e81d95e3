"""Record to Document: which text is shown to the model, and which part of it is trained on.

A template names the trained parts as byte spans of the whole rendered text. The text is tokenised once, and a token is
trained if and only if its last byte lies in such a span: so the mask does not depend on where tokens happen to end, and
the ids are those the model will meet, which they would not be if the pieces were tokenised one by one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from infctx.data.document import Document, smallest_ids
from infctx.data.tokenizer import END_OF_TEXT, Tokenizer, encode_utf8
from infctx.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered:
    """A record as text.

    Attributes:
        text: everything the model sees but the closing end of text.
        trained_spans: (start, end) offsets in the text's UTF-8 bytes, in order, not overlapping.
        trains_end_of_text: whether stopping here is to be learned.
    """

    text: str
    trained_spans: tuple[tuple[int, int], ...]
    trains_end_of_text: bool


class _WrongFieldsError(DataError):
    pass


def render_text(fields: Mapping[str, object]) -> Rendered:
    """Field "text", all of it trained."""
    (text,) = _strings(fields, ("text",))
    return Rendered(text=text, trained_spans=((0, len(encode_utf8(text))),), trains_end_of_text=True)


def render_completion(fields: Mapping[str, object]) -> Rendered:
    """Fields "prompt" and "completion", joined as they are; only the completion is trained."""
    prompt, completion = _strings(fields, ("prompt", "completion"))
    start = len(encode_utf8(prompt))
    end = start + len(encode_utf8(completion))
    return Rendered(text=prompt + completion, trained_spans=((start, end),), trains_end_of_text=True)


TEMPLATES: dict[str, Callable[[Mapping[str, object]], Rendered]] = {
    "text": render_text,
    "completion": render_completion,
}


def _strings(fields: Mapping[str, object], names: tuple[str, ...]) -> list[str]:
    values = [fields.get(name) for name in names]
    strings = [value for value in values if isinstance(value, str)]
    if len(strings) < len(names):
        wanted = " and ".join(f'"{name}"' for name in names)
        found = ", ".join(f'"{name}" ({type(value).__name__})' for name, value in fields.items()) or "none"
        raise _WrongFieldsError(f"expected {wanted} as strings (str), found the fields: {found}")
    return strings


def _fits(template: str, fields: Mapping[str, object]) -> bool:
    try:
        TEMPLATES[template](fields)
    except DataError:
        return False
    return True


def render(template: str, fields: Mapping[str, object]) -> Rendered:
    """Render a record with the template that `data.template` names.

    Raises: DataError for an unknown template, and for fields that do not fit (naming the template that they do fit).
    """
    check_template(template)
    try:
        return TEMPLATES[template](fields)
    except _WrongFieldsError as error:
        fitting = [name for name in TEMPLATES if _fits(name, fields)]
        advice = f"; they fit data.template={fitting[0]}" if fitting else ""
        raise DataError(f"data.template={template}: {error}{advice}") from None


def check_template(template: str) -> None:
    """Raise DataError for a template that does not exist."""
    if template not in TEMPLATES:
        raise DataError(f"data.template={template}: expected one of {', '.join(TEMPLATES)}.")


class NothingToTrainOnError(DataError):
    """A row that would teach nothing. num_tokens: what leaving it out drops."""

    def __init__(self, reason: str, *, num_tokens: int) -> None:
        super().__init__(reason)
        self.num_tokens = num_tokens


def make_document(rendered: Rendered, tokenizer: Tokenizer, *, origin: str) -> Document:
    """Tokenise the rendered text once, close it with end of text, and weigh its tokens.

    Raises: DataError for an empty text and for one with nothing to train on.
    """
    ids = tokenizer.encode(rendered.text)
    if len(ids) == 0:
        raise DataError("empty document")
    last_bytes = np.cumsum(tokenizer.byte_lengths(ids)) - 1
    weights = np.zeros(len(ids) + 1, dtype=np.float32)
    weights[:-1] = _in_spans(last_bytes, rendered.trained_spans)
    weights[-1] = rendered.trains_end_of_text
    # Nothing comes before the first token to predict it.
    weights[0] = 0
    if not weights.any():
        reason = "nothing to train on: no token but the first lies in the trained part"
        raise NothingToTrainOnError(reason, num_tokens=len(weights))
    return Document(tokens=smallest_ids(np.append(ids, END_OF_TEXT)), weights=weights, origin=origin)


def _in_spans(offsets: npt.NDArray[np.int64], spans: tuple[tuple[int, int], ...]) -> npt.NDArray[np.bool_]:
    inside = np.zeros(len(offsets), dtype=np.bool_)
    for start, end in spans:
        inside[np.searchsorted(offsets, start) : np.searchsorted(offsets, end)] = True
    return inside
