"""Tokens/s with drafts against without, where the text is given: docstrings of the installed transformers.

The model computes (30M, random weights); which token comes is the text's, so what is measured is how often drafts hold on
that text and what a step of several rows costs. Neighbors are BM25's from the training share, two of 64 tokens a chunk of
32, as docs/results.md has them. SEQUENCES sets how many texts of a kind.
"""

import json
import os
import tempfile
from functools import partial
from pathlib import Path

import torch
from texts import docstrings

from retro_engine.bench.contestants import SHAPES
from retro_engine.bench.frame import Measured, Options, at_least, compared, time_in_turns
from retro_engine.config import preset_model
from retro_engine.data.batches import Sequences, split_documents
from retro_engine.data.neighbor_table import NeighborTable, find_table
from retro_engine.data.prepare import prepare
from retro_engine.data.store import Store
from retro_engine.generate.decoding_batch import DecodingBatch
from retro_engine.generate.generator import Generator
from retro_engine.generate.request import Request
from retro_engine.model.quantize import use_weights
from retro_engine.model.retro import RetroModel
from retro_engine.retrieval.hit import Found
from retro_engine.retrieval.neighbors import build_neighbors
from retro_engine.retrieval.overlap import chunk_overlaps

SEQUENCES = int(os.environ.get("SEQUENCES", 12))
M, K, R, CHUNKS = 32, 2, 64, 8
LEAST = {"held-out text": 1.5, "overlap above .3": 2.5, "no overlap": 0.97}  # tokens/s with drafts against without
Text = tuple[list[int], list[Found]]  # tokens of whole chunks, and the neighbors of each


def run(options: Options) -> Measured:
    measured = Measured([])
    with tempfile.TemporaryDirectory() as folder:
        store, kinds = texts_of(Path(folder))
        for weights in ("fp32", "int8"):
            model = make_model(store.vocab_size, weights)
            for kind, texts in kinds.items():
                measure(measured, {name: Generator(model, store.tokenizer, drafts=name == "with") for name in ("with", "without")}, f"{weights}, {kind}", texts, LEAST[kind])  # fmt: skip
    return measured


def measure(measured: Measured, generators: dict[str, Generator], case: str, texts: list[Text], least: float) -> None:
    counts: dict[str, list[int]] = {name: [] for name in generators}

    def say_all(name: str) -> None:
        counts[name] = [say(generators[name], *text) for text in texts]

    works = {name: partial(say_all, name) for name in generators}
    rows = compared(case, time_in_turns(works, rounds=3), ours=["with"])
    rows[0].note = f"{sum(counts['without']) / sum(counts['with']):.2f} tokens a step"
    measured.rows += rows
    measured.targets.append(at_least(f"{case}: tokens/s with drafts against without", rows[0].ratios["without"], least))


def make_model(vocabulary: int, weights: str) -> RetroModel:
    shape = SHAPES["30M"]
    config = preset_model(
        "base", vocab_size=vocabulary, hidden_size=shape.width, ffn_hidden_size=4 * shape.width, num_attention_heads=shape.heads,
        dec_num_layers=shape.layers, dec_cross_attention=shape.cross_layers, enc_num_layers=2, enc_cross_attention=[],
        chunk_size=M, num_neighbors=K, retrieved_length=R, encoder_seq_length=CHUNKS * M,
    )  # fmt: skip
    return use_weights(RetroModel(config, torch.Generator().manual_seed(0)).eval(), weights)


def say(generator: Generator, tokens: list[int], chunks: list[Found]) -> int:
    """Make the model say a text after its first chunk; the steps it took."""
    model, steps = generator.model, 0
    sequence = generator.open(Request(tokens[:M], len(tokens) - M))
    sequence.is_reading = True
    batch = DecodingBatch(
        model, pad_id=0, size=1, capacity=len(tokens), neighbor_tokens=K * R, encodings=generator.encodings
    )
    batch.join(sequence, chunks[:1])
    logits = batch.take_in()
    assert logits is not None
    batch.settle()
    sequence.accept(said(tokens[M : M + 1], len(logits))[0])
    while sequence.finish_reason is None:
        place, found = len(sequence.tokens), {}
        if sequence.completes():
            found = {sequence: chunks[place // M - 1]}
        (logits_TV,) = batch.step(found)
        batch.accepted(sequence, said(tokens[place : place + len(logits_TV)], logits_TV.shape[1]))
        steps += 1
    assert sequence.tokens == tokens
    return steps


def said(tokens: list[int], vocabulary: int) -> torch.Tensor:
    """Logits that choose these tokens."""
    return torch.nn.functional.one_hot(torch.tensor(tokens), vocabulary).float()


def texts_of(folder: Path) -> tuple[Store, dict[str, list[Text]]]:
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in docstrings("transformers")))
    store = prepare([folder / "text.jsonl"], folder / "store", vocab_size=4096, chunk_size=M)
    build_neighbors(store, [store], "bm25", num_neighbors=20)
    table = NeighborTable(find_table(store, None), store)
    shares = split_documents(store, "80,5,15")
    sequences = Sequences(store, shares["test"], CHUNKS * M, table, K, R, shares["train"])
    found: dict[str, list[Text]] = {kind: [] for kind in LEAST}
    for batch in sequences.batches(1):
        assert batch.neighbors is not None and batch.lengths is not None
        tokens, overlaps = batch.tokens[0].tolist(), chunk_overlaps(batch, M)[0, :-1]
        if (batch.document_ids[0] != batch.document_ids[0][0]).any() or {*store.tokenizer.end_ids} & {*tokens}:
            continue
        chunks = [Found(read, lengths, []) for read, lengths in zip(batch.neighbors[0], batch.lengths[0])]
        kinds = {"held-out text": True, "overlap above .3": overlaps.min() > 0.3, "no overlap": overlaps.max() == 0}
        for kind in LEAST:
            if kinds[kind] and len(found[kind]) < SEQUENCES:
                found[kind].append((tokens, chunks))
    return store, found
