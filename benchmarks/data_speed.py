"""How fast rows become tokens, by source and by processes, beside the reference tokenizer and `datasets.map`; memory.

    python benchmarks/data_speed.py speed [--megabytes 96] [--rounds 3] [--output FILE]
    python benchmarks/data_speed.py memory [--gigabytes 1 4] [--output FILE]
    python benchmarks/data_speed.py random [--tokens 2500000000] [--output FILE]

The text is this Python's own documentation and library sources, shuffled in paragraphs: rows of 2 KB on average. MB are
10^6 bytes of UTF-8 text in the documents. Sides run in turn, each in a process of its own; figures are medians. All of
them do the same work: read the rows, World tokens, an end of text, a loss mask, everything on disk at the end. "random"
reads documents at random from a mapped store of random ids: 2.5 billion are what 10 GB of text come to.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

LINES_IN_ROW = 40


def paragraphs() -> list[str]:
    """Some MB of real text and code."""
    library = Path(sysconfig.get_path("stdlib"))
    texts = [(library / "pydoc_data" / "topics.py").read_text(encoding="utf-8").encode().decode("unicode_escape")]
    texts += [path.read_text(encoding="utf-8", errors="ignore") for path in sorted(library.glob("*.py"))[:150]]
    lines = "\n".join(texts).split("\n")
    return ["\n".join(lines[begin : begin + LINES_IN_ROW]) for begin in range(0, len(lines), LINES_IN_ROW)]


def texts_of(num_bytes: int, *, seed: int = 0) -> Iterator[str]:
    """Paragraphs drawn again and again, until there are so many bytes."""
    pool = paragraphs()
    generator = random.Random(seed)
    done = number = 0
    while done < num_bytes:
        text = f"{number}: {generator.choice(pool)}\n{generator.choice(pool)[:800]}"
        done += len(text.encode())
        number += 1
        yield text


def as_chat(text: str) -> dict[str, object]:
    """The text as a conversation of four turns."""
    quarter = max(1, len(text) // 4)
    parts = [text[begin : begin + quarter].strip() or "x" for begin in range(0, 4 * quarter, quarter)]
    roles = ("user", "assistant", "user", "assistant")
    return {"messages": [{"role": role, "content": part} for role, part in zip(roles, parts, strict=True)]}


def write_inputs(folder: Path, num_bytes: int) -> dict[str, tuple[str, dict[str, object]]]:
    """The same text in every format. Returns source -> path and settings of the set."""
    import csv

    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    texts = list(texts_of(num_bytes))
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    (folder / "rows.jsonl").write_bytes(lines)
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(lines, 6))
    (folder / "rows.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines))
    with (folder / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text"])
        writer.writerows([text] for text in texts)
    pq.write_table(pa.table({"text": texts}), folder / "rows.parquet", row_group_size=4096)
    chats = "".join(json.dumps(as_chat(text), ensure_ascii=False) + "\n" for text in texts)
    (folder / "chats.jsonl").write_text(chats, encoding="utf-8")
    rows = "".join(
        json.dumps({"instruction": text[:200], "input": "", "output": text[200:]}, ensure_ascii=False) + "\n"
        for text in texts
        if text[:200].strip() and text[200:].strip()
    )
    (folder / "tasks.jsonl").write_text(rows, encoding="utf-8")
    books = folder / "books"
    books.mkdir()
    for number, begin in enumerate(range(0, len(texts), 500)):
        (books / f"{number:05d}.txt").write_text("\n".join(texts[begin : begin + 500]), encoding="utf-8")
    return {
        "jsonl": (str(folder / "rows.jsonl"), {}),
        "jsonl.gz": (str(folder / "rows.jsonl.gz"), {}),
        "jsonl.zst": (str(folder / "rows.jsonl.zst"), {}),
        "csv": (str(folder / "rows.csv"), {}),
        "parquet": (str(folder / "rows.parquet"), {}),
        "text, 1 MB each": (str(books / "*.txt"), {}),
        "jsonl, chat": (str(folder / "chats.jsonl"), {"template": "chat"}),
        "jsonl, instruct": (str(folder / "tasks.jsonl"), {"template": "instruct"}),
    }


# The sides, each in a process of its own


def run_ours(path: str, template: str, cache: str, workers: int) -> None:
    """Prepare a set, from nothing."""
    from infctx.data.load import SetSpec, load_sets
    from infctx.data.rows import RowRules
    from infctx.data.templates import make_template
    from infctx.data.tokenizer import WorldTokenizer

    spec = SetSpec(paths=(path,), template=make_template(template), rules=RowRules(on_bad_row="skip"))
    began = time.perf_counter()
    loaded = load_sets([spec], tokenizer=WorldTokenizer(), cache=Path(cache), workers=workers)
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "tokens": loaded.documents.num_tokens, **peaks()}))


class MapTokenizer:
    """What `datasets.map` calls, with the same tokenizer; each process makes its own, since it cannot be pickled."""

    encoder = None

    def __call__(self, batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        import pyrwkv_tokenizer

        if MapTokenizer.encoder is None:
            MapTokenizer.encoder = pyrwkv_tokenizer.RWKVTokenizer()
        ids = [[*tokens, 0] for tokens in MapTokenizer.encoder.encode_batch(batch["text"])]
        return {"input_ids": ids, "loss_mask": [[0, *[1] * (len(tokens) - 1)] for tokens in ids]}


def run_map(path: str, cache: str, workers: int) -> None:
    """`datasets.map` in batches, as its documentation advises."""
    import datasets

    columns = {"input_ids": "uint16", "loss_mask": "uint8"}
    features = {name: datasets.Sequence(datasets.Value(kind)) for name, kind in columns.items()}
    began = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=path, split="train", cache_dir=cache)
    mapped = rows.map(
        MapTokenizer(),
        batched=True,
        remove_columns=["text"],
        features=datasets.Features(features),
        num_proc=workers if workers > 1 else None,
    )
    seconds = time.perf_counter() - began
    tokens = sum(len(row["input_ids"]) for row in mapped)
    print(json.dumps({"seconds": seconds, "tokens": tokens, **peaks()}))


def run_reference(path: str, num_bytes: int) -> None:
    """The Python tokenizer of the official runtime, in a loop over the first rows."""
    import rwkv
    from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

    vocabulary = Path(rwkv.__file__).parent / "rwkv_vocab_v20230424.txt"
    tokenizer = TRIE_TOKENIZER(str(vocabulary))
    done = tokens = 0
    began = time.perf_counter()
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            text = json.loads(line)["text"]
            tokens += len(tokenizer.encode(text)) + 1
            done += len(text.encode())
            if done >= num_bytes:
                break
    print(json.dumps({"seconds": time.perf_counter() - began, "tokens": tokens, "bytes": done, **peaks()}))


def peaks() -> dict[str, int]:
    """The largest memory of this process, and of the largest of its children, in bytes."""
    own, children = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {"peak_bytes": own * 1024, "peak_child_bytes": children * 1024}


def side(name: str, *arguments: object) -> dict[str, float]:
    """Run a side in a process of its own."""
    command = [sys.executable, __file__, "side", name, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measure_speed(megabytes: int, rounds: int) -> dict[str, object]:
    """Every source with 1 process and 2, `datasets.map` and the reference, in turn."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_bytes = megabytes * 10**6
        sources = write_inputs(folder, num_bytes)
        times: dict[str, list[dict[str, float]]] = {}
        for number in range(rounds):
            for source, (path, settings) in sources.items():
                for workers in (1, 2):
                    cache = folder / f"cache-{number}-{workers}-{source}".replace(" ", "_")
                    found = side("ours", path, settings.get("template", "text"), cache, workers)
                    times.setdefault(f"{source}, {workers} process{'es' * (workers > 1)}", []).append(found)
                    shutil.rmtree(cache)
            for workers in (1, 2):
                cache = folder / f"map-{number}-{workers}"
                found = side("map", sources["jsonl"][0], cache, workers)
                times.setdefault(f"datasets.map, jsonl, {workers} process{'es' * (workers > 1)}", []).append(found)
                shutil.rmtree(cache)
            times.setdefault("reference loop, jsonl", []).append(side("reference", sources["jsonl"][0], 4 * 10**6))
    plain = times["jsonl, 1 process"][0]["tokens"]
    assert times["datasets.map, jsonl, 1 process"][0]["tokens"] == plain, "not the same work"
    result: dict[str, object] = {}
    for label, found in times.items():
        speeds = [one.get("bytes", num_bytes) / 1e6 / one["seconds"] for one in found]
        result[label] = {
            "megabytes_per_second": round(statistics.median(speeds), 1),
            "all": [round(speed, 1) for speed in speeds],
            "tokens": found[0]["tokens"],
            "peak_megabytes": round(max(one["peak_bytes"] for one in found) / 1e6),
        }
        print(f"{label:34} {statistics.median(speeds):8.1f} MB/s   {speeds}", file=sys.stderr)
    return {"megabytes": megabytes, "rounds": rounds, "sides": result}


def measure_memory(gigabytes: list[float]) -> dict[str, object]:
    """Peak memory of preparing inputs of these sizes, and of opening them and reading at random."""
    result: dict[str, object] = {}
    for size in gigabytes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
                for text in texts_of(int(size * 1e9)):
                    file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            made = side("ours", folder / "rows.jsonl", "text", folder / "cache", 2)
            again = side("reading", folder / "rows.jsonl", folder / "cache")
        result[f"{size:g} GB"] = {
            "input_bytes": size * 1e9,
            "seconds": round(made["seconds"], 1),
            "megabytes_per_second": round(size * 1e3 / made["seconds"], 1),
            "peak_megabytes": round(made["peak_bytes"] / 1e6),
            "peak_megabytes_of_a_worker": round(made["peak_child_bytes"] / 1e6),
            **again,
        }
        print(json.dumps(result[f"{size:g} GB"]), file=sys.stderr)
    return result


def run_reading(path: str, cache: str) -> None:
    """Open a prepared set and read documents at random."""
    import numpy as np

    from infctx.data.load import SetSpec, load_sets
    from infctx.data.rows import RowRules
    from infctx.data.templates import make_template
    from infctx.data.tokenizer import WorldTokenizer

    spec = SetSpec(paths=(path,), template=make_template("text"), rules=RowRules(on_bad_row="skip"))
    began = time.perf_counter()
    documents = load_sets([spec], tokenizer=WorldTokenizer(), cache=Path(cache)).documents
    opened = time.perf_counter() - began
    places = np.random.default_rng(0).integers(0, len(documents), size=20_000).tolist()
    began = time.perf_counter()
    total = sum(int(documents[place].tokens[-1]) for place in places)
    microseconds = (time.perf_counter() - began) / len(places) * 1e6
    assert total == 0, "each ends in end of text"
    facts = {"open_seconds": round(opened, 3), "random_document_microseconds": round(microseconds, 1)}
    print(json.dumps({**facts, "documents": len(documents), "open_peak_megabytes": round(peaks()["peak_bytes"] / 1e6)}))


def measure_random(num_tokens: int) -> dict[str, object]:
    """Time to make a document at random, the files warm: 540 tokens on average, with four runs of weights."""
    import numpy as np

    from infctx.data.document_set import DocumentSet
    from infctx.data.token_store import INDEX_TYPE, TokenStore, open_store

    generator = np.random.default_rng(0)
    num_documents = num_tokens // 540
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "tokens.bin").open("wb") as file:
            for _ in range(100):
                generator.integers(1, 60_000, size=num_tokens // 100, dtype=np.uint16).tofile(file)
        num_tokens = num_tokens // 100 * 100
        index = np.zeros(num_documents, INDEX_TYPE)
        index["end"] = np.append(
            np.sort(generator.choice(num_tokens - 1, num_documents - 1, replace=False)) + 1, num_tokens
        )
        index["begin"][1:] = index["end"][:-1]
        inside = generator.integers(1, num_tokens, size=3 * num_documents)
        run_ends = np.unique(np.concatenate([index["end"], inside]))
        TokenStore(
            tokens=np.memmap(folder / "tokens.bin", dtype=np.uint16, mode="r"),
            run_ends=run_ends,
            run_weights=(np.arange(len(run_ends)) % 2).astype(np.float32),
            index=index,
        ).save(folder, {}, with_tokens=False)
        num_bytes = sum(path.stat().st_size for path in folder.iterdir())
        began = time.perf_counter()
        store, _ = open_store(folder)
        opened = time.perf_counter() - began
        documents = DocumentSet(
            stores=(store,),
            files=(("random",),),
            entries=store.index,
            set_indices=np.zeros(num_documents, np.uint8),
            set_names=("random",),
        )
        found = []
        for _ in range(5):
            places = generator.integers(0, num_documents, size=20_000).tolist()
            began = time.perf_counter()
            for place in places:
                documents[place]
            found.append((time.perf_counter() - began) / len(places) * 1e6)
    facts = {"open_milliseconds": round(opened * 1e3, 1), "microseconds": round(statistics.median(found), 1)}
    print(json.dumps(facts), file=sys.stderr)
    return {"tokens": num_tokens, "documents": num_documents, "bytes_of_files": num_bytes, **facts}


SIDES = {"ours": run_ours, "map": run_map, "reference": run_reference, "reading": run_reading}


def main() -> None:
    if sys.argv[1:2] == ["side"]:
        name, *arguments = sys.argv[2:]
        SIDES[name](*(int(argument) if argument.isdigit() else argument for argument in arguments))  # type: ignore[operator]
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "memory", "random"])
    parser.add_argument("--megabytes", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1, 4])
    parser.add_argument("--tokens", type=int, default=2_500_000_000)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.what == "speed":
        found = measure_speed(options.megabytes, options.rounds)
    elif options.what == "memory":
        found = measure_memory(options.gigabytes)
    else:
        found = measure_random(options.tokens)
    if options.output is not None:
        import torch

        from infctx.bench.machine import commit, machine_facts

        before = json.loads(options.output.read_text()) if options.output.exists() else {}
        facts = {"machine": machine_facts(torch.device("cpu")), "commit": commit()}
        options.output.write_text(json.dumps({**before, options.what: found, **facts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
