"""`retro prepare`: files to tokens and chunks."""

import argparse
import os
from pathlib import Path

from retro_engine.cli import flags
from retro_engine.cli.summaries import of_store, print_summary
from retro_engine.errors import UsageError


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
    sub.add_argument("--workers", type=int, help="threads of the tokenizer")


def run(args: argparse.Namespace) -> int:
    if args.workers is not None:
        if args.workers < 1:
            raise UsageError(f"--workers {args.workers} cannot be used", "at least one thread encodes")
        os.environ["RAYON_NUM_THREADS"] = str(args.workers)
    from retro_engine.data.corpus import Reader
    from retro_engine.data.prepare import prepare

    name = "stdin" if args.inputs[0] == "-" else Path(args.inputs[0]).resolve().name.split(".")[0]
    out = Path(args.out or f"store/{name}")
    store = prepare(
        args.inputs,
        out,
        args.tokenizer,
        args.vocab_size,
        args.chunk_size,
        Reader(args.text_key, args.errors, format=args.format, split=args.split),
        args.strict,
        flags.reporter(args).say,
        args.end_token,
    )
    print_summary(args, {"store": str(out), **store.summary()}, *of_store(store, out))
    return 0
