"""A conversation: its tokens against those of training, its state against the whole text read in one go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from infctx.data.template_catalog import make_template
from infctx.data.templates import make_documents
from infctx.data.tokenizer import BytesTokenizer, WorldTokenizer
from infctx.errors import DataError, InfctxError
from infctx.generation.chat import ChatSession
from infctx.generation.dialogue import Turn, WorldDialogue, dialogue_of
from infctx.generation.prompt_state import PromptState, Reader, digest_of, read_prompt_state
from infctx.generation.reading import TokenArray, read_tokens
from infctx.generation.row import Voice, Wish
from infctx.generation.sampling import SamplingOptions
from infctx.model.finch import Finch

WISH = Wish(sampling=SamplingOptions(temperature=0.8), seed=4, max_tokens=12)


@pytest.fixture
def session(voice: Voice) -> ChatSession:
    return ChatSession(voice, WorldDialogue(), WISH)


def say(session: ChatSession, text: str) -> str:
    return "".join(session.answer(text))


def shown(text: str) -> str:
    """An answer as the next turns have it: without bytes that are no character."""
    return text.replace("\ufffd", "").strip()


TURNS = [Turn("Hi there!", "Hello.\n\nHow are you?"), Turn("  Well:\r\n\r\nsee  ", "世界 is the word."), Turn("a", "b")]


@pytest.mark.parametrize("tokenizer", [WorldTokenizer(), BytesTokenizer()], ids=["world", "bytes"])
@pytest.mark.parametrize("system", ["", "You are\n\nkind."])
def test_the_tokens_before_an_answer_are_those_of_training(tokenizer: object, system: str) -> None:
    """What training weighs is the answer: all tokens before the last answer's first are the prompt."""
    for number, last in enumerate(TURNS, start=1):
        messages = [{"role": "system", "content": system}] * bool(system)
        for turn in TURNS[:number]:
            messages += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.answer}]
        template = make_template("chat", train_turns="last")
        document = make_documents([template.render({"messages": messages})], tokenizer)
        first = int(np.argmax(document.weights > 0))
        prompt = WorldDialogue().prompt(TURNS[: number - 1], last.user, system=system)
        assert tokenizer.encode(prompt).tolist() == document.tokens[:first].tolist()


@pytest.mark.parametrize(
    ("template", "fields"),
    [
        ("instruct", {"instruction": "Say\n\nhi", "output": "hi"}),
        ("question", {"question": "Why?", "answer": "So."}),
        ("completion", {"prompt": "Once ", "completion": "upon"}),
        (
            {"pieces": [{"text": "Q: {q}\nA:", "train": False}, {"text": " {a}", "train": True}], "clean": False},
            {"q": "one\n\ntwo", "a": "x"},
        ),
    ],
    ids=str,
)
def test_runs_of_other_templates_are_asked_in_theirs(template: object, fields: dict[str, str]) -> None:
    made = make_template(template)
    document = make_documents([made.render(fields)], BytesTokenizer())
    first = int(np.argmax(document.weights > 0))
    dialogue = dialogue_of(made)
    prompt = dialogue.prompt(TURNS, next(iter(fields.values())))
    assert BytesTokenizer().encode(prompt).tolist() == document.tokens[:first].tolist()
    assert not dialogue.has_history
    assert dialogue.stops == (("\n\n",) if template in ("instruct", "question") else ())


def test_a_template_with_two_questions() -> None:
    pieces = [{"text": "{passage} {question}", "train": False}, {"text": " {answer}", "train": True}]
    with pytest.raises(InfctxError, match="2 texts"):
        dialogue_of(make_template({"pieces": pieces}))


def test_the_state_is_that_of_the_whole_text(session: ChatSession, voice: Voice) -> None:
    for text in ("one", "two é", "three"):
        before = list(session.turns)
        say(session, text)
        place = session._places[-1]
        expected_tokens = voice.tokenizer.encode(session.dialogue.prompt(before, text))
        assert place.tokens.tolist() == expected_tokens.tolist()
        expected = read_tokens(voice.model, expected_tokens)
        torch.testing.assert_close(place.reading.logits, expected.logits, rtol=1e-5, atol=5e-5)
        for one, other in zip(place.reading.state, expected.state, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=5e-5)
    assert len(session.turns) == 3


def test_what_was_read_is_not_read_again(session: ChatSession) -> None:
    say(session, "a" * 400)
    assert session.tokens_read > 400
    say(session, "b")
    assert session.tokens_read < 100


@pytest.mark.parametrize(("drawn", "ended"), [(" hello\n\n", "stop"), (" hello", "end_of_text")])
def test_an_answer_is_read_while_it_is_written(
    session: ChatSession, voice: Voice, monkeypatch: pytest.MonkeyPatch, drawn: str, ended: str
) -> None:
    """The next prompt begins with its tokens, and is read on from its end; the place is that of the whole text."""
    tokens = iter([byte + 1 for byte in drawn.encode()] + [0] + [1 + ord("x")] * 30)
    monkeypatch.setattr("infctx.generation.sampling.Sampler.draw", lambda self, logits: next(tokens))
    assert say(session, "one") == "hello"
    assert session.row is not None
    assert session.row.ended == ended
    if ended == "stop":
        next(tokens)
    say(session, "two")
    place = session._places[-1]
    unread = len("\n\nUser: two\n\nAssistant:") - (ended == "stop")
    assert session.tokens_read == unread
    expected = read_tokens(voice.model, place.tokens)
    torch.testing.assert_close(place.reading.logits, expected.logits, rtol=1e-5, atol=5e-5)
    for one, other in zip(place.reading.state, expected.state, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=5e-5)


def test_undo_again_and_reset(session: ChatSession, voice: Voice) -> None:
    first = say(session, "one")
    second = say(session, "two")
    places = [place.tokens.tolist() for place in session._places]
    assert session.undo() == Turn("two", shown(second))
    assert len(session.turns) == len(session._places) == 1
    again = say(session, "two")
    assert session.tokens_read == 0, "the place before the answer was kept"
    assert again != second, "each answer has draws of its own"
    assert [place.tokens.tolist() for place in session._places] == places
    session.undo()
    session.undo()
    assert session.turns == []
    with pytest.raises(InfctxError, match="no turn"):
        session.undo()
    say(session, "one")
    session.reset()
    assert session.turns == []
    fresh = ChatSession(voice, WorldDialogue(), WISH)
    assert say(fresh, "one") == first
    assert say(fresh, "two") == second


def test_a_system_text_comes_first_and_changing_it_reads_anew(session: ChatSession) -> None:
    say(session, "one")
    session.set_system("Be brief.")
    say(session, "two")
    assert session._places[-1].tokens.tolist()[:7] == [byte + 1 for byte in b"System:"]
    assert session.tokens_read == len(session._places[-1].tokens)


def test_templates_without_a_system_text(voice: Voice) -> None:
    with pytest.raises(InfctxError, match="no place"):
        ChatSession(voice, dialogue_of(make_template("question")), WISH, system="x")


def test_questions_of_such_templates_stand_alone(voice: Voice) -> None:
    chat = ChatSession(voice, dialogue_of(make_template("question")), WISH)
    say(chat, "one")
    say(chat, "two")
    assert chat._places[1].tokens.tolist() == [byte + 1 for byte in b"Question: two\n\nAnswer:"]


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_was_shown(session: ChatSession) -> None:
    answer = session.answer("one")
    pieces = [next(answer) for _ in range(4)]
    answer.close()
    assert session.turns == [Turn("one", shown("".join(pieces)))]
    assert session.row is not None
    assert session.row.ended == "interrupted"
    say(session, "two")
    assert len(session.turns) == 2


def test_an_empty_text_is_refused_and_changes_nothing(session: ChatSession) -> None:
    say(session, "one")
    with pytest.raises(DataError, match="empty"):
        say(session, " \n ")
    with pytest.raises(DataError, match="surrogate"):
        say(session, "\udc80")
    assert len(session.turns) == 1


@pytest.mark.parametrize("behind_a_document", [False, True])
def test_saved_and_loaded(
    voice: Voice, reader: Reader, document: TokenArray, tmp_path: Path, behind_a_document: bool
) -> None:
    def begun() -> ChatSession:
        session = ChatSession(voice, WorldDialogue(), WISH, system="Be kind.")
        if behind_a_document:
            session.begin_behind(
                PromptState(
                    reading=read_tokens(voice.model, document),
                    reader=reader,
                    text_tokens=len(document),
                    text_digest=digest_of(document),
                )
            )
        return session

    session = begun()
    say(session, "one")
    say(session, "two")
    path = tmp_path / "chat.state"
    session.save(path, reader)
    other = ChatSession(voice, WorldDialogue(), replace(WISH, seed=WISH.seed + 2))
    other.begin_behind(read_prompt_state(path, reader=reader, config=voice.model.config, device=torch.device("cpu")))
    assert (other.turns, other.system) == (session.turns, session.system)
    assert say(other, "three") == say(session, "three")
    # Taken back below what was kept: read again, to the same place.
    for chat in (session, other):
        for _ in range(2):
            chat.undo()
    session.wish = other.wish = WISH
    session._num_answers = other._num_answers = 0
    assert say(other, "else") == say(session, "else")
    other.save(path, reader)
    other.undo()
    other.undo()
    with pytest.raises(InfctxError, match="nothing to save"):
        other.save(path, reader)


def test_few_ids(make_finch: Callable[..., Finch]) -> None:
    from infctx.model.single_token import SingleTokenStep

    model = make_finch(vocab_size=150)
    voice = Voice(model=model, step=SingleTokenStep(model), tokenizer=BytesTokenizer())
    session = ChatSession(voice, WorldDialogue(), WISH)
    assert say(session, "plain") is not None
    say(session, "The answer before had bytes that are no text.")
    with pytest.raises(InfctxError, match=r"196 is beyond.*150"):
        say(session, "é")
