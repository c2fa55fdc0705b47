"""`retro demo python-docs` and `retro demo PATH`: what retrieval gives on text, against decoders without it.

Writes OUT/text, OUT/store and OUT/{retro,plain,plain-flops,plain-wide}; prints the copy ceiling first, then bits per byte
on held-out documents: RETRO on, off and random, a plain decoder trained on the same tokens, one trained with the same
FLOPs, a wider one of the same tokens and FLOPs of inference, and the gain by how much of the text the neighbors state
already.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from retro_engine.api import Retro
from retro_engine.config import Config, ModelConfig, TrainedModelConfig, load_config
from retro_engine.data import files
from retro_engine.data.batches import Sequences, copies_of, split_documents
from retro_engine.data.builtin import python_docs
from retro_engine.data.neighbor_table import NeighborTable, find_table
from retro_engine.data.prepare import prepare
from retro_engine.data.store import Store
from retro_engine.demo.runs import refuse_held, refuse_own, trained
from retro_engine.errors import UsageError
from retro_engine.evaluate.compare import Comparison, compare, show_gain
from retro_engine.evaluate.losses import show_interval
from retro_engine.model.flops import inference_flops, training_flops
from retro_engine.progress import Reporter
from retro_engine.retrieval.ceiling import copy_ceiling, describe_ceiling
from retro_engine.retrieval.neighbors import build_neighbors
from retro_engine.retrieval.overlap import repeated_share

CHUNK_SIZE, LENGTH, VOCABULARY = 32, 256, 4096  # tokens of a chunk and of a sequence, entries
LIMIT = 150_000 // (8 * LENGTH)  # batches of 8 held-out sequences at most, spread over all of them
SPLITS = "80,5,15"
STEPS = 800
MIN_DOCUMENTS = 8
_ROWS = {
    "on": "RETRO, reading its neighbors",
    "off": "the same, retrieval off",
    "random": "the same, neighbors of other text",
    "plain": "decoder without retrieval, equal tokens",
    "plain-flops": "the same, equal FLOPs of training",
    "plain-wide": "a wider one, equal FLOPs of inference",
}
Settings = list[tuple[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the runs of one comparison have in common."""

    store: Path
    preset: str = "tiny"
    seed: int = 1234
    overrides: Sequence[str] = ()
    num_read: int | None = None  # neighbors a chunk in the comparison; None = as many as in training
    again: str = "run it again"  # what to do where a run was stopped

    def config(self, run: Path, steps: int, is_plain: bool = False, more: Settings | None = None) -> Config:
        """The settings of one run; `more` of them are its own."""
        shared = _settings(self.store, run, steps, self.seed, is_plain)
        return load_config([*shared, *self.overrides, *(more or [])], self.preset)


@dataclass(frozen=True)
class Run:
    """One training of a comparison."""

    steps: int
    is_plain: bool = True
    ffn_width: int | None = None  # None = the preset's


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
    store = text_store(_source(what, out), out / "store", reporter)
    again = f"rm -r {out}, and run it again"
    recipe = Recipe(store=store.folder, preset=preset, seed=seed, overrides=overrides, again=again)
    heldout = heldout_of(store, recipe, reporter)
    ceiling, count = copy_ceiling(heldout)
    reporter.say(describe_ceiling(ceiling, count, repeated_share(heldout)))
    figures: dict[str, Any] = {
        "what": what,
        "ceiling": ceiling,
        "documents": store.num_documents,
        "tokens": store.counts["tokens"],
    }
    if ceiling > 0:
        runs, comparison = compare_runs(heldout, out, STEPS if steps is None else steps, recipe, reporter)
        reporter.say(table_of(comparison))
        figures |= {"steps": {name: run.steps for name, run in runs.items()}, **comparison.summary()}
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


def text_store(source: Path, folder: Path, reporter: Reporter) -> Store:
    """The chunks of a text with their neighbors; what is there of it is used. Raises UsageError for too little text."""
    if (folder / files.MANIFEST).is_file():
        store = Store(folder)
    else:
        store = prepare([source], folder, chunk_size=CHUNK_SIZE, vocab_size=VOCABULARY, say=reporter.say)
    if store.num_documents < MIN_DOCUMENTS:
        raise UsageError(
            f"{source} has {store.num_documents} documents",
            f"holding some out takes {MIN_DOCUMENTS}",
            "name more text, or split it",
        )
    if not (folder / "neighbors" / "bm25" / files.MANIFEST).is_file():
        build_neighbors(store, [store], "bm25", reporter=reporter)
    return store


def table_of_store(store: Store) -> NeighborTable:
    return NeighborTable(find_table(store, None), store)


def heldout_of(store: Store, recipe: Recipe, reporter: Reporter) -> Sequences:
    """The test share with its neighbors from the training share. Raises UsageError where nothing can be held out."""
    shares = split_documents(store, SPLITS)
    copies = copies_of(store, shares["test"], shares["train"])
    for document in copies:
        reporter.say(f"held-out document {' '.join(store.name(int(document)))} is also among the others: left out")
    tested = np.setdiff1d(shares["test"], copies)
    if not len(tested):
        raise UsageError(
            f"{store.folder} has no document to test on",
            "every held-out one is also among the others",
            "name more text",
        )
    table = table_of_store(store)
    num_neighbors = recipe.num_read or recipe.config(store.folder, 1).model.num_neighbors
    return Sequences(store, tested, LENGTH, table, num_neighbors, database_documents=shares["train"])


def compare_runs(
    heldout: Sequences, out: Path, steps: int, recipe: Recipe, reporter: Reporter
) -> tuple[dict[str, Run], Comparison]:
    """Train what is not trained yet, in OUT/{retro,plain,plain-flops,plain-wide}, and compare."""
    runs = runs_of(recipe.config(out, steps).model, heldout, steps)
    models = {}
    for name, run in runs.items():
        reporter.say(f"\n{name}: {run.steps:,} steps")
        own = [("model.ffn_hidden_size", run.ffn_width)] if run.ffn_width is not None else []
        result = trained(recipe.config(out / name, run.steps, run.is_plain, own), recipe.again, reporter)
        models[name] = Retro.from_pretrained(result.checkpoint).model
    retro, token_bytes = models.pop("retro"), heldout.store.tokenizer.token_bytes()
    return runs, compare(retro, heldout, token_bytes, models, LIMIT)


def runs_of(model: TrainedModelConfig, heldout: Sequences, steps: int) -> dict[str, Run]:
    """RETRO and the plain decoders it is compared with: of as many tokens; of as many FLOPs of training; and one whose FFN
    is so much wider that inference takes as many FLOPs as RETRO's (with kept neighbors where it can keep them).

    By the neighbors that there are: in training the model's first ones that are not dropped, in inference all of `heldout`.
    """
    retro = replace(model, vocab_size=heldout.store.vocab_size)
    plain = replace(retro, retrieval=False)
    tokens = found = in_training = 0
    for batch in heldout.batches(8, limit=20):
        assert batch.lengths is not None
        tokens += int((batch.document_ids >= 0).sum())
        found += int(batch.lengths.sum())
        in_training += int(batch.lengths[..., : retro.num_neighbors].sum())
    read = round((1 - retro.data.neighbor_dropout) * in_training)
    ratio = training_flops(retro, tokens, read) / training_flops(plain, tokens, 0)
    wanted = inference_flops(retro, tokens, found, kept=retro.encodes_alone)
    return {
        "retro": Run(steps, is_plain=False),
        "plain": Run(steps),
        "plain-flops": Run(round(steps * ratio)),
        "plain-wide": Run(steps, ffn_width=_ffn_width(plain, tokens, wanted)),
    }


def _ffn_width(plain: ModelConfig, tokens: int, wanted: float) -> int:
    """With which inference of a plain decoder takes `wanted` FLOPs; a multiple of 8."""
    flops = inference_flops(plain, tokens, 0, kept=False)
    wider = replace(plain, ffn_hidden_size=plain.ffn_hidden_size + 8)
    step = inference_flops(wider, tokens, 0, kept=False) - flops
    return plain.ffn_hidden_size + 8 * max(0, round((wanted - flops) / step))


def _settings(store: Path, run: Path, steps: int, seed: int, is_plain: bool) -> Settings:
    return [
        ("model.data.store", str(store)), ("model.data.splits_string", SPLITS), ("model.retrieval", not is_plain),
        ("model.chunk_size", CHUNK_SIZE), ("model.encoder_seq_length", LENGTH),
        ("model.optim.sched.min_lr", 1e-4), ("trainer.max_steps", steps), ("trainer.val_check_interval", max(1, steps // 2)),
        ("trainer.limit_val_batches", 8), ("exp_manager.checkpoint_every_n_steps", steps), ("exp_manager.exp_dir", str(run)),
        ("seed", seed),
    ]  # fmt: skip


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
        head, on, plain = f"{row['overlap']!s:>14}: {row['chunks']:>7,} chunks", row["on"], row["plain"]
        if on is None or plain is None:
            lines.append(head)
            continue
        on, plain = float(on), float(plain)
        saved = f"{1 - on / plain:.1%}" if plain else "-"
        lines.append(f"{head}, RETRO {on:.3f}, plain decoder {plain:.3f}, saves {saved}")
    return "\n".join(lines)


def figures_verdict(figures: dict[str, Any]) -> str:
    """One sentence that is true whatever came out."""
    if not figures["ceiling"]:
        return "nothing to gain here: no held-out token can be copied from neighbors"
    parts = []
    for name, words in (
        ("plain", "equal tokens"),
        ("plain-flops", "equal FLOPs of training"),
        ("plain-wide", "equal FLOPs of inference"),
    ):
        gain = figures["gains"][name]
        word = "fewer" if gain["gain"] >= 0 else "more"
        if not (gain["low"] > 0 or gain["high"] < 0):
            word += " (not measurable)"
        parts.append(f"{abs(gain['gain']):.1%} {word} bits per byte than a decoder at {words}")
    return f"RETRO needs {', '.join(parts)}; {figures['ceiling']:.1%} of the tokens could be copied"
