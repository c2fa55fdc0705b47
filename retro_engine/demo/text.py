"""`retro demo python-docs` and `retro demo PATH`: what retrieval gives on text, against decoders without it.

Writes OUT/text, OUT/store and OUT/{retro,plain,plain-flops}; prints the copy ceiling first, then bits per byte on
held-out documents: RETRO on, off and random, a plain decoder trained on the same tokens, one trained with the same
FLOPs, and the gain by how much of the text the neighbors state already.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from retro_engine.api import Retro
from retro_engine.config import Config, TrainedModelConfig, load_config
from retro_engine.data.batches import Sequences, copies_of, split_documents
from retro_engine.data.builtin import python_docs
from retro_engine.data.prepare import prepare
from retro_engine.demo.runs import refuse_held, refuse_own, trained
from retro_engine.errors import UsageError
from retro_engine.evaluate.compare import Comparison, compare, show_gain
from retro_engine.evaluate.losses import show_interval
from retro_engine.model.flops import training_flops
from retro_engine.progress import Reporter
from retro_engine.retrieval.ceiling import copy_ceiling, describe_ceiling
from retro_engine.retrieval.neighbors import build_neighbors
from retro_engine.retrieval.overlap import repeated_share

CHUNK_SIZE, LENGTH, VOCABULARY = 32, 256, 4096  # tokens of a chunk and of a sequence, entries
TESTED_TOKENS = 150_000  # at most, spread over all held-out documents
SPLITS = "80,5,15"
STEPS = 800
MIN_DOCUMENTS = 8
_ROWS = {
    "on": "RETRO, reading its neighbors",
    "off": "the same, retrieval off",
    "random": "the same, neighbors of other text",
    "plain": "decoder without retrieval, equal tokens",
    "plain-flops": "decoder without retrieval, equal FLOPs",
}


def run_text(
    what: str,
    out: Path,
    steps: int | None = None,
    seed: int = 1234,
    overrides: list[str] | None = None,
    reporter: Reporter | None = None,
    preset: str = "tiny",
) -> dict[str, Any]:
    """Run the demo on "python-docs" or a path and return its figures. Raises UsageError for too little text."""
    reporter = reporter or Reporter()
    overrides = overrides or []
    refuse_held(out, "store")
    own = dict.fromkeys(dict(_settings(out, out, 1, seed, is_plain=True)), "--steps and --seed can be chosen")
    refuse_own(overrides, own, "it keeps the comparison fair")
    store = prepare([_source(what, out)], out / "store", chunk_size=CHUNK_SIZE, vocab_size=VOCABULARY, say=reporter.say)
    if store.num_documents < MIN_DOCUMENTS:
        raise UsageError(
            f"{what} has {store.num_documents} documents",
            f"holding some out takes {MIN_DOCUMENTS}",
            "name more text, or split it",
        )
    table = build_neighbors(store, [store], "bm25", reporter=reporter)
    shares = split_documents(store, SPLITS)
    copies = copies_of(store, shares["test"], shares["train"])
    for document in copies:
        reporter.say(f"held-out document {' '.join(store.name(int(document)))} is also among the others: left out")
    tested = np.setdiff1d(shares["test"], copies)
    if not len(tested):
        raise UsageError(
            f"{what} has no document to test on", "every held-out one is also among the others", "name more text"
        )
    model = load_config(overrides, preset).model
    heldout = Sequences(store, tested, LENGTH, table, model.num_neighbors, database_documents=shares["train"])
    ceiling, count = copy_ceiling(heldout)
    reporter.say(describe_ceiling(ceiling, count, repeated_share(heldout)))
    figures: dict[str, Any] = {
        "what": what,
        "ceiling": ceiling,
        "documents": store.num_documents,
        "tokens": store.counts["tokens"],
    }
    if ceiling > 0:
        load = partial(_load, store.folder, seed=seed, overrides=overrides, preset=preset)
        figures |= _measure(heldout, out, STEPS if steps is None else steps, load, reporter)
    (out / "text.json").write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def _source(what: str, out: Path) -> Path:
    if what != "python-docs":
        return Path(what)
    path = out / "text" / "python-docs.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    names = ("id", "title", "text", "source")
    rows = ({name: getattr(document, name) for name in names} for document in python_docs())
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _measure(
    heldout: Sequences, out: Path, steps: int, load: Callable[..., Config], reporter: Reporter
) -> dict[str, Any]:
    """Train and compare; `load` gives the settings of a run's folder, steps and `is_plain`."""
    ratio = _flops_ratio(load(out, 1, is_plain=False).model, heldout)
    runs = {"retro": steps, "plain": steps, "plain-flops": round(steps * ratio)}
    models = {}
    for name, count in runs.items():
        reporter.say(f"\n{name}: {count:,} steps")
        result = trained(load(out / name, count, is_plain=name != "retro"), out, reporter)
        models[name] = Retro.from_pretrained(result.checkpoint).model
    limit = max(1, TESTED_TOKENS // (8 * LENGTH))
    retro, token_bytes = models.pop("retro"), heldout.store.tokenizer.token_bytes()
    comparison = compare(retro, heldout, token_bytes, models, limit)
    reporter.say(table_of(comparison))
    return {"steps": runs, **comparison.summary()}


def _load(
    store: Path, run: Path, steps: int, *, seed: int, overrides: Sequence[str], preset: str, is_plain: bool
) -> Config:
    return load_config([*_settings(store, run, steps, seed, is_plain), *overrides], preset)


def _settings(store: Path, run: Path, steps: int, seed: int, is_plain: bool) -> list[tuple[str, Any]]:
    return [
        ("model.data.store", str(store)), ("model.data.splits_string", SPLITS), ("model.retrieval", not is_plain),
        ("model.chunk_size", CHUNK_SIZE), ("model.encoder_seq_length", LENGTH),
        ("model.optim.sched.min_lr", 1e-4), ("trainer.max_steps", steps), ("trainer.val_check_interval", max(1, steps // 2)),
        ("trainer.limit_val_batches", 8), ("exp_manager.checkpoint_every_n_steps", steps), ("exp_manager.exp_dir", str(run)),
        ("seed", seed),
    ]  # fmt: skip


def _flops_ratio(config: TrainedModelConfig, heldout: Sequences) -> float:
    """FLOPs of a RETRO step over those of a plain decoder's, by the neighbors that there are and are not dropped."""
    config.vocab_size = heldout.store.vocab_size
    tokens = neighbor_tokens = 0
    for batch in heldout.batches(8, limit=20):
        assert batch.lengths is not None
        tokens += int((batch.document_ids >= 0).sum())
        neighbor_tokens += int(batch.lengths.sum())
    kept = round((1 - config.data.neighbor_dropout) * neighbor_tokens)
    return training_flops(config, tokens, kept) / training_flops(config, tokens, 0)


def table_of(comparison: Comparison) -> str:
    """The demo's tables: bits per byte with intervals and gains, then the gain by overlap."""
    documents = len(comparison.losses["on"].nats)
    lines = ["", f"{documents} held-out documents, {int(comparison.losses['on'].tokens.sum()):,} tokens"]
    lines.append(f"{'':42}{'bits per byte':>24}{'RETRO saves':>26}")
    for name, label in _ROWS.items():
        losses = comparison.losses[name]
        low, high = losses.interval()
        saved = "" if name == "on" else show_gain(comparison.gain(name))
        lines.append(f"{label:42}{f'{losses.bits_per_byte:.3f} {show_interval(low, high)}':>24}{saved:>26}")
    realized = comparison.chunks.realized()
    lines.append(
        f"\nof the tokens under the copy ceiling RETRO predicts {realized['on']:.1%}, the decoder at equal tokens {realized['plain']:.1%}"
    )
    lines.append("by how much of the next chunk the neighbors state word for word (runs of 8 tokens):")
    for row in comparison.chunks.groups():
        on, plain = float(row["on"]), float(row["plain"])
        saved = f"{1 - on / plain:.1%}" if plain else "-"
        lines.append(
            f"{row['overlap']!s:>14}: {row['chunks']:>7,} chunks, RETRO {on:.3f}, plain decoder {plain:.3f}, saves {saved}"
        )
    return "\n".join(lines)


def figures_verdict(figures: dict[str, Any]) -> str:
    """One sentence that is true whatever came out."""
    if not figures["ceiling"]:
        return "nothing to gain here: no held-out token can be copied from neighbors"
    parts = []
    for name, words in (("plain", "equal tokens"), ("plain-flops", "equal FLOPs")):
        gain = figures["gains"][name]
        word = "fewer" if gain["gain"] >= 0 else "more"
        if not (gain["low"] > 0 or gain["high"] < 0):
            word += " (not measurable)"
        parts.append(f"{abs(gain['gain']):.1%} {word} bits per byte than a decoder at {words}")
    return f"RETRO needs {' and '.join(parts)}; {figures['ceiling']:.1%} of the tokens could be copied"
