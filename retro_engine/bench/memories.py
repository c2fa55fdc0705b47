"""`bench memories`: memories of tokens beside a model: lookups a second, bytes a token, time a token, and with --run the bits.

Without a run the text is --text, or generated facts: a fifth of its documents is looked up in the memory of the others. With
--run its test documents are evaluated beside the memory of the run's store (retro memory ngram), which must be there.
"""

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retro_engine.bench.frame import Measured, Options, Row, Target, Work, at_least, at_most, compared, time_in_turns
from retro_engine.data.batches import Sequences, split_documents
from retro_engine.data.builtin import write_facts
from retro_engine.data.prepare import prepare
from retro_engine.data.store import Store
from retro_engine.errors import UsageError
from retro_engine.memory.mixture import Mixture
from retro_engine.memory.next_token import MemoryBeside
from retro_engine.memory.ngram_memory import NgramMemory, build_ngram_memory, document_tokens, ngram_folder

if TYPE_CHECKING:
    from retro_engine.evaluate.memories import ScoredTokens

FACTS, SHARES = 6000, "80,0,20"
TOKENS = 200_000  # looked up in a round
STEPS = 64  # tokens generated in a round
BATCHES = 60  # evaluated of a run
LOOKUPS = "lookups"


def run(options: Options) -> Measured:
    if options.run is not None and options.text is not None:
        raise UsageError("--text with --run", "a run is evaluated on its own test documents", "name one")
    if options.run is not None:
        return _of_run(options.run)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = Path(options.text) if options.text else write_facts(folder / "facts", FACTS, 1)["train"]
        store = prepare([text], folder / "store", vocab_size=4096, chunk_size=32)
        start = time.perf_counter()
        memory = build_ngram_memory(store, folder / "memory")
        build_s = time.perf_counter() - start
        rows, facts = _lookups(memory, store, split_documents(store, SHARES)["test"])
    rows.append(Row(case="build", implementation="ours", median_s=build_s, low_s=build_s, high_s=build_s))
    rows[-1].note = f"{memory.num_tokens / build_s / 1e6:.2f} M tokens/s"
    return Measured(rows, targets(facts), facts)


def targets(facts: dict[str, Any]) -> list[Target]:
    """What is asked of a memory; of what was not measured nothing holds."""
    found = [
        at_least("n-gram memory: lookups a second of processor time", facts.get("lookups_per_s"), 100_000),
        at_most("n-gram memory: bytes a token", facts.get("bytes_per_token"), 8),
    ]
    if "gains" in facts:
        model, memory = facts["gains"]["model"], facts["gains"]["memory"]
        found += [
            at_least("with the memory: bits saved against the model alone", model["gain"], 0.04),
            at_least("the same, lower end of its interval", model["low"], 0.02),
            at_least("with the memory: bits saved against the memory alone, lower end", memory["low"], 0.0),
            at_most("with the memory: time a token", facts.get("time_ratio"), 1.3),
        ]
    return found


def _lookups(memory: NgramMemory, store: Store, held: np.ndarray) -> tuple[list[Row], dict[str, Any]]:
    """Every token of held-out documents, each after all that stands before it in its document; nothing is left out."""
    texts, count = [], 0
    for document in held.tolist():
        if count < TOKENS:
            texts.append(next(document_tokens(store, document, document + 1)))
            count += len(texts[-1]) - 1
    left, _ = memory.without(store.contents[held])
    works = {
        "ours": lambda: [memory.guesses(text) for text in texts],
        "ours, some left out": lambda: [left.guesses(text) for text in texts],
    }
    rows = compared(LOOKUPS, time_in_turns(works, rounds=5), ours=[])
    for row in rows:
        row.note = f"{count / row.median_s:,.0f} lookups/s, {count:,} tokens"
    summary = memory.summary()
    start = time.process_time()  # of this core alone, whoever else wants it
    works["ours"]()
    per_s = count / (time.process_time() - start)
    facts = {"lookups_per_s": per_s, "bytes_per_token": summary["bytes_per_token"]}
    return rows, facts | {"tokens": summary["tokens"], "looked_up": count}


def _of_run(path: str) -> Measured:
    from retro_engine.api import Retro
    from retro_engine.evaluate.compare import gain_of
    from retro_engine.evaluate.losses import show_interval
    from retro_engine.evaluate.memories import held_out_marks, look_up, mixed_nats, score_tokens
    from retro_engine.train.run_data import open_evaluation, training_store

    retro = Retro.from_pretrained(path)
    store = training_store(retro.folder, [])
    if store is None:
        raise UsageError(f"{path} names no store", "it was imported", "retro eval --memory FOLDER")
    memory = NgramMemory(ngram_folder(store))
    memory.check(retro.tokenizer.fingerprint, path)
    config, mode = retro.model.config, "on" if retro.model.config.retrieval else "off"
    valid, test = (open_evaluation(retro.folder, config, [], share) for share in ("valid", "test"))
    if not isinstance(valid, Sequences) or not isinstance(test, Sequences):
        raise UsageError(f"{path} is trained on questions", "a memory is of documents", "name another run")
    left, _ = memory.without(held_out_marks(valid, test))
    others, tokens = (score_tokens(retro.model, share, mode, limit=BATCHES) for share in (valid, test))
    fitted_on, known = (others, look_up(left, others)), look_up(left, tokens)
    longest = (others, fitted_on[1].longest())
    nats = {
        "both": mixed_nats(tokens, known, Mixture.fitted, fitted_on),
        "model": tokens.nats_T,
        "memory": mixed_nats(tokens, known, Mixture.fitted, fitted_on, _nothing_known),
        "both, the longest suffix alone": mixed_nats(tokens, known.longest(), Mixture.fitted, longest),
    }
    token_bytes = retro.tokenizer.token_bytes()
    losses = {name: tokens.by_document(token_bytes, values) for name, values in nats.items()}
    for name, found in losses.items():
        print(f"{name}: {found.bits_per_byte:.4f} bits a byte {show_interval(*found.interval(), '.4f')}")
    rows, facts = _lookups(left, store, test.documents)
    rows += _time_a_token(retro, MemoryBeside(memory, Mixture.fitted(others.probabilities, fitted_on[1])))
    facts["time_ratio"] = rows[-1].median_s / rows[-2].median_s
    facts["bits"] = {name: found.summary() for name, found in losses.items()}
    facts["gains"] = {name: gain_of(losses["both"], losses[name]) for name in ("model", "memory")}
    return Measured(rows, targets(facts), facts)


def _nothing_known(tokens: "ScoredTokens") -> np.ndarray:
    return np.full(len(tokens.nats_T), 1 / tokens.sequences.store.vocab_size)


def _time_a_token(retro: Any, beside: MemoryBeside) -> list[Row]:
    """Greedy, batch 1, no retrieval: the model alone and beside the memory."""
    from retro_engine.generate.generator import Generator

    works: dict[str, Work] = {}
    for name, memory in (("model alone", None), ("with the memory", beside)):
        generator = Generator(retro.model, retro.tokenizer, drafts=False, beside=memory)
        works[name] = partial(generator.generate, [5, 6, 7], STEPS, neighbors=[])
    rows = compared(f"{STEPS} tokens, batch 1", time_in_turns(works, rounds=5), ours=[])
    for row in rows:
        row.note = f"{1000 * row.median_s / STEPS:.2f} ms a token"
    return rows
