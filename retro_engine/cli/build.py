"""`retro embed`, `index`, `neighbors`, and `build`, which is all three: from chunks to a neighbor table; `retro encode`: what a
model reads of them.
"""

import argparse
from typing import TYPE_CHECKING, Any

from retro_engine.cli import flags
from retro_engine.cli.summaries import of_table, print_summary
from retro_engine.errors import UsageError

if TYPE_CHECKING:
    from retro_engine.data.neighbor_table import NeighborTable
    from retro_engine.data.store import Store
    from retro_engine.retrieval.executor import Executor
    from retro_engine.retrieval.search import Building

CEILING_CHUNKS = 8  # of the sequences in which the copy ceiling is measured
EMBEDDER = "minilm"  # of embed --retriever dense


def add(commands: flags.Commands) -> None:
    sub = flags.command(commands, "index", run_index, "index a store for a retriever")
    sub.add_argument("store")
    _add_indexing(sub)
    sub = flags.command(commands, "embed", run_embed, "vectors of a store's chunks")
    sub.add_argument("store")
    sub.add_argument("--retriever", default="hash", metavar="NAME", help=f"{flags.RETRIEVER_HELP} (default hash)")
    _add_embedding(sub)
    for name, about in (("neighbors", "fill a store's neighbor table"), ("build", "embed, index and neighbors")):
        _add_neighbors(flags.command(commands, name, run_neighbors, about))
    about = "what a model reads of a store's chunks, encoded once"
    sub = flags.command(commands, "encode", run_encode, about, flags.IN_FRONT)
    sub.add_argument("path", metavar="RUN", help=flags.RUN_HELP)
    sub.add_argument("store", metavar="STORE")
    sub.add_argument("--out", "-o", metavar="FOLDER", help="default: beside the store, where it is read by itself")
    flags.add_in_front(sub)
    _add_executor(sub)


def _add_neighbors(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("query", metavar="STORE")
    sub.add_argument("--stores", nargs="+", metavar="STORE", help="to retrieve from (default: the store itself)")
    sub.add_argument("--source-weights", nargs="+", type=float, metavar="W", help="one for each of --stores, above 0")
    _add_indexing(sub)
    sub.add_argument("--k", type=int, default=20, help="neighbors kept a chunk")
    sub.add_argument("--name", help="the table's name (default: the retriever's)")
    sub.add_argument("--keep-overlaps", action="store_true", help="keep neighbors that overlap (for r <= m)")
    near = "leave out neighbors that hold more of the chunk, in runs of 13 tokens"
    sub.add_argument("--near-duplicates", type=float, metavar="SHARE", help=near)
    leak = "for held-out documents leave out neighbors that state more of the next chunk, in runs of 8"
    sub.add_argument("--leak-limit", type=float, metavar="SHARE", help=leak)
    few = "leave out neighbors that have fewer of the chunk's different tokens"
    sub.add_argument("--least-shared", type=float, metavar="SHARE", help=few)
    sub.add_argument("--rerank", action="store_true", help="the neighbor that has most of them first")


def _add_indexing(sub: argparse.ArgumentParser) -> None:
    """Flags of the commands that build indexes."""
    flags.add_retriever(sub)
    sub.add_argument("--fusion", nargs=2, type=float, default=[1.0, 1.0], metavar="W", help="hybrid: lexical, dense")
    sub.add_argument("--faiss", default="auto", metavar="FACTORY", help="auto, by size, or Faiss' factory string")
    sub.add_argument("--metric", default="auto", choices=["auto", "ip", "l2"], help="ip (auto) or distance")
    flags.add_reading(sub)
    _add_embedding(sub)


def _add_embedding(sub: argparse.ArgumentParser) -> None:
    """Flags of the commands that build vectors, and in what processes."""
    sub.add_argument("--dtype", default="auto", choices=["auto", "fp32", "bf16"], help="of a model; auto measures")
    sub.add_argument("--pooling", default="model", choices=["model", "mean"], help="the model's own, or mean of tokens")
    sub.add_argument("--query-prompt", metavar="TEXT", help="put before queries (default: the model's own)")
    sub.add_argument("--document-prompt", metavar="TEXT", help="put before chunks (default: the model's own)")
    _add_executor(sub)


def _add_executor(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--executor", default="inline", help="inline, processes or ray")
    sub.add_argument("--workers", type=int, metavar="N", help="processes or Ray tasks at once (default: one a core)")
    sub.add_argument("--yes", action="store_true", help="do not ask before long work")


def _embedding(args: argparse.Namespace) -> dict[str, Any]:
    """What `_add_embedding`'s flags choose of the vectors."""
    prompts = {"query_prompt": args.query_prompt, "document_prompt": args.document_prompt}
    return {"precision": args.dtype, "pooling": args.pooling, **prompts}


def _executor(args: argparse.Namespace) -> "Executor":
    from retro_engine.retrieval.executor import Executor

    return Executor(args.executor, args.workers)


def _building(args: argparse.Namespace, retriever: str) -> "Building":
    """How `_add_indexing`'s flags build what is missing for a retriever."""
    from retro_engine.retrieval.search import Building

    if min(args.fusion) < 0 or max(args.fusion) <= 0:
        raise UsageError(f"--fusion {args.fusion} cannot be used", "two weights, none below 0, not both 0")
    analyzer = flags.reading(args)
    if analyzer is not None and retriever not in ("bm25", "hybrid"):
        raise UsageError(
            f"--stemmer and --stop-words do not apply to --retriever {retriever}",
            "bm25 alone reads words",
            "leave them out",
        )
    return Building(
        executor=_executor(args),
        reporter=flags.reporter(args),
        factory=args.faiss,
        metric=args.metric,
        embedder=args.embedder,
        fusion=tuple(args.fusion),
        choices=_embedding(args),
        analyzer=analyzer,
    )


def run_index(args: argparse.Namespace) -> int:
    from retro_engine.data.store import Store
    from retro_engine.retrieval.neighbors import say_index_cost
    from retro_engine.retrieval.search import halves, make_index, named

    retriever = named(args.retriever, args.embedder)
    store, building = Store(args.store), _building(args, retriever)
    for half in halves(retriever, args.embedder):
        say_index_cost(store, half, building.reporter)
        flags.print_result(args, make_index(store, half, building).summary())
    return 0


def run_embed(args: argparse.Namespace) -> int:
    from retro_engine.data.store import Store
    from retro_engine.retrieval.search import check_retriever, named
    from retro_engine.retrieval.vectors import build_vectors

    retriever = named(args.retriever, EMBEDDER)
    check_retriever(retriever)
    if retriever in ("bm25", "hybrid"):
        raise UsageError(
            f"--retriever {retriever} has no vectors", "embed makes them for hash or a model", "retro index"
        )
    vectors = build_vectors(Store(args.store), retriever, _executor(args), flags.reporter(args), **_embedding(args))
    flags.print_result(args, vectors.summary())
    return 0


def run_encode(args: argparse.Namespace) -> int:
    from pathlib import Path

    from retro_engine.api import Retro
    from retro_engine.data.store import Store
    from retro_engine.generate.encode_store import encode_store
    from retro_engine.generate.open_model import OpenedModel

    out, store = None if args.out is None else Path(args.out), Store(args.store)
    retro = Retro.from_pretrained(args.path)
    if flags.settle_reading(args, retro, has_something=True):
        flags.read_in_front(args, retro, store.chunk_size)
    opened = OpenedModel(folder=retro.folder, model=retro.model, tokenizer=retro.tokenizer, generation={})
    made = encode_store(opened, store, out, _executor(args), flags.reporter(args))
    flags.print_result(args, {"folder": str(made.folder), **made.summary()})
    return 0


def run_neighbors(args: argparse.Namespace) -> int:
    from retro_engine.config import DataConfig
    from retro_engine.data.store import Store
    from retro_engine.retrieval.neighbors import Filters, build_neighbors, share_without_neighbors
    from retro_engine.retrieval.search import named

    query, retriever = Store(args.query), named(args.retriever, args.embedder)
    table = build_neighbors(
        query,
        flags.open_stores(args.stores) if args.stores else [query],
        retriever,
        args.k,
        args.name,
        merge_overlaps=not args.keep_overlaps,
        building=_building(args, retriever),
        weights=args.source_weights,
        filters=Filters(
            args.near_duplicates,
            args.leak_limit,
            DataConfig().splits_string,
            least_shared=args.least_shared,
            reranks=args.rerank,
        ),
    )
    without, worth = share_without_neighbors(table), _worth(args, table, query)
    result = {"table": str(table.folder), **table.summary(), "share_without_neighbors": without, **worth}
    print_summary(args, result, *of_table(table, without))
    return 0


def _worth(args: argparse.Namespace, table: "NeighborTable", query: "Store") -> dict[str, float]:
    """What could be copied on held-out documents, before anyone trains; and says it."""
    from retro_engine.config import DataConfig
    from retro_engine.data.batches import Sequences, describe_copies, split_documents
    from retro_engine.retrieval.ceiling import copy_ceiling, describe_ceiling
    from retro_engine.retrieval.overlap import repeated_share

    shares = split_documents(query, DataConfig().splits_string)
    if not len(shares["valid"]):
        return {}
    length, say = CEILING_CHUNKS * query.chunk_size, flags.reporter(args).say
    heldout = Sequences(query, shares["valid"], length, table, min(2, args.k), database_documents=shares["train"])
    (ceiling, count), repeated = copy_ceiling(heldout), repeated_share(heldout)
    say(describe_ceiling(ceiling, count, repeated))
    if (copies := describe_copies(heldout, Sequences(query, shares["train"], length))) is not None:
        say(copies)
    return {"copy_ceiling": ceiling, "repeated_share": repeated}
