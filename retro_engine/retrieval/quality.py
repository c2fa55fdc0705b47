"""What a neighbor table is worth, measured on a sample of its chunks: similarity, overlap, what is missing.

Letters: Q sampled chunks, K neighbors, R tokens per neighbor.
"""

from typing import Any

import numpy as np

from retro_engine.data.loader import NeighborLoader
from retro_engine.data.neighbor_table import NeighborTable
from retro_engine.retrieval.ceiling import MANY_REPEATED
from retro_engine.retrieval.embed import embed
from retro_engine.retrieval.overlap import NGRAM, stated_shares

SAMPLE_ROWS, SAMPLE_SEED = 1000, 1234
NEIGHBORS = 4  # of each chunk are compared
EDGES = np.linspace(0, 1, 11)


def quality(table: NeighborTable, sample: int = SAMPLE_ROWS) -> dict[str, Any]:
    """Shares and histograms (ten equal bins from 0 to 1) over at most `sample` chunks and four neighbors each.

    `similarity`: cosine of the hashed projections of a chunk and its neighbor. `own_overlap` and `next_overlap`:
    the share of the chunk, and of the one after it, that the neighbor and its continuation hold in runs of 8 tokens.
    """
    query, k = table.query, min(NEIGHBORS, table.num_neighbors)
    rng = np.random.default_rng(SAMPLE_SEED)
    rows = np.sort(rng.choice(query.num_rows, min(sample, query.num_rows), replace=False))
    everything = table.ids(rows, table.num_neighbors)
    ids_QK = everything[:, :k]
    loader = NeighborLoader(table.databases)
    tokens_QKR, lengths_QK = loader.gather(ids_QK, 2 * query.chunk_size)
    own, own_lengths = _chunks(table, rows)
    ends = np.array([query.document_rows(query.document_of(int(row)))[1] for row in rows])
    following, following_lengths = _chunks(table, np.minimum(rows + 1, query.num_rows - 1))
    following_lengths *= rows + 1 < ends
    is_there = ids_QK >= 0
    first_chunk, first_length = tokens_QKR[..., : query.chunk_size], np.minimum(lengths_QK, query.chunk_size)
    near = embed(first_chunk.reshape(-1, query.chunk_size), first_length.reshape(-1)).reshape(*ids_QK.shape, -1)
    similarity = np.einsum("qz,qkz->qk", embed(own, own_lengths), near)
    has_next = is_there & (following_lengths > 0)[:, None]
    shares = {
        "similarity": similarity[is_there],
        "own_overlap": stated_shares(own, own_lengths, tokens_QKR, lengths_QK, NGRAM)[is_there],
        "next_overlap": stated_shares(following, following_lengths, tokens_QKR, lengths_QK, NGRAM)[has_next],
    }
    return {
        "sampled_chunks": len(rows),
        "share_missing": float((everything < 0).mean()),
        "share_without_neighbors": float((everything[:, 0] < 0).mean()),
        "neighbors_a_chunk": float((everything >= 0).sum(1).mean()),
        **{f"mean_{name}": float(values.mean()) if len(values) else 0.0 for name, values in shares.items()},
        **{name: np.histogram(np.clip(values, 0, 1), EDGES)[0].tolist() for name, values in shares.items()},
    }


def describe_quality(report: dict[str, Any]) -> list[str]:
    """The report as lines, histograms as bars."""
    lines = [
        f"sampled {report['sampled_chunks']:,} chunks: {report['share_missing']:.1%} of the neighbors missing, "
        f"{report['share_without_neighbors']:.1%} of the chunks without any"
    ]
    for name in ("similarity", "own_overlap", "next_overlap"):
        counts = report[name]
        total = max(1, sum(counts))
        lines.append(f"{name.replace('_', ' ')}: mean {report[f'mean_{name}']:.3f}")
        lines += [
            f"  {edge:.1f} {'#' * round(40 * count / total):<40} {count / total:.1%}"
            for edge, count in zip(EDGES, counts)
        ]
    follows = report["next_overlap"]
    if follows[-1] > MANY_REPEATED * max(1, sum(follows)):
        lines.append(
            f"WARNING: {follows[-1] / sum(follows):.1%} of the neighbors state nine tenths of the next chunk or more: "
            "duplicates?\n  retro neighbors STORE --near-duplicates .8 --leak-limit .3 --name clean leaves them out"
        )
    return lines


def _chunks(table: NeighborTable, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [rows, m] and lengths [rows] of chunks of the query store."""
    found = [table.query.rows(int(row), int(row) + 1) for row in rows]
    return np.concatenate([t for t, _ in found]), np.concatenate([n for _, n in found]).astype(np.int64)
