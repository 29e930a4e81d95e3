"""What data.path may say, and what is refused."""

import os
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from infctx.data.sources.catalog import find_files, format_of
from infctx.errors import DataError


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.txt", "a.txt", "sub/c.txt", "sub/deep/d.txt", "sub/e.md", "odd[1].txt"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    return tmp_path


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    store = fsspec.filesystem("memory")
    yield store
    store.rm("/", recursive=True)


def names(files: list[str], tree: Path) -> list[str]:
    return [Path(file).relative_to(tree).as_posix() for file in files]


def test_globs_are_sorted_deep_and_without_duplicates(tree: Path) -> None:
    found = find_files([f"{tree}/**/*.txt", f"{tree}/b.txt", f"{tree}/sub/../a.txt"])
    assert names(found, tree) == ["a.txt", "b.txt", "odd[1].txt", "sub/c.txt", "sub/deep/d.txt"]


def test_a_file_whose_name_looks_like_a_glob_is_found(tree: Path) -> None:
    assert names(find_files([f"{tree}/odd[1].txt"]), tree) == ["odd[1].txt"]


def test_a_glob_leaves_out_folders(tree: Path) -> None:
    assert names(find_files([f"{tree}/s*/*"]), tree) == ["sub/c.txt", "sub/e.md"]


def test_exclude_matches_the_whole_path(tree: Path) -> None:
    found = find_files([f"{tree}/**/*.txt"], exclude=["*/sub/*", "*/b.txt"])
    assert names(found, tree) == ["a.txt", "odd[1].txt"]


def test_relative_paths_stay_relative_and_can_be_excluded_either_way(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree)
    assert find_files(["*.txt"], exclude=["odd*"]) == ["a.txt", "b.txt"]
    assert find_files(["*.txt"], exclude=[f"{tree.as_posix()}/odd*"]) == ["a.txt", "b.txt"]


def test_home_is_known(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tree))
    assert names(find_files(["~/sub/*.md"]), tree) == ["sub/e.md"]


def test_stdlib_names_the_standard_library() -> None:
    found = find_files(["{stdlib}/json/*.py"], exclude=["{stdlib}/json/__*"])
    folder = Path(sysconfig.get_path("stdlib")) / "json"
    assert str(folder / "decoder.py") in found
    assert str(folder / "__init__.py") not in found


def test_torch_names_the_installed_torch() -> None:
    (found,) = find_files(["{torch}/testing/_internal/common_methods_invocations.py"])
    # The document of recipes/million_tokens.yaml, which promises this.
    assert Path(found).stat().st_size > 1_000_000


def test_a_pipe_is_no_file(tree: Path) -> None:
    # Opening one waits for ever.
    os.mkfifo(tree / "pipe.txt")
    assert names(find_files([f"{tree}/*.txt"]), tree) == ["a.txt", "b.txt", "odd[1].txt"]
    with pytest.raises(DataError, match=r"pipe\.txt: no such file"):
        find_files([f"{tree}/pipe.txt"])


@pytest.mark.parametrize(
    ("paths", "exclude", "format", "message"),
    [
        (["{tree}/none.txt"], [], "auto", r"none\.txt: no such file"),
        (["{tree}/a.txt", "{tree}/*.csv"], [], "auto", r"\*\.csv: no such file"),
        (["{tree}/sub/"], [], "auto", r"sub/: expected a file or a glob, got a folder.*sub/\*\*.*data\.format to code"),
        (["{tree}/sub"], [], "jsonl", "expected a file or a glob, got a folder"),
        (["{tree}/*.txt"], ["*"], "auto", r"data\.exclude=\['\*'\]: leaves none of the 3 files"),
        ([], [], "auto", "at least one file or glob"),
        (["{tree}/a.txt"], [], "words", r"data\.format=words: expected auto or one of jsonl, text"),
        (["{tree}/a.txt"], [], "code_repository", "expected a folder, got a file"),
        (["{tree}/*.txt"], [], "code_repository", "no such folder"),
        (["{tree}/a.txt"], [], "huggingface", "got a file"),
        (["{tree}/none"], [], "huggingface", "there is no such folder"),
        (["{tree}/a.txt"], [], "binidx", r"expected a \.bin or \.idx file"),
        (["memory://pairs/x.idx"], [], "binidx", "expected a local path, got a URL"),
        (["memory://source"], [], "code", "expected a local path, got a URL"),
        (["memory://nowhere/*.txt"], [], "auto", "memory://nowhere/.*: no such file"),
        (["nothing://x/*.txt"], [], "auto", "nothing://x/.*: expected a readable file, got: Protocol not known"),
    ],
)
def test_paths_that_give_nothing_are_refused(
    tree: Path, paths: list[str], exclude: list[str], format: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        find_files([path.replace("{tree}", str(tree)) for path in paths], exclude=exclude, format=format)


@pytest.mark.parametrize(
    ("path", "format"),
    [
        ("a/b.jsonl", "jsonl"),
        ("b.NDJSON", "jsonl"),
        ("b.json", "jsonl"),
        ("b.jsonl.gz", "jsonl"),
        ("b.JSONL.ZST", "jsonl"),
        ("b.csv.gz", "csv"),
        ("b.tsv", "tsv"),
        ("b.parquet", "parquet"),
        ("b.idx", "binidx"),
        ("b.bin", "binidx"),
        ("b.txt.gz", "text"),
        ("b.gz", "text"),
        ("a.jsonl/b", "text"),
        ("s3://bucket/b.csv", "csv"),
        ("zip://b.tsv::file:///data/x.zip", "tsv"),
        ("simplecache::https://host/b.parquet?download=1", "parquet"),
    ],
)
def test_the_name_tells_the_format(path: str, format: str) -> None:
    assert format_of(path) == format


# Pairs


@pytest.mark.parametrize(
    ("path", "format"),
    [("x.idx", "auto"), ("x.bin", "auto"), ("x.*", "auto"), ("x", "binidx"), ("x.idx", "binidx"), ("x.*", "binidx")],
)
def test_a_pair_is_listed_once_as_its_index(tmp_path: Path, path: str, format: str) -> None:
    (tmp_path / "x.idx").touch()
    (tmp_path / "x.bin").touch()
    assert find_files([f"{tmp_path}/{path}"], format=format) == [f"{tmp_path}/x.idx"]


def test_a_bin_without_its_index_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.bin").touch()
    with pytest.raises(DataError, match=r"x\.bin: expected its index .*x\.idx beside it"):
        find_files([f"{tmp_path}/*"])


# Code


@pytest.fixture
def repositories(tmp_path: Path) -> Path:
    for name in ("one/a.py", "one/src/b.py", "one/node_modules/c.js", "two/d.py", "README"):
        file = tmp_path / "all" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    return tmp_path / "all"


@pytest.mark.parametrize("path", ["", "/", "/**"])
def test_a_folder_of_code_is_listed_with_its_root_marked(repositories: Path, path: str) -> None:
    found = find_files([f"{repositories}{path}"], format="code")
    assert found == [f"{repositories}/./{name}" for name in ("README", "one/a.py", "one/src/b.py", "two/d.py")]


def test_a_glob_of_folders_of_code_gives_each_its_own_root(repositories: Path) -> None:
    found = find_files([f"{repositories}/*"], format="code", exclude=["*/src/*"])
    assert found == [f"{repositories}/README", f"{repositories}/one/./a.py", f"{repositories}/two/./d.py"]


def test_files_of_code_may_be_named_one_by_one(repositories: Path) -> None:
    assert find_files([f"{repositories}/**/*.py"], format="code") == [
        f"{repositories}/one/a.py",
        f"{repositories}/one/src/b.py",
        f"{repositories}/two/d.py",
    ]


@pytest.mark.parametrize("path", ["one", "one/"])
def test_a_repository_is_its_folder(repositories: Path, path: str) -> None:
    assert find_files([f"{repositories}/{path}"], format="code_repository") == [f"{repositories}/one"]


def test_a_glob_of_repositories(repositories: Path) -> None:
    found = find_files([f"{repositories}/*", f"{repositories}/one"], format="code_repository", exclude=["*/two"])
    assert found == [f"{repositories}/one"]
    assert find_files([f"{repositories}/**"], format="code_repository") == [str(repositories)]


def test_a_folder_without_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty" / ".git").mkdir(parents=True)
    with pytest.raises(DataError, match="expected a folder with files of source code"):
        find_files([f"{tmp_path}/empty"], format="code")


# Names on the hub


def test_names_on_the_hub_stay_as_they_are(tmp_path: Path) -> None:
    assert find_files(["org/some.set-2", "squad", str(tmp_path)], format="huggingface") == sorted(
        ["org/some.set-2", "squad", str(tmp_path)]
    )


# URLs


def test_urls_of_memory(memory: fsspec.AbstractFileSystem) -> None:
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl", "d.txt"):
        memory.pipe(f"/rows/{name}", b"")
    assert find_files(["memory://rows/*.jsonl"]) == ["memory:///rows/a.jsonl", "memory:///rows/b.jsonl"]
    deep = find_files(["memory://rows/**/*.jsonl", "memory:///rows/b.jsonl"], exclude=["*/a.*"])
    assert deep == ["memory:///rows/b.jsonl", "memory:///rows/deep/c.jsonl"]
    with pytest.raises(DataError, match="got a folder"):
        find_files(["memory://rows"])


def test_urls_of_local_files(tree: Path) -> None:
    assert find_files([f"file://{tree}/*.txt"], exclude=["*odd*"]) == [f"file://{tree}/a.txt", f"file://{tree}/b.txt"]
    assert find_files([f"file://{tree}/odd[1].txt"]) == [f"file://{tree}/odd[1].txt"]


def test_urls_of_files_in_an_archive(tree: Path) -> None:
    with zipfile.ZipFile(tree / "x.zip", "w") as archive:
        for name in ("b.csv", "in/a.csv", "c.txt"):
            archive.writestr(name, "")
    inside = f"::file://{tree}/x.zip"
    assert find_files([f"zip://**/*.csv{inside}"]) == [f"zip://b.csv{inside}", f"zip://in/a.csv{inside}"]
    assert find_files([f"zip://c.txt{inside}"]) == [f"zip://c.txt{inside}"]
