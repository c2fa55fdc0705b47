"""The commands `retro import`, `retro export` and `retro explain`, and what `retro eval` measures on tasks."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retro_engine.errors import MissingInputError, StoreError, UsageError
from retro_engine.train.__main__ import DEVICES

if TYPE_CHECKING:
    from retro_engine.api import Retro
    from retro_engine.data.batches import Sequences
    from retro_engine.data.questions import Questions
    from retro_engine.evaluate.perplexity import DocumentLosses
    from retro_engine.progress import Reporter

Command = Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]
DTYPES = ("float32", "bfloat16", "float16")


def add_interop(command: Command) -> None:
    sub = command("import", _import, "a model of another project as a checkpoint: Hugging Face, GGUF, Megatron, NeMo")
    sub.add_argument("path", metavar="PATH", help="a folder, or a .gguf, .nemo or .pt file")
    sub.add_argument("--out", "-o", required=True, metavar="DIR", help="the checkpoint's folder")
    sub.add_argument("--format", default="auto", help="auto, hf, gguf, nemo, mcore, megatron")
    sub.add_argument("--tokenizer", metavar="PATH", help="a tokenizer.json or its folder (default: the model's own)")
    sub.add_argument("--end-token", metavar="TOKEN", help="ends a document (default: the model's files say which)")
    sub.add_argument("--metadata", metavar="FILE", help="JSON: settings that a Megatron checkpoint does not have in it")
    sub.add_argument("--dtype", default="float32", choices=DTYPES)

    sub = command("export", _export, "a checkpoint as a Hugging Face folder")
    sub.add_argument("path", metavar="RUN", help="a run's folder or a checkpoint")
    sub.add_argument("--out", "-o", required=True, metavar="DIR")

    sub = command("explain", _explain, "what each neighbor did to a text: change of log-probability")
    sub.add_argument("--device", choices=DEVICES, help="a GPU where there is one (auto), or trainer.accelerator=")
    sub.add_argument("path", metavar="RUN", help="a run's folder or a checkpoint")
    sub.add_argument("prompt")
    sub.add_argument("text", nargs="?", help="what is explained (default: what the model generates)")
    sub.add_argument("--neighbors", action="append", metavar="TEXT", help="a given neighbor; may be repeated")
    sub.add_argument("--index", nargs="+", metavar="STORE", help="stores to retrieve from (default: the run's)")
    sub.add_argument("--retriever", default="bm25")
    sub.add_argument("--k", type=int, help="neighbors to retrieve (default: the model's)")
    sub.add_argument("--html", metavar="FILE", help="write the heat map as a page")


def _import(args: argparse.Namespace) -> int:
    from retro_engine.interop.imports import DTYPES, import_model, write_checkpoint
    from retro_engine.progress import Reporter

    metadata = None
    if args.metadata is not None:
        try:
            metadata = json.loads(Path(args.metadata).read_text())
        except OSError as error:
            raise MissingInputError(f"{args.metadata} cannot be read", error.strerror or "") from error
        except ValueError as error:
            raise StoreError(f"{args.metadata} is not JSON", str(error)) from error
        if not isinstance(metadata, dict):
            raise StoreError(f"{args.metadata} holds no settings", "expected an object of names and values")
    imported = import_model(args.path, args.format, args.tokenizer, metadata, DTYPES[args.dtype], args.end_token)
    write_checkpoint(imported, args.out, args.path)
    reporter = Reporter("json" if args.json else "quiet" if args.quiet else "text")
    for note in imported.notes:
        reporter.say(f"note: {note}")
    config = imported.model.config
    count = sum(parameter.numel() for parameter in imported.model.parameters())
    result = {
        "checkpoint": args.out,
        "source": imported.source,
        "parameters": count,
        "layers": config.dec_num_layers,
        "vocab_size": config.vocab_size,
        "retrieval": config.retrieval,
    }
    print(json.dumps(result) if args.json else "\n".join(f"{key}: {value}" for key, value in result.items()))
    return 0


def _export(args: argparse.Namespace) -> int:
    from retro_engine.interop.exports import export_model

    folder = export_model(args.path, args.out)
    print(json.dumps({"folder": str(folder)}) if args.json else f"folder: {folder}")
    return 0


def _explain(args: argparse.Namespace) -> int:
    from retro_engine.api import Retro
    from retro_engine.data import files
    from retro_engine.data.store import Store
    from retro_engine.generate.explain import explain
    from retro_engine.generate.generator import Generator
    from retro_engine.report import heat_map_page
    from retro_engine.retrieval.search import Retriever
    from retro_engine.train.checkpoint import find_checkpoint
    from retro_engine.train.run_data import run_databases

    if args.k is not None and args.k < 1:
        raise UsageError(f"--k {args.k} cannot be used", "at least one neighbor is explained")
    checkpoint = find_checkpoint(args.path)
    retro = Retro.from_pretrained(checkpoint, device=args.device)
    retriever = None
    if args.neighbors is None and retro.model.config.retrieval:
        stores = [Store(path) for path in args.index] if args.index else run_databases(checkpoint)
        retriever = Retriever(stores, args.retriever)
    generator = Generator(retro.model, retro.tokenizer, retriever)
    say_device(args, retro)
    text = args.text
    if text is None:
        text = generator.generate(args.prompt, neighbors=args.neighbors, num_neighbors=args.k).text
    found = explain(generator, args.prompt, text, args.neighbors, args.k)
    if args.html is not None:
        files.publish(Path(args.html), [heat_map_page(args.prompt, found).encode()])
    if args.json:
        print(json.dumps({"prompt": args.prompt, "text": text, **found.summary()}))
        return 0
    print(f"{args.prompt}|{text}")
    print(f"log-probability {found.log_probs_T.sum():.3f} nats, without neighbors {found.off_T.sum():.3f}")
    for hit, change, row in zip(found.neighbors, found.changes, found.token_changes):
        best = sorted(zip(row, found.pieces), reverse=True)[:5]
        shown = ", ".join(f"{piece!r} {value:+.2f}" for value, piece in best)
        print(f"{change:+9.3f}  {hit.where}: {' '.join(hit.text.split())[:120]}")
        print(f"{'':11}most on {shown}")
    return 0


def say_device(args: argparse.Namespace, retro: "Retro") -> None:
    """What --device led to, before the first computation."""
    from retro_engine.model.device import describe_device
    from retro_engine.progress import Reporter

    Reporter("json" if args.json else "quiet" if args.quiet else "text").say(describe_device(retro.device))


def add_task_flags(sub: argparse.ArgumentParser) -> None:
    """The flags of `retro eval` for questions, tasks and rivals."""
    sub.add_argument(
        "--questions",
        metavar="FILE",
        help="exact match and F1 on questions (JSON, TSV, Parquet); --modes of retrieved,gold,random,off,prompt",
    )
    sub.add_argument("--strict", action="store_true", help="questions: stop at the first row that cannot be used")
    sub.add_argument("--lm-eval", metavar="TASKS", help="tasks of lm-evaluation-harness, with commas between them")
    sub.add_argument("--lm-eval-path", metavar="DIR", help="task files of yours")
    sub.add_argument(
        "--index", nargs="+", metavar="STORE", help="questions, tasks: stores to retrieve from (default: the run's)"
    )
    sub.add_argument("--retriever", default="bm25")
    sub.add_argument("--no-retrieval", action="store_true", help="tasks: retrieval off")
    sub.add_argument("--in-prompt", action="store_true", help="also the same decoder with the neighbors in its prompt")
    sub.add_argument(
        "--words", metavar="FILE", help="perplexity per word of FILE, the share's text as the papers count it"
    )


def eval_tasks(args: argparse.Namespace) -> int:
    from retro_engine.api import Retro
    from retro_engine.train.checkpoint import find_checkpoint

    if args.limit is not None and args.limit < 1:
        raise UsageError(f"--limit {args.limit} cannot be used", "at least one question is asked")
    checkpoint = find_checkpoint(args.path)
    retro = Retro.from_pretrained(checkpoint, device=args.device)
    results = (
        _eval_questions(args, checkpoint, retro) if args.questions is not None else _eval_lm(args, checkpoint, retro)
    )
    if args.json:
        print(json.dumps({"checkpoint": str(checkpoint), **results}))
        return 0
    for name, values in results.items():
        shown = [
            f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
        ]
        print(f"{name:12} {', '.join(shown)}")
    return 0


def _eval_questions(args: argparse.Namespace, checkpoint: Path, retro: "Retro") -> dict[str, dict[str, Any]]:
    from retro_engine.evaluate.questions import MODES, answer_questions
    from retro_engine.progress import Reporter

    modes = args.modes.split(",") if args.modes else ["retrieved", "gold", "random", "off"]
    for mode in modes:
        if mode not in MODES:
            raise UsageError(f"mode {mode!r} does not exist", "", f"one of {', '.join(MODES)}")
    reporter = Reporter("json" if args.json else "quiet" if args.quiet else "text")
    questions = _open_questions(args, checkpoint, retro, reporter.say)
    if questions.num_left_out:
        reporter.say(f"{questions.num_left_out} questions are longer than the model's sequences: left out")
    say_device(args, retro)
    results = {}
    count = min(args.limit or len(questions.questions), len(questions.questions))
    with reporter.progress("answering", count * len(modes), "questions") as meter:
        for mode in modes:
            answers = answer_questions(retro.model, questions, mode, limit=args.limit, advance=meter.advance)
            results[mode] = answers.summary()
    return results


def _open_questions(
    args: argparse.Namespace, checkpoint: Path, retro: "Retro", say: Callable[[str], None]
) -> "Questions":
    from retro_engine.config import DataConfig
    from retro_engine.data.question_files import load_questions, tell_bad
    from retro_engine.data.questions import Questions
    from retro_engine.data.store import Store
    from retro_engine.train.checkpoint import read_coding
    from retro_engine.train.run_data import question_search, run_config

    try:
        data = run_config(checkpoint, args.overrides, needed=() if args.index else ("store",)).model.data
    except MissingInputError:  # a checkpoint apart from its run
        if args.index is None:
            raise
        data = DataConfig()
    if args.index is None and data.store is None:
        raise UsageError("there is no store", "it has the documents of the questions", "--index STORE")
    stores = [Store(path) for path in (args.index or [str(data.store)])]
    read_coding(checkpoint, stores[0].chunk_size).check(*(store.coding for store in stores))
    config = retro.model.config
    rows, bad = load_questions(args.questions, data.question_template)
    tell_bad(rows, bad, args.questions, None if args.strict else say)
    search = question_search(stores, args.retriever, config.r)
    length = config.encoder_seq_length
    K, r = config.num_neighbors, config.r
    return Questions(rows, stores[0], args.questions, length, K, r, "data", search, num_set_aside=len(bad))


def _eval_lm(args: argparse.Namespace, checkpoint: Path, retro: "Retro") -> dict[str, dict[str, Any]]:
    from retro_engine.data.store import Store
    from retro_engine.generate.generator import Generator
    from retro_engine.interop.lm_eval_model import run_tasks
    from retro_engine.retrieval.search import Retriever
    from retro_engine.train.run_data import run_databases

    retriever = None
    if retro.model.config.retrieval and not args.no_retrieval:
        stores = [Store(path) for path in args.index] if args.index else run_databases(checkpoint)
        retriever = Retriever(stores, args.retriever)
    generator = Generator(retro.model, retro.tokenizer, retriever)
    say_device(args, retro)
    return run_tasks(generator, args.lm_eval.split(","), args.lm_eval_path, args.limit)


def eval_in_prompt(
    args: argparse.Namespace, retro: "Retro", sequences: "Sequences | Questions", batches: int, reporter: "Reporter"
) -> "DocumentLosses":
    """The same decoder with retrieved text in its prompt, on the same documents."""
    from retro_engine.data.batches import Sequences
    from retro_engine.evaluate.in_prompt import evaluate_in_prompt

    if not isinstance(sequences, Sequences) or sequences.table is None:
        raise UsageError(
            "--in-prompt has no neighbors to read", "the run has no neighbor table", "retro eval a RETRO's run"
        )
    with reporter.progress("evaluating neighbors in the prompt", batches, "sequences") as meter:
        return evaluate_in_prompt(
            retro.model, sequences, retro.tokenizer.token_bytes(), args.limit, meter.advance, args.precision
        )


def add_word_perplexity(
    args: argparse.Namespace, results: "dict[str, DocumentLosses]", summary: dict[str, dict[str, Any]]
) -> None:
    """exp(nats of the share / words of the file): comparable between tokenizers, as WikiText-103's papers report it."""
    from retro_engine.evaluate.perplexity import count_words, word_perplexity

    if args.limit is not None:
        raise UsageError("--words needs the whole share", "its words are those of all documents", "leave --limit out")
    words = count_words(Path(args.words))
    for mode, losses in results.items():
        summary[mode] |= {"word_perplexity": word_perplexity(losses, words), "words": words}
