"""infctx check --trace-token: every value against what somebody else computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import infctx
from infctx import assemble
from infctx.data.tokenizer import tokenizer_by_name
from infctx.token_trace.file_row import read_file_row
from infctx.token_trace.place import find_token

ROOT = Path(__file__).parents[2]
DEBUG = ROOT / "recipes" / "debug_cpu.yaml"
CHATS = ROOT / "datasets" / "instructions" / "chat.jsonl"
# float32 beside float64 through some hundred tokens.
CLOSE = 2e-4


@pytest.fixture
def trace(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[int, dict[str, Any]]]:
    """The values of each stop by its number. The checkout's recipes have paths below it."""
    monkeypatch.chdir(ROOT)

    def run(recipe: Path, place: str, *overrides: str) -> dict[int, dict[str, Any]]:
        stops = cli("check", recipe, *overrides, "--trace-token", place, "--json").ok().json["stops"]
        assert [stop["number"] for stop in stops] == list(range(1, 11))
        return {stop["number"]: stop["values"] for stop in stops}

    return run


def text_of(stops: dict[int, dict[str, Any]], template: str) -> str:
    """The text of the token's document, from the file and by hand."""
    row = json.loads(Path(stops[1]["path"]).read_text(encoding="utf-8").splitlines()[stops[1]["line"] - 1])
    if template == "completion":
        return row["prompt"] + row["completion"]
    names = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}
    return "\n\n".join(f"{names[turn['role']]}: {turn['content'].strip()}" for turn in row["messages"])


def ids_of(text: str) -> Tensor:
    return torch.tensor([[byte + 1 for byte in text.encode()] + [0]])


def borders_by_autograd(
    model: torch.nn.Module, ids: Tensor, place: int, *, chunk_tokens: int, first: int
) -> tuple[float, dict[int, dict[str, float]]]:
    """The loss at one place, and the norm of its gradient at each border, through one graph from chunk `first` on."""
    state, kept = None, {}
    for chunk in range(place // chunk_tokens + 1):
        piece = ids[:, chunk * chunk_tokens : min((chunk + 1) * chunk_tokens, place + 1)]
        if chunk == first and state is not None:
            state = type(state)(*(tensor.detach().requires_grad_() for tensor in state))
        if chunk >= first and state is not None:
            for tensor in state:
                tensor.retain_grad()
            kept[chunk] = state
        logits, state = model(piece, state)
    loss = F.cross_entropy(logits[0, -1], ids[0, place + 1])
    model.zero_grad()
    loss.backward()
    norms = {
        chunk: {name: float(tensor.grad.norm()) for name, tensor in zip(at.fields, at, strict=True)}
        for chunk, at in kept.items()
    }
    return loss.item(), norms


def step_gradients(model: torch.nn.Module, rows: list[tuple[Tensor, Tensor]]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of ids and the weights of each id as a target, every row in one piece."""
    model.zero_grad()
    total = sum(float(weights.sum()) for _, weights in rows)
    loss = torch.zeros((), dtype=torch.float64)
    for ids, weights in rows:
        losses = F.cross_entropy(model(ids[:, :-1])[0][0], ids[0, 1:], reduction="none")
        loss = loss + (losses * weights[1:]).sum() / total
    loss.backward()
    return loss.item(), {name: one.grad.clone() for name, one in model.named_parameters()}


def completion_weights(stops: dict[int, dict[str, Any]]) -> Tensor:
    row = json.loads(Path(stops[1]["path"]).read_text(encoding="utf-8").splitlines()[stops[1]["line"] - 1])
    masked, trained = (len(row[column].encode()) for column in ("prompt", "completion"))
    return torch.tensor([0.0] * masked + [1.0] * (trained + 1), dtype=torch.float64)


def test_values_of_a_trained_token(trace: Callable[..., Any]) -> None:
    chunked = "bptt.chunk_tokens=16"
    place = 42
    stops = trace(DEBUG, f"1:{place}", chunked)
    ids, weights = ids_of(text_of(stops, "completion")), completion_weights(stops)
    other = trace(DEBUG, "0:0", chunked)
    model = infctx.load_model(ROOT / "datasets/byte_finch/model.safetensors", dtype=torch.float64)

    assert stops[5]["id"] == int(ids[0, place])
    assert stops[5]["document_tokens"] == ids.shape[1]
    assert stops[5]["weight"] == float(weights[place]) == 1.0
    assert stops[5]["why"] == "in column completion, which is trained"
    assert (stops[6]["row"], stops[6]["chunk"], stops[6]["t"]) == (1, place // 16, place % 16)
    assert (stops[6]["target_id"], stops[6]["target_weight"]) == (int(ids[0, place + 1]), 1.0)

    loss, norms = borders_by_autograd(model, ids, place, chunk_tokens=16, first=0)
    token_gradients = {name: one.grad.clone() for name, one in model.named_parameters()}
    found = {border["before_chunk"]: border["gradient_norm"] for border in stops[9]["borders"]}
    assert found.keys() == norms.keys() == set(range(1, place // 16 + 1))
    for chunk, expected in norms.items():
        assert found[chunk] == pytest.approx(expected, rel=CLOSE)
    assert stops[9]["reaches_chunks"] == list(range(place // 16 + 1))
    assert stops[9]["stops_because"] == "the document begins"

    logits, _ = model(ids[:, : place + 1])
    log_probabilities = logits[0, -1].detach().log_softmax(-1)
    target = int(ids[0, place + 1])
    assert stops[8]["loss"] == pytest.approx(loss, rel=CLOSE)
    assert stops[8]["probability"] == pytest.approx(float(log_probabilities[target].exp()), rel=CLOSE)
    assert stops[8]["rank"] == 1 + int((log_probabilities > log_probabilities[target]).sum())
    rows = [(ids_of(text_of(other, "completion")), completion_weights(other)), (ids, weights)]
    step_loss, gradients = step_gradients(model, rows)
    total = sum(float(one.sum()) for _, one in rows)
    assert stops[8]["weight_total"] == total
    assert stops[8]["step_loss"] == pytest.approx(step_loss, rel=CLOSE)
    assert stops[8]["share_of_step_loss"] == pytest.approx(loss / total / step_loss, rel=CLOSE)

    last = stops[10]
    norm = float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm())
    assert last["grad_norm"] == pytest.approx(norm, rel=CLOSE)
    assert last["clip_factor"] == pytest.approx(min(1.0, 1.0 / norm), rel=CLOSE)
    own_norm = float(torch.stack([gradient.norm() for gradient in token_gradients.values()]).norm())
    assert last["token_grad_norm"] == pytest.approx(own_norm / total, rel=CLOSE)
    mine, whole = token_gradients[last["parameter"]] / total, gradients[last["parameter"]]
    assert last["parameter_grad_norm"] == pytest.approx(float(whole.norm()), rel=CLOSE)
    assert last["parameter_token_share"] == pytest.approx(float((mine * whole).sum() / whole.square().sum()), rel=1e-3)
    # Adam's first step is lr · g / (|g| + eps); the warm-up begins with a hundredth of the rate.
    clipped = whole * min(1.0, 1.0 / norm)
    assert last["learning_rate"] == pytest.approx(1e-5)
    assert last["update_norm"] == pytest.approx(1e-5 * float((clipped / (clipped.abs() + 1e-8)).norm()), rel=0.01)


def test_norms_inside_the_model(trace: Callable[..., Any]) -> None:
    place = 40
    stops = trace(DEBUG, f"0:{place}", "bptt.chunk_tokens=16")
    ids = ids_of(text_of(stops, "completion"))
    model = infctx.load_model(ROOT / "datasets/byte_finch/model.safetensors", dtype=torch.float64)
    # The residual stream by hand: every layer on the whole sequence.
    with torch.no_grad():
        _, before = model(ids[:, :32])
        _, behind = model(ids[:, :48])
        x = model.input_norm(model.embedding(ids))
        norms, zero = [], model.fresh_state(1)
        for number, block in enumerate(model.blocks):
            x = block(x, zero.wkv[number], zero.att_shift[number], zero.ffn_shift[number], None)[0]
            norms.append(float(x[0, place].norm()))
        head_input = float(model.output_norm(x)[0, place].norm())
        embedding = float(model.embedding.weight[ids[0, place]].norm())
    seen = stops[7]
    assert seen["embedding_norm"] == pytest.approx(embedding, rel=CLOSE)
    assert seen["layer_norms"] == pytest.approx(norms, rel=CLOSE)
    assert seen["head_input_norm"] == pytest.approx(head_input, rel=CLOSE)
    for told, state in ((seen["state_before_chunk"], before), (seen["state_behind_chunk"], behind)):
        for name, tensor in zip(state.fields, state, strict=True):
            assert told[name] == pytest.approx(float(tensor.norm()), rel=CLOSE)
    assert 0 < seen["wkv6"]["smallest_decay"] <= seen["wkv6"]["largest_decay"] < 1


def test_the_recurrence_at_one_token_is_that_of_the_reference(make_finch: Callable[..., Any]) -> None:
    from infctx_kernels.wkv6.reference import wkv6_reference

    model = make_finch(dtype=torch.float64)
    mix, hidden = model.blocks[1].time_mix, torch.randn(2, 7, 32, dtype=torch.float64)
    shift, wkv = torch.randn(2, 32, dtype=torch.float64), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    seen = mix.recurrence_values(hidden, shift, wkv, None)
    output, _ = wkv6_reference(seen.receptance, seen.key, seen.value, seen.log_decay, mix.bonus, wkv, None, None)
    torch.testing.assert_close(seen.output, output)


def test_a_chat_in_a_stream_with_a_window(trace: Callable[..., Any]) -> None:
    chat = (f"data.path={CHATS}", "data.template=chat", "bptt.chunk_tokens=32", "bptt.window=8", "run.rows=1")
    place = trace(DEBUG, "0:100", *chat)[6]["next_trained_place"]
    stops = trace(DEBUG, f"0:{place}", *chat)
    assert stops[3]["data.mode"] == "stream"
    ids = ids_of(text_of(stops, "chat"))
    at = stops[5]["document_token"]
    assert stops[5]["id"] == int(ids[0, at])
    assert stops[6]["target_id"] == int(ids[0, at + 1])
    assert stops[5]["document_tokens"] == ids.shape[1]
    assert at == place, "the first document of the row is long enough"
    model = infctx.load_model(ROOT / "datasets/byte_finch/model.safetensors", dtype=torch.float64)
    loss, norms = borders_by_autograd(model, ids, at, chunk_tokens=32, first=0)
    assert stops[8]["loss"] == pytest.approx(loss, rel=CLOSE)
    found = {border["before_chunk"]: border["gradient_norm"] for border in stops[9]["borders"]}
    assert found.keys() == norms.keys()
    for chunk, expected in norms.items():
        assert found[chunk] == pytest.approx(expected, rel=CLOSE)


def test_where_the_window_cuts(trace: Callable[..., Any]) -> None:
    """Document mode with a window: what reaches the window's first border goes no further."""
    place = 42
    stops = trace(DEBUG, f"0:{place}", "bptt.chunk_tokens=10", "bptt.window=2", "data.mode=document")
    ids = ids_of(text_of(stops, "completion"))
    model = infctx.load_model(ROOT / "datasets/byte_finch/model.safetensors", dtype=torch.float64)
    _, norms = borders_by_autograd(model, ids, place, chunk_tokens=10, first=4)
    assert stops[9]["window"][0] == 4
    assert stops[9]["reaches_chunks"] == [4]
    assert stops[9]["stops_because"] == "the window begins"
    (border,) = stops[9]["borders"]
    assert border["gradient_norm"] == pytest.approx(norms[4], rel=CLOSE)


def test_the_step_is_the_first_of_a_run(
    trace: Callable[..., Any], cli: Callable[..., Any], make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """With dropout too: the same random numbers."""
    recipe = make_recipe(
        adapter={"kind": "lora", "rank": 2, "alpha": 4, "dropout": 0.3},
        optimizer={"z_loss": 0.01, "token_dropout": 0.2},
        run={"accumulate": 2, "steps": 1},
    )
    stops = trace(recipe, "3:5")
    cli("train", recipe).ok()
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert stops[8]["step_loss"] == pytest.approx(first["loss"], rel=1e-6)
    assert stops[10]["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-6)
    assert stops[10]["learning_rate"] == first["lr"]
    assert "lora" in stops[10]["parameter"]


def test_nothing_is_changed(
    cli: Callable[..., Any],
    make_recipe: Callable[..., Path],
    tmp_path: Path,
    snapshot: Callable[[Path], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changed = []

    def watched(run: Any, row: int, token: int) -> Any:
        before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
        stops = real(run, row, token)
        after = run.model.state_dict()
        changed.extend(name for name in before if not torch.equal(before[name], after[name]))
        changed.extend(name for name, one in run.model.named_parameters() if one.grad is not None)
        changed.extend([run.engine.optimizer.state] if run.engine.optimizer.state else [])
        return stops

    real = assemble.trace_token
    monkeypatch.setattr(assemble, "trace_token", watched)
    recipe = make_recipe(bptt={"boundaries": "disk"})
    before = snapshot(tmp_path)
    cli("check", recipe, "--trace-token", "0:3").ok()
    assert changed == []
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(("adapter", "precision"), [("state", "fp32"), ("full", "bf16"), ("pissa", "bf16")])
def test_people_get_one_screen(
    cli: Callable[..., Any], make_recipe: Callable[..., Path], adapter: str, precision: str
) -> None:
    recipe = make_recipe(
        adapter={"kind": adapter} | ({"rank": 2} if adapter == "pissa" else {}), run={"precision": precision}
    )
    shown = cli("check", recipe, "--trace-token", "1:9").ok()
    lines = shown.out.splitlines()
    assert shown.err == ""
    assert len(lines) < 60
    assert max(map(len, lines)) <= 100
    for number in range(1, 11):
        (line,) = (line for line in lines if line.startswith(f"{number:>2}  "))
        file, name = line[27:].split()[-2:]
        path, at = file.split(":")
        assert name.split(".")[-1] in (ROOT / path).read_text(encoding="utf-8").splitlines()[int(at) - 1], line


def mixed(rows: Path, tmp_path: Path) -> dict[str, Any]:
    table = tmp_path / "answers.csv"
    lines = [f'"what is {number}?"," {number} é, or ""so"".\n"' for number in range(9)]
    table.write_text("\n".join(["prompt,completion", *lines]) + "\n", encoding="utf-8")
    chats = {"name": "chats", "path": str(CHATS), "template": "chat", "share": 1, "train_turns": "last"}
    return {
        "path": None,
        "sets": [
            {"name": "texts", "path": str(rows), "share": 2, "rechunk_tokens": 21},
            chats,
            {"name": "answers", "path": str(table), "template": "completion", "share": 1},
        ],
    }


@pytest.mark.parametrize("kind", ["stream", "document", "packed", "rechunked", "tail", "mixture", "dropout", "split"])
def test_every_token_of_a_step_is_found_again(
    make_recipe: Callable[..., Path], rows: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its id, its weight in the document and the bytes of its text, whatever lies between the file and the step."""
    document = {"chunk_tokens": 8, "window": "document"}
    sections = {
        "stream": {},
        "document": {"bptt": document},
        "packed": {"bptt": document, "data": {"pack_tokens": 150}},
        "rechunked": {"bptt": document, "data": {"rechunk_tokens": 33}},
        "tail": {"bptt": document, "data": {"validation_tail": 0.3}},
        "mixture": {"bptt": document, "data": mixed(rows, tmp_path), "run": {"rows": 24}},
        "dropout": {"optimizer": {"token_dropout": 0.5}},
        "split": {"bptt": document, "data": {"max_tokens": 9, "on_long": "split"}, "run": {"rows": 9}},
    }[kind]
    seen = []

    def all_tokens(run: Any, row: int, token: int) -> list[Any]:
        tokenizer = tokenizer_by_name(run.data.tokenizer)
        slices = [one for group in run.step.groups for one in group.chunks.rows]
        for number, one in enumerate(slices):
            for at in range(len(one)):
                place = find_token(run.step, run.data.training, number, at)
                name, source = run.recipe.data.sources()[place.set_index]
                token_of_row = (place.row_token, place.token_id)
                row_of_file = read_file_row(
                    name, source, file=place.file, line=place.line, token=token_of_row, tokenizer=tokenizer
                )
                weight = float(place.document.weights[place.document_token])
                assert place.token_id == int(one.tokens[at]) == int(place.document.tokens[place.document_token])
                assert weight == (row_of_file.weight if place.document_token else 0.0)
                if one.weights[at] > 0:
                    assert place.target_id == int(one.targets[at])
                seen.append((name, row_of_file.part))
        return []

    monkeypatch.setattr(assemble, "trace_token", all_tokens)
    from infctx.recipe.load import load_recipe

    assemble.trace_recipe(load_recipe(make_recipe(**sections)), 0, 0)
    assert len(seen) > 30
    if kind == "mixture":
        assert {name for name, _ in seen} == {"texts", "chats", "answers"}
        assert {part for _, part in seen} >= {"column text", "column prompt", "column completion"}
        assert any(part.startswith("turn ") for _, part in seen)


def test_masked_ends_and_first_tokens_are_explained(trace: Callable[..., Any]) -> None:
    masked = trace(DEBUG, "0:20")
    assert masked[5]["why"] == "in column prompt, which is masked"
    assert masked[6]["why_no_weight"] == "the target is masked"
    assert masked[8]["share_of_step_loss"] == masked[10]["parameter_token_share"] == 0.0
    assert masked[9]["reaches_chunks"] == [0]
    assert trace(DEBUG, "0:0")[5]["why"] == "a document's first token is nobody's target"
    last = trace(DEBUG, f"0:{masked[6]['row_tokens'] - 1}")
    assert last[5]["id"] == 0
    assert last[5]["why"] == "in the closing end of text, which is trained"
    assert last[6]["target_id"] is last[8]["loss"] is None
    assert last[9]["reaches_chunks"] == []


def test_what_is_not_there(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for place, words in {
        "2:0": ("no row 2", "0:0 to 0:"),
        "0:5000": ("no token 5,000", "0:0 to 0:", "1:0 to 1:"),
        "1:47": ("no token 47", "From 47 to 50 it is padding"),
        "0-37": ("expected ROW:T", "0:37"),
        "-1:3": ("expected ROW:T",),
    }.items():
        cli("check", DEBUG, f"--trace-token={place}").refused(*words)
    cli("check", DEBUG, "--trace-token", "0:3", "--gradient").refused("--gradient")
