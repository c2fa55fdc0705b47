"""Hits in answers: one form in generation, explanations and searches."""

from collections.abc import Sequence
from typing import Any

from retro_engine.retrieval.hit import Hit


def neighbors_json(hits: Sequence[Hit]) -> list[dict[str, Any]]:
    """document, title, chunk (of the document; -1 = given), score, text, continuation, source (empty = given)."""
    return [{**vars(hit), "score": round(float(hit.score), 6)} for hit in hits]
