"""`retro demo`: the whole pipeline on generated facts, and the proof that the model reads its neighbors.

Writes OUT/text, OUT/store/{train,heldout,notes,news} and OUT/run; ends with value accuracy on entities the
model was never trained on (retrieval on, off, random, one right and one wrong neighbor), then adds notes about
a brand-new entity to a second store and asks for its facts. Exit code 6 when the proof fails.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from retro_engine.api import Retro
from retro_engine.config import load_config
from retro_engine.data.batches import Sequences
from retro_engine.data.builtin import Entity, ask, entity_notes, make_entities, write_facts
from retro_engine.data.neighbor_table import NeighborTable
from retro_engine.data.prepare import prepare, store_from_documents
from retro_engine.data.store import Store
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.demo.runs import refuse_held, refuse_own, trained
from retro_engine.errors import GateError
from retro_engine.evaluate.facts import FactsResult, evaluate_facts
from retro_engine.evaluate.losses import show_interval
from retro_engine.generate.generator import Generator
from retro_engine.progress import Reporter
from retro_engine.retrieval.neighbors import build_neighbors
from retro_engine.retrieval.search import Retriever

CHUNK_SIZE, LENGTH, VOCABULARY = 32, 128, 1024  # tokens of a chunk, tokens of a sequence, entries
NUM_HELDOUT = 512
STEPS, WARMUP_STEPS, CONSTANT_SHARE = 1500, 50, 0.6
ENTITIES_PER_STEP = 9  # a batch has 8 sequences of about one document each: every entity is seen once at most
GATE_ON, GATE_OFF = 0.90, 0.15
ANSWER_TOKENS = 16
_OWN = {  # settings that would train on other data than are measured, or that a flag says
    "trainer.max_steps": "--steps says it",
    "seed": "--seed says it",
    "model.init": "--init says it",
    "exp_manager.exp_dir": "--out says it",
    "model.data.store": "retro train takes any",
    "model.data.valid_store": "retro train takes any",
    "model.chunk_size": "retro train takes any",
    "model.encoder_seq_length": "retro train takes any",
}
_ROWS = {
    "on": "its two notes",
    "off": "nothing (retrieval off)",
    "random": "notes about somebody else",
    "one_right": "one right, one wrong note",
}


@dataclass
class FactsData:
    train: Store
    heldout: Store
    notes: Store
    heldout_path: Path


def facts_data(
    out: Path, num_train: int, num_heldout: int, seed: int, reporter: Reporter, chunk_size: int = CHUNK_SIZE
) -> FactsData:
    """Generate the corpus and take it through prepare, index and neighbors."""
    paths = write_facts(out / "text", num_train, num_heldout, seed)
    stores = out / "store"
    words = [text for e in make_entities(num_train, seed) for text in (e.document, *e.notes)]
    tokenizer = Tokenizer.train(words, VOCABULARY)
    tokenizer_path = out / "text" / "tokenizer.json"
    tokenizer_path.write_text(tokenizer.json)
    train_store, heldout, notes = (
        prepare([paths[name]], stores / name, str(tokenizer_path), chunk_size=chunk_size)
        for name in ("train", "heldout", "notes")
    )
    for query in (train_store, heldout):
        build_neighbors(query, [notes], "bm25", num_neighbors=8, reporter=reporter)
    return FactsData(train_store, heldout, notes, paths["heldout"])


def facts_settings(out: Path, steps: int, init: str, chunk_size: int = CHUNK_SIZE) -> list[str | tuple[str, Any]]:
    """The recipe of docs/retrieval-ready.md as overrides of the tiny preset."""
    return [
        ("model.data.store", f"{out}/store/train"),
        ("model.data.valid_store", f"{out}/store/heldout"),
        f"model.init={init}",
        f"model.chunk_size={chunk_size}",
        f"model.encoder_seq_length={LENGTH}",
        f"trainer.max_steps={steps}",
        f"trainer.val_check_interval={max(1, steps // 4)}",
        "trainer.limit_val_batches=8",
        "model.optim.sched.name=WSD",
        f"model.optim.sched.warmup_steps={WARMUP_STEPS}",
        f"model.optim.sched.constant_steps={max(0, int((steps - WARMUP_STEPS) * CONSTANT_SHARE))}",
        "model.optim.sched.min_lr=6e-5",
        f"exp_manager.checkpoint_every_n_steps={steps}",
    ]


def run_facts(
    out: Path,
    steps: int | None = None,
    init: str = "retrieval_ready",
    seed: int = 1234,
    is_gated: bool = True,
    reporter: Reporter | None = None,
    overrides: Sequence[str] = (),
    chunk_size: int = CHUNK_SIZE,
) -> dict[str, Any]:
    """Run the demo in folder `out` and return its figures. Raises GateError when the proof fails."""
    reporter = reporter or Reporter()
    steps = STEPS if steps is None else steps
    refuse_held(out, "text")
    refuse_own(overrides, _OWN, "its figures are of what it made")
    start = time.monotonic()
    num_train = max(64, steps * ENTITIES_PER_STEP)
    data = facts_data(out, num_train, min(NUM_HELDOUT, num_train), seed=1, reporter=reporter, chunk_size=chunk_size)
    prepared_s = time.monotonic() - start
    settings = [
        *facts_settings(out, steps, init, chunk_size),
        ("seed", seed),
        ("exp_manager.exp_dir", f"{out}/run"),
        *overrides,
    ]
    config = load_config(settings, "tiny")
    start = time.monotonic()
    result = trained(config, f"rm -r {out}, and run it again", reporter)
    trained_s = time.monotonic() - start
    retro = Retro.from_pretrained(result.checkpoint)
    results = evaluate_facts(retro.model, heldout_sequences(retro, data.heldout), data.heldout_path)
    figures: dict[str, Any] = {mode: value.summary() for mode, value in results.items()}
    figures |= {"steps": result.step, "prepared_s": prepared_s, "trained_s": trained_s, "seed": seed, "init": init}
    reporter.say(table(results))
    reporter.say(f"prepared in {prepared_s:.0f} s, trained in {trained_s:.0f} s")
    figures["new_entity"] = _new_entity(retro, data, out, seed, reporter)
    (out / "demo.json").write_text(json.dumps(figures, indent=1) + "\n")
    if is_gated:
        _gate(results)
    return figures


def table(results: dict[str, FactsResult]) -> str:
    """The demo's table, one row a condition, with 95 % intervals over entities."""
    lines = [
        "",
        f"{len(results['on'].tokens)} entities that the model was never trained on; their facts stand only in the store of notes.",
        f"{'the model reads':28}{'value tokens right':>24}{'whole values right':>24}{'bits per byte':>22}",
    ]
    for mode, label in _ROWS.items():
        s = results[mode].summary()
        cells = [
            f"{s[key]:.3f} {show_interval(*s[key + '_interval'])}"
            for key in ("value_accuracy", "whole_values", "bits_per_byte")
        ]
        lines.append(f"{label:28}{cells[0]:>24}{cells[1]:>24}{cells[2]:>22}")
    return "\n".join(lines)


def heldout_sequences(retro: Retro, store: Store, num_neighbors: int | None = None) -> Sequences:
    """All documents of a store with their BM25 neighbors, for `retro`; `num_neighbors` None = as it was trained."""
    c = retro.model.config
    table = NeighborTable(store.folder / "neighbors" / "bm25", store)
    c = replace(c, num_neighbors=num_neighbors or c.num_neighbors)
    return Sequences.of_model(c, store, np.arange(store.num_documents), table, None)


def _new_entity(retro: Retro, data: FactsData, out: Path, seed: int, reporter: Reporter) -> list[dict[str, Any]]:
    """Put notes about an entity nobody has seen into a second store and ask for its facts by free generation."""
    entity = make_entities(1, seed + 77_000_000)[0]
    news = store_from_documents(
        entity_notes(entity, "news"), out / "store" / "news", retro.tokenizer, data.notes.chunk_size
    )
    generator = Generator(retro.model, retro.tokenizer, Retriever([data.notes, news]))
    reporter.say(
        f"\nNew: {len(entity.notes)} notes about {entity.name} in a second store, searched together with the first."
    )
    for note in entity.notes:
        reporter.say(f"  | {note}")
    answers = [_answer(generator, entity, attribute, reporter) for attribute in _stated(entity)]
    right = sum(answer["is_right"] for answer in answers)
    reporter.say(f"{right} of {len(answers)} answers right")
    return answers


def _stated(entity: Entity) -> list[str]:
    told = " ".join(entity.notes)
    return [attribute for attribute, value in entity.values.items() if value in told]


def _answer(generator: Generator, entity: Entity, attribute: str, reporter: Reporter) -> dict[str, Any]:
    prompt = f"These lines are about {entity.name}. {ask(entity.name, attribute)}"
    out = generator.generate(prompt, ANSWER_TOKENS)
    answer = out.text.split(".")[0].strip()
    value = entity.values[attribute]
    sources = [hit.document for hit in out.neighbors]
    is_right = answer == value
    verdict = "right" if is_right else f"wrong: {value}"
    reporter.say(f"  {prompt.split('. ', 1)[1]} -> {answer}   ({verdict}; read: {', '.join(sources)})")
    return {"prompt": prompt, "answer": answer, "value": value, "is_right": is_right, "sources": sources}


def _gate(results: dict[str, FactsResult]) -> None:
    on, off, random = (results[mode].value_accuracy for mode in ("on", "off", "random"))
    if on < GATE_ON or off > GATE_OFF or random > GATE_OFF:
        raise GateError(
            f"value accuracy on {on:.3f}, off {off:.3f}, random {random:.3f}",
            f"the demo asks for on >= {GATE_ON:.2f}, off and random <= {GATE_OFF:.2f}",
            "try another --seed or more --steps",
        )
