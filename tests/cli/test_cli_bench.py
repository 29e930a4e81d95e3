"""infctx bench kernels: its JSON, its files, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from infctx.bench import gates, pairs, wkv6_suite

TINY = ("--device", "cpu", "--tokens", 32, "--heads", 1, "--head-size", 16, "--pairs", 2, "--quick")
OPERATOR = """
from .CoreDependencies import *
from infctx_kernels import wkv6

@TCompileBaseline
def rwkv_inner(r, k, v, w, u, kv_state, chunk_len=128, precision=64):
    r, k, v, w = (x.transpose(1, 2) for x in (r, k, v, w))
    output, state = wkv6(r, k, v, w.clamp(0.005).log(), u[0, :, 0], kv_state.float(), backend="torch")
    return output.transpose(1, 2), state
"""


@pytest.fixture
def peer(tmp_path: Path) -> str:
    file = tmp_path / "trainer" / "RWKV-v6" / "src" / "module" / "rwkv_inner.py"
    file.parent.mkdir(parents=True)
    file.write_text(OPERATOR)
    return f"infctx-trainer={tmp_path / 'trainer'}"


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Interrupt while the row of this number is timed."""
    begun = []

    def interrupted(*arguments: Any, **settings: Any) -> pairs.PairTimes:
        begun.append(arguments)
        if len(begun) == number:
            raise KeyboardInterrupt
        return pairs.time_pairs(*arguments, **settings)

    monkeypatch.setattr(wkv6_suite, "time_pairs", interrupted)


def test_json(cli: Callable[..., Any], peer: str, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    ended = cli("bench", "kernels", *TINY, "--dtype", "fp32", "--dtype", "bf16", "--backend", "torch", "--peer", peer,
                "--threads", 2, "--output", tmp_path / "results" / "here", "--json").ok()  # fmt: skip
    result = ended.json
    assert ended.out.count("\n") == 1
    assert result["is_complete"]
    assert result["machine"].keys() >= {"cpu", "cores", "threads", "gpu"}
    assert result["machine"]["threads"] == 2
    assert torch.get_num_threads() == before
    assert result["machine"]["gpu"] is None
    assert result["versions"]["torch"] == torch.__version__
    assert result["commit"] is None or result["commit"].keys() == {"revision", "is_dirty"}
    assert result["settings"]["tokens"] == [32]
    assert result["settings"]["pairs"] == 2
    assert [(gate["side"], gate["dtype"], gate["is_passed"]) for gate in result["gates"]] == [
        (name, dtype, name != "infctx-trainer-default")
        for dtype in ("fp32", "bf16")
        for name in ("torch", "infctx-trainer", "infctx-trainer-default")
    ]
    assert len(result["rows"]) == 2 * 2 * 2
    for row in result["rows"]:
        if row["other"] == "infctx-trainer":
            assert row["pairs"] == 2
            low, high = row["ratio_interval"]
            assert 0 < low <= row["ratio"] <= high
            assert row["ours_ns_per_token_head"] == pytest.approx(row["ours_ms"] * 1e6 / 32, rel=1e-3)
            assert row["a_a_ratio"] > 0
            assert row["reason"] is None
        else:
            assert row["ratio"] is row["ours_ms"] is row["a_a_ratio"] is None
            assert "multiples of 128 tokens, not 32" in row["reason"]
    written = json.loads((tmp_path / "results" / "here" / "kernels_cpu.json").read_text())
    assert written == result
    assert [path.name for path in (tmp_path / "results" / "here").iterdir()] == ["kernels_cpu.json"]
    for word in ("infctx-trainer", "forward+backward", "multiples of 128 tokens", "float64", "A/A"):
        assert word in ended.err


def test_what_is_chosen_by_itself_is_compared_with_torch(cli: Callable[..., Any]) -> None:
    result = cli("bench", "kernels", *TINY, "--json").ok().json
    chosen = result["rows"][0]["ours"]
    assert {row["other"] for row in result["rows"]} == ({None} if chosen == "torch" else {"torch"})
    assert [row["pass"] for row in result["rows"]] == ["forward", "forward+backward"]
    assert all(row["pairs"] == 2 and row["ours_ms"] > 0 for row in result["rows"])
    assert "no checkout given" in result["peers"]["infctx-trainer"]["absence"]


def test_a_backend_alone_and_two_of_ours(cli: Callable[..., Any], tmp_path: Path) -> None:
    alone = cli("bench", "kernels", *TINY, "--backend", "torch", "--json").ok()
    assert [(row["ours"], row["other"], row["ratio"]) for row in alone.json["rows"]] == [("torch", None, None)] * 2
    both = cli("bench", "kernels", *TINY, "--backend", "reference", "--seconds-per-case", 0, "--json").ok()
    assert [(row["ours"], row["other"], row["pairs"]) for row in both.json["rows"]] == [("reference", "torch", 1)] * 2
    assert all(row["ratio"] > 0 for row in both.json["rows"])
    assert list(tmp_path.iterdir()) == []


def test_interrupt_gives_what_there_is(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    earlier = tmp_path / "kernels_cpu.json"
    earlier.write_text("an earlier result")
    stop_at(monkeypatch, 2)
    ended = cli("bench", "kernels", *TINY, "--backend", "torch", "--output", tmp_path, "--json")
    assert ended.code == 3
    assert "Interrupted" in ended.err
    assert not ended.json["is_complete"]
    assert [row["pass"] for row in ended.json["rows"]] == ["forward"]
    assert json.loads((tmp_path / "kernels_cpu.partial.json").read_text()) == ended.json
    assert earlier.read_text() == "an earlier result"
    monkeypatch.undo()
    whole = cli("bench", "kernels", *TINY, "--backend", "torch", "--output", tmp_path, "--json").ok()
    assert json.loads(earlier.read_text()) == whole.json
    assert not (tmp_path / "kernels_cpu.partial.json").exists()


def test_nothing_measured_is_no_success(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "FP32_BOUND", 1e-30)
    ended = cli("bench", "kernels", *TINY, "--json")
    assert ended.code == 1
    assert "Nothing could be measured" in ended.err
    assert "Traceback" not in ended.err
    assert all(row["ratio"] is None and "allowed 1.0e-30" in row["reason"] for row in ended.json["rows"])


BAD = {
    "dtype": (["--dtype", "fp8"], ["fp8", "fp32, bf16"]),
    "device": (["--device", "tpu"], ["tpu", "cpu or cuda"]),
    "no GPU": (["--device", "cuda"], ["--device cuda", "no CUDA device"]),
    "backend": (["--device", "cpu", "--backend", "warp"], ["--backend warp", "torch"]),
    "peer": (["--device", "cpu", "--peer", "somebody"], ["'somebody'", "infctx-trainer, fla"]),
    "peer without a path": (["--device", "cpu", "--peer", "infctx-trainer"], ["infctx-trainer=PATH"]),
    "peer elsewhere": (["--device", "cpu", "--peer", "infctx-trainer=/none"], ["/none", "rwkv_inner.py"]),
    "no pairs": (["--pairs", 0], ["--pairs"]),
    "no tokens": (["--tokens", 0], ["--tokens"]),
    "words": (["--tokens", "many"], ["--tokens"]),
    "no threads": (["--threads", 0], ["--threads"]),
    "time": (["--device", "cpu", "--seconds-per-case", "inf"], ["--seconds-per-case inf"]),
    "output": (["--device", "cpu", "--output", __file__], [__file__]),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_options(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options, words = BAD[what]
    cli("bench", "kernels", *options, "--json").refused(*words)


def test_help_of_the_group_has_an_example(cli: Callable[..., Any]) -> None:
    text = cli("bench", "--help").ok().out
    assert "Example: infctx bench kernels --quick" in text
    assert "kernels" in text[: text.index("Example")]
