"""Hugging Face sets: saved ones and folders of files; the hub is played by stand-ins."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

import datasets
from infctx.data.sources.catalog import UNKNOWN_BYTES, num_input_bytes, read_unit, scan, whole
from infctx.data.sources.records import Record, Rejection
from infctx.errors import DataError

ReadAll = Callable[..., tuple[list[Record], list[Rejection]]]

ROWS = [{"text": "one", "n": 1}, {"text": "twö", "n": 2}]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def saved_splits(tmp_path: Path) -> Path:
    splits = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "splits")
    return tmp_path / "splits"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "files").mkdir()
    for name, rows in (("train", ROWS), ("test", ROWS[1:])):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "files" / f"{name}.jsonl").write_text(lines)
    return tmp_path / "files"


def digest(path: Path | str) -> str:
    return scan(str(path), format="huggingface", unit_bytes=1).digest


def test_a_saved_set(saved: Path, read_all: ReadAll) -> None:
    records, rejected = read_all(saved, "huggingface")
    assert [(record.fields, record.origin) for record in records] == [(ROWS[0], f"{saved}:1"), (ROWS[1], f"{saved}:2")]
    assert rejected == []
    with pytest.raises(DataError, match=r"data\.split=test: the saved set has no splits"):
        read_all(saved, "huggingface", split="test")
    with pytest.raises(DataError, match=r"data\.subset=en: a saved set has no subsets"):
        read_all(saved, "huggingface", subset="en")


def test_a_saved_set_of_splits(saved_splits: Path, read_all: ReadAll) -> None:
    assert len(read_all(saved_splits, "huggingface")[0]) == 2
    assert len(read_all(saved_splits, "huggingface", split="test")[0]) == 1
    with pytest.raises(DataError, match=r"data\.split=dev: expected one of \['test', 'train'\]"):
        read_all(saved_splits, "huggingface", split="dev")


def test_a_folder_of_files(folder: Path, read_all: ReadAll) -> None:
    records, _ = read_all(folder, "huggingface")
    assert [(record.fields, record.line) for record in records] == [(ROWS[0], 1), (ROWS[1], 2)]
    assert len(read_all(folder, "huggingface", split="test")[0]) == 1
    with pytest.raises(DataError, match=r"files: expected a Hugging Face data set, got ValueError.*data\.split\."):
        read_all(folder, "huggingface", split="dev")


def test_a_folder_that_cannot_be_read_to_its_end(folder: Path) -> None:
    (folder / "train.jsonl").write_text(json.dumps(ROWS[0]) + "\n{]\n")
    with pytest.raises(DataError, match="files: expected a Hugging Face data set, got"):
        list(read_unit(whole(str(folder), format="huggingface"), on_reject=print))


def test_the_digest_of_a_saved_set_is_of_its_fingerprints(saved: Path, saved_splits: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(saved, tmp_path / "copy")
    assert digest(copy) == digest(saved)
    datasets.Dataset.from_list(ROWS[:1]).save_to_disk(tmp_path / "other")
    assert len({digest(saved), digest(tmp_path / "other"), digest(saved_splits)}) == 3
    (unit,) = scan(str(saved), format="huggingface", unit_bytes=1).units
    assert unit == whole(str(saved), format="huggingface")


def test_the_digest_of_a_folder_is_of_its_names_and_contents(folder: Path) -> None:
    before = digest(folder)
    (folder / "test.jsonl").rename(folder / "eval.jsonl")
    renamed = digest(folder)
    (folder / "train.jsonl").write_text(json.dumps({"text": "six", "n": 6}) + "\n")
    assert len({before, renamed, digest(folder)}) == 3


def test_the_size_of_a_local_set_is_that_of_its_files(folder: Path) -> None:
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert num_input_bytes([(str(folder), "huggingface")]) == size
    assert scan(str(folder), format="huggingface", unit_bytes=1).num_bytes == size
    assert num_input_bytes([(str(folder), "huggingface"), ("org/name", "huggingface")]) == UNKNOWN_BYTES


# The hub. No test reaches it.


def test_a_set_on_the_hub_is_streamed(read_all: ReadAll, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*arguments: object, **options: object) -> list[dict[str, object]]:
        asked.append((arguments, options))
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    records, _ = read_all("org/name", "huggingface", split="dev", subset="en")
    assert [record.origin for record in records] == ["org/name:1", "org/name:2"]
    assert asked == [(("org/name",), {"name": "en", "split": "dev", "streaming": True})]


def test_a_hub_that_is_out_of_reach(read_all: ReadAll, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*arguments: object, **options: object) -> object:
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"org/name: .*got ConnectionError: Couldn't reach.* reaches the hub, or save"):
        read_all("org/name", "huggingface")


@pytest.mark.parametrize("commit", ["abc", None])
def test_the_digest_of_a_set_on_the_hub_is_its_commit(monkeypatch: pytest.MonkeyPatch, commit: str | None) -> None:
    def dataset_info(self: object, name: str) -> object:
        assert name == "org/name"
        return SimpleNamespace(sha=commit)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    if commit is None:
        with pytest.raises(DataError, match="the hub gave none"):
            digest("org/name")
        return
    first = digest("org/name")
    commit = "def"
    assert digest("org/name") != first


def test_a_cache_of_a_set_on_the_hub_needs_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def dataset_info(self: object, name: str) -> object:
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    with pytest.raises(DataError, match=r"a cache needs the commit of the set.*OfflineModeIsEnabled.*data\.cache"):
        digest("org/name")


def test_optional_packages_are_imported_only_where_they_are_needed() -> None:
    code = (
        "import sys, infctx.data.sources.catalog;"
        "print(*[name for name in ('torch', 'datasets', 'pyarrow', 'pandas', 'zstandard', 'fsspec')"
        " if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout.split(), done.stderr) == ([], "")
