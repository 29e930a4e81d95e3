"""Which tokens are trained on, whatever the tokens' borders are."""

from importlib.resources import files

import numpy as np
import pytest
from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

from infctx.data.document import Document, smallest_ids
from infctx.data.templates import (
    EmptyRowError,
    NothingToTrainOnError,
    Rendered,
    leading_space_missing,
    make_document,
    make_documents,
    make_template,
)
from infctx.data.tokenizer import BytesTokenizer, Tokenizer, WorldTokenizer
from infctx.errors import DataError

WORLD = WorldTokenizer()
BYTES = BytesTokenizer()


def document_of(template: str, fields: dict[str, object], tokenizer: Tokenizer) -> Document:
    return make_document(make_template(template).render(fields), tokenizer, origin="rows.jsonl:1")


def rendered_of(text: str, spans: list[tuple[int, int]], *, end_weight: float = 0.0) -> Rendered:
    return Rendered(text=text, spans=tuple((start, end, 1.0) for start, end in spans), end_weight=end_weight)


def weights_by_hand(ids: list[int], spans: list[tuple[int, int, float]], tokenizer: Tokenizer) -> list[float]:
    """One token at a time: a token has the weight of the span in which its last byte lies; never the first."""
    weights, end = [], 0
    for token_id in ids:
        end += len(tokenizer.decode_bytes([token_id]))
        weights.append(next((weight for start, stop, weight in spans if start <= end - 1 < stop), 0.0))
    return [0.0, *weights[1:]]


def random_rendered(generator: np.random.Generator, num_characters: int) -> Rendered:
    text = "".join(generator.choice(list("ab \n\n:.。é東👩"), size=num_characters))
    cuts = np.unique(generator.integers(0, len(text.encode()) + 1, size=8)).tolist()
    spans = [
        (start, end, float(generator.choice([0.25, 1.0, 3.0])))
        for start, end in zip(cuts[::2], cuts[1::2], strict=False)
    ]
    return Rendered(text=text, spans=tuple(spans), end_weight=float(generator.choice([0.0, 0.5, 1.0])))


@pytest.fixture(scope="module")
def oracle() -> TRIE_TOKENIZER:
    return TRIE_TOKENIZER(str(files("rwkv").joinpath("rwkv_vocab_v20230424.txt")))


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
    ("好。", "\n\n答"),
    ("x\n", "\n\ty"),
    ("", "no prompt"),
    ("only the end", ""),
    ("one token", "a"),
    ("東", "京"),
]


@pytest.mark.parametrize("tokenizer", [WORLD, BYTES], ids=["world", "bytes"])
@pytest.mark.parametrize(("prompt", "completion"), STRADDLING)
def test_completion_trains_by_byte_span(tokenizer: Tokenizer, prompt: str, completion: str) -> None:
    document = document_of("completion", {"prompt": prompt, "completion": completion}, tokenizer)
    ids = tokenizer.encode(prompt + completion).tolist()
    assert document.tokens.tolist() == [*ids, 0]
    span = (len(prompt.encode()), len((prompt + completion).encode()), 1.0)
    assert document.weights.tolist() == [*weights_by_hand(ids, [span], tokenizer), 1.0]


def test_a_token_across_the_border_belongs_to_the_side_of_its_last_byte() -> None:
    # "\n" + "\n" is the one token 261, which ends in the completion.
    document = document_of("completion", {"prompt": "Q\n", "completion": "\nA"}, WORLD)
    assert document.tokens.tolist() == [*WORLD.encode("Q").tolist(), 261, *WORLD.encode("A").tolist(), 0]
    assert document.weights.tolist() == [0.0, 1.0, 1.0, 1.0]
    # "。\n" is one token as well.
    document = document_of("completion", {"prompt": "好。", "completion": "\nA"}, WORLD)
    assert [WORLD.decode([token]) for token in document.tokens.tolist()] == ["好", "。\n", "A", ""]
    assert document.weights.tolist() == [0.0, 1.0, 1.0, 1.0]
    # A token with its last byte in the prompt is not trained.
    rendered = rendered_of("Q\n\nA", [(1, 2), (3, 4)])
    assert make_document(rendered, WORLD, origin="x").weights.tolist() == [0.0, 0.0, 1.0, 0.0]


def test_a_batch_is_weighed_as_its_rows_by_hand(oracle: TRIE_TOKENIZER) -> None:
    generator = np.random.Generator(np.random.PCG64(0))
    for tokenizer in (WORLD, BYTES):
        rows = [random_rendered(generator, int(generator.integers(1, 90))) for _ in range(60)]
        rows[3] = rows[40] = Rendered(text="", spans=(), end_weight=1.0)
        rows[7] = rendered_of("untrained", [])
        rows[9] = make_template("text").render({"text": "all of it: 東京"})
        batch = make_documents(rows, tokenizer)
        assert batch.tokens.dtype == np.int32
        assert batch.weights.dtype == np.float32
        assert batch.lengths.dtype == np.int64
        expected_ids, expected_weights, lengths = [], [], []
        for row in rows:
            ids = oracle.encode(row.text) if tokenizer is WORLD else [byte + 1 for byte in row.text.encode()]
            expected_ids += [*ids, 0]
            weights = weights_by_hand(ids, list(row.spans), tokenizer) if ids else []
            expected_weights += [*weights, row.end_weight if ids else 0.0]
            lengths.append(len(ids) + 1)
        assert batch.tokens.tolist() == expected_ids
        assert batch.weights.tolist() == expected_weights
        assert batch.lengths.tolist() == lengths
        assert np.count_nonzero(batch.weights) > 300


def test_rows_that_are_trained_as_a_whole_need_no_byte_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [make_template("text").render({"text": text}) for text in ("one 東京", "two")]
    expected = [0.0, *[1.0] * len(WORLD.encode("one 東京")), 0.0, *[1.0] * len(WORLD.encode("two"))]
    monkeypatch.delattr(WorldTokenizer, "token_ends")
    assert make_documents(rows, WORLD).weights.tolist() == expected


def test_no_rows_make_no_tokens() -> None:
    batch = make_documents([], WORLD)
    assert (len(batch.tokens), len(batch.weights), len(batch.lengths)) == (0, 0, 0)


@pytest.mark.parametrize("fields", [{"text": ""}, {"prompt": "", "completion": ""}])
def test_an_empty_document_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(EmptyRowError, match=r"^empty document$"):
        document_of("text" if "text" in fields else "completion", fields, WORLD)
    with pytest.raises(EmptyRowError, match=r"^empty document$"):
        make_document(Rendered(text="", spans=(), end_weight=1.0), WORLD, origin="x")


def test_a_document_without_a_trained_target_is_refused() -> None:
    for spans in ([], [(0, 1)]):
        with pytest.raises(NothingToTrainOnError, match="nothing to train on") as caught:
            make_document(rendered_of("a", spans), WORLD, origin="x")
        assert caught.value.num_tokens == 2


@pytest.mark.parametrize("fields", [{"text": "a\ud800"}, {"prompt": "\udfff", "completion": "b"}])
def test_a_lone_surrogate_is_refused_before_it_meets_other_rows(fields: dict[str, object]) -> None:
    place = 1 if "text" in fields else 0
    with pytest.raises(DataError, match=rf"lone surrogate U\+D[8F].. at character {place},"):
        make_template("text" if "text" in fields else "completion").render(fields)


@pytest.mark.parametrize(
    ("prompt", "completion", "is_missing"),
    [
        ("Assistant:", "Hello", True),
        ("東:", "京", True),
        ("東:", "Hé京", True),
        ("Assistant:", " Hello", False),
        ("Assistant:", "\nHello", False),
        ("Assistant:", "\u3000Hello", False),
        ("Assistant: ", "Hello", False),
        ("Assistant", "Hello", False),
        ("", ":Hello", False),
        ("", "all trained: yes", False),
    ],
)
def test_an_answer_without_its_leading_space_is_noticed(prompt: str, completion: str, is_missing: bool) -> None:
    rendered = make_template("completion").render({"prompt": prompt, "completion": completion})
    assert leading_space_missing(rendered) is is_missing


def test_built_in_conversations_have_their_leading_space() -> None:
    rows = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert not leading_space_missing(make_template("chat", weights={"user": 1}).render({"messages": rows}))
    assert not leading_space_missing(make_template("question").render({"question": "q", "answer": "a"}))


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
