"""OpenAI's vector stores: each a namespace of the library, with files as its documents, searched as documents are.

A store is a document of the namespace `vector-stores`, whose title is its name; a file that is added is cut into chunks and found
by the next search. `default` is the library itself: what its documents are, generation reads.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from retro_engine.data.corpus import Document, FieldValue
from retro_engine.library.documents import MAX_QUERY_CHARACTERS
from retro_engine.library.filters import Filter
from retro_engine.library.library import DEFAULT, MAX_LIST, Library
from retro_engine.retrieval.hit import Hit
from retro_engine.serve.api_error import ApiError
from retro_engine.serve.documents import Metadata, check_fields, filter_of, library_of, note_of, query_number
from retro_engine.serve.fields import Name, Value
from retro_engine.serve.limits import Strict, parse, read_json
from retro_engine.serve.request_context import audit, brief, limits_of, service_of, write
from retro_engine.serve.uploads import created, file_of, new_id, page

STORES = "vector-stores"
MAX_FILES = 100  # of one request
MAX_RESULTS = 50
Json = dict[str, Any]
FileIds = Annotated[list[Annotated[str, Field(max_length=128)]], Field(max_length=MAX_FILES, fail_fast=True)]


class CreateStore(Strict):
    """The body of POST /v1/vector_stores. Chunks are the library's; nothing expires."""

    name: str = Field("", max_length=255)
    description: str | None = Field(None, max_length=512)
    file_ids: FileIds | None = None
    metadata: dict[Name, Value] | None = Field(None, max_length=16)
    chunking_strategy: None = None
    expires_after: None = None


class AddFile(Strict):
    """The body of POST /v1/vector_stores/{store}/files."""

    file_id: str = Field(max_length=128)
    attributes: Metadata | None = None
    chunking_strategy: None = None


class NewAttributes(Strict):
    """The body of POST /v1/vector_stores/{store}/files/{file}."""

    attributes: Metadata | None = None


class SearchStore(Strict):
    """The body of POST /v1/vector_stores/{store}/search."""

    query: str | Annotated[list[str], Field(min_length=1, max_length=8, fail_fast=True)]
    max_num_results: int = Field(10, ge=1, le=MAX_RESULTS)
    filters: Json | None = None
    ranking_options: None = None
    rewrite_query: bool | None = None


async def create_store(request: Request) -> Response:
    """A new store, with files if some are named."""
    library, _ = library_of(request)
    body = parse(CreateStore, await read_json(request, limits_of(request)))
    files = [await file_of(request, identifier, "file_ids") for identifier in dict.fromkeys(body.file_ids or ())]
    identifier = new_id("vs_")
    about = json.dumps({"description": body.description, "metadata": body.metadata or {}}, ensure_ascii=False)
    if files:
        await write(request, partial(library.add, namespace=identifier), files)
    await write(request, partial(library.add, namespace=STORES), [Document(identifier, body.name, about)])
    audit(request, "vector_stores.add", ids=[identifier])
    return JSONResponse(await _shown(request, identifier))


async def list_stores(request: Request) -> Response:
    """A page of stores, in the order of their ids."""
    library, _ = library_of(request)
    limit = query_number(request, "limit", 20, MAX_LIST)
    after = request.query_params.get("after", "")
    entries = await brief(request, partial(library.entries, STORES, after=after, limit=limit))
    return JSONResponse(page([await _shown(request, one.id) for one in entries], limit))


async def get_store(request: Request) -> Response:
    return JSONResponse(await _shown(request, request.path_params["store"]))


async def delete_store(request: Request) -> Response:
    """Delete a store with what it took of its files; the files stay."""
    library, _ = library_of(request)
    identifier = request.path_params["store"]
    await check_store(request, identifier)
    if identifier == DEFAULT:
        raise ApiError(400, "default is the library itself: POST /v1/documents/reset empties it", "vector_store_id")
    await write(request, partial(library.delete, namespace=STORES), [identifier])
    await write(request, library.reset, identifier)
    audit(request, "vector_stores.delete", ids=[identifier])
    return JSONResponse({"id": identifier, "object": "vector_store.deleted", "deleted": True})


async def check_store(request: Request, identifier: str) -> Document:
    """What is kept of a store. Raises ApiError 404 where it is not there."""
    library, _ = library_of(request)
    if identifier == DEFAULT:
        return Document(DEFAULT, "the library", "{}")
    found = await brief(request, partial(library.get, namespace=STORES), identifier)
    if found is None:
        raise ApiError(404, f"vector store {identifier[:80]!r} does not exist", "vector_store_id", "store_not_found")
    return found


async def _shown(request: Request, identifier: str) -> Json:
    library, _ = library_of(request)
    found = await check_store(request, identifier)
    about, counts = json.loads(found.text), await brief(request, _counts, library, identifier)
    files = dict.fromkeys(("in_progress", "failed", "cancelled"), 0)
    files |= {"completed": counts.get("documents", 0), "total": counts.get("documents", 0)}
    when = created(identifier)
    return {
        "id": identifier,
        "object": "vector_store",
        "created_at": when,
        "last_active_at": when,
        "name": found.title,
        "description": about.get("description"),
        "usage_bytes": counts.get("bytes", 0),
        "file_counts": files,
        "status": "completed",
        "expires_after": None,
        "expires_at": None,
        "metadata": about.get("metadata", {}),
    }


def _counts(library: Library, namespace: str) -> Json:
    return dict(library.statistics()["namespaces"].get(namespace, {}))


async def add_file(request: Request) -> Response:
    """Add a file to a store: when this returns, searches find it."""
    library, _ = library_of(request)
    identifier = request.path_params["store"]
    body = parse(AddFile, await read_json(request, limits_of(request)))
    await check_store(request, identifier)
    check_fields(body.attributes, "attributes")
    document = replace(await file_of(request, body.file_id), metadata=body.attributes or {})
    await write(request, partial(library.add, namespace=identifier), [document])
    audit(request, "vector_stores.files.add", ids=[identifier, document.id])
    return JSONResponse(_file_of(identifier, document))


async def set_attributes(request: Request) -> Response:
    """Give a store's file other attributes."""
    library, _ = library_of(request)
    body = parse(NewAttributes, await read_json(request, limits_of(request)))
    check_fields(body.attributes, "attributes")
    store = request.path_params["store"]
    document = replace(await _store_file(request), metadata=body.attributes or {})
    await write(request, partial(library.add, namespace=store), [document])
    audit(request, "vector_stores.files.update", ids=[store, document.id])
    return JSONResponse(_file_of(store, document))


def _file_of(store: str, document: Document) -> Json:
    return _file(store, document.id, len(document.text.encode()), document.metadata)


def _file(store: str, identifier: str, size: int, attributes: Mapping[str, FieldValue]) -> Json:
    about = {"usage_bytes": size, "created_at": created(identifier), "attributes": dict(attributes)}
    return {"id": identifier, "object": "vector_store.file", "vector_store_id": store, "status": "completed", "last_error": None, **about}  # fmt: skip


async def list_store_files(request: Request) -> Response:
    """A page of a store's files, in the order of their ids."""
    library, _ = library_of(request)
    identifier = request.path_params["store"]
    await check_store(request, identifier)
    limit = query_number(request, "limit", 20, MAX_LIST)
    after = request.query_params.get("after", "")
    entries = await brief(request, partial(library.entries, identifier, after=after, limit=limit))
    return JSONResponse(page([_file(identifier, one.id, one.bytes, one.metadata) for one in entries], limit))


async def get_store_file(request: Request) -> Response:
    document = await _store_file(request)
    return JSONResponse(_file_of(request.path_params["store"], document))


async def delete_store_file(request: Request) -> Response:
    """Take a file out of a store; the file stays."""
    library, _ = library_of(request)
    document = await _store_file(request)
    store = request.path_params["store"]
    await write(request, partial(library.delete, namespace=store), [document.id])
    audit(request, "vector_stores.files.delete", ids=[store, document.id])
    return JSONResponse({"id": document.id, "object": "vector_store.file.deleted", "deleted": True})


async def _store_file(request: Request) -> Document:
    library, _ = library_of(request)
    store, identifier = request.path_params["store"], request.path_params["file"]
    await check_store(request, store)
    document = await brief(request, partial(library.get, namespace=store), identifier)
    if document is None:
        raise ApiError(404, f"file {identifier[:80]!r} is not in this vector store", "file_id", "file_not_found")
    return document


async def search_store(request: Request) -> Response:
    """The best chunks for a text, or for several together, as the library's searches rank them."""
    library, _ = library_of(request)
    identifier = request.path_params["store"]
    body = parse(SearchStore, await read_json(request, limits_of(request)))
    queries = [body.query] if isinstance(body.query, str) else body.query
    for query in queries:
        if not query.strip() or len(query) > MAX_QUERY_CHARACTERS:
            raise ApiError(400, f"query holds no text, or more than {MAX_QUERY_CHARACTERS:,} characters", "query")
    where = filter_of(body.filters)
    await check_store(request, identifier)
    search = partial(search_stores, library, service_of(request).mode, where=where)
    hits = await brief(request, search, [identifier], queries, body.max_num_results)
    about = await brief(request, library.metadata, [hit.document for hit in hits], identifier)
    note = await note_of(request, where, identifier)
    data = [
        {"file_id": hit.document, "filename": hit.title, "score": round(float(hit.score), 6), "attributes": about.get(hit.document, {}),
         "content": [{"type": "text", "text": hit.text + hit.continuation}]}
        for hit in hits
    ]  # fmt: skip
    head = {"object": "vector_store.search_results.page", "search_query": queries}
    return JSONResponse({**head, "data": data, "has_more": False, "next_page": None, **note})


def search_stores(
    library: Library, mode: str, stores: list[str], queries: list[str], k: int, where: Filter | None = None
) -> list[Hit]:
    """The k best chunks of several stores for several texts; each chunk once, with its best score."""
    found: dict[tuple[str, str, int], Hit] = {}
    scores: dict[tuple[str, str, int], float] = {}
    shown = 2 * library.file.chunk_size  # a chunk and what follows it
    for store in dict.fromkeys(stores):
        for query in queries:
            for hit, _ in library.find(query, k, mode, namespace=store, retrieved_length=shown, where=where):
                key = store, hit.document, hit.chunk
                found.setdefault(key, hit)
                scores[key] = max(scores.get(key, 0.0), hit.score)
    return [found[key] for key in sorted(scores, key=lambda key: -scores[key])[:k]]
