"""`retro import` and `retro export`: models of other projects as checkpoints, and the reverse."""

import argparse
import json
from pathlib import Path

from retro_engine.cli import flags
from retro_engine.cli.summaries import of_import, print_summary
from retro_engine.errors import MissingInputError, StoreError, UsageError

OF_READER = (
    ("--name", str, "NAME", "of the reader (default: the folder's)"),
    ("--template", str, "TEXT", "of the prompt, with {question} in it (default: the run's)"),
    ("--passage", str, "TEXT", "what is read of a passage, with {text} and perhaps {title} in it (default: its text)"),
    ("--absent", str, "TEXT", "the answer that means: not in the documents (default: the run's)"),
    ("--k", int, "N", "passages that are read (default: the run's)"),
    ("--chunk-size", int, "N", "tokens of the chunks that are searched (default: what the run's passages need)"),
    ("--max-new-tokens", int, "N", "of an answer (default: 32)"),
    ("--card", str, "FILE", "Markdown on data, licence and figures, for the reader's README.md"),
)
MOST_CARD_BYTES = 1 << 16


def add(commands: flags.Commands) -> None:
    about = "a model of another project as a checkpoint: Hugging Face, GGUF, Megatron, NeMo"
    sub = flags.command(commands, "import", run_import, about)
    sub.add_argument("path", metavar="PATH", help="a folder, or a .gguf, .nemo or .pt file")
    sub.add_argument("--out", "-o", required=True, metavar="DIR", help="the checkpoint's folder")
    sub.add_argument("--format", default="auto", help="auto, hf, gguf, nemo, mcore, megatron")
    sub.add_argument("--tokenizer", metavar="PATH", help="a tokenizer.json or its folder (default: the model's own)")
    sub.add_argument("--end-token", metavar="TOKEN", help="ends a document (default: the model's files say which)")
    sub.add_argument("--metadata", metavar="FILE", help="JSON: settings that a Megatron checkpoint does not have in it")
    sub.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="of the weights")

    about = "a checkpoint as a Hugging Face folder, or a run's adapters as a reader for retro ask"
    sub = flags.command(commands, "export", run_export, about)
    sub.add_argument("path", metavar="RUN", help=flags.RUN_HELP)
    sub.add_argument("--out", "-o", required=True, metavar="DIR")
    base = "as a reader beside this base: a .gguf file, or a name that retro fetch knows"
    sub.add_argument("--reader", metavar="BASE", help=base)
    for flag, kind, metavar, about in OF_READER:
        sub.add_argument(flag, type=kind, metavar=metavar, help=about)


def run_import(args: argparse.Namespace) -> int:
    from retro_engine.interop.imports import DTYPES, import_model, write_checkpoint

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
    imported = import_model(
        args.path,
        args.format,
        tokenizer=args.tokenizer,
        metadata=metadata,
        dtype=DTYPES[args.dtype],
        end_token=args.end_token,
    )
    write_checkpoint(imported, args.out, args.path)
    for note in imported.notes:
        flags.reporter(args).say(f"note: {note}")
    config = imported.model.config
    count = imported.model.num_parameters
    result = {
        "checkpoint": args.out,
        "source": imported.source,
        "parameters": count,
        "layers": config.dec_num_layers,
        "vocab_size": config.vocab_size,
        "retrieval": config.retrieval,
    }
    print_summary(args, result, *of_import(args.out, result))
    return 0


def run_export(args: argparse.Namespace) -> int:
    named = {flag[2:].replace("-", "_"): flag for flag, *_ in OF_READER}
    given = {name: value for name in named if (value := getattr(args, name)) is not None}
    if args.reader is None:
        if given:
            what = ", ".join(named[name] for name in given)
            raise UsageError(f"{what} cannot be used", "it is of a reader", "--reader BASE")
        from retro_engine.interop.exports import export_model

        folder = export_model(args.path, args.out)
    else:
        from retro_engine.data.inputs import read_bounded
        from retro_engine.readers.make_reader import make_reader

        if "card" in given:
            given["card"] = read_bounded(Path(given["card"]), MOST_CARD_BYTES).decode("utf-8", "replace")
        folder = make_reader(args.path, args.out, args.reader, **given)
    flags.print_result(args, {"folder": str(folder)})
    return 0
