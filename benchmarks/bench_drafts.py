"""Tokens/s with drafts against without, where the text is given: docstrings of the installed transformers.

The model computes (30M, random weights); which token comes is the text's, so what is measured is how often drafts hold on
that text and what a step of several rows costs. Of every 20th module some texts of 256 tokens are said, in chunks of 32 with the two
best neighbors of 64 tokens that BM25 finds in the other modules; one at a time, and four together. TEXTS sets how many of a
kind. Takes about three minutes on two cores.
"""

import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from texts import docstrings

from retro_engine.bench.contestants import SHAPES
from retro_engine.bench.frame import Measured, Options, Spread, at_least, compared
from retro_engine.config import preset_model
from retro_engine.data.batches import Sequences
from retro_engine.data.neighbor_table import NeighborTable, find_table
from retro_engine.data.prepare import prepare
from retro_engine.data.store import Store
from retro_engine.generate import drafts
from retro_engine.generate.decoding_batch import DecodingBatch
from retro_engine.generate.generator import Generator
from retro_engine.generate.request import Request
from retro_engine.generate.sequence import DecodingSequence, stacked
from retro_engine.model.quantize import use_weights
from retro_engine.model.retro import RetroModel
from retro_engine.retrieval.hit import Found
from retro_engine.retrieval.neighbors import build_neighbors
from retro_engine.retrieval.overlap import chunk_overlaps

TEXTS, TOGETHER = int(os.environ.get("TEXTS", 12)), 4
HELD_OUT, VOCABULARY = 20, 4096
M, K, R, CHUNKS = 32, 2, 64, 8
LEAST = {"held-out text": 1.5, "overlap above .3": 2.5, "no overlap": 0.97}  # tokens/s with drafts against without
NEVER_SLOWER = 0.97
Text = tuple[list[int], list[Found]]  # tokens of whole chunks, and the neighbors of each


def run(options: Options) -> Measured:
    drafts.MOST_SEQUENCES = TOGETHER  # to see what it would cost
    measured = Measured([])
    with tempfile.TemporaryDirectory() as folder:
        store, kinds = texts_of(Path(folder))
        for weights in ("fp32", "int8"):
            model = make_model(store.vocab_size, weights)
            generators = {
                name: Generator(model, store.tokenizer, drafts=name == "with") for name in ("with", "without")
            }
            for kind, texts in kinds.items():
                alone = [[text] for text in texts]
                measure(measured, generators, case=f"{weights}, {kind}", batches=alone, together=1, least=LEAST[kind])
                measure(
                    measured,
                    generators,
                    case=f"{weights}, {kind}, {TOGETHER} together",
                    batches=[texts],
                    together=TOGETHER,
                    least=NEVER_SLOWER,
                )
    return measured


def measure(
    measured: Measured,
    generators: dict[str, Generator],
    case: str,
    batches: list[list[Text]],
    together: int,
    least: float,
) -> None:
    """Each batch by both in turns, after one that is not counted; neighbors are kept."""
    for generator in generators.values():
        for _, chunks in sum(batches, []):
            keep(generator, chunks)
    times: dict[str, list[float]] = {name: [] for name in generators}
    steps = dict.fromkeys(generators, 0)
    for batch in (batches[0], *batches):
        for name, generator in generators.items():
            start = time.perf_counter()
            count = say(generator, batch, together)
            times[name].append(time.perf_counter() - start)
            steps[name] += count
    rows = compared(case, {name: Spread.of(each[1:]) for name, each in times.items()}, ours=["with"])
    ratio = sum(times["without"][1:]) / sum(times["with"][1:])  # of all texts; the rows have the median one
    rows[0].ratios = {"without": ratio}
    rows[0].note = f"{steps['without'] / steps['with']:.2f} times as many tokens a step"
    measured.rows += rows
    measured.targets.append(at_least(f"{case}: tokens/s with drafts against without", ratio, least))


def make_model(vocabulary: int, weights: str) -> RetroModel:
    shape = SHAPES["30M"]
    config = preset_model(
        "base", vocab_size=vocabulary, hidden_size=shape.width, ffn_hidden_size=4 * shape.width, num_attention_heads=shape.heads,
        dec_num_layers=shape.layers, dec_cross_attention=shape.cross_layers, enc_num_layers=2, enc_cross_attention=[],
        chunk_size=M, num_neighbors=K, retrieved_length=R, encoder_seq_length=CHUNKS * M,
    )  # fmt: skip
    return use_weights(RetroModel(config, torch.Generator().manual_seed(0)).eval(), weights)


def say(generator: Generator, texts: list[Text], together: int) -> int:
    """Make the model say texts after their first chunks, some together, the next when one has ended; the steps it took."""
    batch = DecodingBatch(
        generator.model, pad_id=0, size=together, capacity=CHUNKS * M, neighbor_tokens=K * R, encodings=generator.encodings
    )  # fmt: skip
    given: dict[DecodingSequence, Text] = {}
    waiting, steps = list(texts), 0
    while waiting or batch.decoding:
        while waiting and len(batch.decoding) < together:
            tokens, chunks = waiting.pop(0)
            sequence = generator.open(Request(tokens[:M], len(tokens) - M))
            sequence.is_reading = True
            given[sequence] = tokens, chunks
            batch.join(sequence, chunks[:1])
            logits = batch.take_in()
            assert logits is not None
            batch.settle()
            sequence.accept(said(tokens[M : M + 1], len(logits))[0])
        found = {s: given[s][1][len(s.tokens) // M - 1] for s in batch.decoding if s.completes()}
        for sequence, logits_TV in zip(list(batch.decoding), batch.step(found)):
            place = len(sequence.tokens)
            batch.accepted(sequence, said(given[sequence][0][place : place + len(logits_TV)], logits_TV.shape[1]))
            if sequence.finish_reason is not None:
                assert sequence.tokens == given[sequence][0]
                batch.leave(sequence)
        steps += 1
    return steps


def keep(generator: Generator, chunks: list[Found]) -> None:
    """Encode the neighbors of a text."""
    assert generator.encodings is not None
    tokens, lengths = (part.flatten(0, 1) for part in stacked(chunks, 0, torch.device("cpu")))
    generator.encodings.of(tokens[lengths > 0], lengths[lengths > 0])


def said(tokens: list[int], vocabulary: int) -> torch.Tensor:
    """Logits that choose these tokens."""
    return torch.nn.functional.one_hot(torch.tensor(tokens), vocabulary).float()


def texts_of(folder: Path) -> tuple[Store, dict[str, list[Text]]]:
    """Of every HELD_OUT-th module, with neighbors from all others."""
    rows = list(docstrings("transformers"))
    held_out = rows[::HELD_OUT]
    database = _store(folder / "others", [row for number, row in enumerate(rows) if number % HELD_OUT], "auto")
    store = _store(folder / "held-out", held_out, str(database.folder))
    build_neighbors(store, [database], "bm25", num_neighbors=K)
    table = NeighborTable(find_table(store, None), store)
    sequences = Sequences(
        store,
        np.arange(store.num_documents),
        sequence_length=CHUNKS * M,
        table=table,
        num_neighbors=K,
        retrieved_length=R,
    )
    found: dict[str, list[Text]] = {kind: [] for kind in LEAST}
    for rows_BL in np.random.default_rng(0).permutation(sequences.in_order())[:, None]:
        batch = sequences.batch(rows_BL)
        assert batch.neighbors is not None and batch.lengths is not None
        tokens, overlaps = batch.tokens[0].tolist(), chunk_overlaps(batch, M)[0, :-1]
        if (batch.document_ids[0] != batch.document_ids[0][0]).any() or {*store.tokenizer.end_ids} & {*tokens}:
            continue
        chunks = [Found(read, lengths, []) for read, lengths in zip(batch.neighbors[0], batch.lengths[0])]
        kinds = {"held-out text": True, "overlap above .3": overlaps.min() > 0.3, "no overlap": overlaps.max() == 0}
        for kind in LEAST:
            if kinds[kind] and len(found[kind]) < TEXTS:
                found[kind].append((tokens, chunks))
    return store, found


def _store(folder: Path, rows: list[dict[str, str]], tokenizer: str) -> Store:
    folder.mkdir()
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    size = VOCABULARY if tokenizer == "auto" else None
    return prepare([text], folder / "store", tokenizer, vocab_size=size, chunk_size=M)
