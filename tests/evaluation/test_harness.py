"""Tasks of lm-evaluation-harness from local files, beside the same scores by hand."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from infctx.data.tokenizer import BytesTokenizer, WorldTokenizer
from infctx.errors import InfctxError
from infctx.model.finch import Finch

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness", exc_type=ImportError)
# Of packages that the harness imports; not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore")

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl}, cache_dir: FOLDER/cache}
output_type: multiple_choice
test_split: test
fewshot_split: test
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WORDS = """
task: tiny_words
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/words.jsonl}, cache_dir: FOLDER/cache}
output_type: generate_until
test_split: test
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["STOP"], max_gen_toks: 9, do_sample: false}
metric_list: [{metric: exact_match}]
"""
TEXTS = """
task: tiny_texts
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/texts.jsonl}, cache_dir: FOLDER/cache}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""
QUESTIONS = [
    {
        "question": f"what is {number}" + " really" * (number % 4),
        "choices": ["yes", "no", "perhaps so", "a longer answer"],
        "answer": number % 4,
    }
    for number in range(14)
]
LONG_TEXTS = ["a short text", "one of many chunks " * 20]


@pytest.fixture
def model(make_finch: Callable[..., Finch]) -> Finch:
    """A byte-level model that prefers letters: no text of it ends at once."""
    model = make_finch(vocab_size=257, n_layer=2)
    with torch.no_grad():
        model.head.weight[98:123].mul_(4.0)
        model.head.weight[0] = -model.head.weight[99:110].mean(0)
    return model


@pytest.fixture
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def log_probability(model: Finch, context: str, continuation: str) -> float:
    ids = BytesTokenizer().encode(context + continuation).tolist()
    first = len(context.encode())
    with torch.no_grad():
        logits, _ = model(torch.tensor([ids]))
    found = torch.log_softmax(logits[0].double(), -1)
    return sum(float(found[place - 1, ids[place]]) for place in range(first, len(ids)))


def greedy(model: Finch, prompt: str, count: int) -> str:
    ids = BytesTokenizer().encode(prompt).tolist()
    begin = len(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    return bytes(token - 1 for token in ids[begin:]).decode("utf-8", "replace")


def write(folder: Path, name: str, task: str, rows: list[dict[str, Any]]) -> None:
    (folder / f"{name}.yaml").write_text(task.replace("FOLDER", str(folder)))
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.usefixtures("_offline")
def test_tasks_of_files_have_the_scores_by_hand(model: Finch, tmp_path: Path) -> None:
    from infctx.evaluation.harness import HarnessModel, run_tasks

    prompts = ["once", "upon a time there was ", "x", "in a house"]
    texts = [greedy(model, prompt, 9) for prompt in prompts]
    assert len(set(texts)) == 4
    # Two are right, one would be without the limit of 9 tokens.
    answers = [texts[0], "something else", greedy(model, prompts[2], 10), texts[3]]
    words = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(prompts, answers, strict=True)]
    write(tmp_path, "choice", CHOICE, QUESTIONS)
    write(tmp_path, "words", WORDS, words)
    write(tmp_path, "texts", TEXTS, [{"text": text} for text in LONG_TEXTS])
    harness = HarnessModel(model, BytesTokenizer(), rows=3, chunk_tokens=16)
    found = run_tasks(harness, ["tiny_choice", "tiny_words", "tiny_texts"], folder=tmp_path)

    right = right_by_length = 0
    for row in QUESTIONS:
        scores = [log_probability(model, f"Q: {row['question']}\nA:", f" {choice}") for choice in row["choices"]]
        by_length = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
        right += scores.index(max(scores)) == row["answer"]
        right_by_length += by_length.index(max(by_length)) == row["answer"]
    assert 0 < right < len(QUESTIONS)
    assert found["tiny_choice"]["acc"] == pytest.approx(right / len(QUESTIONS))
    assert found["tiny_choice"]["acc_norm"] == pytest.approx(right_by_length / len(QUESTIONS))
    assert found["tiny_words"]["exact_match"] == pytest.approx(0.5)
    # Behind an end of text, id 0, which no byte has.
    nats = 0.0
    for text in LONG_TEXTS:
        ids = [0, *BytesTokenizer().encode(text).tolist()]
        with torch.no_grad():
            logits, _ = model(torch.tensor([ids]))
        nats -= float(torch.log_softmax(logits[0].double(), -1)[range(len(ids) - 1), ids[1:]].sum())
    expected = nats / math.log(2) / sum(map(len, LONG_TEXTS))
    assert found["tiny_texts"]["bits_per_byte"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.usefixtures("_offline")
def test_shots_and_limit_reach_the_harness(model: Finch, tmp_path: Path) -> None:
    from infctx.evaluation.harness import HarnessModel, run_tasks

    write(tmp_path, "choice", CHOICE, QUESTIONS)
    asked: list[tuple[str, str]] = []

    class Listening(HarnessModel):
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            asked.extend(request.args for request in requests)
            return super().loglikelihood(requests)

    harness = Listening(model, BytesTokenizer(), rows=2, chunk_tokens=64)
    run_tasks(harness, [str(tmp_path / "choice.yaml")], shots=2, limit=3)
    assert len(asked) == 3 * 4
    assert all(context.count("Q: ") == 3 for context, _ in asked)


def test_a_task_that_nobody_knows_is_named(model: Finch, tmp_path: Path) -> None:
    from infctx.evaluation.harness import HarnessModel, run_tasks

    harness = HarnessModel(model, BytesTokenizer(), rows=1, chunk_tokens=64)
    with pytest.raises(InfctxError, match=r"--tasks hellaswg: no task.*Near: hellaswag"):
        run_tasks(harness, ["hellaswg"])
    with pytest.raises(InfctxError, match=r"--tasks-folder .*: expected a folder"):
        run_tasks(harness, ["any"], folder=tmp_path / "none")


def test_drawn_tokens_are_refused(model: Finch) -> None:
    from lm_eval.api.instance import Instance

    from infctx.evaluation.harness import HarnessModel

    harness = HarnessModel(model, BytesTokenizer(), rows=1, chunk_tokens=64)
    settings = {"until": "\n", "do_sample": True, "temperature": 0.7}
    request = Instance(
        request_type="generate_until", doc={}, arguments=("a", settings), idx=0, metadata=("story", 0, 1)
    )
    with pytest.raises(InfctxError, match="story draws tokens"):
        harness.generate_until([request])


def test_batches_change_no_answer(model: Finch) -> None:
    from lm_eval.api.instance import Instance

    from infctx.evaluation.harness import HarnessModel

    source = random.Random(0)
    prompts = ["".join(source.choices("abc de", k=source.randrange(1, 60))) for _ in range(9)]

    def answers(rows: int) -> tuple[list[str], list[float]]:
        harness = HarnessModel(model, BytesTokenizer(), rows=rows, chunk_tokens=16)
        until = [
            Instance(
                request_type="generate_until",
                doc={},
                arguments=(prompt, {"until": ["q", "zz"], "max_gen_toks": 5 + 5 * (place % 2)}),
                idx=0,
            )
            for place, prompt in enumerate(prompts)
        ]
        rolling = [
            Instance(request_type="loglikelihood_rolling", doc={}, arguments=(prompt,), idx=0) for prompt in prompts
        ]
        return harness.generate_until(until), harness.loglikelihood_rolling(rolling)

    (texts, probabilities), (texts_alone, probabilities_alone) = answers(4), answers(1)
    assert texts == texts_alone
    assert probabilities == pytest.approx(probabilities_alone, abs=1e-5)
    assert all(len(text) <= 5 + 5 * (place % 2) for place, text in enumerate(texts))


def test_a_pair_is_cut_where_the_context_ends() -> None:
    from infctx.evaluation.harness import split_pair

    world = WorldTokenizer()
    context, continuation = split_pair(world, "The answer is", " Paris")
    assert (world.decode(context), world.decode(continuation)) == ("The answer is", " Paris")
    # Spaces at its end belong to what follows, as in the vocabulary.
    assert split_pair(world, "The answer is ", "Paris") == (context, continuation)
    # One token holds the end of the one and the beginning of the other.
    context, continuation = split_pair(world, "The answ", "er")
    assert (world.decode(context), world.decode(continuation)) == ("The", " answer")
    assert split_pair(world, "", "Paris")[0] == (0,)
    with pytest.raises(InfctxError, match="empty continuation"):
        split_pair(world, "The answer", "")
