"""`bench decode`: a prompt of 256 tokens and 256 new ones, neighbors given, batch 1 and 8: ours against the peers.

Ours and GPT-2 keep keys and values; the peers compute the whole sequence again at every token, which is timed at 16
lengths spread over the 256 and summed up, because all of them take minutes. `gb_s` is the weights read once per new token,
over the time beyond the prompt's, new neighbors' encoding included; its share is that of the rate at which this processor reads
memory, measured in the same run. Retrieval is timed apart: one BM25 search of a chunk, which every 64 tokens take.
"""

import mmap
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from retro_engine.bench import peers
from retro_engine.bench.frame import Row, time_in_turns
from retro_engine.bench.peers import RETRO_PEERS, SHAPES, Contestant, Inputs, M

PROMPT, NEW, LENGTHS = 256, 256, 16
CPU = torch.device("cpu")


def run(sizes: list[str], batches: tuple[int, ...] = (1, 8), names: list[str] | None = None) -> list[Row]:
    names = peers.present(peers.chosen(names, peers.DECODERS) or list(peers.DECODERS))
    rows = [_retrieval()]
    for size in sizes:
        rows += _size(size, names, batches)
    return rows


def read_gb_s() -> float:
    """How fast this processor reads memory, over 256 MiB (in large pages, where there are any, as our weights are)."""
    memory = mmap.mmap(-1, 1 << 28)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    source = torch.frombuffer(memory, dtype=torch.float32).fill_(1.0)
    return 1e-9 * 4 * source.numel() / time_in_turns({"read": source.sum}, CPU, 9)["read"][1]


def _size(size: str, names: list[str], batches: tuple[int, ...]) -> list[Row]:
    shape, rows, ceiling = SHAPES[size], [], read_gb_s()
    contestants = [Contestant(name, shape, torch.get_num_threads()) for name in names]
    try:
        for batch in batches:
            inputs = Inputs.draw(replace(shape, batch=batch, length=PROMPT + NEW))
            times = {contestant.name: _seconds(contestant, inputs) for contestant in contestants}
            for contestant in contestants:
                low, median, high = times[contestant.name]
                row = Row("decode", f"decode {size}, batch {batch}", contestant.name, median, low, high)
                row.note = f"{batch * NEW / median:.1f} tokens/s"
                if contestant.name not in RETRO_PEERS:
                    first = statistics.median(_decode(contestant, inputs, 1) for _ in range(3))
                    step = (median - first) / (NEW - 1)
                    row.gb_s, row.bound = 1e-9 * contestant.weight_bytes / step, "reading memory"
                    row.ceiling_share = row.gb_s / ceiling
                    row.note += f", prompt {first:.3f} s, then {1e3 * step:.2f} ms a step"
                row.ratios = {name: t[1] / median for name, t in times.items() if name != contestant.name}
                rows.append(row)
    finally:
        for contestant in contestants:
            contestant.close()
    return rows


def _seconds(contestant: Contestant, inputs: Inputs) -> tuple[float, float, float]:
    """20 %, median and 80 % of three times; of peers one, summed up from LENGTHS lengths."""
    if contestant.name in RETRO_PEERS:
        lengths = range(PROMPT, PROMPT + NEW, NEW // LENGTHS)
        contestant.decode(inputs.tokens[:, :PROMPT], inputs.neighbors, 1)
        total = sum(contestant.decode(inputs.tokens[:, :length], inputs.neighbors, 1) for length in lengths)
        return (total * NEW / LENGTHS,) * 3
    _decode(contestant, inputs, M)
    times = sorted(_decode(contestant, inputs, NEW) for _ in range(3))
    return times[0], times[1], times[2]


def _decode(contestant: Contestant, inputs: Inputs, new: int) -> float:
    """Seconds of the prompt and `new` tokens."""
    return contestant.decode(inputs.tokens[:, :PROMPT], inputs.neighbors, new)


def _retrieval() -> Row:
    """One chunk's neighbors from a store of generated facts."""
    from retro_engine.data.builtin import write_facts
    from retro_engine.data.prepare import prepare
    from retro_engine.retrieval.lexical import Bm25Index

    with tempfile.TemporaryDirectory() as folder:
        paths = write_facts(Path(folder), 1500, 10)
        store = prepare([paths["train"], paths["notes"]], Path(folder) / "store", chunk_size=M)
        index = Bm25Index.build(store, Path(folder) / "index")
        texts = next(iter(store.texts()))[:65]
        times = []
        for text in texts:
            start = time.perf_counter()
            index.search([text], peers.K)
            times.append(time.perf_counter() - start)
        low, *_, high = statistics.quantiles(times[1:], n=5)
        case = f"retrieval, {store.num_rows:,} chunks"
        return Row("decode", case, "BM25", statistics.median(times[1:]), low, high, note=f"a chunk, every {M} tokens")
