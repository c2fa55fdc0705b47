"""What grows with the text: opening a store and packing its epoch, BM25 tables, preparing on two processes, and the peak of a
validation against that of a training step.

All text is synthetic. RETRO_CHUNKS sets the chunks of the store (2 million by default; the target is of 50 million, which
take some 2 GB of disk), RETRO_BM25 those of the smaller of two collections for BM25, of which the other has ten times as
many (45,000 by default; the targets are of 450,000, which take 8 GB of memory), RETRO_TEXT the MB that are prepared (64).
What is measured of memory and descriptors is of processes of their own: `bench_scale.py PART FOLDER`.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from retro_engine.bench.frame import Measured, Options, Row, at_least, at_most, compared, time_in_turns
from retro_engine.bench.machine import forget_peak, resident_mib
from retro_engine.config import load_config
from retro_engine.data.batches import Order, Sequences
from retro_engine.data.store import Store, StoreWriter
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.evaluate.perplexity import evaluate
from retro_engine.jit import numba
from retro_engine.model.retro import RetroModel
from retro_engine.retrieval.bm25 import best, idf
from retro_engine.retrieval.bm25_search import search

CHUNKS = int(os.environ.get("RETRO_CHUNKS", 2_000_000))
SMALLER = int(os.environ.get("RETRO_BM25", 45_000))
TEXT_MB = int(os.environ.get("RETRO_TEXT", 64))
DESCRIPTORS = 256
WORDS = 37  # of a chunk, about as many as differ in 64 tokens
DOCUMENT = 12  # chunks
QUERIES, K = 500, 60  # chunks of a table's stretch; results for 20 neighbors without overlaps
VOCABULARY = 32_768


def run(options: Options) -> Measured:
    measured = Measured([], facts={"chunks": CHUNKS, "bm25": [SMALLER, 10 * SMALLER], "text_mb": TEXT_MB})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_store(folder / "large", CHUNKS)
        found = part("store", folder / "large")
        add(measured, f"{CHUNKS:,} chunks, opened", found["opened_s"], f"{found['descriptors']} descriptors open")
        add(measured, f"{CHUNKS:,} chunks, an epoch packed", found["packed_s"], f"{found['sequences']:,} sequences")
        measured.rows[0].peak_mib, measured.rows[1].peak_mib = found["opened_mib"], found["packed_mib"]
        measured.targets += [
            at_most(f"s to open {CHUNKS:,} chunks at {DESCRIPTORS} descriptors", found["opened_s"], 2),
            at_most("MiB at most until it is open", found["opened_mib"], 1024),
            at_most("s to pack its epoch", found["packed_s"], 20),
        ]
        found = part("peaks", folder / "small")
        for what in ("training step", "validation"):
            add(measured, f"peak of a {what}", found[f"{what} s"], f"{found[what]:.0f} MiB more than before")
        ratio = found["validation"] / found["training step"]
        measured.targets.append(at_most("peak of a validation, of a training step's", ratio, 1))
        measure_prepare(measured, folder)
    measure_bm25(measured)
    return measured


def add(measured: Measured, case: str, seconds: float, note: str) -> None:
    measured.rows.append(
        Row(case=case, implementation="ours", median_s=seconds, low_s=seconds, high_s=seconds, note=note)
    )


def part(name: str, folder: Path) -> dict[str, float]:
    """What a process of its own measures."""
    ran = subprocess.run([sys.executable, __file__, name, str(folder)], stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(ran.stdout.splitlines()[-1]))


def write_store(folder: Path, chunks: int, chunk_size: int = 4) -> None:
    """Documents of 1 to 23 chunks, all of them full."""
    rng = np.random.default_rng(0)
    with_end = StoreWriter(folder, Tokenizer.train(["x"], 300), chunk_size)
    left = chunks
    while left:
        rows = min(left, int(rng.integers(1, 24)))
        with_end.add_tokens((str(left), ""), np.full(rows * chunk_size, 5), rows * chunk_size, left)
        left -= rows
    with_end.close()


def store_part(folder: Path) -> dict[str, float]:
    """Open a store with few descriptors, and pack an epoch of it."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
    forget_peak()
    before, start = resident_mib(), time.perf_counter()
    store = Store(folder)
    documents = np.arange(len(store.documents))
    opened_s, opened_mib = time.perf_counter() - start, resident_mib(is_peak=True) - before
    descriptors = len(os.listdir("/proc/self/fd"))
    start = time.perf_counter()
    sequences = Sequences(store, documents, 32 * store.chunk_size)
    count = len(sequences.epoch(Order(1), 0))
    packed_s, packed_mib = time.perf_counter() - start, resident_mib(is_peak=True) - before
    return {"opened_s": opened_s, "opened_mib": opened_mib, "descriptors": descriptors, "packed_s": packed_s,
            "packed_mib": packed_mib, "sequences": count}  # fmt: skip


def peaks_part(folder: Path) -> dict[str, float]:
    """MiB that a training step and a validation of as many sequences take at most."""
    write_store(folder, 4096, 64)
    store = Store(folder)
    sequences = Sequences(store, np.arange(store.num_documents), 512)
    config = load_config([
        "model.hidden_size=128", "model.ffn_hidden_size=256", "model.num_attention_heads=2", "model.dec_num_layers=2",
        "model.retrieval=false", "model.encoder_seq_length=512", f"model.vocab_size={VOCABULARY}",
    ])  # fmt: skip
    model = RetroModel(config.model)
    token_bytes = np.ones(VOCABULARY, np.int64)

    def step() -> None:
        batch = sequences.training_batch(0, 8, Order(1))
        tokens, labels = torch.from_numpy(batch.tokens), torch.from_numpy(batch.labels)
        documents = torch.from_numpy(batch.document_ids)
        model(tokens, None, None, documents, labels, None).backward()
        model.zero_grad()

    works = {
        "training step": step,
        "validation": lambda: evaluate(model, sequences, token_bytes, ("off",), batch_size=8, limit=1),
    }
    found = {}
    for name, work in works.items():
        work()
        forget_peak()
        before, start = resident_mib(), time.perf_counter()
        work()
        found[name], found[f"{name} s"] = resident_mib(is_peak=True) - before, time.perf_counter() - start
    return found


def measure_prepare(measured: Measured, folder: Path) -> None:
    """`retro prepare` with one process and with two, each of one thread; starting them is in the time."""
    rng = np.random.default_rng(1)
    words = ["".join(chr(97 + letter) for letter in rng.integers(0, 26, rng.integers(2, 10))) for _ in range(20_000)]
    text, tokenizer = folder / "c.jsonl", folder / "tokenizer.json"
    with open(text, "w") as file:
        while file.tell() < TEXT_MB << 20:
            drawn = (len(words) * rng.random(150_000) ** 3).astype(int)
            documents = [" ".join(words[number] for number in drawn[at : at + 150]) for at in range(0, len(drawn), 150)]
            file.writelines(json.dumps({"text": document}) + "\n" for document in documents)
    tokenizer.write_text(Tokenizer.train(documents[:200], 4096).json)
    stores: dict[str, str] = {}

    def work(workers: str) -> None:
        out = tempfile.mkdtemp(dir=folder) + "/s"
        command = [sys.executable, "-m", "retro_engine.cli", "prepare", str(text), "--out", out, "--workers", workers]
        environment = os.environ | {"RAYON_NUM_THREADS": "1"}
        subprocess.run([*command, "--tokenizer", str(tokenizer), "--quiet"], check=True, env=environment)
        stores[workers] = Store(out).fingerprint

    times = time_in_turns({"one process": lambda: work("1"), "two processes": lambda: work("2")}, rounds=3)
    assert stores["1"] == stores["2"], "the stores differ"
    rows = compared(f"preparing {TEXT_MB} MB", times, ours=["two processes"])
    measured.rows += rows
    measured.targets.append(at_least("two processes of prepare against one", rows[1].ratios["one process"], 1.8))


def measure_bm25(measured: Measured) -> None:
    """A table's chunks, against adding up every list whole; and the same for ten times as many chunks."""
    smaller, larger = (compare_bm25(measured, chunks) for chunks in (SMALLER, 10 * SMALLER))
    measured.targets += [
        at_least(f"BM25 tables, {10 * SMALLER:,} chunks: exhaustive / ours", larger.ratios["exhaustive"], 3),
        at_most(f"time of a query, {10 * SMALLER:,} against {SMALLER:,} chunks", larger.median_s / smaller.median_s, 2),
    ]


def compare_bm25(measured: Measured, chunks: int) -> Row:
    """Raises AssertionError where the hits differ."""
    ends, postings, own = synthetic_queries(chunks)
    contents = (np.arange(chunks) // DOCUMENT).astype(np.int32)
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    highest = float(postings[-1].max())
    works = {
        "ours": lambda: found.update(
            ours=search(ends, postings, highest=highest, contents=contents, own=own, num_chunks=chunks, k=K, workers=1)
        ),
        "exhaustive": lambda: found.update(all=exhaustive(ends, postings, contents, own, chunks)),
    }
    rows = compared(f"{QUERIES} chunks among {chunks:,}", time_in_turns(works, rounds=3))
    assert all(np.array_equal(*pair) for pair in zip(found["ours"], found["all"])), "other hits"
    for row in rows:
        row.note = f"{QUERIES / row.median_s:,.0f} chunks/s"
    measured.rows += rows
    return rows[0]


def synthetic_queries(chunks: int) -> tuple[np.ndarray, tuple[np.ndarray, ...], np.ndarray]:
    """Runs of ten chunks as queries. Of their words 45 % are of all text (Zipf), 30 % of a topic of some 40 documents, 25 % of
    their document, which repeats them; topics, and with them words, are more where there is more text.
    """
    rng = np.random.default_rng(0)
    share = 1 / (np.arange(30_000) + 3.7)
    zipf = np.cumsum(share) / share.sum()
    documents = np.arange(chunks)[:, None] // DOCUMENT
    topics = max(1, chunks // DOCUMENT // 40)
    kind = rng.random((chunks, WORDS + 3))
    common = np.searchsorted(zipf, rng.random(kind.shape))
    words = documents * 2_654_435_761 % topics * 1_000_003 + (300 * rng.random(kind.shape) ** 2).astype(np.int64) * 7919
    of_topic = len(zipf) + words * 2_654_435_761 % (1 << 40) % (2000 + int(20 * topics**0.8))
    words = documents * 7_368_787 + (60 * rng.random(kind.shape) ** 2).astype(np.int64) * 104_729
    own = np.searchsorted(zipf, words * 2_654_435_761 % (1 << 40) % 1_000_003 / 1_000_003)
    drawn = np.sort(np.where(kind < 0.45, common, np.where(kind < 0.75, of_topic, own)), 1)
    is_new = np.diff(drawn, axis=1, prepend=-1) != 0
    places = np.flatnonzero(is_new)
    counts = np.diff(places, append=drawn.size)
    terms, of_chunk = drawn.reshape(-1)[places], (places // drawn.shape[1]).astype(np.int32)
    order = np.argsort(terms, kind="stable")
    known, firsts, frequencies = np.unique(terms[order], return_index=True, return_counts=True)
    scores = np.repeat(idf(frequencies, chunks), frequencies) * counts[order] / (counts[order] + 1.5)
    begins = np.append(0, np.cumsum(is_new.sum(1)))
    asked = (rng.integers(0, chunks - 10, QUERIES // 10)[:, None] + np.arange(10)).reshape(-1)
    held = np.searchsorted(known, np.concatenate([terms[begins[row] : begins[row + 1]] for row in asked]))
    ends, lasts = np.cumsum(begins[asked + 1] - begins[asked]), firsts + frequencies
    weights = np.ones(len(held), np.float32)
    postings = firsts[held], lasts[held], weights, of_chunk[order], scores.astype(np.float32)
    return ends, postings, (asked // DOCUMENT).astype(np.int32)


def exhaustive(
    ends: np.ndarray, postings: tuple[np.ndarray, ...], contents: np.ndarray, own: np.ndarray, chunks: int
) -> tuple[np.ndarray, np.ndarray]:
    """Every list added up whole, one after the other."""
    firsts, lasts, _, of_chunk, scores = postings
    ids, kept = np.empty((len(ends), K), np.int64), np.empty((len(ends), K), np.float32)
    total = np.zeros(chunks, np.float32)
    for query, (begin, end) in enumerate(zip(np.append(0, ends), ends)):
        total[:] = 0
        _add_lists(firsts[begin:end], lasts[begin:end], of_chunk, scores, total)
        total[contents == own[query]] = 0
        ids[query], kept[query] = best(total, K)
    return ids, kept


@numba.njit(nogil=True, cache=True)
def _add_lists(firsts, lasts, chunks, scores, total):  # type: ignore[no-untyped-def]
    for term in range(len(firsts)):
        for entry in range(firsts[term], lasts[term]):
            total[chunks[entry]] += scores[entry]


if __name__ == "__main__":
    print(json.dumps({"store": store_part, "peaks": peaks_part}[sys.argv[1]](Path(sys.argv[2]))))
