"""Three parts of text_results.py: what an n-gram memory gives beside decoders and RETROs, nothing of it trained, and its targets.

memory-SEED: on re-used text, beside a RETRO and beside a plain decoder of as many tokens. wikipedia-SEED: beside a plain
decoder, the memory of all other articles, of every fourth, and of about as many tokens as the decoder was trained on; then
WikiText-103 (texts.py) beside the first of them. packages-SEED: beside a plain decoder of packages' source, memories of some of
it and of all, on other packages. Held-out documents are not in the memory, by what they say.
"""

import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from retro_engine.api import Retro
from retro_engine.bench import memories
from retro_engine.bench.frame import Target, at_least, at_most
from retro_engine.config import Config, load_config
from retro_engine.data import files
from retro_engine.data.batches import Sequences
from retro_engine.data.prepare import prepare
from retro_engine.data.store import Store
from retro_engine.demo.runs import trained
from retro_engine.evaluate.compare import gain_of, show_gain
from retro_engine.evaluate.losses import DocumentLosses, show_interval
from retro_engine.evaluate.memories import Beside, held_out_marks, losses_beside
from retro_engine.memory.ngram_memory import NgramMemory, build_ngram_memory, ngram_folder
from retro_engine.progress import Reporter
from retro_engine.train.run_data import open_evaluation

CHUNK, VOCABULARY = 32, 4096
RETRO = ["model.retrieved_length=64", "model.num_neighbors=2"]
PLAIN = ["model.retrieval=false"]
SHARES = {"memory": "80,5,15", "reading": "80,5,15", "wikipedia": "80,3,17", "packages": "98,2,0"}
BATCHES = {"memory": 40, "reading": 30, "wikipedia": 60, "packages": 60}  # of 8 sequences, spread evenly
AS_MANY, A_QUARTER = (
    16,
    4,
)  # of so many articles one: with 1,000 steps of 2,048 tokens as many tokens as were trained on
SOME_PACKAGES = (64, 8)  # of so many files of packages one


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What one seed of a part is made with."""

    out: Path
    part: str
    seed: int
    steps: int
    preset: str
    overrides: Sequence[str]
    report: Reporter

    def run(self, store: Store, name: str, own: Sequence[str]) -> Retro:
        """A training to its end, or what is there of it."""
        folder = self.out / f"{self.part}-{self.seed}" / name
        return Retro.from_pretrained(
            trained(self.config(store, folder, own), "the same command goes on", self.report).checkpoint
        )

    def config(self, store: Store, folder: Path, own: Sequence[str]) -> Config:
        return load_config([
            f"model.data.store={store.folder}", f"exp_manager.exp_dir={folder}", f"model.chunk_size={CHUNK}",
            f"model.data.splits_string='{SHARES[self.part]}'", f"trainer.max_steps={self.steps}", "trainer.limit_val_batches=8",
            f"seed={self.seed}", *own, *self.overrides,
        ], self.preset)  # fmt: skip

    def beside(
        self, retro: Retro, memory: NgramMemory, share: Sequences, fitting: Sequences | None, mode: str
    ) -> Beside:
        token_bytes = retro.tokenizer.token_bytes()
        return losses_beside(
            retro.model,
            memory,
            share=share,
            fitting=fitting,
            mode=mode,
            token_bytes=token_bytes,
            limit=BATCHES[self.part],
        )


def reused(trial: Trial, store: Store) -> dict[str, Any]:
    """Beside a RETRO that reads its neighbors, the same without them, and a plain decoder."""
    retro, plain = trial.run(store, "retro", RETRO), trial.run(store, "plain", PLAIN)
    memory, valid, test = _left(store, retro)
    found: dict[str, DocumentLosses] = {}
    own = _share(plain, "valid"), _share(plain, "test")  # the same documents without neighbors
    for name, model, mode, (fitting, share) in (
        ("on", retro, "on", (valid, test)),
        ("off", retro, "off", (valid, test)),
        ("plain", plain, "off", own),
    ):
        losses = trial.beside(model, memory, share, fitting, mode).losses
        found |= {name: losses["model"], f"{name} with the memory": losses["both"]}
        found.setdefault("the memory alone", losses["memory"])
    best = found["on with the memory"]
    return {
        "shown": _shown(found) | {f"RETRO with the memory against {name}": show_gain(gain_of(best, of)) for name, of in found.items() if of is not best},
        "documents": {name: of.nats.tolist() for name, of in found.items()},
    }  # fmt: skip


def wikipedia(trial: Trial, text: Path, wikitext: Path | None) -> dict[str, Any]:
    """Beside a plain decoder; lookups and seconds too."""
    store = _store([text], trial.out / "store-wikipedia", None)
    plain = trial.run(store, "plain", PLAIN)
    memory, valid, test = _left(store, plain)
    best = trial.beside(plain, memory, test, valid, "off")
    found = {f"Wikipedia, {name}": of for name, of in best.losses.items()}
    for every, label in ((AS_MANY, "as many tokens"), (A_QUARTER, "every fourth article")):
        fewer = _memory(_some(trial, text, every, store)).without(held_out_marks(valid, test))[0]
        for name, of in trial.beside(plain, fewer, test, valid, "off").losses.items():
            found[f"Wikipedia, {name}, {label}"] = of
    if wikitext is not None:
        other = _store([wikitext], trial.out / "store-wikitext", store)
        share = Sequences.of_model(plain.model.config, other, np.arange(other.num_documents), None, None)
        outside, _ = _memory(store).without(held_out_marks(share))
        found |= {
            f"WikiText-103, {name}": of for name, of in trial.beside(plain, outside, share, None, "off").losses.items()
        }
    _, facts = memories.lookups(memory, store, test.documents)
    _, seconds = memories.time_beside(plain.model, plain.tokenizer, _memory(store), best.weights, test)
    facts |= {"time": seconds, "flops": memories.flops_beside(plain.model, best.guesses_per_token)}
    return {
        "shown": _shown(found) | {f"{place}: saves": show_gain(gain_of(found[f"{place}, both"], found[f"{place}, model"])) for place in ("Wikipedia", "WikiText-103") if f"{place}, both" in found} | facts,
        "facts": facts,
        "documents": {name: of.nats.tolist() for name, of in found.items()},
    }  # fmt: skip


def packages(trial: Trial, text: Path, heldout: Path) -> dict[str, Any]:
    """Memories of every 64th file, of every eighth and of all beside one decoder of them; each half of the others' files fits the other."""
    store = _store([text], trial.out / "store-packages", None)
    plain = trial.run(store, "plain", PLAIN)
    other = _store([heldout], trial.out / "store-heldout-packages", store)
    share = Sequences.of_model(plain.model.config, other, np.arange(other.num_documents), None, None)
    found: dict[str, DocumentLosses] = {}
    facts: dict[str, Any] = {}
    for every in (*SOME_PACKAGES, 1):
        some = store if every == 1 else _some(trial, text, every, store)
        begin = time.process_time()
        memory = _memory(some)
        of_files = "all files" if every == 1 else f"one file of {every}"
        facts[of_files] = {"seconds": time.process_time() - begin, **memory.summary()}
        losses = trial.beside(plain, memory.without(held_out_marks(share))[0], share, None, "off").losses
        found |= {
            "decoder": losses["model"],
            f"memory, {of_files}": losses["memory"],
            f"both, {of_files}": losses["both"],
        }
    facts["lookups"] = memories.lookups(memory, other, share.documents)[1]
    saves = {
        f"{name}: saves": show_gain(gain_of(of, found["decoder"]))
        for name, of in found.items()
        if name.startswith("both")
    }
    return {
        "shown": _shown(found) | saves | facts,
        "facts": facts,
        "documents": {name: of.nats.tolist() for name, of in found.items()},
    }  # fmt: skip


def targets(part: str, facts: dict[str, Any] | None, nats: Mapping[str, DocumentLosses] | None) -> list[Target]:
    """Of the nats of all seeds, document by document, and the facts of the first; None: not measured, nothing holds."""

    def gain(one: str, other: str) -> dict[str, float | None]:
        if nats is None or one not in nats:
            return {"gain": None, "low": None}
        return dict(gain_of(nats[one], nats[other]))

    if part == "memory":
        both = "on with the memory"
        return [
            at_least(f"memory of re-used text, RETRO with it against {name}, lower end", gain(both, of)["low"], 0.0)
            for name, of in (("RETRO", "on"), ("the memory alone", "the memory alone"))
        ]
    if part == "packages":
        some = f"both, one file of {SOME_PACKAGES[0]}"
        return [
            at_least("packages: what a memory of all files saves, lower end", gain("both, all files", "decoder")["low"], 0.0),
            at_least("the same against a memory of some, lower end", gain("both, all files", some)["low"], 0.0),
        ]  # fmt: skip
    whole, known = gain("Wikipedia, both", "Wikipedia, model"), facts or {}
    seconds = known.get("time", {})
    fewer = gain("Wikipedia, both, as many tokens", "Wikipedia, model, as many tokens")
    outside = gain("WikiText-103, both", "WikiText-103, model")
    slowest = max(seconds.values(), default=None)
    return [
        at_least("Wikipedia, equal tokens of training: what the memory saves", whole["gain"], 0.04),
        at_least("the same, lower end", whole["low"], 0.02),
        at_least("the same, a memory of as many tokens, lower end", fewer["low"], 0.0),
        at_most("the same, FLOPs of inference, times the decoder's", known.get("flops"), memories.MOST_FLOPS),
        at_most("the same, time a token, times the decoder's, at most", slowest, memories.MOST_TIME),
        at_least("WikiText-103 after Wikipedia: what the memory saves", outside["gain"], 0.04),
        at_least("WikiText-103, lower end", outside["low"], 0.0),
        *memories.targets(known),
    ]


def _shown(found: Mapping[str, DocumentLosses]) -> dict[str, str]:
    return {name: f"{of.bits_per_byte:.4f} {show_interval(*of.interval(), '.4f')}" for name, of in found.items()}


def _share(retro: Retro, share: str) -> Sequences:
    sequences = open_evaluation(retro.folder, retro.model.config, [], share)
    assert isinstance(sequences, Sequences)
    return sequences


def _left(store: Store, retro: Retro) -> tuple[NgramMemory, Sequences, Sequences]:
    """The store's memory without what is held out, and the validation and the test documents."""
    valid, test = _share(retro, "valid"), _share(retro, "test")
    return _memory(store).without(held_out_marks(valid, test))[0], valid, test


def _memory(store: Store) -> NgramMemory:
    folder = ngram_folder(store)
    return NgramMemory(folder) if (folder / files.MANIFEST).is_file() else build_ngram_memory(store, folder)


def _store(paths: Sequence[Path], folder: Path, like: Store | None) -> Store:
    """Prepared where it is not there; `like`: with the tokenizer of that store."""
    if (folder / files.MANIFEST).is_file():
        return Store(folder)
    if like is None:
        return prepare([*paths], folder, chunk_size=CHUNK, vocab_size=VOCABULARY)
    return prepare([*paths], folder, str(like.folder), chunk_size=CHUNK)


def _some(trial: Trial, text: Path, every: int, like: Store) -> Store:
    """The store of every so many-th row of a file of JSON lines; those of 16 are among those of 4."""
    name = f"{text.name.split('.')[0]}-{every}"
    out = trial.out / f"{name}.jsonl"
    if not out.is_file():
        raw = text.read_bytes()
        plain = zstandard.ZstdDecompressor().stream_reader(raw) if text.suffix == ".zst" else io.BytesIO(raw)
        lines = io.TextIOWrapper(plain, encoding="utf-8")
        files.publish(out, ["".join(line for number, line in enumerate(lines) if number % every == 3).encode()])
    return _store([out], trial.out / f"store-{name}", like)
