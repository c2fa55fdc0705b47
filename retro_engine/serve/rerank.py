"""Documents of one request in the order of what they have to do with a query: POST /v1/rerank, as Jina's and Cohere's clients ask.

By the library's embedder where it has one that reads meaning, else by BM25 over the documents that were sent (each is a text of a
collection that they make up: a word that all of them have says nothing).
"""

import secrets
from typing import Annotated

import numpy as np
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from retro_engine.library.documents import MAX_QUERY_CHARACTERS
from retro_engine.library.library import Library
from retro_engine.retrieval.analyzer import Analyzer
from retro_engine.retrieval.bm25 import idf, term_score
from retro_engine.serve.api_error import ApiError
from retro_engine.serve.limits import Strict, parse, read_json
from retro_engine.serve.prompts import check_model_name
from retro_engine.serve.request_context import limits_of, long, service_of
from retro_engine.serve.service import Service
from retro_engine.serve.tokens import embed_texts
from retro_engine.serve.work import Check

MAX_DOCUMENTS = 1000


class DocumentText(Strict):
    """A document as an object."""

    text: str


class Rerank(Strict):
    """The body of POST /v1/rerank."""

    model: str | None = None
    query: str = Field(min_length=1, max_length=MAX_QUERY_CHARACTERS)
    documents: Annotated[list[str | DocumentText], Field(min_length=1, max_length=MAX_DOCUMENTS, fail_fast=True)]
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = True


async def rerank(request: Request) -> Response:
    """The documents, best first, each with its place in the request and its score."""
    service, limits = service_of(request), limits_of(request)
    body = parse(Rerank, await read_json(request, limits, limits.documents_bytes))
    check_model_name(service, body.model or service.name, service.embedder_name)
    if not body.query.strip():
        raise ApiError(400, "the query is empty: it holds no text", "query")
    texts = [one if isinstance(one, str) else one.text for one in body.documents]
    scores_U, tokens = await long(request, _scores, service, body.query, texts)
    order = np.argsort(-scores_U, kind="stable")[: body.top_n]
    results = []
    for place in order.tolist():
        document = {"document": {"text": texts[place]}} if body.return_documents else {}
        results.append({"index": place, "relevance_score": round(float(scores_U[place]), 6), **document})
    about = {"scorer": service.embedder_name or "bm25"}
    usage = {"total_tokens": tokens, "prompt_tokens": tokens}
    head = {"id": f"rerank-{secrets.token_hex(12)}", "object": "list", "model": service.embedder_name or service.name}
    return JSONResponse({**head, "results": results, "usage": usage, "retro": about})


def _scores(service: Service, query: str, texts: list[str], check: Check) -> tuple[np.ndarray, int]:
    """Of each text, and the tokens of them all."""
    tokens = sum(map(len, service.tokenizer.encode_batch([query, *texts])))
    check()
    if service.embedder_name is not None:
        vectors = embed_texts(service, [query, *texts], check)
        return vectors[1:] @ vectors[0], tokens
    library = service.library
    analyzer = library.file.analyzer if type(library) is Library else Analyzer()  # that of replicas is elsewhere
    return bm25_scores(analyzer, query, texts), tokens


def bm25_scores(analyzer: Analyzer, query: str, texts: list[str]) -> np.ndarray:
    """[U]: of each text for a query, with the statistics of these texts."""
    found = analyzer.terms(texts)
    wanted = analyzer.query(query)
    owners = np.repeat(np.arange(len(texts)), np.diff(found.ends, prepend=0))
    is_wanted = np.isin(found.hashes, wanted)
    places = np.searchsorted(wanted, found.hashes[is_wanted])
    owners, counts = owners[is_wanted], found.counts[is_wanted].astype(np.float64)
    weights = idf(np.bincount(places, minlength=len(wanted)).astype(np.float64), len(texts))
    average = max(1.0, float(found.lengths.mean()))
    values = term_score(weights[places], counts, found.lengths[owners], average)
    return np.bincount(owners, values, minlength=len(texts))
