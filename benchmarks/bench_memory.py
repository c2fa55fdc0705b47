"""Does the memory of every stage from text to neighbors stay as it is over four times the data?

Peak resident memory without file pages, looked at every 2 ms, with shards of 8,192 chunks; each stage is a process.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from retro_engine.bench.frame import Measured, Options, Row, at_most
from retro_engine.data.builtin import write_facts
from retro_engine.data.prepare import prepare

STAGES = {  # in this order: neighbors are searched in the index before
    "prepare": ["prepare", "{text}", "--out", "{folder}/prepared"],
    "embed (hash)": ["embed", "{folder}/store", "--retriever", "hash"],
    "index (BM25)": ["index", "{folder}/store", "--retriever", "bm25"],
    "index (hash, IVF256,SQ8)": ["index", "{folder}/store", "--retriever", "hash", "--faiss", "IVF256,SQ8"],
    "neighbors (BM25)": ["neighbors", "{folder}/store", "--k", "4"],
}
TEXT_REPEATED = 8  # of what `prepare` reads: it is done with the facts alone too soon
WATCHED = """
import sys, threading, time
from retro_engine.cli import main
from retro_engine.retrieval import index, lexical, neighbors, vectors
lexical.BLOCK_ROWS = vectors.SHARD_ROWS = neighbors.SHARD_ROWS = 8192; lexical.MERGE_POSTINGS = 1 << 18
index.TRAIN_FLAT = 10240
peak = 0
def watch():
    global peak
    while True:
        now = next(x for x in open("/proc/self/status") if x.startswith("RssAnon"))
        peak = max(peak, int(now.split()[1])); time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
code = main([*sys.argv[1:], "--quiet"])
print(peak)
sys.exit(code)
"""


def run(options: Options) -> Measured:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for copies in (1, 4):
            folder = Path(name) / str(copies)
            folder.mkdir()
            facts = write_facts(folder, 6000 * copies, 10)["train"]
            text = folder / "text.jsonl"
            text.write_text(facts.read_text() * TEXT_REPEATED)
            store = prepare([facts], folder / "store", vocab_size=2000, chunk_size=16)
            for stage, words in STAGES.items():
                command = [word.format(text=text, folder=folder) for word in words]
                rows.append(_watched(stage, command, copies, store.num_rows))
    peaks = {(row.case, row.implementation): row.peak_mib or 0 for row in rows}
    grown = peaks["prepare", "4x"] / peaks["prepare", "1x"]
    return Measured(rows, [at_most("prepare: peak memory over four times the text", grown, 1.1)])


def _watched(stage: str, command: list[str], copies: int, num_chunks: int) -> Row:
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", WATCHED, *command], check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - start
    peak_mib = int(done.stdout.split()[-1]) / 1024
    row = Row(case=stage, implementation=f"{copies}x", median_s=seconds, low_s=seconds, high_s=seconds)
    row.peak_mib, row.note = peak_mib, f"{num_chunks:,} chunks, peak {peak_mib:.0f} MiB"
    return row
