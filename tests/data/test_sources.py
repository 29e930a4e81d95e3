"""Paths and rows: what is read, what is refused, and that a bad row costs itself only."""

import sysconfig
from pathlib import Path

import pytest

from infctx.data.sources import Record, Rejection, expand_paths, read_records
from infctx.errors import DataError


def read_all(path: Path) -> tuple[list[Record], list[Rejection]]:
    rejected: list[Rejection] = []
    return list(read_records(path, on_reject=rejected.append)), rejected


def texts(records: list[Record]) -> list[object]:
    return [record.fields["text"] for record in records]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.txt", "a.txt", "sub/c.txt", "sub/deep/d.txt", "sub/e.md", "odd[1].txt"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    return tmp_path


def names(files: list[Path], tree: Path) -> list[str]:
    return [file.relative_to(tree).as_posix() for file in files]


def test_globs_are_sorted_deep_and_without_duplicates(tree: Path) -> None:
    found = expand_paths([f"{tree}/**/*.txt", f"{tree}/b.txt", f"{tree}/sub/../a.txt"])
    assert names(found, tree) == ["a.txt", "b.txt", "odd[1].txt", "sub/c.txt", "sub/deep/d.txt"]


def test_a_file_whose_name_looks_like_a_glob_is_found(tree: Path) -> None:
    assert names(expand_paths([f"{tree}/odd[1].txt"]), tree) == ["odd[1].txt"]


def test_a_glob_leaves_out_folders(tree: Path) -> None:
    assert names(expand_paths([f"{tree}/s*/*"]), tree) == ["sub/c.txt", "sub/e.md"]


def test_exclude_matches_the_whole_path(tree: Path) -> None:
    found = expand_paths([f"{tree}/**/*.txt"], exclude=["*/sub/*", "*/b.txt"])
    assert names(found, tree) == ["a.txt", "odd[1].txt"]


def test_relative_paths_stay_relative_and_can_be_excluded_either_way(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree)
    assert [str(file) for file in expand_paths(["*.txt"], exclude=["odd*"])] == ["a.txt", "b.txt"]
    assert [str(file) for file in expand_paths(["*.txt"], exclude=[f"{tree.as_posix()}/odd*"])] == ["a.txt", "b.txt"]


def test_stdlib_names_the_standard_library() -> None:
    found = expand_paths(["{stdlib}/json/*.py"], exclude=["{stdlib}/json/__*"])
    folder = Path(sysconfig.get_path("stdlib")) / "json"
    assert folder / "decoder.py" in found
    assert folder / "__init__.py" not in found


def test_torch_names_the_installed_torch() -> None:
    (found,) = expand_paths(["{torch}/testing/_internal/common_methods_invocations.py"])
    # The document of recipes/million_tokens.yaml, which promises this.
    assert found.stat().st_size > 1_000_000


@pytest.mark.parametrize(
    ("paths", "exclude", "message"),
    [
        (["{tree}/none.txt"], [], r"none\.txt: no such file"),
        (["{tree}/a.txt", "{tree}/*.csv"], [], r"\*\.csv: no such file"),
        (["{tree}/sub"], [], r"sub: expected a file or a glob, got a folder.*sub/\*\*"),
        (["{tree}/*.txt"], ["*"], r"data\.exclude=\['\*'\]: leaves none of the 3 files"),
        ([], [], "at least one file or glob"),
    ],
)
def test_paths_that_give_nothing_are_refused(tree: Path, paths: list[str], exclude: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        expand_paths([path.replace("{tree}", str(tree)) for path in paths], exclude)


def test_jsonl_with_byte_order_mark_crlf_and_blank_lines(tmp_path: Path) -> None:
    file = tmp_path / "rows.JSONL"
    file.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n   \n{"text": "two\\r\\n\xe2\x80\xa8"}\n{"text": "three"}')
    records, rejected = read_all(file)
    assert texts(records) == ["one", "two\r\n\u2028", "three"]
    assert [record.origin for record in records] == [f"{file}:1", f"{file}:4", f"{file}:5"]
    assert rejected == []


BAD_LINES = [
    (b'{"text": "\xff"}', "not valid UTF-8: byte 0xFF at byte offset 10 of the line"),
    (b"\x00\x00\x00\x00", "not valid JSON"),
    (b'{"text": "a\x00b"}', "not valid JSON: Invalid control character"),
    (b'{"text": "one"', "not valid JSON"),
    (b'{"text": 1} {"text": 2}', "not valid JSON: Extra data at column 13"),
    (b'["text"]', "expected a JSON object, got an array"),
    (b'"text"', "expected a JSON object, got a string"),
    (b"12", "expected a JSON object, got a number"),
    (b"true", "expected a JSON object, got a truth value"),
    (b"null", "expected a JSON object, got null"),
    (b"[" * 200_000, "nested too deeply"),
    (b'{"text": ' + b"1" * 5000 + b"}", "not valid JSON: Exceeds the limit"),
    # Only the file's first line may begin with a byte order mark.
    (b'\xef\xbb\xbf{"text": "late mark"}', "not valid JSON"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES, ids=[str(number) for number in range(len(BAD_LINES))])
def test_a_bad_line_costs_itself_only(tmp_path: Path, line: bytes, reason: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n')
    records, rejected = read_all(file)
    assert texts(records) == ["before", "after"]
    assert [(row.file, row.line) for row in rejected] == [(str(file), 2)]
    assert reason in rejected[0].reason


def test_reading_stops_where_on_reject_raises(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": "before"}\n[]\n{"text": "after"}\n')

    def stop(rejection: Rejection) -> None:
        raise DataError(rejection.reason)

    records = read_records(file, on_reject=stop)
    assert next(records).fields == {"text": "before"}
    with pytest.raises(DataError, match="an array"):
        next(records)


def test_an_empty_jsonl_has_no_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n\n")
    assert read_all(file) == ([], [])


def test_a_text_file_is_one_document_kept_verbatim(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_bytes(b"\xef\xbb\xbf one\r\ntwo\x00\n\n")
    records, rejected = read_all(file)
    assert records == [Record(fields={"text": " one\r\ntwo\x00\n\n"}, file=str(file), line=1)]
    assert rejected == []


def test_a_text_file_that_is_not_utf8_names_the_byte(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_bytes(b"fine\ncaf\xe9 ")
    records, rejected = read_all(file)
    assert records == []
    assert rejected == [
        Rejection(file=str(file), line=1, reason="not valid UTF-8: byte 0xE9 at byte offset 8 of the file")
    ]


@pytest.mark.parametrize("name", ["gone.txt", "gone.jsonl"])
def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"{name}: expected a readable file"):
        read_all(tmp_path / name)
