"""`bench memories`: memories of tokens beside a model: lookups a second, bytes a token, time a token, and with --run the bits.

Without a run the text is --text, or generated facts: a fifth of its documents is looked up in the memory of the others. With
--run its test documents are evaluated beside the memory of the run's store (retro memory ngram), which must be there. Seconds
are those of the processor, on one thread: whoever else wants it changes them little. Beside ours stands infini-gram where it is installed.
"""

import itertools
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from retro_engine.bench import infini_gram
from retro_engine.bench.frame import Measured, Options, Row, Target, Work, at_least, at_most, compared, time_in_turns
from retro_engine.data.batches import Sequences, split_documents
from retro_engine.data.builtin import write_facts
from retro_engine.data.prepare import prepare
from retro_engine.data.store import Store
from retro_engine.errors import UsageError
from retro_engine.memory.mixture import Mixture
from retro_engine.memory.next_token import MemoryBeside
from retro_engine.memory.ngram_memory import NgramMemory, build_ngram_memory, document_tokens, ngram_folder
from retro_engine.memory.suffix_order import LONGEST
from retro_engine.model.flops import token_flops

if TYPE_CHECKING:
    from retro_engine.data.tokenizer import Tokenizer
    from retro_engine.model.retro import RetroModel

FACTS, SHARES = 6000, "80,0,20"
TOKENS = 200_000  # looked up in a round
RIVAL_TOKENS = 2_000  # that infini-gram is asked about in a round
STEPS, PROMPT, PROMPTS = 64, 32, 8  # tokens that are generated after so many of each of so many documents
TOGETHER = (1, 8)  # sequences that are generated together
TIMED_BATCHES, ROUNDS = 4, 7
MOST_TIME, MOST_FLOPS = 1.3, 1.02  # times the model's
ALONE, WITH = "model alone", "with the memory"
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
        held = split_documents(store, SHARES)["test"]
        rows, facts = lookups(memory, store, held)
        if infini_gram.is_installed() and memory.parts[0].tokens.dtype == np.uint16:
            rows.append(_rival(memory, held_texts(store, held), folder / "infini-gram"))
            facts["times_infini_gram"] = facts["lookups_per_s"] * rows[-1].median_s / RIVAL_TOKENS
        else:
            print(f"{infini_gram.NAME} is left out: it is not installed, or the vocabulary is above 65,536")
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
            at_most("with the memory: FLOPs of inference, times the model's", facts.get("flops"), MOST_FLOPS),
        ]
        times = facts.get("time", {})
        found += [at_most(f"with the memory: time, {case}", ratio, MOST_TIME) for case, ratio in times.items()]
    return found


def lookups(memory: NgramMemory, store: Store, held: np.ndarray) -> tuple[list[Row], dict[str, Any]]:
    """Every token of held-out documents, each after all that stands before it in its document; nothing is left out."""
    texts = held_texts(store, held)
    count = sum(len(text) - 1 for text in texts)
    left, _ = memory.without(store.contents[held])
    works = {
        "ours": lambda: [memory.guesses(text) for text in texts],
        "ours, some left out": lambda: [left.guesses(text) for text in texts],
    }
    rows = _timed(LOOKUPS, works)
    for row in rows:
        row.note = f"{count / row.median_s:,.0f} lookups/s, {count:,} tokens"
    summary = memory.summary()
    facts = {"lookups_per_s": count / rows[0].median_s, "bytes_per_token": summary["bytes_per_token"]}
    return rows, facts | {"tokens": summary["tokens"], "looked_up": count}


def held_texts(store: Store, held: np.ndarray) -> list[np.ndarray]:
    """Documents of TOKENS tokens together, or a little more."""
    texts, count = [], 0
    for document in held.tolist():
        if count < TOKENS:
            texts.append(next(document_tokens(store, document, document + 1)))
            count += len(texts[-1]) - 1
    return texts


def _rival(memory: NgramMemory, texts: Sequence[np.ndarray], folder: Path) -> Row:
    """infini-gram's share of each token after the longest suffix of the LONGEST before it."""
    tokens = memory.parts[0].tokens
    other = infini_gram.InfiniGram(tokens, folder, memory.eod_id)
    asked = [
        (text[max(0, end - LONGEST) : end].tolist(), int(text[end])) for text in texts for end in range(1, len(text))
    ]
    asked = asked[:: max(1, len(asked) // RIVAL_TOKENS)][:RIVAL_TOKENS]
    (row,) = _timed(LOOKUPS, {infini_gram.NAME: lambda: [other.look_up(*one) for one in asked]})
    row.note = f"{len(asked) / row.median_s:,.0f} lookups/s, the longest suffix; {other.num_bytes / len(tokens):.1f} bytes a token"
    return row


def _of_run(path: str) -> Measured:
    from retro_engine.api import Retro
    from retro_engine.evaluate.compare import gain_of
    from retro_engine.evaluate.losses import show_interval
    from retro_engine.evaluate.memories import held_out_marks, losses_beside
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
    found = losses_beside(
        retro.model,
        left,
        share=test,
        fitting=valid,
        mode=mode,
        token_bytes=retro.tokenizer.token_bytes(),
        limit=BATCHES,
    )
    for name, losses in found.losses.items():
        print(f"{name}: {losses.bits_per_byte:.4f} bits a byte {show_interval(*losses.interval(), '.4f')}")
    rows, facts = lookups(left, store, test.documents)
    timed, ratios = time_beside(retro.model, retro.tokenizer, memory, found.weights, test)
    facts |= {"time": ratios, "flops": flops_beside(retro.model, found.guesses_per_token)}
    facts["bits"] = {name: losses.summary() for name, losses in found.losses.items()}
    facts["gains"] = {name: gain_of(found.losses["both"], found.losses[name]) for name in ("model", "memory")}
    return Measured(rows + timed, targets(facts), facts)


def flops_beside(model: "RetroModel", guesses_per_token: float) -> float:
    """Times the FLOPs of inference with the memory, at most: every suffix that is mixed in scales all V probabilities and adds to
    them.
    """
    return 1 + 2 * guesses_per_token * model.config.vocab_size / token_flops(model.config)["inference"]


def time_beside(
    model: "RetroModel", tokenizer: "Tokenizer", memory: NgramMemory, weights: Mixture, share: Sequences
) -> tuple[list[Row], dict[str, float]]:
    """Seconds of one thread's processor without the memory and with it, and how many times the former the latter are: generating
    (no retrieval, tokens drawn from the model, none ends early) after the begins of documents, and evaluating.
    """
    from retro_engine.evaluate.memories import look_up, score_tokens

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    documents = (next(document_tokens(share.store, one, one + 1)) for one in share.documents.tolist())
    prompts = [text[:PROMPT].tolist() for text in itertools.islice(documents, PROMPTS)]
    mode = "on" if model.config.retrieval else "off"

    def evaluate(memory: NgramMemory | None) -> None:
        tokens = score_tokens(model, share, mode, limit=TIMED_BATCHES)
        if memory is not None:
            weights.probabilities(tokens.probabilities, look_up(memory, tokens))

    try:
        rows = [
            row
            for size in TOGETHER
            for row in _time_generation(model, tokenizer, memory=memory, weights=weights, prompts=prompts, size=size)
        ]
        works: dict[str, Work] = {ALONE: partial(evaluate, None), WITH: partial(evaluate, memory)}
        rows += _timed("evaluate", works)
    finally:
        torch.set_num_threads(threads)
    return rows, {alone.case: beside.median_s / alone.median_s for alone, beside in zip(rows[::2], rows[1::2])}


def _time_generation(
    model: "RetroModel",
    tokenizer: "Tokenizer",
    memory: NgramMemory,
    weights: Mixture,
    prompts: Sequence[list[int]],
    size: int,
) -> list[Row]:
    from retro_engine.generate.generator import Generator
    from retro_engine.generate.request import Request
    from retro_engine.generate.sampling import Sampling

    drawn = Sampling(greedy=False, min_tokens=STEPS)
    requests = [Request(prompt, STEPS, sampling=drawn, neighbors=[]) for prompt in prompts]
    groups = [requests[first : first + size] for first in range(0, len(requests), size)]

    def generate(generator: Generator) -> None:
        for group in groups:
            generator.generate_all(group)

    works: dict[str, Work] = {}
    for name, beside in ((ALONE, None), (WITH, MemoryBeside(memory, weights))):
        works[name] = partial(generate, Generator(model, tokenizer, drafts=False, beside=beside))
    rows = _timed(f"generate, {size} together", works)
    for row in rows:
        row.note = f"{1000 * row.median_s / STEPS / len(prompts):.3f} ms a token"
    return rows


def _timed(case: str, works: dict[str, Work]) -> list[Row]:
    return compared(case, time_in_turns(works, rounds=ROUNDS, clock=time.process_time), ours=[])
