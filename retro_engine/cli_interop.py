"""The commands `retro import`, `retro export` and `retro explain`."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from retro_engine.errors import MissingInputError, StoreError, UsageError

Command = Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]
DTYPES = ("float32", "bfloat16", "float16")


def add_interop(command: Command) -> None:
    sub = command("import", _import, "a model of another project as a checkpoint: Hugging Face, GGUF, Megatron, NeMo")
    sub.add_argument("path", metavar="PATH", help="a folder, or a .gguf, .nemo or .pt file")
    sub.add_argument("--out", "-o", required=True, metavar="DIR", help="the checkpoint's folder")
    sub.add_argument("--format", default="auto", help="auto, hf, gguf, nemo, mcore, megatron")
    sub.add_argument("--tokenizer", metavar="PATH", help="a tokenizer.json or its folder (default: the model's own)")
    sub.add_argument("--metadata", metavar="FILE", help="JSON: settings that a Megatron checkpoint does not have in it")
    sub.add_argument("--dtype", default="float32", choices=DTYPES)

    sub = command("export", _export, "a checkpoint as a Hugging Face folder")
    sub.add_argument("path", metavar="RUN", help="a run's folder or a checkpoint")
    sub.add_argument("--out", "-o", required=True, metavar="DIR")

    sub = command("explain", _explain, "what each neighbor did to a text: change of log-probability")
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
    imported = import_model(args.path, args.format, args.tokenizer, metadata, DTYPES[args.dtype])
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
    from retro_engine.train.loop import run_databases

    if args.k is not None and args.k < 1:
        raise UsageError(f"--k {args.k} cannot be used", "at least one neighbor is explained")
    checkpoint = find_checkpoint(args.path)
    retro = Retro.from_pretrained(checkpoint)
    retriever = None
    if args.neighbors is None and retro.model.config.retrieval:
        stores = [Store(path) for path in args.index] if args.index else run_databases(checkpoint)
        retriever = Retriever(stores, args.retriever)
    generator = Generator(retro.model, retro.tokenizer, retriever)
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
        print(f"{change:+9.3f}  {hit.store}/{hit.document} {hit.title}: {' '.join(hit.text.split())[:120]}")
        print(f"{'':11}most on {shown}")
    return 0
