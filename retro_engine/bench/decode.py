"""`bench decode`: a prompt of 256 tokens and 256 new ones, neighbors given, batch 1 and 8: ours against the peers.

Ours and GPT-2 keep keys and values; the peers compute the whole sequence again at every token, and so does ours without
its cache, which is timed at 16 lengths spread over the 256 and summed up, because all of them take minutes. `gb_s` is the
weights read once per new token, over the time beyond the prompt's, new neighbors' encoding included; its share is that of
the rate at which this processor reads memory, measured in the same run. Retrieval is timed apart: one BM25 search of a
chunk, which every 64 tokens take. Then ours with 16, 17 and 32 rows, and beside a busy process (crowded.py).
"""

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from retro_engine.bench import contestants, crowded
from retro_engine.bench.ceilings import read_gb_s
from retro_engine.bench.contestants import DECODERS, RECOMPUTED, RETRO_PEERS, SHAPES, Contestant, Inputs, M
from retro_engine.bench.frame import Measured, Options, Row, Spread, Target, at_least, compared

PROMPT, NEW, LENGTHS = 256, 256, 16
PEOPLE = 1500  # whose facts retrieval searches
RECOMPUTING = (RECOMPUTED, *RETRO_PEERS)


def run(options: Options, batches: tuple[int, ...] = (1, 8)) -> Measured:
    names = contestants.present(contestants.chosen(options.implementations, DECODERS) or list(DECODERS))
    measured = Measured([_retrieval()])
    for size in options.sizes:
        ceiling = read_gb_s()
        with contestants.started(names, SHAPES[size]) as started:
            for batch in batches:
                rows = _batch(size, batch, started, ceiling)
                measured.rows += rows
                measured.targets += targets(size, batch, rows)
        if "ours" in names:
            rows, found = crowded.run(size, torch.get_num_threads())
            measured.rows += rows
            measured.targets += found
    return measured


def _batch(size: str, batch: int, started: list[Contestant], ceiling: float) -> list[Row]:
    inputs = Inputs.draw(replace(SHAPES[size], batch=batch, length=PROMPT + NEW))
    times = {contestant.name: _seconds(contestant, inputs) for contestant in started}
    rows = compared(f"decode {size}, batch {batch}", times, ours=times)
    for row, contestant in zip(rows, started):
        row.note = f"{batch * NEW / row.median_s:.1f} tokens/s"
        if contestant.name not in RECOMPUTING:
            first = statistics.median(_decode(contestant, inputs, 1) for _ in range(3))
            step = (row.median_s - first) / (NEW - 1)
            row.gb_s, row.bound = 1e-9 * contestant.weight_bytes / step, "reading memory"
            row.ceiling_share = row.gb_s / ceiling
            row.note += f", prompt {first:.3f} s, then {1e3 * step:.2f} ms a step"
    return rows


def targets(size: str, batch: int, rows: list[Row]) -> list[Target]:
    """Of docs/performance-log.md."""
    found = {row.implementation: row for row in rows}
    if "ours" not in found:
        return []
    ours, case = found["ours"], rows[0].case
    fastest = min((ours.ratios[name] for name in RETRO_PEERS if name in found), default=None)
    out = [
        at_least(f"{case}: times as fast as the faster peer", fastest, 40 if batch == 1 else 150),
        at_least(f"{case}: times as fast as GPT-2 with its cache", ours.ratios.get("gpt2"), 1),
        at_least(f"{case}: times as fast as without the cache", ours.ratios.get(RECOMPUTED), 20),
    ]
    if size == "120M" and batch == 1:
        out.append(at_least(f"{case}: share of the rate of reading", ours.ceiling_share, 0.8))
    return out


def _seconds(contestant: Contestant, inputs: Inputs) -> Spread:
    """Of three times; of those that compute everything again one, summed up from LENGTHS lengths."""
    if contestant.name in RECOMPUTING:
        lengths = range(PROMPT, PROMPT + NEW, NEW // LENGTHS)
        contestant.decode(inputs.tokens[:, :PROMPT], inputs.neighbors, 1)
        total = sum(contestant.decode(inputs.tokens[:, :length], inputs.neighbors, 1) for length in lengths)
        return Spread.of([total * NEW / LENGTHS])
    _decode(contestant, inputs, M)
    return Spread.of([_decode(contestant, inputs, NEW) for _ in range(3)])


def _decode(contestant: Contestant, inputs: Inputs, new: int) -> float:
    """Seconds of the prompt and `new` tokens."""
    return contestant.decode(inputs.tokens[:, :PROMPT], inputs.neighbors, new)


def _retrieval() -> Row:
    """One chunk's neighbors from a store of generated facts."""
    from retro_engine.data.builtin import write_facts
    from retro_engine.data.prepare import prepare
    from retro_engine.retrieval.lexical import Bm25Index

    with tempfile.TemporaryDirectory() as folder:
        paths = write_facts(Path(folder), PEOPLE, 10)
        store = prepare([paths["train"], paths["notes"]], Path(folder) / "store", chunk_size=M)
        index = Bm25Index.build(store, Path(folder) / "index")
        texts = next(iter(store.texts()))[:65]
        times = []
        for text in texts:
            start = time.perf_counter()
            index.search([text], contestants.K)
            times.append(time.perf_counter() - start)
        (row,) = compared(f"retrieval, {store.num_rows:,} chunks", {"BM25": Spread.of(times[1:])})
        row.note = f"a chunk, every {M} tokens"
        return row
