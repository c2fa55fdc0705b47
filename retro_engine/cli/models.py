"""`retro import` and `retro export`: models of other projects as checkpoints, and the reverse."""

import argparse
import json
from pathlib import Path

from retro_engine.cli import flags
from retro_engine.errors import MissingInputError, StoreError


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

    sub = flags.command(commands, "export", run_export, "a checkpoint as a Hugging Face folder")
    sub.add_argument("path", metavar="RUN", help=flags.RUN_HELP)
    sub.add_argument("--out", "-o", required=True, metavar="DIR")


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
    imported = import_model(args.path, args.format, args.tokenizer, metadata, DTYPES[args.dtype], args.end_token)
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
    flags.print_result(args, result)
    return 0


def run_export(args: argparse.Namespace) -> int:
    from retro_engine.interop.exports import export_model

    folder = export_model(args.path, args.out)
    flags.print_result(args, {"folder": str(folder)})
    return 0
