"""The command `retro`: one sub-command a stage. Flags are about the run; all else is settings (key=value).

Exit codes: 0 ok, 1 bug (trace saved), 2 usage or settings, 3 input missing, corrupt or incompatible,
4 optional dependency missing, 5 out of disk, memory or device, 6 quality gate failed, 130/143 interrupted.
"""

import argparse
import io
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retro_engine.errors import GateError, MissingInputError, RetroError, StoppedError, UsageError, nearest, typed

if TYPE_CHECKING:
    from contextlib import ExitStack

    from retro_engine.api import Retro
    from retro_engine.config import Config
    from retro_engine.data.store import Store
    from retro_engine.generate.request import Generation, Request
    from retro_engine.model.retro import RetroModel
    from retro_engine.progress import Reporter
    from retro_engine.retrieval.hit import NeighborSource
    from retro_engine.retrieval.search import Building

READS_ALL = ("demo", "train", "config")
READS = {  # settings that the other commands read, beside --device's trainer.accelerator; what ends with a point is a section
    "mup": ("model.", "seed", "trainer.accelerator"),
    "eval": ("model.data.", "model.encoder_seq_length", "model.chunk_size"),
    "generate": (
        "inference.", "checkpoint_dir", "checkpoint_name", "prompt", "neighbors", "cluster_type", "megatron_amp_O2",
        "tensor_model_parallel_size", "pipeline_model_parallel_size", "retro_model_file", "trainer.devices",
        "trainer.num_nodes", "trainer.precision",
    ),
}  # fmt: skip
RETRIEVER_HELP = "bm25, hash, minilm, hybrid, or a SentenceTransformers model: a folder or a hub id"
CEILING_CHUNKS = 8  # of the sequences in which the copy ceiling is measured

# Every heavy import is inside the command that needs it: `retro --help` answers at once.


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    from retro_engine.cli_docs import with_url
    from retro_engine.train.__main__ import parse

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names that are not UTF-8 go out as the bytes that they are
    parser = _parser()
    args = parse(parser, with_url(list(sys.argv[1:] if argv is None else argv)))
    if args.command is None:
        parser.print_help()
        return 2
    try:
        _check_overrides(args)
        return args.run(args)
    except KeyboardInterrupt:
        return _fail(args, StoppedError(130, "what was published before is whole", "run the same command again"))
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except Exception as error:
        known = typed(error)
        return _bug(error) if known is None else _fail(args, known)


def _check_overrides(args: argparse.Namespace) -> None:
    """Raise UsageError for a setting that the command does not read: nothing that is typed is ignored."""
    from retro_engine.config import asked_accelerator, named_keys

    if args.command in READS_ALL or getattr(args, "plan", False):
        return
    reads = (*READS.get(args.command, ()), *(("trainer.accelerator",) if hasattr(args, "device") else ()))
    for text in args.overrides:
        (key,) = named_keys([text], with_environment=False) or (text,)
        if not any(key == name or name.endswith(".") and key.startswith(name) for name in reads):
            what = f"it reads {', '.join(name + '...' * name.endswith('.') for name in reads)}" if reads else ""
            raise UsageError(
                f"{text}: retro {args.command} takes no {'such setting' if reads else 'settings'}",
                what,
                f"retro {args.command} --help",
            )
    if hasattr(args, "device"):
        args.device = asked_accelerator(args.overrides, args.device)


def _fail(args: argparse.Namespace, error: RetroError) -> int:
    if getattr(args, "json", False):
        event = {"event": "error", "what": error.what, "why": error.why, "do": error.do, "exit_code": error.exit_code}
        print(json.dumps(event), file=sys.stderr)
    else:
        print(f"error: {error}", file=sys.stderr)
    return error.exit_code


def _bug(error: Exception) -> int:
    """The last resort: keep the trace, name the file."""
    import tempfile
    import traceback

    with tempfile.NamedTemporaryFile("w", prefix="retro-trace-", suffix=".txt", delete=False) as file:
        file.write("".join(traceback.format_exception(error)))
    print(
        f"error: {type(error).__name__}: {error}\n  this is a bug in retro-engine\n  the trace is in {file.name}",
        file=sys.stderr,
    )
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="retro", description="Text in, a retrieval-enhanced language model out.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], about: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about)
        sub.set_defaults(run=run)
        if name != "train":
            sub.add_argument("--json", action="store_true", help="events and results as JSON lines")
            sub.add_argument("--quiet", action="store_true")
        return sub

    sub = command("demo", _demo, "the whole pipeline on a small corpus, ends with what retrieval gives")
    sub.add_argument(
        "what",
        nargs="?",
        default="facts",
        metavar="facts|python-docs|PATH",
        help="facts, python-docs, or files of yours",
    )
    sub.add_argument("--out", "-o", default="runs/demo", metavar="DIR")
    sub.add_argument("--steps", type=int, help="training steps (facts 1,500, text 800); fewer for a trial run")
    sub.add_argument("--init", default="retrieval_ready", choices=["retrieval_ready", "standard"], help="facts only")
    sub.add_argument("--preset", default="tiny", help="text: tiny, or small for a run of an hour")
    sub.add_argument("--seed", type=int, default=1234)
    sub.add_argument("--no-gate", action="store_true", help="facts: exit 0 also when the proof fails")

    sub = command("prepare", _prepare, "files -> tokens and chunks")
    sub.add_argument(
        "inputs",
        nargs="+",
        metavar="IN",
        help="text, HTML, JSON, TSV, CSV, Parquet, compressed or not; folders; - for standard input",
    )
    sub.add_argument("--out", "-o", metavar="DIR", help="the store (default store/NAME of the first input)")
    sub.add_argument("--tokenizer", default="auto", help="auto trains one; or a tokenizer.json or a folder with one")
    sub.add_argument(
        "--end-token", metavar="TOKEN", help="of --tokenizer: ends a document (default: its files say which)"
    )
    sub.add_argument("--vocab-size", type=int, help="entries of a trained tokenizer (default by corpus size)")
    sub.add_argument("--chunk-size", type=int, default=64, metavar="M", help="tokens a chunk")
    sub.add_argument("--text-key", default="text", help="key of the text in JSON lines")
    sub.add_argument("--errors", default="strict", choices=["strict", "replace"], help="replace repairs bad UTF-8")
    sub.add_argument("--strict", action="store_true", help="stop at the first row that cannot be used")
    sub.add_argument("--workers", type=int, help="threads of the tokenizer")

    for name, about in (("index", "index a store for a retriever"), ("embed", "vectors of a store's chunks")):
        sub = command(name, _index if name == "index" else _embed, about)
        sub.add_argument("store")
        _add_building(sub, default="bm25" if name == "index" else "hash")

    for name, about in (("neighbors", "fill a store's neighbor table"), ("build", "embed, index and neighbors")):
        sub = command(name, _neighbors, about)
        sub.add_argument("query", metavar="STORE")
        sub.add_argument(
            "--database", nargs="+", metavar="STORE", help="stores to retrieve from (default: the store itself)"
        )
        sub.add_argument("--weights", nargs="+", type=float, metavar="W", help="one for each database, above 0")
        _add_building(sub, default="bm25")
        sub.add_argument("--k", type=int, default=20, help="neighbors kept a chunk")
        sub.add_argument("--name", help="the table's name (default: the retriever's)")
        sub.add_argument("--keep-overlaps", action="store_true", help="keep neighbors that overlap (for r <= m)")
        sub.add_argument(
            "--near-duplicates",
            type=float,
            metavar="SHARE",
            help="leave out neighbors that hold more of the chunk, in runs of 13 tokens",
        )
        sub.add_argument(
            "--leak-limit",
            type=float,
            metavar="SHARE",
            help="for held-out documents leave out neighbors that state more of the next chunk, in runs of 8",
        )

    from retro_engine.train.__main__ import add_arguments

    sub = command("train", _train, "train a model; also torchrun -m retro_engine.train")
    add_arguments(sub)

    sub = command("mup", _mup, "width scaling: write base widths, check activations, sweep learning rates")
    sub.add_argument("what", choices=["base", "check", "sweep"])
    sub.add_argument("store", nargs="?", help="sweep: trained on; check: instead of random tokens")
    sub.add_argument("--out", "-o", help="base: the YAML file; check, sweep: a folder (default runs/mup)")
    sub.add_argument("--preset", help="a model instead of the small one that check and sweep scale")
    sub.add_argument("--widths", default="64,128,256,512", help="values of model.hidden_size; all else in proportion")
    sub.add_argument("--keep-head-width", action="store_true", help="more heads with the width, not wider ones")
    sub.add_argument("--rates", help="sweep: learning rates (default 2^-13 ... 2^-5)")
    sub.add_argument("--seeds", type=int, default=3)
    sub.add_argument("--steps", type=int, help="check: 5, sweep: 300")

    sub = command("eval", _eval, "bits per byte with retrieval on, off, random or given")
    sub.add_argument("path", metavar="RUN", help="a run's folder or a checkpoint")
    _add_device(sub)
    sub.add_argument("--share", default="valid", choices=["train", "valid", "test", "all"], help="which documents")
    sub.add_argument("--modes", help="of on,off,random,given (default on,off,random)")
    sub.add_argument("--neighbors", action="append", metavar="TEXT", help="a given neighbor; may be repeated")
    sub.add_argument("--limit", type=int, help="batches a mode")
    sub.add_argument("--precision", choices=["32", "bf16-mixed"], default="32", help="of the model's products")
    sub.add_argument(
        "--leak-limit", type=float, metavar="SHARE", help="neighbors that state more of the next chunk are missing"
    )
    sub.add_argument("--against", nargs="+", metavar="RUN", default=[], help="plain decoders to compare with, paired")
    sub.add_argument("--fail-if", metavar="EXPR", help="exit 6 when true, like 'bpb_on>bpb_off'")

    from retro_engine.cli_interop import add_interop, add_task_flags

    add_task_flags(sub)

    sub = command("generate", _generate, "continue a prompt, reading neighbors")
    sub.add_argument("path", nargs="?", metavar="RUN", help="a run's folder or a checkpoint (or checkpoint_dir=)")
    _add_device(sub)
    sub.add_argument("prompt", nargs="?")
    sub.add_argument("-i", "--interactive", action="store_true", help="one prompt a line from standard input")
    sub.add_argument("--index", nargs="+", metavar="STORE", help="stores to retrieve from (default: the run's)")
    sub.add_argument("--retriever", default="bm25", help=RETRIEVER_HELP)
    sub.add_argument("--embedder", default="minilm", metavar="MODEL", help="hybrid: its dense half (default minilm)")
    sub.add_argument("--library", metavar="FOLDER", help="a live library to read from; with --index, from both")
    sub.add_argument("--mode", default="lexical", help="of the library's search: lexical, dense or hybrid")
    sub.add_argument("--fusion", nargs=2, type=float, default=[1.0, 1.0], metavar="W", help="weights: library, stores")
    sub.add_argument("--weights", choices=["fp32", "bf16", "int8"], help="type of the weights (default: as saved)")
    sub.add_argument("--neighbors", action="append", metavar="TEXT", help="a given neighbor; may be repeated")
    sub.add_argument("--no-retrieval", action="store_true")
    sub.add_argument("--show-neighbors", action="store_true")
    sub.add_argument("--seed", type=int, default=0)

    from retro_engine.cli_docs import add_docs

    add_docs(command("docs", _doctor, "a live library: add, list, get, rm, reset, query, import"))

    add_interop(command)

    from retro_engine.cli_serve import add_accounts, add_serve

    add_serve(command("serve", _doctor, "OpenAI's API, live documents and a web page on a trained model"))
    for kind, about in (("users", "who may sign in to the page"), ("keys", "keys of the API")):
        add_accounts(command(kind, _doctor, f"{about}: add, remove, list"), kind)

    sub = command("report", _report, "one HTML page on a run: what retrieval gave, how it trained, what it read")
    sub.add_argument("path", metavar="RUN")
    _add_device(sub)
    sub.add_argument("--share", default="valid", choices=["train", "valid", "test", "all"], help="which documents")
    sub.add_argument(
        "--against", action="append", default=[], metavar="NAME=RUN", help="a plain decoder to compare with"
    )
    sub.add_argument("--limit", type=int, default=32, help="batches a mode")
    sub.add_argument("--all", action="store_true", help="every batch")

    sub = command(
        "inspect", _inspect, "what a store, table, index, library or checkpoint is; --plan: what training would take"
    )
    sub.add_argument("path", nargs="?")
    sub.add_argument("--plan", action="store_true", help="memory, FLOPs and communication of a step on H100s, on paper")
    sub.add_argument("--preset", help="--plan: tiny, small, base, mcore or nemo")
    sub.add_argument("--config", "-c", metavar="FILE", help="--plan: YAML settings")
    sub.add_argument("--processes", type=int, metavar="N", help="--plan: GPUs (default: one per shared matrix)")
    sub.add_argument("--verify", action="store_true", help="compare every file with its checksum")
    sub.add_argument("--samples", type=int, default=0, metavar="N", help="chunks to print, with their neighbors")

    sub = command("config", _config, "show the settings, list the keys, or compare two files")
    sub.add_argument("what", choices=["show", "keys", "diff"])
    sub.add_argument("arguments", nargs="*", metavar="ARG", help="keys: a section; diff: two files; show: key=value")
    sub.add_argument("--preset")
    sub.add_argument("--config", "-c", metavar="FILE")

    command("doctor", _doctor, "what is installed and which implementations will be used")
    return parser


def _add_device(sub: argparse.ArgumentParser) -> None:
    from retro_engine.train.__main__ import DEVICES

    sub.add_argument("--device", choices=DEVICES, help="a GPU where there is one (auto), or trainer.accelerator=")


def _add_building(sub: argparse.ArgumentParser, default: str) -> None:
    """Flags of the commands that build vectors and indexes."""
    from retro_engine.cli_docs import add_reading

    sub.add_argument("--retriever", default=default, help=f"{RETRIEVER_HELP} (default {default})")
    sub.add_argument("--embedder", default="minilm", metavar="MODEL", help="hybrid: its dense half (default minilm)")
    sub.add_argument("--fusion", nargs=2, type=float, default=[1.0, 1.0], metavar="W", help="hybrid: weights of both")
    sub.add_argument("--index", default="auto", metavar="FACTORY", help="auto, by size, or Faiss' factory string")
    sub.add_argument("--metric", default="auto", choices=["auto", "ip", "l2"], help="ip (auto) or distance")
    sub.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"], help="of a model; auto measures")
    sub.add_argument("--pooling", default="model", choices=["model", "mean"], help="the model's own, or mean of tokens")
    sub.add_argument("--query-prompt", metavar="TEXT", help="put before queries (default: the model's own)")
    sub.add_argument("--document-prompt", metavar="TEXT", help="put before chunks (default: the model's own)")
    add_reading(sub)
    sub.add_argument("--executor", default="inline", help="inline, processes or ray")
    sub.add_argument("--workers", type=int, metavar="N", help="processes or Ray tasks at once (default: one a core)")
    sub.add_argument("--yes", action="store_true", help="do not ask before long work")


def _building(args: argparse.Namespace) -> "Building":
    from retro_engine.cli_docs import reading
    from retro_engine.retrieval.executor import Executor
    from retro_engine.retrieval.search import Building

    if min(args.fusion) < 0 or max(args.fusion) <= 0:
        raise UsageError(f"--fusion {args.fusion} cannot be used", "two weights, none below 0, not both 0")
    choices = {key: getattr(args, key) for key in ("precision", "pooling", "query_prompt", "document_prompt")}
    analyzer = reading(args)
    if analyzer is not None and args.retriever not in ("bm25", "hybrid"):
        raise UsageError(
            f"--stemmer and --stop-words do not apply to --retriever {args.retriever}",
            "bm25 alone reads words",
            "leave them out",
        )
    return Building(
        Executor(args.executor, args.workers),
        _reporter(args),
        args.index,
        args.metric,
        args.embedder,
        tuple(args.fusion),
        choices,
        analyzer,
    )


def _reporter(args: argparse.Namespace) -> "Reporter":
    from retro_engine.progress import Reporter

    mode = "json" if args.json else "quiet" if args.quiet else "text"
    return Reporter(mode, is_yes=getattr(args, "yes", True))


def _demo(args: argparse.Namespace) -> int:
    reporter = _reporter(args)
    out = Path(args.out)
    if args.steps is not None and args.steps < 1:
        raise UsageError(f"--steps {args.steps} cannot be used", "at least one step is trained")
    for text in args.overrides:
        key, _, value = text.lstrip("+").partition("=")
        if key in ("trainer.devices", "trainer.num_nodes") and value != "1":
            raise UsageError(f"{text} cannot be used", "the demo trains in one process", "retro train --nproc N")
    if args.what == "facts":
        from retro_engine.demo.facts import run_facts

        figures = run_facts(out, args.steps, args.init, args.seed, not args.no_gate, reporter, args.overrides)
        run, index, prompt = out / "run", out / "store" / "notes", "These lines are about"
    else:
        from retro_engine.demo.text import figures_verdict, run_text

        if args.what != "python-docs" and not Path(args.what).exists():
            raise MissingInputError(f"{args.what} does not exist", "", "retro demo facts, python-docs or PATH")
        figures = run_text(args.what, out, args.steps, args.seed, args.overrides, reporter, args.preset)
        run, index, prompt = out / "retro", out / "store", "The"
        reporter.say(f"\n{figures_verdict(figures)}")
    if args.json:
        print(json.dumps(figures))
    if run.exists():
        reporter.say(
            f"\nnext:\n  retro generate {run} '{prompt}' --index {index} --show-neighbors\n  retro eval {run}\n"
            "  retro prepare YOUR/FILES --out store/mine && retro build store/mine"
        )
    return 0


def _prepare(args: argparse.Namespace) -> int:
    if args.workers is not None:
        if args.workers < 1:
            raise UsageError(f"--workers {args.workers} cannot be used", "at least one thread encodes")
        os.environ["RAYON_NUM_THREADS"] = str(args.workers)
    from retro_engine.data.corpus import Reader
    from retro_engine.data.prepare import prepare

    name = "stdin" if args.inputs[0] == "-" else Path(args.inputs[0]).resolve().name.split(".")[0]
    out = Path(args.out or f"store/{name}")
    reader = Reader(args.text_key, args.errors)
    say = _reporter(args).say
    store = prepare(
        args.inputs, out, args.tokenizer, args.vocab_size, args.chunk_size, reader, args.strict, say, args.end_token
    )
    _print(args, {"store": str(out), **store.summary()})
    return 0


def _index(args: argparse.Namespace) -> int:
    from retro_engine.data.store import Store
    from retro_engine.retrieval.neighbors import say_index_cost
    from retro_engine.retrieval.search import halves, make_index

    store, building = Store(args.store), _building(args)
    for half in halves(args.retriever, args.embedder):
        say_index_cost(store, half, building.reporter)
        _print(args, make_index(store, half, building).summary())
    return 0


def _embed(args: argparse.Namespace) -> int:
    from retro_engine.data.store import Store
    from retro_engine.retrieval.search import check_retriever
    from retro_engine.retrieval.vectors import build_vectors

    check_retriever(args.retriever)
    if args.retriever in ("bm25", "hybrid"):
        raise UsageError(
            f"--retriever {args.retriever} has no vectors", "embed makes them for hash or a model", "retro index"
        )
    store, building = Store(args.store), _building(args)
    vectors = build_vectors(store, args.retriever, building.executor, building.reporter, **building.choices)
    _print(args, vectors.summary())
    return 0


def _neighbors(args: argparse.Namespace) -> int:
    from retro_engine.config import DataConfig
    from retro_engine.data.batches import Sequences, describe_copies, split_documents
    from retro_engine.data.store import Store
    from retro_engine.retrieval.ceiling import copy_ceiling, describe_ceiling
    from retro_engine.retrieval.neighbors import Filters, build_neighbors, share_without_neighbors
    from retro_engine.retrieval.overlap import repeated_share

    query = Store(args.query)
    databases = [Store(path) for path in args.database] if args.database else [query]
    reporter = _reporter(args)
    filters = Filters(args.near_duplicates, args.leak_limit, DataConfig().splits_string)
    table = build_neighbors(
        query,
        databases,
        args.retriever,
        args.k,
        args.name,
        reporter,
        not args.keep_overlaps,
        _building(args),
        args.weights,
        filters,
    )
    shares = split_documents(query, DataConfig().splits_string)
    result = {"table": str(table.folder), **table.summary(), "share_without_neighbors": share_without_neighbors(table)}
    if len(shares["valid"]):
        length = CEILING_CHUNKS * query.chunk_size
        heldout = Sequences(query, shares["valid"], length, table, min(2, args.k), database_documents=shares["train"])
        result["copy_ceiling"], count = copy_ceiling(heldout)
        result["repeated_share"] = repeated_share(heldout)
        reporter.say(describe_ceiling(result["copy_ceiling"], count, result["repeated_share"]))
        trained = Sequences(query, shares["train"], length)
        if (copies := describe_copies(heldout, trained)) is not None:
            reporter.say(copies)
    _print(args, result)
    return 0


def _train(args: argparse.Namespace) -> int:
    from retro_engine.train.__main__ import run

    return run(args)


def _mup(args: argparse.Namespace) -> int:
    from retro_engine.config import load_config, named_keys
    from retro_engine.train import mup

    if args.what == "base":
        if args.out is None:
            raise UsageError("retro mup base has no file to write", "", "--out FILE.yaml")
        model = load_config(args.overrides, args.preset).model
        _print(args, {"shape_file": args.out, **mup.write_base(model, Path(args.out))})
        return 0
    widths = [int(width) for width in _numbers("--widths", args.widths)]
    for flag, value in (("--seeds", args.seeds), ("--steps", args.steps)):
        if value is not None and value < 1:
            raise UsageError(f"{flag} {value} cannot be used", "at least 1")
    if len(widths) < 2 and args.what == "check":
        raise UsageError(f"--widths {args.widths} cannot be used", "a slope takes two widths", "--widths 64,128,256")
    if args.what == "sweep" and args.store is None:
        raise UsageError("retro mup sweep has nothing to train on", "", "retro mup sweep STORE")
    if args.what == "sweep" and "model.optim.lr" in named_keys(args.overrides, with_environment=False):
        raise UsageError("model.optim.lr cannot be used", "a sweep trains at many rates", "--rates 1e-3,2e-3")
    out, reporter = Path(args.out or "runs/mup"), _reporter(args)
    config = mup.open_config(args.overrides, args.preset, args.store)
    if args.what == "check":
        steps = args.steps or 5
        check = mup.coordinate_check(config, widths, steps, args.seeds, args.keep_head_width, reporter)
        mup.save_check(check, config, steps, out)
        print(
            json.dumps({"slopes": check.slopes(True), "without": check.slopes(False)}) if args.json else check.table()
        )
        check.gate()
        return 0
    rates = _numbers("--rates", args.rates) if args.rates else [2.0**power for power in range(-13, -4)]
    result = mup.sweep(config, widths, rates, args.seeds, args.steps or 300, out, args.keep_head_width, reporter)
    print(json.dumps(result.summary()) if args.json else result.table())
    return 0


def _numbers(flag: str, text: str) -> list[float]:
    """'64,128' -> different numbers above 0."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number < float("inf") for number in numbers) or len(set(numbers)) < len(numbers):
        raise UsageError(f"{flag} {text} cannot be used", "different numbers above 0, with commas between them")
    return numbers


def _eval(args: argparse.Namespace) -> int:
    if args.questions is not None or args.lm_eval is not None:
        from retro_engine.cli_interop import eval_tasks

        return eval_tasks(args)
    from retro_engine.api import Retro
    from retro_engine.evaluate.compare import gain_of
    from retro_engine.evaluate.perplexity import Given, evaluate, show_interval
    from retro_engine.generate.generator import encode_neighbors
    from retro_engine.model.device import describe_device
    from retro_engine.train.checkpoint import find_checkpoint
    from retro_engine.train.run_data import open_evaluation

    checkpoint = find_checkpoint(args.path)
    retro = Retro.from_pretrained(checkpoint, device=args.device)
    reporter = _reporter(args)
    sequences = open_evaluation(checkpoint, retro.model.config, args.overrides, args.share, reporter.say)
    modes = (args.modes or ("on,off,random" if retro.model.config.retrieval else "off")).split(",")
    is_plain = not retro.model.config.retrieval
    if is_plain and (args.neighbors or set(modes) - {"off"}):
        raise UsageError(
            "this model is a plain decoder (model.retrieval=false)", "it reads no neighbors", "--modes off"
        )
    _check_limit(args.limit)
    given = None
    if args.neighbors:
        given = Given(*encode_neighbors(retro.tokenizer, args.neighbors, retro.model.config.r))
        modes += ["given"] * ("given" not in modes)
    for mode in modes:
        if mode not in ("on", "off", "random", "given"):
            raise UsageError(
                f"mode {mode!r} does not exist", nearest(mode, ["on", "off", "random", "given"]), "on,off,random,given"
            )
    if "given" in modes and given is None:
        raise UsageError("mode given needs neighbors", "", "--neighbors TEXT")
    reporter.say(describe_device(retro.device))
    batches = len(sequences.in_order()) if args.limit is None else min(8 * args.limit, len(sequences.in_order()))
    with reporter.progress("evaluating", batches * len(modes), "sequences") as meter:
        results = evaluate(
            retro.model,
            sequences,
            retro.tokenizer.token_bytes(),
            modes,
            limit=args.limit,
            precision=args.precision,
            advance=meter.advance,
            given=given,
            leak_limit=args.leak_limit,
        )
    if args.in_prompt:
        from retro_engine.cli_interop import eval_in_prompt

        results["prompt"] = eval_in_prompt(args, retro, sequences, batches, reporter)
    summary: dict[str, Any] = {mode: result.summary() for mode, result in results.items()}
    if args.words is not None:
        from retro_engine.cli_interop import add_word_perplexity

        add_word_perplexity(args, results, summary)
    gains = {}
    for path in args.against:
        other = _plain_decoder(path, retro)
        with reporter.progress(f"evaluating {path}", batches, "sequences") as meter:
            losses = evaluate(other, sequences, retro.tokenizer.token_bytes(), ["off"], limit=args.limit, precision=args.precision, advance=meter.advance)  # fmt: skip
        gains[path] = gain_of(results[modes[0]], losses["off"])
        summary[path] = losses["off"].summary()
        results[path] = losses["off"]
    if args.json:
        print(json.dumps({"checkpoint": str(checkpoint), "share": args.share, **summary, "gains": gains}))
    else:
        first = next(iter(summary.values()))
        print(
            f"{checkpoint}: {first['documents']} documents, {first['tokens']:,} tokens, {first['bytes']:,} bytes ({args.share})"
        )
        print(f"{'retrieval':12}{'bits per byte':>15}{'95 % interval':>20}{'perplexity':>12}{'loss':>9}")
        for mode, s in summary.items():
            interval = show_interval(*results[mode].interval(), ".4f")
            print(f"{mode:12}{s['bits_per_byte']:>15.4f}{interval:>20}{s['perplexity']:>12.2f}{s['loss']:>9.4f}")
        for path, gain in gains.items():
            interval = show_interval(gain["low"], gain["high"], ".1%")
            print(f"{modes[0]} saves {gain['gain']:.1%} {interval} against {path}")
        for mode, s in summary.items():
            if "word_perplexity" in s:
                print(f"{mode:12} perplexity per word {s['word_perplexity']:.2f}")
    if args.fail_if and _holds(args.fail_if, summary):
        raise GateError(f"--fail-if {args.fail_if} is true", "", "see the figures above")
    return 0


def _plain_decoder(path: str, retro: "Retro") -> "RetroModel":
    """The model of a run that reads no neighbors, with the tokenizer of `retro`."""
    from retro_engine.api import Retro
    from retro_engine.train.checkpoint import find_checkpoint

    other = Retro.from_pretrained(find_checkpoint(path), device=retro.device)
    if other.model.config.retrieval:
        raise UsageError(
            f"{path} is a RETRO", "--against takes plain decoders (model.retrieval=false)", "retro eval it"
        )
    if other.tokenizer.json != retro.tokenizer.json:
        raise UsageError(
            f"{path} has another tokenizer", "losses are compared token by token", "train it on the same store"
        )
    return other.model


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit} cannot be used", "at least one batch is evaluated")


def _holds(expression: str, summary: dict[str, dict[str, Any]]) -> bool:
    """LEFT < > <= >= RIGHT over bpb_MODE, loss_MODE, perplexity_MODE and numbers."""
    names = {
        f"{short}_{mode}": s[key]
        for mode, s in summary.items()
        for short, key in (("bpb", "bits_per_byte"), ("loss", "loss"), ("perplexity", "perplexity"))
    }
    match = re.fullmatch(r"\s*([\w.]+)\s*(<=|>=|<|>)\s*([\w.]+)\s*", expression)
    try:
        if match is None:
            raise ValueError(expression)
        left, right = (float(str(names.get(name, name))) for name in (match[1], match[3]))
    except ValueError:
        raise UsageError(
            f"--fail-if {expression!r} cannot be read", f"names: {', '.join(names)}", "like 'bpb_on>bpb_off'"
        ) from None
    return {"<": left < right, ">": left > right, "<=": left <= right, ">=": left >= right}[match[2]]


def _generate(args: argparse.Namespace) -> int:
    import contextlib

    from retro_engine.api import Retro
    from retro_engine.config import load_config
    from retro_engine.generate.generator import Generator
    from retro_engine.model.device import describe_device
    from retro_engine.train.checkpoint import find_checkpoint

    asked = load_config(args.overrides)  # NeMo's commands name the checkpoint, the prompt and the neighbors here
    for key, value in (("devices", asked.trainer.devices), ("num_nodes", asked.trainer.num_nodes)):
        if value not in (None, 1, -1):
            raise UsageError(
                f"trainer.{key}={value} cannot be used", "generation runs in one process", f"trainer.{key}=1"
            )
    if asked.trainer.precision != "auto":
        _reporter(args).say(
            "note: trainer.precision means nothing here: --weights fp32, bf16 or int8 chooses the weights' type"
        )
    prompt = args.prompt if args.prompt is not None else asked.prompt
    args.neighbors = args.neighbors or asked.neighbors
    if (prompt is None) != args.interactive:
        raise UsageError(
            "there is no prompt, or one too many", "", "retro generate RUN 'The prompt', or retro generate RUN -i"
        )
    checkpoint = find_checkpoint(args.path or _named_checkpoint(asked))
    retro = Retro.from_pretrained(checkpoint, weights=args.weights, device=args.device)
    with contextlib.ExitStack() as resources:
        is_retrieving = retro.model.config.retrieval and not args.no_retrieval and not args.neighbors
        source = _neighbor_source(args, checkpoint, resources) if is_retrieving else None
        generator = Generator(retro.model, retro.tokenizer, source)
        _reporter(args).say(describe_device(retro.device))
        for text in [prompt] if prompt is not None else map(str.rstrip, sys.stdin):
            if text or not args.interactive:
                request = _request(args, retro, text)
                _print_generation(args, request, generator.generate_all([request])[0])
    return 0


def _neighbor_source(args: argparse.Namespace, checkpoint: Path, resources: "ExitStack") -> "NeighborSource":
    """The stores, the library, or both; the library stays open as long as `resources`."""
    from retro_engine.library.library import Library
    from retro_engine.library.live import LiveRetriever
    from retro_engine.retrieval.search import Building, Retriever
    from retro_engine.train.run_data import run_databases

    static = None
    if args.index or not args.library:
        stores = _stores(args.index) if args.index else run_databases(checkpoint)
        for store in stores:
            _ = store.tokenizer  # read at the first search: what is damaged shows before the work begins
        static = Retriever(stores, args.retriever, building=Building(embedder=args.embedder))
    if not args.library:
        assert static is not None
        return static
    return LiveRetriever(
        resources.enter_context(Library(args.library, is_read_only=True)), static, args.fusion, args.mode
    )


def _request(args: argparse.Namespace, retro: "Retro", prompt: str) -> "Request":
    from retro_engine.config import load_config
    from retro_engine.generate.request import Request
    from retro_engine.generate.sampling import Sampling

    defaults = [
        (f"inference.{name}", getattr(retro.sampling, name)) for name in ("greedy", "temperature", "top_k", "top_p")
    ]
    settings = load_config([*defaults, *args.overrides], say=lambda note: None).inference
    if settings.greedy and not retro.sampling.greedy:  # asked for here: how the run samples is of no use
        settings = load_config(args.overrides, say=lambda note: None).inference
    inference = settings.retro_inference
    sampling = Sampling(
        greedy=settings.greedy,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        seed=args.seed,
        repetition_penalty=settings.repetition_penalty,
        min_tokens=settings.min_tokens_to_generate,
    )
    has_logprobs = settings.compute_logprob or settings.all_probs
    return Request(
        prompt,
        settings.tokens_to_generate,
        sampling=sampling,
        neighbors=[] if args.no_retrieval else args.neighbors,
        num_neighbors=inference.retro_num_neighbors,
        retrieved_length=inference.retro_gpt_retrieved_length,
        stop=tuple(settings.end_strings),
        logprobs=(retro.model.config.vocab_size if settings.all_probs else 0) if has_logprobs else None,
        echo=has_logprobs,
        add_bos=settings.add_BOS,
        pad_prompt=settings.pad_prompt,
        passed_over=0 if inference.reuse_top else inference.ft_neighbours,
    )


def _print_generation(args: argparse.Namespace, request: "Request", out: "Generation") -> None:
    for note in out.notes:
        _reporter(args).say(f"note: {note}")
    if args.json:
        segments = [{"text": s.text, "neighbors": [hit.to_json() for hit in s.neighbors]} for s in out.segments]
        result = {"prompt": request.prompt, "text": out.text, "segments": segments, "finish_reason": out.finish_reason}
        if out.logprobs is not None:
            result["logprobs"] = [vars(logprob) for logprob in out.logprobs]
        print(json.dumps(result))
        return
    print(out.text if request.echo else f"{request.prompt}{out.text}")
    for logprob in out.logprobs or []:
        print(f"   {'' if logprob.logprob is None else f'{logprob.logprob:.4f}':>10}  {logprob.text!r}")
    for segment in out.segments if args.show_neighbors else []:
        print(f"\n-- {segment.text!r} could read:")
        for hit in segment.neighbors:
            shown = " ".join(hit.text.split())
            print(f"   {hit.score:8.2f}  {hit.where}: {shown[:160]}")


def _named_checkpoint(config: "Config") -> Path:
    """NeMo's checkpoint_dir and checkpoint_name: a run's folder, and the name of one of its checkpoints or of none."""
    from retro_engine.progress import note

    if config.checkpoint_dir is None:
        raise UsageError("there is no model", "RUN or checkpoint_dir= names one", "retro generate RUN 'The prompt'")
    folder = Path(config.checkpoint_dir)
    named = [folder / part / str(config.checkpoint_name) for part in ("", "checkpoints")]
    found = next((path for path in named if config.checkpoint_name and path.is_dir()), None)
    if found is None and config.checkpoint_name:
        note(f"{folder} has no checkpoint {config.checkpoint_name}: the newest one is read")
    return found or folder


def _report(args: argparse.Namespace) -> int:
    from retro_engine.report import write_report

    _check_limit(args.limit)
    decoders = {}
    for text in args.against:
        name, separator, path = text.partition("=")
        if not separator or not name or name in ("on", "off", "random"):
            raise UsageError(
                f"--against {text} cannot be read", "a name of your choice and a run", "--against plain=runs/plain"
            )
        decoders[name] = Path(path)
    limit = None if args.all else args.limit
    print(write_report(Path(args.path), decoders, args.share, limit, _reporter(args), args.device))
    return 0


def _stores(paths: Sequence[str]) -> "list[Store]":
    from retro_engine.data.store import Store

    return [Store(path) for path in paths]


def _plan(args: argparse.Namespace) -> int:
    from retro_engine.config import load_config
    from retro_engine.train.plan import plan, table

    config = load_config(args.overrides, args.preset, args.config)
    processes = args.processes if args.processes is not None else config.model.tensor_model_parallel_size
    figures = plan(config, processes)
    print(json.dumps(figures) if args.json else table(figures))
    return 0


def _inspect(args: argparse.Namespace) -> int:
    if args.plan and args.path is not None:
        raise UsageError(f"{args.path}: --plan takes settings, no path", "", "retro inspect --plan key=value ...")
    if args.plan:
        return _plan(args)
    given = [f"--{flag}" for flag in ("preset", "config", "processes") if getattr(args, flag) is not None]
    if given:
        raise UsageError(f"{given[0]} is a flag of --plan", "", "retro inspect --plan")
    if args.path is None:
        raise UsageError(
            "nothing to inspect was given", "", "retro inspect PATH, or retro inspect --plan key=value ..."
        )
    from retro_engine.data import files
    from retro_engine.data.neighbor_table import NeighborTable
    from retro_engine.data.store import Store
    from retro_engine.library.file import FILE
    from retro_engine.library.library import Library
    from retro_engine.retrieval.index import VectorIndex
    from retro_engine.retrieval.lexical import Bm25Index
    from retro_engine.retrieval.quality import describe_quality, quality
    from retro_engine.retrieval.vectors import Vectors
    from retro_engine.train import checkpoint

    path = Path(args.path)
    if (path / "checkpoints").is_dir() or (path / checkpoint.COMPLETE).exists():
        folder = checkpoint.find_checkpoint(path)
        if args.verify:
            checkpoint.verify(folder)
        _print(args, {"kind": "checkpoint", "path": str(folder), **checkpoint.read_trainer(folder)})
        return 0
    if (path / FILE).is_file():
        with Library(path, is_read_only=True) as library:
            if args.verify:
                library.verify()
            _print(args, {**library.statistics(), **({"verified": True} if args.verify else {})})
        return 0
    if not (path / files.MANIFEST).is_file():
        raise MissingInputError(
            f"{path} is not a store, table, index, library, run or checkpoint", "it has no manifest.json"
        )
    try:
        kind = files.read_json(path / files.MANIFEST).get("kind")
    except (ValueError, AttributeError, OSError):
        kind = "store"  # reading it as one says what is wrong
    query = Store(path.parent.parent if kind in ("neighbors", "index", "embeddings") else path)
    if kind == "neighbors":
        found: Any = NeighborTable(path, query)
    elif kind == "index":
        found = Bm25Index(path, query) if path.name == "bm25" else VectorIndex(path, query)
    else:
        found = Vectors(path, query) if kind == "embeddings" else query
    if args.verify:
        found.verify()
    _print(args, {**found.summary(), **({"verified": True} if args.verify else {})})
    if kind == "neighbors":
        report = quality(found)
        _print(args, report) if args.json else print("\n".join(describe_quality(report)))
    if args.samples and kind in ("neighbors", "store"):
        _print_samples(args.samples, query, found if kind == "neighbors" else None)
    elif args.samples and kind != "checkpoint":
        _print_search_samples(args.samples, query, found)
    return 0


def _print_search_samples(count: int, store: "Store", found: Any) -> None:
    """Some chunks, and what an index finds for them."""
    import numpy as np

    for row in np.linspace(0, store.num_rows - 1, min(count, store.num_rows)).astype(int).tolist():
        print(f"\n{row} {' '.join(store.text(row).split())}")
        if hasattr(found, "vectors"):
            ids, scores = found.search_vectors(found.vectors.rows(row, row + 1), 4)
        elif hasattr(found, "search"):
            ids, scores = found.search([store.text(row)], 4)
        else:
            print(f"    {np.array2string(found.rows(row, row + 1)[0], precision=3, threshold=8)}")
            continue
        for chunk, score in zip(ids[0].tolist(), scores[0].tolist()):
            if chunk >= 0 and chunk != row:
                print(f"    {chunk} {score:.3f} {' '.join(store.text(chunk).split())}")


def _print_samples(count: int, query: "Store", table: Any) -> None:
    import numpy as np

    for row in np.linspace(0, query.num_rows - 1, min(count, query.num_rows)).astype(int):
        identifier, title = query.name(query.document_of(int(row)))
        print(f"\n{row} [{identifier} {title}] {' '.join(query.text(int(row)).split())}")
        for chunk in table.ids(np.array([row]), min(3, table.num_neighbors))[0] if table is not None else []:
            if chunk >= 0:
                store, local = table.locate(int(chunk))
                identifier, title = store.name(store.document_of(local))
                print(f"    {chunk} [{identifier} {title}] {' '.join(store.text(local).split())}")


def _config(args: argparse.Namespace) -> int:
    from retro_engine.config import Config, flat_keys, load_config, to_yaml

    if args.what == "show":
        print(to_yaml(load_config([*args.arguments, *args.overrides], args.preset, args.config)), end="")
    elif args.what == "keys":
        section = args.arguments[0] if args.arguments else ""
        keys = {key: value for key, value in flat_keys(Config()).items() if key.startswith(section)}
        if not keys:
            raise UsageError(
                f"no setting starts with {section}", nearest(section, list(flat_keys(Config()))), "retro config keys"
            )
        for key, value in keys.items():
            print(f"{key} ({type(value).__name__}) = {value}")
    else:
        if len(args.arguments) != 2:
            raise UsageError("config diff compares two files", "", "retro config diff A.yaml B.yaml")
        left, right = (flat_keys(load_config(None, None, file)) for file in args.arguments)
        for key in left:
            if left[key] != right[key]:
                print(f"{key}: {left[key]} -> {right[key]}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    import importlib.metadata
    import platform

    import torch
    from retro_kernels.backend import backend

    from retro_engine import __version__
    from retro_engine.data.loader import has_native_loader

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    packages = (
        "torch",
        "numpy",
        "tokenizers",
        "safetensors",
        "faiss-cpu",
        "bm25s",
        "apsw",
        "numba",
        "tensorboard",
        "sentence-transformers",
        "starlette",
        "uvicorn",
        "ray",
        "pyarrow",
    )
    _print(
        args,
        {
            "retro-engine": __version__,
            "python": platform.python_version(),
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "kernels": backend("cuda" if torch.cuda.is_available() else "cpu"),
            "loader": "C++" if has_native_loader() else "NumPy (no compiler when it was installed)",
            **{package: version(package) for package in packages},
        },
    )
    return 0


def _print(args: argparse.Namespace, result: dict[str, Any]) -> None:
    if args.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key}: {value}")


if __name__ == "__main__":
    sys.exit(main())
