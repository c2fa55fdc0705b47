"""What commands say at their end: for people a few lines and the next command, for programs (--json) all of it as JSON."""

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retro_engine.data.neighbor_table import NeighborTable
    from retro_engine.data.store import Store

DEFAULT_CHUNK = 64  # tokens: a model's, where nothing is said


def print_summary(
    args: argparse.Namespace, result: dict[str, Any], lines: Sequence[str], commands: Sequence[str] = ()
) -> None:
    """`commands`: what one would type next; left out with --quiet."""
    if args.json:
        print(json.dumps(result))
        return
    print("\n".join(lines))
    if commands and not args.quiet:
        print("\n".join(["next:", *(f"  {command}" for command in commands)]))


def quoted(path: str | Path) -> str:
    """A path as one types it."""
    return shlex.quote(str(path))


def of_store(store: "Store", out: Path) -> tuple[list[str], list[str]]:
    counts = store.counts
    tokens = f"{counts['tokens']:,} tokens in {store.num_rows:,} chunks of {store.chunk_size}"
    lines = [f"{out}: {store.num_documents:,} documents, {tokens}; a tokenizer of {store.vocab_size:,} entries"]
    return lines, [f"retro build {quoted(out)}"]


def of_table(table: "NeighborTable", without: float) -> tuple[list[str], list[str]]:
    """`without`: share of the chunks that have no neighbor."""
    name = table.manifest["retriever"].get("name", "")
    chunks = f"{table.query.num_rows:,} chunks, {without:.2%} of them without any"
    lines = [f"{table.folder}: {table.num_neighbors} neighbors a chunk by {name}, for {chunks}"]
    store, size = table.query.folder, table.query.chunk_size
    more = "" if size == DEFAULT_CHUNK else f" model.chunk_size={size}"
    named = quoted(f"model.data.store={store}")
    run = quoted(f"runs/{store.resolve().name}")
    return lines, [f"retro train --preset tiny --out {run} {named}{more}"]


def of_import(out: str, result: dict[str, Any]) -> tuple[list[str], list[str]]:
    reads = "reads neighbors" if result["retrieval"] else "a plain decoder"
    size = (
        f"{result['parameters'] / 1e6:,.1f} M parameters, {result['layers']} layers, {result['vocab_size']:,} entries"
    )
    lines = [f"{out}: {size}; {reads}; from {result['source']}"]
    where = quoted(out)
    return lines, [
        f"retro prepare YOUR/FILES --out store/mine --tokenizer {where} && retro build store/mine",
        f"retro generate {where} 'The prompt' --stores store/mine --show-neighbors",
    ]
