"""`retro prepare`: files to tokens and chunks; `retro merge`: several stores as one."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from retro_engine.cli import flags
from retro_engine.cli.summaries import of_store, print_summary
from retro_engine.errors import UsageError

if TYPE_CHECKING:
    from retro_engine.data.store import Store


def add(commands: flags.Commands) -> None:
    sub = flags.command(commands, "prepare", run, "files -> tokens and chunks")
    sub.add_argument("inputs", nargs="+", metavar="IN", help=flags.INPUTS_HELP)
    sub.add_argument("--out", "-o", metavar="DIR", help="the store (default store/NAME of the first input)")
    sub.add_argument("--tokenizer", default="auto", help="auto trains one; or a tokenizer.json or a folder with one")
    end_token = "of --tokenizer: ends a document (default: its files say which)"
    sub.add_argument("--end-token", metavar="TOKEN", help=end_token)
    sub.add_argument("--vocab-size", type=int, help="entries of a trained tokenizer (default by corpus size)")
    sub.add_argument("--chunk-size", type=int, default=64, metavar="M", help="tokens a chunk")
    flags.add_format(sub)
    split = "texts at blank lines (joined to 2,000 bytes) or headings; auto: one large file alone"
    sub.add_argument("--split", default="auto", choices=["auto", "blank-lines", "headings", "none"], help=split)
    sub.add_argument("--text-key", default="text", help="key of the text in JSON lines")
    sub.add_argument("--errors", default="strict", choices=["strict", "replace"], help="replace repairs bad UTF-8")
    sub.add_argument("--strict", action="store_true", help="stop at the first row that cannot be used")
    sub.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes that encode (default 1, with a thread a core)"
    )
    sub = flags.command(commands, "merge", run_merge, "stores of one tokenizer -> one store")
    sub.add_argument("stores", nargs="+", metavar="STORE", help="in the order of their documents")
    sub.add_argument("--out", "-o", metavar="DIR", required=True, help="the new store")
    what = "leave out documents that say what earlier ones say (exact), or nearly (minhash)"
    sub.add_argument("--deduplicate", default="none", choices=["none", "exact", "minhash"], help=what)
    runs = "of minhash: share of their runs of 5 tokens that near copies have in common (default .8)"
    sub.add_argument("--threshold", type=float, metavar="P", help=runs)


def run(args: argparse.Namespace) -> int:
    from retro_engine.data.corpus import Reader
    from retro_engine.data.prepare import prepare

    name = "stdin" if args.inputs[0] == "-" else Path(args.inputs[0]).resolve().name.split(".")[0]
    out = Path(args.out or f"store/{name}")
    if any(given.endswith(".idx") for given in args.inputs):
        store = _of_megatron(args, out)
        flags.print_result(args, {"store": str(out), **store.summary()})
        return 0
    store = prepare(
        args.inputs,
        out,
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size,
        chunk_size=args.chunk_size,
        reader=Reader(args.text_key, args.errors, format=args.format, split=args.split),
        is_strict=args.strict,
        say=flags.reporter(args).say,
        end_token=args.end_token,
        workers=args.workers,
    )
    print_summary(args, {"store": str(out), **store.summary()}, *of_store(store, out))
    return 0


def _of_megatron(args: argparse.Namespace, out: Path) -> "Store":
    """NAME.idx files hold tokens: what is for text is refused."""
    from retro_engine.data.megatron_corpus import store_from_megatron
    from retro_engine.data.tokenizer import Tokenizer

    if not all(given.endswith(".idx") for given in args.inputs):
        raise UsageError(
            "files of text and Megatron's .idx files cannot be mixed", "", "prepare each, then retro merge"
        )
    if args.tokenizer == "auto":
        raise UsageError("--tokenizer is missing", ".idx files hold the ids of one", "name the one they were made with")
    of_text = args.vocab_size is not None or args.strict or args.errors != "strict" or args.text_key != "text"
    if of_text or args.format is not None or args.split != "auto" or args.workers != 1:
        names = "--vocab-size, --text-key, --errors, --strict, --format, --split and --workers"
        raise UsageError(f"{names} cannot be used", ".idx files hold no text")
    return store_from_megatron(
        [Path(given) for given in args.inputs], out, Tokenizer.load(args.tokenizer, args.end_token), args.chunk_size
    )


def run_merge(args: argparse.Namespace) -> int:
    from retro_engine.data.merge import merge
    from retro_engine.data.store import Store

    if args.threshold is not None and args.deduplicate != "minhash":
        raise UsageError(
            f"--threshold {args.threshold} cannot be used", "minhash alone has one", "--deduplicate minhash"
        )
    threshold = 0.8 if args.threshold is None else args.threshold
    stores = [Store(path) for path in args.stores]
    made = merge(stores, Path(args.out), args.deduplicate, threshold, flags.reporter(args).say)
    flags.print_result(args, {"store": args.out, **made.summary()})
    return 0
