"""`retro explain`: what each neighbor did to a text."""

import argparse
import json
from pathlib import Path

from retro_engine.cli import flags
from retro_engine.errors import UsageError


def add(commands: flags.Commands) -> None:
    sub = flags.command(
        commands, "explain", run, "what each neighbor did to a text: change of log-probability", flags.IN_FRONT
    )
    flags.add_device(sub)
    sub.add_argument("path", metavar="RUN", help=flags.RUN_HELP)
    sub.add_argument("prompt")
    sub.add_argument("text", nargs="?", help="what is explained (default: what the model generates)")
    flags.add_neighbors(sub)
    flags.add_in_front(sub)
    flags.add_sources(sub)
    sub.add_argument("--k", type=int, help="neighbors to retrieve (default: the model's)")
    sub.add_argument("--html", metavar="FILE", help="write the heat map as a page")


def run(args: argparse.Namespace) -> int:
    from retro_engine.api import Retro
    from retro_engine.data import files
    from retro_engine.generate.explain import explain
    from retro_engine.generate.generator import Generator
    from retro_engine.report import heat_map_page

    if args.k is not None and args.k < 1:
        raise UsageError(f"--k {args.k} cannot be used", "at least one neighbor is explained")
    retro = Retro.from_pretrained(args.path, device=args.device)
    reads = flags.settle_reading(args, retro, bool(args.stores or args.neighbors))
    source = flags.open_retriever(args, retro) if reads and args.neighbors is None else None
    if reads:
        flags.read_in_front(args, retro, None if source is None else source.coding.chunk_size)
    generator = Generator(retro.model, retro.tokenizer, source)
    flags.say_device(args, retro)
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
