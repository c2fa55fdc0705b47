"""The figures of README and docs/results.md, and their targets: python benchmarks/text_results.py (make results)

Hours in parts: one that is done (OUT/PART.json) is not done again, a training goes on where it was stopped.
text-SEED: RETRO against plain decoders of equal tokens, FLOPs of training and FLOPs of inference. encoder-SEED: encoders that do
not read the chunk against those that do. recipes: other settings, on validation. memory-SEED: an n-gram memory beside them,
and with --wikipedia (and --wikitext) wikipedia-SEED: beside a plain decoder of it; with --packages and --heldout packages-SEED:
memories of three sizes (memory_results.py). reading-SEED: other neighbors, and other numbers of them (reading_results.py). With --model (SmolLM2-135M, imported)
prefix: neighbors in front of a decoder that was never trained to read, their bits and seconds; tuning: the same after tuning.
demo: what make demo proves. speed: every bench that README names, on an idle machine, alone (speed_results.py).
The last line is one JSON object; it says of every target whether it holds.
"""

import argparse
import itertools
import json
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import memory_results
import numpy as np
import reading_results
import speed_results
import torch
from texts import docstrings

from retro_engine.api import Retro
from retro_engine.bench.frame import Target, at_least, at_most
from retro_engine.bench.machine import environment
from retro_engine.bench.results import target_table, targets_by_row
from retro_engine.config import Config, load_config
from retro_engine.data import files
from retro_engine.data.batches import Sequences, copies_of, split_documents
from retro_engine.data.prepare import prepare
from retro_engine.data.store import Store
from retro_engine.demo import text as demo
from retro_engine.demo.facts import run_facts
from retro_engine.demo.runs import trained
from retro_engine.errors import RetroError, UsageError
from retro_engine.evaluate.compare import gain_of, show_gain
from retro_engine.evaluate.in_prompt import evaluate_in_prompt
from retro_engine.evaluate.losses import DocumentLosses
from retro_engine.evaluate.perplexity import evaluate
from retro_engine.evaluate.reading_cost import reading_cost
from retro_engine.model.quantize import use_weights
from retro_engine.progress import Reporter
from retro_engine.retrieval.neighbors import build_neighbors
from retro_engine.train.checkpoint import find_checkpoint
from retro_engine.train.run_data import open_evaluation

Part = dict[str, Any]
REPORT = Reporter()
BF16 = "bf16-mixed"
AGAIN = "the same command goes on"
SAVES = {  # by the name of the demo's decoder: what is equal, and the share of its bits that RETRO is to save
    "plain": ("tokens", 0.18),
    "plain-flops": ("FLOPs of training", 0.08),
    "plain-wide": ("FLOPs of inference", 0.15),
}
SLIM = "model.encoder_ffn_hidden_size=256"  # a quarter of the preset's
ALONE = "model.enc_cross_attention=[]"
ENCODERS = {  # on facts and on text, whose presets differ in width
    "alone": ([ALONE], [ALONE]),
    "alone and slim": ([ALONE, "model.encoder_ffn_hidden_size=128"], [ALONE, SLIM]),
    "reads the chunk": (["model.enc_cross_attention=[0]"], ["model.enc_cross_attention=[0]"]),
}
# What validation asked for after 300 steps, one seed; `recipes` measures it again. Four neighbors a chunk are read where two were trained.
RECIPE: list[str] = [SLIM]
NUM_READ = 4
RECIPES: dict[str, list[str]] = {
    "as the preset": [],
    "encoder's FFN of 256": [SLIM],
    "FFN of 256, dropped on 60 %": [SLIM, "model.data.neighbor_dropout=0.6"],
    "FFN of 256, four neighbors, dropped on 60 %": [SLIM, "model.data.neighbor_dropout=0.6", "model.num_neighbors=4"],
    "FFN of 256, crossing in two layers": [SLIM, "model.dec_cross_attention=[1,3]"],
    "FFN of 256, one neighbor, dropped on 25 %": [SLIM, "model.data.neighbor_dropout=0.25", "model.num_neighbors=1"],
}
READ = (1, 2, 4, 8)  # neighbors a chunk that each of these reads
OF_MODEL = ["model.chunk_size=64", "model.data.splits_string='80,5,15'", "model.encoder_seq_length=512"]
TUNING = {"reads": ["model.reading=prefix"], "plain": ["model.retrieval=false"]}


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is measured, and how large."""

    out: Path
    text: Path | None = None  # None = docstrings of transformers
    model: Path | None = None
    wikipedia: Path | None = None
    wikitext: Path | None = None
    packages: Path | None = None
    squad: Path | None = None
    heldout: Path | None = None
    memory_steps: int = 700
    wikipedia_steps: int = 1000
    reading_steps: int = 260
    steps: int = 1500
    tuning_steps: int = 120
    preset: str = "small"
    overrides: Sequence[str] = ()
    documents: int | None = None  # of the docstrings; None = all
    batches: int = 3  # of 8 sequences, that SmolLM2 is measured on

    def settings(self, name: str) -> dict[str, Any]:
        """What a part must have been made with to count."""
        if name in WHOLE:
            return {"squad": str(self.squad)} if name == "speed" else {}
        if name in OF_DECODER:
            kept = {"model": str(self.model), "batches": self.batches}
            return {**kept, "text": str(self.text), **({"steps": self.tuning_steps} if name == "tuning" else {})}
        if name in FILES:
            read = {flag: str(getattr(self, flag)) for flag in FILES[name]}
            return {**read, "steps": self.wikipedia_steps, "preset": self.preset, "overrides": [*self.overrides]}
        steps = {"memory": self.memory_steps, "reading": self.reading_steps}.get(name, self.steps)
        preset = reading_results.PRESET if name == "reading" else self.preset
        kept = {"text": str(self.text), "steps": steps, "preset": preset, "overrides": [*self.overrides]}
        return {**kept, **({"recipe": RECIPE, "read": NUM_READ} if name == "text" else {})}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", "-o", type=Path, default=Path("runs/results"), metavar="DIR")
    parser.add_argument("--only", nargs="+", choices=[*PARTS], default=[], help="default: all, with --model or without")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help=f"of {', '.join(SEEDED)}")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="default: the docstrings of the installed transformers"
    )
    parser.add_argument("--model", type=Path, metavar="RUN", help="SmolLM2-135M as retro import wrote it")
    parser.add_argument("--wikipedia", type=Path, metavar="FILE", help="articles, of the part wikipedia")
    parser.add_argument(
        "--wikitext", type=Path, metavar="FILE", help="WikiText-103's test articles (texts.py), of the same"
    )
    parser.add_argument(
        "--packages", type=Path, metavar="FILE", help="files of wheels (texts.py), of the part packages"
    )
    parser.add_argument("--heldout", type=Path, metavar="FILE", help="files of other wheels, of the same")
    parser.add_argument("--squad", type=Path, metavar="FILE", help="SQuAD's development file, of the part speed")
    parser.add_argument("--steps", type=int, default=Task.steps, help="of the trainings on text and facts")
    parser.add_argument("--tuning-steps", type=int, default=Task.tuning_steps, help="of 2,048 tokens each")
    parser.add_argument("--quick", action="store_true", help="a trial of seconds, whose figures mean nothing")
    args = parser.parse_args(argv)
    task = Task(
        out=args.out,
        text=args.text,
        model=args.model,
        wikipedia=args.wikipedia,
        wikitext=args.wikitext,
        packages=args.packages,
        squad=args.squad,
        heldout=args.heldout,
        steps=args.steps,
        tuning_steps=args.tuning_steps,
    )
    if args.quick:
        small = (
            "model.hidden_size=48",
            "model.ffn_hidden_size=64",
            "model.num_attention_heads=2",
            "model.init=standard",
        )
        task = replace(
            task,
            out=args.out / "quick",
            steps=2,
            memory_steps=2,
            reading_steps=2,
            wikipedia_steps=2,
            tuning_steps=2,
            preset="tiny",
            overrides=small,
            documents=60,
            batches=1,
        )
        args.seeds, args.only = [0], args.only or [name for name in PARTS if name not in WHOLE]
    try:
        return run(task, args.only, args.seeds)
    except RetroError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def run(task: Task, only: Sequence[str], seeds: Sequence[int]) -> int:
    for name in only:
        if name in missing(task):
            flag, why = NEEDS[name]
            raise UsageError(f"{name} has no --{flag}", why, f"--{flag}")
    if task.wikitext is not None and task.wikipedia is None:
        raise UsageError(
            "--wikitext has no --wikipedia", "it is measured beside Wikipedia's decoder", "--wikipedia FILE"
        )
    if (task.packages is None) != (task.heldout is None):
        raise UsageError(
            "--packages and --heldout go together", "the one is evaluated beside a memory of the other", "name both"
        )
    about = environment(torch.device("cpu"))
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    files.make_folder(task.out)
    parts: dict[str, Part] = {}
    for name in only or PARTS:
        if name in missing(task):
            print(f"{name}: left out, it needs --{NEEDS[name][0]}")
            continue
        for seed in seeds if name in SEEDED else [seeds[0]]:
            label = f"{name}-{seed}" if name in SEEDED else name
            parts[label] = done(task, label, about, seed)
    targets = targets_of(parts)
    print(target_table(targets))
    print(
        json.dumps(
            finite({**about, "parts": {n: p["shown"] for n, p in parts.items()}, "targets": targets_by_row(targets)})
        )
    )
    return 0


def missing(task: Task) -> set[str]:
    """The parts that lack a file."""
    return {name for name, (flag, _) in NEEDS.items() if getattr(task, flag) is None}


def done(task: Task, label: str, about: dict[str, Any], seed: int) -> Part:
    """A part from its file, or made and written now. Raises UsageError for one that was begun with other settings."""
    name, path, begun = label.split("-")[0], task.out / f"{label}.json", task.out / f"{label}.begun.json"
    settings = task.settings(name)
    if not begun.is_file():
        files.publish(begun, [files.json_bytes(settings)])
    if (found := files.read_object(begun)) != settings:
        raise UsageError(f"{label} was begun with {found}", f"asked for is {settings}", "another --out")
    if path.is_file():
        return files.read_object(path)
    print(f"\n{label}", flush=True)
    part = PARTS[name](task, seed)
    files.publish(path, [files.json_bytes(finite({"about": about, "settings": settings, **part}))])
    print("\n".join(f"  {name}: {value}" for name, value in part["shown"].items()), flush=True)
    return part


def finite(value: Any) -> Any:
    """Without what JSON has no word for: intervals of too few documents."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def text_of(task: Task) -> Path:
    """The documents as JSON lines."""
    path = task.text or task.out / "transformers.jsonl"
    if task.text is None and not path.is_file():
        rows = itertools.islice(docstrings("transformers"), task.documents)
        files.publish(path, ["".join(json.dumps(row) + "\n" for row in rows).encode()])
    return path


def recipe_of(
    task: Task, seed: int, more: Sequence[str] = (), num_read: int | None = None
) -> tuple[demo.Recipe, Store]:
    store = demo.text_store(text_of(task), task.out / f"store-{text_of(task).stem}", REPORT)
    recipe = demo.Recipe(
        store=store.folder,
        preset=task.preset,
        seed=seed,
        overrides=[*task.overrides, *more],
        num_read=num_read,
        again=AGAIN,
    )
    return recipe, store


def text(task: Task, seed: int) -> Part:
    recipe, store = recipe_of(task, seed, RECIPE, NUM_READ)
    heldout = demo.heldout_of(store, recipe, REPORT)
    runs, comparison = demo.compare_runs(heldout, task.out / f"text-{seed}", task.steps, recipe, REPORT)
    print(demo.table_of(comparison))
    return {
        "shown": {name: show_gain(comparison.gain(name)) for name in SAVES},
        "runs": {name: vars(run) for name, run in runs.items()},
        **comparison.summary(),
        "documents": nats_of(comparison.losses),
    }


def nats_of(losses: dict[str, DocumentLosses]) -> dict[str, list[float]]:
    return {name: of.nats.tolist() for name, of in losses.items()}


def encoder(task: Task, seed: int) -> Part:
    """RETROs on facts and on text, that differ in nothing but what the encoder reads."""
    out = task.out / f"encoder-{seed}"
    facts, losses = {}, {}
    for name, (on_facts, on_text) in ENCODERS.items():
        folder = out / f"facts {name}"
        if not (folder / "demo.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            run_facts(folder, task.steps, seed=seed, is_gated=False, reporter=REPORT, overrides=on_facts)
        facts[name] = files.read_object(folder / "demo.json")["on"]
        recipe, store = recipe_of(task, seed, on_text)
        heldout = demo.heldout_of(store, recipe, REPORT)
        result = trained(recipe.config(out / f"text {name}", task.steps), recipe.again, REPORT)
        model = Retro.from_pretrained(result.checkpoint).model
        losses[name] = evaluate(model, heldout, store.tokenizer.token_bytes(), ["on"], limit=demo.LIMIT)["on"]
    gains = {name: show_gain(gain_of(of, losses["reads the chunk"])) for name, of in losses.items()}
    return {
        "shown": {
            **{
                f"facts, {name}": f"{of['bits_per_byte']:.4f}, {of['value_accuracy']:.3f} right"
                for name, of in facts.items()
            },
            **{f"text, {name}": f"{of.bits_per_byte:.4f}" for name, of in losses.items()},
            **{f"text, {name} saves": gain for name, gain in gains.items() if name != "reads the chunk"},
        },
        "facts": facts,
        "documents": nats_of(losses),
    }


def memory(task: Task, seed: int) -> Part:
    _, store = recipe_of(task, seed)
    return memory_results.reused(trial_of(task, "memory", seed, task.memory_steps), store)


def wikipedia(task: Task, seed: int) -> Part:
    assert task.wikipedia is not None
    trial = trial_of(task, "wikipedia", seed, task.wikipedia_steps)
    return memory_results.wikipedia(trial, task.wikipedia, task.wikitext)


def packages(task: Task, seed: int) -> Part:
    assert task.packages is not None and task.heldout is not None
    trial = trial_of(task, "packages", seed, task.wikipedia_steps)
    return memory_results.packages(trial, task.packages, task.heldout)


def trial_of(task: Task, part: str, seed: int, steps: int) -> memory_results.Trial:
    return memory_results.Trial(
        out=task.out,
        part=part,
        seed=seed,
        steps=steps,
        preset=task.preset,
        overrides=task.overrides,
        report=REPORT,
    )


def recipes(task: Task, seed: int) -> Part:
    """On validation, so that a choice among them does not spend the test share."""
    shown: dict[str, Any] = {}
    found: dict[str, Any] = {}
    plain_recipe, store = recipe_of(task, seed)
    shares = split_documents(store, demo.SPLITS)
    valid = np.setdiff1d(shares["valid"], copies_of(store, shares["valid"], shares["train"]))
    token_bytes = store.tokenizer.token_bytes()

    def bits(model: Any, mode: str, num_neighbors: int) -> float:
        table = demo.table_of_store(store)
        sequences = Sequences(store, valid, demo.LENGTH, table, num_neighbors, database_documents=shares["train"])
        return evaluate(model, sequences, token_bytes, [mode])[mode].bits_per_byte

    for factor in (1, 2):  # of the steps: what a decoder learns from more tokens, to be read between
        config = plain_recipe.config(task.out / "recipes" / f"plain {factor}", factor * task.steps, is_plain=True)
        model = Retro.from_pretrained(trained(config, plain_recipe.again, REPORT).checkpoint).model
        found[f"plain, {factor} x tokens"] = shown[f"plain, {factor} x tokens"] = bits(model, "off", 1)
    plain, slope = shown["plain, 1 x tokens"], math.log2(shown["plain, 2 x tokens"] / shown["plain, 1 x tokens"])
    for name, more in RECIPES.items():
        recipe, _ = recipe_of(task, seed, more)
        config = recipe.config(task.out / "recipes" / name, task.steps)
        heldout = demo.heldout_of(store, recipe, Reporter("quiet"))
        ratio = demo.runs_of(config.model, heldout, 1000)["plain-flops"].steps / 1000
        model = Retro.from_pretrained(trained(config, recipe.again, REPORT).checkpoint).model
        by_count = {count: bits(model, "on", count) for count in READ}
        off, best = bits(model, "off", 1), min(by_count.values())
        equal = plain * 2 ** (slope * math.log2(ratio))
        found[name] = {"on": by_count, "off": off, "training": ratio, "equal_flops": equal}
        read = ", ".join(f"{count} neighbors {value:.4f}" for count, value in by_count.items())
        shown[name] = f"{read}, off {off:.4f}; saves {1 - best / plain:.1%}, {1 - best / equal:.1%} at {ratio:.2f} x"
    return {"shown": shown, "validation": found}


def model_store(task: Task) -> Store:
    """The documents in the model's tokens, with their neighbors."""
    assert task.model is not None
    folder = task.out / f"store-{text_of(task).stem}-{task.model.name}"
    if not (folder / files.MANIFEST).is_file():
        prepare([text_of(task)], folder, str(find_checkpoint(task.model)), chunk_size=64, say=REPORT.say)
    store = Store(folder)
    if not (folder / "neighbors" / "bm25" / files.MANIFEST).is_file():
        build_neighbors(store, [store], "bm25", reporter=REPORT)
    return store


def sequences_of(task: Task, retro: Retro) -> Sequences:
    """The test share, as a model reads it."""
    store = model_store(task)
    settings = [f"model.data.store={store.folder.absolute()}", *OF_MODEL]
    sequences = open_evaluation(retro.folder, retro.model.config, settings, "test", REPORT.say)
    assert isinstance(sequences, Sequences)
    return sequences


def losses_of(task: Task, retro: Retro, modes: Sequence[str]) -> dict[str, DocumentLosses]:
    token_bytes = retro.tokenizer.token_bytes()
    return evaluate(retro.model, sequences_of(task, retro), token_bytes, modes, limit=task.batches, precision=BF16)


def prefix(task: Task, seed: int) -> Part:
    assert task.model is not None
    retro = Retro.from_pretrained(task.model).read_in_front(64)
    sequences, token_bytes = sequences_of(task, retro), retro.tokenizer.token_bytes()
    losses = losses_of(task, retro, ("on", "off", "random"))
    losses["prompt"] = evaluate_in_prompt(retro.model, sequences, token_bytes, task.batches, precision=BF16)
    use_weights(retro.model, "bf16")
    cost = reading_cost(retro.model, sequences, task.batches)
    return {
        "shown": {
            **{name: f"{of.bits_per_byte:.4f}" for name, of in losses.items()},
            **{f"seconds, {way}": f"{seconds:.1f}" for way, seconds in cost.seconds.items()},
        },
        "losses": {name: of.summary() for name, of in losses.items()},
        "cost": vars(cost),
        "documents": nats_of(losses),
    }


def tuning(task: Task, seed: int) -> Part:
    """Adapters that learn reading in front, and adapters that learn the same text without."""
    found: dict[str, DocumentLosses] = {}
    rates = {}
    for name in TUNING:
        result = trained(tuning_config(task, name, seed), AGAIN, REPORT)
        rates[name] = result.metrics.get("tokens_per_s", math.nan)
        retro = Retro.from_pretrained(result.checkpoint)
        losses = losses_of(task, retro, ("on", "off", "random") if name == "reads" else ("off",))
        found |= {f"{name}, {mode}": of for mode, of in losses.items()}
    found["plain, in front"] = losses_of(task, retro.read_in_front(64), ["on"])[
        "on"
    ]  # what reading without learning it gives
    gain = gain_of(found["reads, on"], found["plain, off"])
    shown = {name: f"{of.bits_per_byte:.4f}" for name, of in found.items()}
    shown |= {f"tokens/s, {name}": f"{value:.0f}" for name, value in rates.items()}
    return {
        "shown": {**shown, "tuned with reading saves": show_gain(gain)},
        "gain": gain,
        "losses": {name: of.summary() for name, of in found.items()},
        "tokens_per_s": rates,
    }


def tuning_config(task: Task, name: str, seed: int) -> Config:
    """2,048 tokens a step, 1,024 at a time: reading in front takes 12 GiB for twice as many."""
    return load_config([
        f"model.init_from={task.model}", f"model.data.store={model_store(task).folder}", f"exp_manager.exp_dir={task.out / 'tuning' / name}",
        *OF_MODEL, *TUNING[name], "model.lora.rank=8", "model.optim.lr=1e-3", "model.optim.sched.warmup_steps=10", "model.optim.sched.min_lr=1e-4",
        "model.micro_batch_size=2", "model.global_batch_size=4", f"trainer.precision={BF16}", f"trainer.max_steps={task.tuning_steps}", "trainer.val_check_interval=40",
        "trainer.limit_val_batches=4", "exp_manager.checkpoint_every_n_steps=20", f"seed={seed}",
    ])  # fmt: skip


PARTS: dict[str, Callable[[Task, int], Part]] = {
    "text": text,
    "encoder": encoder,
    "prefix": prefix,
    "tuning": tuning,
    "recipes": recipes,
    "memory": memory,
    "wikipedia": wikipedia,
    "packages": packages,
    "reading": lambda task, seed: reading_results.reading(
        trial_of(task, "reading", seed, task.reading_steps), recipe_of(task, seed)[1]
    ),
    "demo": lambda task, _: speed_results.demo(task.out, REPORT),
    "speed": lambda task, _: speed_results.speed(task.squad),
}
WHOLE = ("demo", "speed")  # what has no trial of seconds
SEEDED = ("text", "encoder", "memory", "wikipedia", "packages", "reading")
OF_DECODER = {"prefix", "tuning"}
FILES = {"wikipedia": ("wikipedia", "wikitext"), "packages": ("packages", "heldout")}
IMPORTED = "model", "it measures a decoder that was imported with retro import"
NEEDS = {
    "prefix": IMPORTED,
    "tuning": IMPORTED,
    "wikipedia": ("wikipedia", "it is of a file of articles"),
    "packages": ("packages", "it is of files of wheels"),
}


def targets_of(parts: dict[str, Part]) -> list[Target]:
    """Of the parts that are done; of the others nothing is measured."""
    of = {seeded: [part for name, part in parts.items() if name.startswith(f"{seeded}-")] for seeded in SEEDED}
    found = [*_saved(of["text"]), *_encoded(of["encoder"]), *_read(parts.get("prefix"), parts.get("tuning"))]
    for name in ("memory", "wikipedia", "packages"):
        nats = {mode: added(of[name], mode) for mode in of[name][0]["documents"]} if of[name] else None
        found += memory_results.targets(name, of[name][0].get("facts") if of[name] else None, nats)
    return found + speed_results.targets_of(parts.get("speed"))


def _saved(texts: list[Part]) -> list[Target]:
    gains = {name: gain_of(added(texts, "on"), added(texts, name))["gain"] if texts else None for name in SAVES}
    return [at_least(f"re-used text, equal {equal}: what RETRO saves", gains[name], least) for name, (equal, least) in SAVES.items()]  # fmt: skip


def _encoded(encoders: list[Part]) -> list[Target]:
    *others, reads = ENCODERS
    targets = []
    for name in others:
        facts = text = None
        if encoders:
            sums = {of: sum(part["facts"][of]["bits_per_byte"] for part in encoders) for of in (name, reads)}
            facts = sums[name] / sums[reads]
            text = 1 - gain_of(added(encoders, name), added(encoders, reads))["gain"]
        row = f"encoder {name} against one that {reads}: bits of"
        targets += [at_most(f"{row} facts", facts, 1.005), at_most(f"{row} text", text, 1.005)]
    return targets


def _read(front: Part | None, tuned: Part | None) -> list[Target]:
    untrained = kept = anew = after = low = None
    if front is not None:
        bits = {name: of["bits_per_byte"] for name, of in front["losses"].items()}
        seconds = front["cost"]["seconds"]
        untrained = bits["on"] / bits["prompt"]
        kept, anew = (seconds[way] / seconds["in the prompt"] for way in ("kept", "not kept"))
        if tuned is not None:
            after = tuned["losses"]["reads, on"]["bits_per_byte"] / bits["prompt"]
    if tuned is not None:
        low = tuned["gain"]["low"]
    row = "SmolLM2, neighbors in front against in the prompt"
    return [
        at_most(f"{row}: bits, untrained", untrained, 1.04),
        at_most(f"{row}: bits, tuned", after, 1.0),
        at_most(f"{row}: time, kept", kept, 1 / 8),
        at_most(f"{row}: time, none kept", anew, 1 / 2),
        at_least("SmolLM2, tuned with reading against tuned without: lower end of what it saves", low, 0.0),
    ]


def added(parts: Sequence[Part], name: str) -> DocumentLosses:
    """The nats of several seeds, document by document."""
    nats = np.sum([part["documents"][name] for part in parts], axis=0)
    return DocumentLosses(nats, np.zeros(len(nats)), np.zeros(len(nats)))


if __name__ == "__main__":
    sys.exit(main())
