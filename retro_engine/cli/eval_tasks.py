"""`retro eval --questions` and `--lm-eval`: right answers instead of bits."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from retro_engine.cli import flags
from retro_engine.errors import MissingInputError, UsageError

if TYPE_CHECKING:
    from retro_engine.api import Retro
    from retro_engine.data.questions import Questions

Results = dict[str, dict[str, Any]]


def add_flags(sub: argparse.ArgumentParser) -> None:
    questions = "exact match and F1 on questions (JSON, TSV, Parquet)"
    sub.add_argument("--questions", metavar="FILE", help=questions)
    sub.add_argument("--strict", action="store_true", help="questions: stop at the first row that cannot be used")
    sub.add_argument("--lm-eval", metavar="TASKS", help="tasks of lm-evaluation-harness, with commas between them")
    sub.add_argument("--lm-eval-path", metavar="DIR", help="task files of yours")
    sub.add_argument("--no-retrieval", action="store_true", help="tasks: retrieval off")
    flags.add_encodings(sub)


def run(args: argparse.Namespace) -> int:
    from retro_engine.api import Retro

    if args.encodings and args.lm_eval is None:
        raise UsageError("--encodings is not for --questions", "each is read once", "leave it out")
    retro = Retro.from_pretrained(args.path, device=args.device)
    has_something = args.stores is not None and not args.no_retrieval
    reads = flags.settle_reading(args, retro, has_something)
    results = _eval_questions(args, retro, reads) if args.questions is not None else _eval_lm(args, retro, reads)
    if args.json:
        print(json.dumps({"checkpoint": str(retro.folder), **results}))
        return 0
    for name, values in results.items():
        shown = [f"{key} {x:.4f}" if isinstance(x, float) else f"{key} {x}" for key, x in values.items()]
        print(f"{name:12} {', '.join(shown)}")
    return 0


def _eval_questions(args: argparse.Namespace, retro: "Retro", reads: bool) -> Results:
    from retro_engine.evaluate.perplexity import check_modes
    from retro_engine.evaluate.questions import MODES, answer_questions

    modes = args.modes.split(",") if args.modes else ["retrieved", "gold", "random", "off"]
    check_modes(modes, MODES)
    report = flags.reporter(args)
    questions, absent = _open_questions(args, retro, reads)
    if questions.num_left_out:
        report.say(f"{questions.num_left_out} questions are longer than the model's sequences: left out")
    flags.say_device(args, retro)
    results = {}
    count = min(args.limit or len(questions.questions), len(questions.questions))
    with report.progress("answering", count * len(modes), "questions") as meter:
        for mode in modes:
            answers = answer_questions(
                retro.model, questions, mode, limit=args.limit, advance=meter.advance, absent=absent
            )
            results[mode] = answers.summary()
    return results


def _open_questions(args: argparse.Namespace, retro: "Retro", reads: bool) -> "tuple[Questions, str | None]":
    """The questions, and what the model was taught to say where the passages do not hold the answer."""
    from retro_engine.config import DataConfig
    from retro_engine.data.question_files import load_questions, tell_bad
    from retro_engine.data.questions import Questions
    from retro_engine.retrieval.search import Building
    from retro_engine.train.checkpoint import read_coding
    from retro_engine.train.run_data import question_search, run_config

    try:
        data = run_config(retro.folder, args.overrides, needed=() if args.stores else ("store",)).model.data
    except MissingInputError:  # a checkpoint apart from its run
        if args.stores is None:
            raise
        data = DataConfig()
    if args.stores is None and data.store is None:
        raise UsageError("there is no store", "it has the documents of the questions", "--stores STORE")
    stores = flags.open_stores(args.stores or [str(data.store)])
    read_coding(retro.folder, stores[0].chunk_size).check(*(store.coding for store in stores))
    rows, bad = load_questions(args.questions, data.question_template)
    tell_bad(rows, bad, args.questions, None if args.strict else flags.reporter(args).say)
    if reads:
        flags.read_in_front(args, retro, stores[0].chunk_size)
    c = retro.model.config
    search = question_search(stores, args.retriever, c.r, Building(embedder=args.embedder))
    length, K = c.encoder_seq_length, c.num_neighbors
    absent = data.question_absent_answer if data.question_absent else None
    questions = Questions(
        rows,
        stores[0],
        path=args.questions,
        sequence_length=length,
        num_neighbors=K,
        retrieved_length=c.r,
        source="data",
        search=search,
        num_set_aside=len(bad),
    )
    return questions, absent


def _eval_lm(args: argparse.Namespace, retro: "Retro", reads: bool) -> Results:
    from retro_engine.interop.lm_eval_model import run_tasks

    source = flags.open_retriever(args, retro) if reads and not args.no_retrieval else None
    if source is not None:
        flags.read_in_front(args, retro, source.coding.chunk_size)
    generator = flags.open_generator(args, retro, source)
    flags.say_device(args, retro)
    return run_tasks(generator, args.lm_eval.split(","), args.lm_eval_path, args.limit)
