"""Which tokens are trained on, whatever the tokens' borders are."""

import numpy as np
import pytest

from infctx.data.document import Document, smallest_ids
from infctx.data.templates import TEMPLATES, Rendered, make_document, render
from infctx.data.tokenizer import BytesTokenizer, Tokenizer, WorldTokenizer
from infctx.errors import DataError

WORLD = WorldTokenizer()
BYTES = BytesTokenizer()


def document_of(template: str, fields: dict[str, object], tokenizer: Tokenizer) -> Document:
    return make_document(render(template, fields), tokenizer, origin="rows.jsonl:1")


def weights_by_hand(ids: list[int], spans: list[tuple[int, int]], tokenizer: Tokenizer) -> list[float]:
    """One token at a time: a token counts if its last byte lies in a span; never the first."""
    weights, end = [], 0
    for token_id in ids:
        end += len(tokenizer.decode_bytes([token_id]))
        weights.append(float(any(start <= end - 1 < stop for start, stop in spans)))
    weights[0] = 0.0
    return weights


@pytest.mark.parametrize("tokenizer", [WORLD, BYTES], ids=["world", "bytes"])
def test_text_trains_all_but_the_first_token(tokenizer: Tokenizer) -> None:
    text = "Größe: 東京\r\n\n\n👩‍👧 <|endoftext|>"
    document = document_of("text", {"text": text, "meta": 3}, tokenizer)
    assert document.tokens.tolist() == [*tokenizer.encode(text).tolist(), 0]
    assert document.weights.tolist() == [0.0] + [1.0] * (len(document) - 1)
    assert document.weights.dtype == np.float32
    assert document.tokens.dtype == np.uint16
    assert document.origin == "rows.jsonl:1"
    assert document.num_trained_tokens == len(document) - 1


STRADDLING = [
    ("Question:\n", "\nAnswer"),
    ("ab", "out"),
    ("prompt ", "completion"),
    ("a\r", "\nb"),
    ("", "no prompt"),
    ("only the end", ""),
    ("東", "京"),
]


@pytest.mark.parametrize("tokenizer", [WORLD, BYTES], ids=["world", "bytes"])
@pytest.mark.parametrize(("prompt", "completion"), STRADDLING)
def test_completion_trains_by_byte_span(tokenizer: Tokenizer, prompt: str, completion: str) -> None:
    document = document_of("completion", {"prompt": prompt, "completion": completion}, tokenizer)
    ids = tokenizer.encode(prompt + completion).tolist()
    assert document.tokens.tolist() == [*ids, 0]
    begin, end = len(prompt.encode()), len((prompt + completion).encode())
    assert document.weights.tolist() == [*weights_by_hand(ids, [(begin, end)], tokenizer), 1.0]


def test_a_token_across_the_border_belongs_to_the_side_of_its_last_byte() -> None:
    # "\n" + "\n" is the one token 261, which ends in the completion.
    document = document_of("completion", {"prompt": "Q\n", "completion": "\nA"}, WORLD)
    assert document.tokens.tolist() == [*WORLD.encode("Q").tolist(), 261, *WORLD.encode("A").tolist(), 0]
    assert document.weights.tolist() == [0.0, 1.0, 1.0, 1.0]
    # The same token with its last byte in the prompt is not trained.
    rendered = Rendered(text="Q\n\nA", trained_spans=((1, 2), (3, 4)), trains_end_of_text=False)
    assert make_document(rendered, WORLD, origin="x").weights.tolist() == [0.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("tokenizer", [WORLD, BYTES], ids=["world", "bytes"])
def test_many_spans_on_random_text(tokenizer: Tokenizer) -> None:
    generator = np.random.Generator(np.random.PCG64(0))
    num_trained = 0
    for _ in range(50):
        text = "".join(generator.choice(list("ab \n\n:é東👩"), size=60))
        cuts = np.unique(generator.integers(0, len(text.encode()) + 1, size=8))
        spans = [(int(a), int(b)) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]
        rendered = Rendered(text=text, trained_spans=tuple(spans), trains_end_of_text=True)
        document = make_document(rendered, tokenizer, origin="x")
        ids = document.tokens[:-1].tolist()
        assert document.weights[:-1].tolist() == weights_by_hand(ids, spans, tokenizer)
        num_trained += document.num_trained_tokens
    assert num_trained > 500


@pytest.mark.parametrize(
    ("template", "fields", "message"),
    [
        ("text", {"prompt": "a", "completion": "b"}, r'"text".*"prompt".*"completion".*fit data\.template=completion'),
        ("completion", {"text": "a"}, r'"prompt" and "completion".*"text" \(str\); they fit data\.template=text'),
        ("completion", {"prompt": "a"}, r'expected "prompt" and "completion".*found the fields: "prompt" \(str\)$'),
        ("text", {"text": 3}, r'"text" \(int\)$'),
        ("text", {"text": None}, r'"text" \(NoneType\)$'),
        ("text", {}, "found the fields: none$"),
        ("txt", {"text": "a"}, r"data\.template=txt: expected one of text, completion"),
    ],
)
def test_fields_that_do_not_fit_are_named(template: str, fields: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        render(template, fields)


def test_every_template_is_in_the_catalog() -> None:
    assert list(TEMPLATES) == ["text", "completion"]


@pytest.mark.parametrize("fields", [{"text": ""}, {"prompt": "", "completion": ""}])
def test_an_empty_document_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(DataError, match=r"^empty document$"):
        document_of("text" if "text" in fields else "completion", fields, WORLD)


def test_a_document_without_a_trained_target_is_refused() -> None:
    for spans in ((), ((0, 1),)):
        rendered = Rendered(text="a", trained_spans=spans, trains_end_of_text=False)
        with pytest.raises(DataError, match="nothing to train on"):
            make_document(rendered, WORLD, origin="x")


@pytest.mark.parametrize("fields", [{"text": "a\ud800"}, {"prompt": "\udfff", "completion": "b"}])
def test_a_lone_surrogate_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(DataError, match="lone surrogate"):
        document_of("text" if "text" in fields else "completion", fields, WORLD)


def test_ids_are_stored_as_small_as_they_fit() -> None:
    assert smallest_ids(np.array([0, 65535], dtype=np.int32)).dtype == np.uint16
    assert smallest_ids(np.array([0, 65536], dtype=np.int32)).dtype == np.int32


def test_a_document_checks_itself() -> None:
    ids = np.array([1, 2], dtype=np.uint16)
    for tokens, weights in [
        (ids, np.array([1, 1], dtype=np.float32)),
        (ids, np.zeros(3, dtype=np.float32)),
        (ids[:0], np.zeros(0, dtype=np.float32)),
        (ids[None], np.zeros((1, 2), dtype=np.float32)),
    ]:
        with pytest.raises(AssertionError, match="x: "):
            Document(tokens=tokens, weights=weights, origin="x")
