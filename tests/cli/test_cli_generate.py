"""infctx generate: prompts from everywhere, stops, states, batches, signals."""

from __future__ import annotations

import io
import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from infctx.cli_voice import ReadingProgress


def generate(cli: Any, model: Path, *arguments: object) -> dict[str, Any]:
    return cli("generate", model, *arguments, "--json").ok().json


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "document.txt"
    path.write_text("".join(f"Line {number} é.\n" for number in range(300)), encoding="utf-8")
    return path


def test_prompts_from_a_file_and_from_stdin(
    cli: Any, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.txt").write_bytes("Größe\r\n".encode())
    same = ["--max-tokens", 12, "--seed", 3]
    expected = generate(cli, models["pth"], "--prompt", "Größe\r\n", *same)["text"]
    assert generate(cli, models["pth"], "--prompt-file", tmp_path / "p.txt", *same)["text"] == expected
    # The prompt of a file is not printed again.
    assert cli("generate", models["pth"], "--prompt-file", tmp_path / "p.txt", *same).ok().out == f"{expected}\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"abc")))
    piped = cli("generate", models["pth"], "--prompt-file", "-", *same).ok()
    assert piped.out == generate(cli, models["pth"], "--prompt", "abc", *same)["text"] + "\n"


def test_stop(cli: Any, models: dict[str, Path]) -> None:
    same = ["--prompt", "ab", "--seed", 1, "--max-tokens", 60, "--temperature", 3]
    whole = generate(cli, models["pth"], *same)
    assert (whole["ended"], whole["tokens"]) == ("length", 60)
    plain = [place for place in range(5, len(whole["text"])) if whole["text"][place : place + 2].isascii()]
    place = plain[0]
    stop = whole["text"][place : place + 2]
    cut = generate(cli, models["pth"], *same, "--stop", "never", "--stop", stop)
    assert cut["ended"] == "stop"
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]


def test_penalties_and_top_k_reach_the_sampler(cli: Any, models: dict[str, Path]) -> None:
    same = ["--prompt", "ab", "--seed", 1, "--max-tokens", 40]
    greedy = generate(cli, models["pth"], *same, "--temperature", 0)["text"]
    assert generate(cli, models["pth"], *same, "--top-k", 1)["text"] == greedy
    penalised = ["--temperature", 0, "--presence-penalty", 1000, "--penalty-decay", 1]
    answer = generate(cli, models["pth"], *same, *penalised)
    assert answer["tokens"] == 40
    assert answer["text"] != greedy


def test_a_seed_that_was_not_given_is_told(cli: Any, models: dict[str, Path]) -> None:
    same = ["--prompt", "ab", "--max-tokens", 12]
    first = generate(cli, models["pth"], *same)
    assert generate(cli, models["pth"], *same, "--seed", first["seed"])["text"] == first["text"]


def test_the_speed_is_told(cli: Any, models: dict[str, Path]) -> None:
    ended = cli("generate", models["pth"], "--prompt", "abc", "--max-tokens", 5, "--seed", 1, "--json").ok()
    speed = ended.json["speed"]
    assert (speed["prompt_tokens"], speed["tokens"]) == (3, 5)
    assert speed["first_token_seconds"] > 0
    assert re.search(r"read 3 tokens at [\d.,]+ tokens/s, first after [\d.]+ s, wrote 5 at ", ended.err)
    assert max(map(len, ended.err.splitlines())) <= 80


def test_read_once_and_asked(cli: Any, models: dict[str, Path], document: Path, tmp_path: Path) -> None:
    state = tmp_path / "d.state"
    kept = cli("generate", models["pth"], "--prompt-file", document, "--save-state", state, "--max-tokens", 0).ok()
    assert kept.out == ""
    assert str(state) in kept.err
    text = document.read_text(encoding="utf-8")
    same = ["--max-tokens", 30, "--seed", 5]
    for question in ("What?", "é", "Who is it?"):
        asked = generate(cli, models["pth"], "--state", state, "--prompt", question, *same)
        whole = generate(cli, models["pth"], "--prompt", text + question, *same)
        assert asked["text"] == whole["text"]
        assert asked["state_tokens"] == whole["state_tokens"] == len((text + question).encode())
    # Without a question the text goes on.
    assert (
        generate(cli, models["safetensors"], "--state", state, *same)["text"]
        == generate(cli, models["pth"], "--prompt", text, *same)["text"]
    )


def test_reading_is_stopped_and_goes_on(
    cli: Any, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document, state = tmp_path / "long.txt", tmp_path / "long.state"
    document.write_text("0123456789abcdef" * 300)
    command = ["generate", models["pth"], "--prompt-file", document, "--save-state", state, "--max-tokens", 6]
    command += ["--seed", 1]
    goes_on = ReadingProgress.goes_on

    def interrupted(self: ReadingProgress, num_read: int) -> bool:
        if num_read == 2048:
            signal.raise_signal(signal.SIGINT)
        return goes_on(self, num_read)

    with monkeypatch.context() as patch:
        patch.setattr(ReadingProgress, "goes_on", interrupted)
        stopped = cli(*command)
    assert stopped.code == 3, stopped.err
    assert "Stopped by SIGINT at 2,048 of 4,800 tokens" in stopped.err
    assert stopped.out == ""
    refused = cli("generate", models["pth"], "--prompt", "another", "--save-state", state, "--max-tokens", 1)
    refused.refused(str(state), "another text", "--force")
    asked = cli("generate", models["pth"], "--state", state, "--max-tokens", 1).ok()
    assert "stopped before the end" in asked.err
    ended = cli(*command, "--json").ok()
    assert "2,048 of 4,800 tokens had been read before" in ended.err
    assert ended.json["speed"]["prompt_tokens"] == 4800 - 2048
    whole = cli("generate", models["pth"], "--prompt-file", document, "--max-tokens", 6, "--seed", 1, "--json").ok()
    assert ended.json["text"] == whole.json["text"]


def test_an_interrupt_while_writing_ends_with_what_is_there(
    cli: Any, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from infctx.generation.row import Row

    take = Row.take

    def interrupted(self: Row, logits: Any) -> str:
        if len(self.tokens) == 3:
            raise KeyboardInterrupt
        return take(self, logits)

    monkeypatch.setattr(Row, "take", interrupted)
    ended = cli("generate", models["pth"], "--prompt", "a", "--max-tokens", 9, "--json")
    assert ended.code == 130
    assert (ended.json["tokens"], ended.json["ended"]) == (3, "interrupted")
    assert ended.err.rstrip().endswith("Interrupted.")


def test_a_batch(cli: Any, models: dict[str, Path], tmp_path: Path) -> None:
    prompts, output = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    rows = [{"prompt": "ab"}, {"prompt": "cde", "seed": 40, "id": [7]}, {"prompt": ""}, {"prompt": "é"}]
    prompts.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    same = ["--max-tokens", 15, "--temperature", 0.9]
    printed = cli("generate", models["pth"], "--prompts", prompts, "--rows", 2, "--seed", 9, *same).ok()
    results = [json.loads(line) for line in printed.out.splitlines()]
    assert [result["seed"] for result in results] == [9, 40, 11, 12]
    for row, result in zip(rows, results, strict=True):
        assert {key: result[key] for key in row} == row
        alone = generate(cli, models["pth"], "--prompt", row["prompt"], "--seed", result["seed"], *same)
        assert (result["text"], result["tokens"]) == (alone["text"], alone["tokens"])
    facts = generate(cli, models["pth"], "--prompts", prompts, "--output", output, "--seed", 9, *same)
    assert (facts["prompts"], facts["written"], facts["output"]) == (4, 4, str(output))
    assert [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()] == results
    assert generate(cli, models["pth"], "--prompts", prompts, "--seed", 9, *same)["results"] == results
    again = ["generate", models["pth"], "--prompts", prompts, "--output", output]
    cli(*again).refused(str(output), "--force")
    cli(*again, "--force").ok()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nonsense", ["p.jsonl:2", "JSON"]),
        ('{"text": "a"}', ["p.jsonl:2", "prompt"]),
        ('{"prompt": 3}', ["p.jsonl:2", "prompt"]),
        ('{"prompt": "a", "seed": -1}', ["p.jsonl:2", "seed"]),
        ('{"prompt": "\\ud800"}', ["surrogate"]),
    ],
)
def test_bad_rows(cli: Any, models: dict[str, Path], tmp_path: Path, line: str, words: list[str]) -> None:
    (tmp_path / "p.jsonl").write_text(f'{{"prompt": "a"}}\n{line}\n')
    cli("generate", models["pth"], "--prompts", tmp_path / "p.jsonl").refused(*words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--prompt", "--state"]),
        (["--prompt", "a", "--prompts", "p.jsonl"], ["one of"]),
        (["--prompt", "a", "--output", "x"], ["--output"]),
        (["--prompts", "p.jsonl", "--save-state", "x"], ["--save-state"]),
        (["--state", "x", "--save-state", "x"], ["--save-state", "--prompt"]),
        (["--prompt", "a", "--save-state", "none/x"], ["none/x", "folder"]),
        (["--prompt", "a", "--device", "tpu"], ["tpu", "cuda"]),
        (["--prompt", "a", "--dtype", "int8"], ["int8", "bf16"]),
        (["--prompt", "a", "--stop", ""], ["--stop"]),
        (["--prompt", "a", "--state", "none.state"], ["none.state"]),
        (["--prompt", "a", "--last-weights"], ["--last-weights", "averages"]),
        (["--prompt-file", "none.txt"], ["none.txt"]),
        (["--prompts", "none.jsonl"], ["none.jsonl"]),
        (["--prompt-file", "MODEL"], ["UTF-8"]),
        (["--prompt", "a", "--presence-penalty", "nan"], ["presence-penalty"]),
    ],
    ids=str,
)
def test_what_cannot_be_asked(cli: Any, models: dict[str, Path], arguments: list[str], words: list[str]) -> None:
    given = [str(models["pth"]) if argument == "MODEL" else argument for argument in arguments]
    cli("generate", models["pth"], *given).refused(*words)


def test_states_of_others(cli: Any, models: dict[str, Path], tmp_path: Path) -> None:
    state = tmp_path / "s.state"
    cli("generate", models["pth"], "--prompt", "abc", "--save-state", state, "--max-tokens", 1).ok()
    cli("generate", models["other"], "--state", state).refused(str(state), "another model")
    cli("chat", models["other"], "--state", state).refused(str(state), "another model")
    content = state.read_bytes()
    state.write_bytes(content[:-100])
    cli("generate", models["pth"], "--state", state).refused(str(state), "truncated")
    # A broken file is not written over unasked.
    command = ["generate", models["pth"], "--prompt", "abc", "--save-state", state, "--max-tokens", 1]
    cli(*command).refused(str(state))
    cli(*command, "--force").ok()
    assert state.read_bytes() == content


def test_bf16_goes_on_from_a_state_read_in_fp32_and_says_so(cli: Any, models: dict[str, Path], tmp_path: Path) -> None:
    state = tmp_path / "s.state"
    cli("generate", models["pth"], "--prompt", "abc", "--save-state", state, "--max-tokens", 1).ok()
    ended = cli("generate", models["pth"], "--state", state, "--dtype", "bf16", "--max-tokens", 3).ok()
    assert "was read in float32, and goes on in bfloat16" in ended.err
