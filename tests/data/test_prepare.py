"""A prepared cache gives what reading at once gives: whatever the processes, after a kill, and never a stale one."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infctx.data import prepare as prepare_module
from infctx.data import prepare_parts
from infctx.data.load import IN_MEMORY_BYTES, LoadedData, SetSpec, load_sets
from infctx.data.rows import RowRules
from infctx.data.templates import make_template
from infctx.data.tokenizer import BytesTokenizer, WorldTokenizer
from infctx.errors import DataError


@pytest.fixture
def _small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units of some rows, so that small files have many."""
    monkeypatch.setattr(prepare_module, "UNIT_BYTES", 1500)


def write_rows(path: Path, count: int, *, seed: int = 0) -> None:
    """Rows of all lengths, among them bad ones, blank lines, duplicates and a long one."""
    generator = np.random.default_rng(seed)
    lines: list[str] = []
    for number in range(count):
        words = " ".join(f"w{generator.integers(500)}" for _ in range(int(generator.integers(1, 60))))
        lines.append(json.dumps({"text": f"{number} {words} é日本", "weight": float(generator.integers(0, 3))}))
        if number % 17 == 3:
            lines.append("not json")
        if number % 13 == 5:
            lines.append("")
        if number % 11 == 7:
            lines.append(lines[len(lines) // 2] or "{}")
    lines.insert(5, json.dumps({"text": "long " * 900, "weight": 1}))
    path.write_text("\n".join(lines), encoding="utf-8")


def spec_of(folder: Path, **settings: Any) -> SetSpec:
    rules = RowRules(on_bad_row="skip", max_tokens=settings.pop("max_tokens", None), on_long="split")
    paths = (f"{folder}/*.jsonl", f"{folder}/*.txt")
    template = settings.pop("template", make_template("text", weight_field="weight"))
    return SetSpec(paths=paths, template=template, rules=rules, **settings)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inputs = tmp_path / "in"
    inputs.mkdir()
    write_rows(inputs / "a.jsonl", 60)
    write_rows(inputs / "b.jsonl", 25, seed=1)
    # Has no column of that name, so it is a bad row.
    (inputs / "c.txt").write_text("a book " * 400)
    return inputs


def load(spec: SetSpec, cache: Path | None, *, workers: int = 1, tokenizer: Any = None) -> LoadedData:
    return load_sets(
        [spec],
        tokenizer=tokenizer or WorldTokenizer(),
        cache="memory" if cache is None else cache,
        workers=workers,
    )


def assert_same(left: LoadedData, right: LoadedData) -> None:
    assert len(left.documents) == len(right.documents) > 0
    for one, other in zip(left.documents, right.documents, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.weights, other.weights)
        assert one.origin == other.origin
    assert left.documents.fingerprint == right.documents.fingerprint
    assert left.rejected == right.rejected
    assert {key: n for key, n in left.dropped.items() if n} == {key: n for key, n in right.dropped.items() if n}
    assert left.duplicates == right.duplicates


@pytest.mark.usefixtures("_small_units")
@pytest.mark.parametrize("settings", [{}, {"on_duplicate": "skip"}, {"max_tokens": 40}, {"rechunk_tokens": 100}])
def test_a_cache_gives_what_reading_at_once_gives(folder: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    spec = spec_of(folder, **settings)
    expected = load(spec, None)
    assert expected.rejected
    made = load(spec, tmp_path / "cache")
    assert_same(made, expected)
    assert_same(load(spec, tmp_path / "cache"), expected)
    assert isinstance(made.documents.stores[0].tokens.base, np.memmap)
    assert not list((tmp_path / "cache").glob("*.unfinished"))


def test_a_unit_may_be_larger_than_the_memory(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a compressed file holds is written in pieces as it comes."""
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "a.jsonl.gz").write_bytes(gzip.compress((folder / "a.jsonl").read_bytes()))
    monkeypatch.setattr(prepare_parts, "SPILL_TOKENS", 700)
    monkeypatch.setattr("infctx.data.rows.BATCH_ROWS", 8)
    spec = SetSpec(
        paths=(f"{packed}/*",),
        template=make_template("text", weight_field="weight"),
        rules=RowRules(on_bad_row="skip"),
    )
    expected = load(spec, None)
    most = []
    original = prepare_parts.SpillingBuilder.spill

    def note(self: Any) -> None:
        most.append(self.num_tokens)
        original(self)

    monkeypatch.setattr(prepare_parts.SpillingBuilder, "spill", note)
    assert_same(load(spec, tmp_path / "cache"), expected)
    assert len(most) > 4
    assert sum(most) == expected.documents.num_tokens


@pytest.mark.usefixtures("_small_units")
def test_the_number_of_processes_changes_nothing(folder: Path, tmp_path: Path) -> None:
    spec = spec_of(folder)
    expected = load(spec, None)
    for workers in (1, 3):
        assert_same(load(spec, tmp_path / str(workers), workers=workers), expected)
    names = {path.name for workers in (1, 3) for path in (tmp_path / str(workers)).iterdir() if path.is_dir()}
    assert len(names) == 1, "the same key"


@pytest.mark.usefixtures("_small_units")
def test_a_second_opening_reads_no_row(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(folder)
    load(spec, tmp_path / "cache")

    def refuse(*arguments: object, **settings: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr("infctx.data.reading.read_unit", refuse)
    monkeypatch.setattr("infctx.data.scan_memory.scan", refuse)
    load(spec, tmp_path / "cache")


def changes() -> list[Any]:
    return [
        pytest.param({"template": make_template("text", weight=0.5)}, None, id="template"),
        pytest.param({"max_tokens": 64}, None, id="rules"),
        pytest.param({"on_duplicate": "skip"}, None, id="duplicates"),
        pytest.param({}, BytesTokenizer(), id="tokenizer"),
    ]


@pytest.mark.parametrize(("settings", "tokenizer"), changes())
def test_another_reading_is_another_cache(
    folder: Path, tmp_path: Path, settings: dict[str, Any], tokenizer: Any
) -> None:
    cache = tmp_path / "cache"
    before = load(spec_of(folder), cache)
    changed = spec_of(folder, **settings)
    assert_same(load(changed, cache, tokenizer=tokenizer), load(changed, None, tokenizer=tokenizer))
    assert_same(load(spec_of(folder), cache), before)


def test_a_changed_file_is_read_again_though_its_size_and_time_are_the_same(folder: Path, tmp_path: Path) -> None:
    cache, file = tmp_path / "cache", folder / "a.jsonl"
    load(spec_of(folder), cache)
    facts = file.stat()
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("w1", "w2"), encoding="utf-8")
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (facts.st_size, facts.st_mtime_ns)
    changed = load(spec_of(folder), cache)
    assert_same(changed, load(spec_of(folder), None))
    file.write_text(text, encoding="utf-8")
    assert load(spec_of(folder), cache).documents.fingerprint != changed.documents.fingerprint


def test_a_moved_folder_keeps_its_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(spec_of(folder), tmp_path / "cache")
    moved = tmp_path / "moved"
    folder.rename(moved)

    def refuse(*arguments: object, **settings: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(prepare_module, "_make", refuse)
    found = load(spec_of(moved), tmp_path / "cache")
    assert found.documents[0].origin == f"{moved}/a.jsonl:1"


def test_small_sets_are_not_prepared(folder: Path, tmp_path: Path) -> None:
    spec, root = spec_of(folder), tmp_path / "cache"
    small = load_sets([spec], tokenizer=WorldTokenizer(), cache="auto", cache_root=root)
    assert not root.exists()
    assert small.caches == ()
    (folder / "d.txt").write_text("x" * IN_MEMORY_BYTES)
    large = load_sets([spec], tokenizer=WorldTokenizer(), cache="auto", cache_root=root)
    assert [cache.parent for cache in large.caches] == [root]


@pytest.mark.usefixtures("_small_units")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_row_stops_a_preparation_and_names_its_place(folder: Path, tmp_path: Path, workers: int) -> None:
    spec = SetSpec(paths=(f"{folder}/a.jsonl",), template=make_template("text"))
    with pytest.raises(DataError, match=r"a\.jsonl:\d+: not valid JSON"):
        load(spec, tmp_path / "cache", workers=workers)
    with pytest.raises(DataError, match=r"a\.jsonl:\d+: not valid JSON"):
        load(spec, tmp_path / "cache", workers=workers)


def test_a_file_that_changes_meanwhile_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = prepare_parts.build_part

    def build_and_write(*arguments: Any) -> None:
        original(*arguments)
        with (folder / "a.jsonl").open("a") as file:
            file.write('\n{"text": "late", "weight": 1}')

    monkeypatch.setattr(prepare_parts, "build_part", build_and_write)
    with pytest.raises(DataError, match=r"a\.jsonl: the file changed while it was being prepared"):
        load(spec_of(folder), tmp_path / "cache")
    monkeypatch.setattr(prepare_parts, "build_part", original)
    assert_same(load(spec_of(folder), tmp_path / "cache"), load(spec_of(folder), None))


KILLED = """
    import signal
    import sys
    from pathlib import Path
    from infctx.data import prepare
    from infctx.data.load import SetSpec, load_sets
    from infctx.data.rows import RowRules
    from infctx.data.templates import make_template
    from infctx.data.tokenizer import WorldTokenizer

    prepare.UNIT_BYTES = 1500
    if __name__ == "__main__":
        # A shell that runs things in the background has them ignore it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        spec = SetSpec(
            paths=(sys.argv[1] + "/*.jsonl", sys.argv[1] + "/*.txt"),
            template=make_template("text", weight_field="weight"),
            rules=RowRules(on_bad_row="skip", on_long="split"),
        )
        load_sets([spec], tokenizer=WorldTokenizer(), cache=Path(sys.argv[2]), workers=int(sys.argv[3]))
"""


def assert_ends(group: int) -> None:
    """Nothing of a process group is left, soon."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(group, signal.SIGKILL)
    raise AssertionError("processes are left")


@pytest.mark.usefixtures("_small_units")
@pytest.mark.parametrize(("workers", "stop"), [(1, signal.SIGKILL), (2, signal.SIGKILL), (2, signal.SIGINT)])
def test_a_killed_preparation_goes_on_where_it_was(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, stop: signal.Signals
) -> None:
    write_rows(folder / "a.jsonl", 1500)
    cache, script = tmp_path / "cache", tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder), str(cache), str(workers)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    done: list[Path] = []
    deadline = time.monotonic() + 60
    while len(done) < 4 and time.monotonic() < deadline and process.poll() is None:
        done = [path for path in cache.glob("*.unfinished/part-*") if "." not in path.name]
    os.killpg(process.pid, stop) if stop == signal.SIGINT else process.send_signal(stop)
    process.wait(30)
    done = [path for path in cache.glob("*.unfinished/part-*") if "." not in path.name]
    assert len(done) >= 4, "it was stopped in the middle"
    built: list[str] = []
    original = prepare_parts.build_part

    def note(job: Any, reading: Any) -> None:
        built.append(job.part.name)
        original(job, reading)

    monkeypatch.setattr(prepare_parts, "build_part", note)
    spec = spec_of(folder)
    resumed = load(spec, cache)
    assert not set(built) & {path.name for path in done}
    assert built
    assert_same(resumed, load(spec, None))
    # Its processes have ended with it.
    assert_ends(process.pid)


def test_workers_leave_an_interrupt_to_their_parent() -> None:
    """It reaches the whole group of a terminal; what they are at is finished and kept."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=prepare_parts._begin_worker) as pool:
        assert pool.submit(signal.raise_signal, signal.SIGINT).result(60) is None


def test_a_damaged_cache_is_named(folder: Path, tmp_path: Path) -> None:
    made = load(spec_of(folder), tmp_path / "cache")
    (made.caches[0] / "facts.json").write_text("{")
    with pytest.raises(DataError, match=r"this cache of prepared data is damaged .*Delete the folder"):
        load(spec_of(folder), tmp_path / "cache")


def test_damaged_memory_of_hashes_costs_time_only(folder: Path, tmp_path: Path) -> None:
    load(spec_of(folder), tmp_path / "cache")
    (tmp_path / "cache" / "files.json").write_text("[1, 2")
    assert_same(load(spec_of(folder), tmp_path / "cache"), load(spec_of(folder), None))
