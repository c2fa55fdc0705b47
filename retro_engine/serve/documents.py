"""Documents over HTTP: list, read, add, replace, delete, import in the background, reset, search."""

import asyncio
import tempfile
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from retro_engine.data.corpus import Document, FieldValue
from retro_engine.data.identity import composed, content_id
from retro_engine.errors import UsageError
from retro_engine.library.documents import MAX_QUERY_CHARACTERS, check_id, check_seen
from retro_engine.library.filters import MOST_FIELDS, Filter, check_metadata, read_filter
from retro_engine.library.importer import Importer
from retro_engine.library.library import DEFAULT, MAX_LIST, Library
from retro_engine.library.search import MODES
from retro_engine.serve.answers import neighbors_json
from retro_engine.serve.api_error import ApiError
from retro_engine.serve.forms import MULTIPART, file_text, kind_of_body, read_form
from retro_engine.serve.limits import Strict, parse, parse_json, read_chunks, read_json
from retro_engine.serve.request_context import audit, brief, limits_of, service_of, write

MAX_DOCUMENTS = 1000  # of one request
MAX_K = 1000


Metadata = Annotated[dict[str, str | bool | int | float], Field(max_length=MOST_FIELDS)]


class NewDocument(Strict):
    """A document as it is sent; without an id it gets that of its content."""

    text: str
    id: str | None = None
    title: str = ""
    metadata: Metadata | None = None


class ManyDocuments(Strict):
    """Several at once: all of them are added, or none."""

    documents: list[NewDocument] = Field(min_length=1, max_length=MAX_DOCUMENTS, fail_fast=True)


class Confirmation(Strict):
    """A reset has no way back."""

    confirm: bool


class Query(Strict):
    """A search."""

    query: str = Field(min_length=1, max_length=MAX_QUERY_CHARACTERS)
    k: int = Field(5, ge=1, le=MAX_K)
    mode: str | None = None
    filters: dict[str, Any] | None = None  # library/filters.py
    min_score: float | None = Field(None, ge=0)  # of hits; not of hybrid mode, whose scores are of ranks
    weights: list[Annotated[float, Field(ge=0)]] = Field([1.0, 1.0], min_length=2, max_length=2, fail_fast=True)


def library_of(request: Request) -> tuple[Library, Importer]:
    service = service_of(request)
    if service.library is None or service.importer is None:
        raise ApiError(
            400, "there is no library: the server of a plain decoder has one with --library", code="no_library"
        )
    return service.library, service.importer


async def list_documents(request: Request) -> Response:
    """A page of ids and sizes, those after `after`; and the library's counts."""
    library, _ = library_of(request)
    other = next((name for name in request.query_params if name not in ("after", "limit")), None)
    if other is not None:
        raise ApiError(400, f"unknown field {other[:80]} of the query", other[:80], "unknown_field")
    limit = query_number(request, "limit", 100, MAX_LIST)
    version = library.version  # what is listed is of this one, or newer
    entries = await brief(request, partial(library.entries, after=request.query_params.get("after", ""), limit=limit))
    statistics = await brief(request, library.statistics)
    data = [{"object": "document", **vars(entry)} for entry in entries]
    following = service_of(request).followed
    folders = [] if following is None else [one.about() for one in following.folders]
    failed = [f"folder {one['folder']} is not followed now: {one['why']}" for one in folders if one["why"]]
    return JSONResponse(
        {
            "object": "list",
            "data": data,
            "has_more": len(data) == limit,
            "index_version": version,
            "statistics": {
                **statistics["namespaces"].get("default", {}),
                "notes": [*statistics["notes"], *failed],
                "followed": folders,
            },
        }
    )


async def get_document(request: Request) -> Response:
    library, _ = library_of(request)
    identifier = request.path_params["id"]
    document = await brief(request, library.get, identifier)
    if document is None:
        raise ApiError(404, f"document {identifier!r} does not exist", "id", "document_not_found")
    names = ("id", "title", "metadata", "text")
    return JSONResponse({"object": "document", **{name: getattr(document, name) for name in names}})


async def add_documents(request: Request) -> Response:
    """One document, {"documents": [...]}, or a form with a file; each replaces the one with its id. When this returns, the next
    request reads them.
    """
    if kind_of_body(request) == MULTIPART:
        return await _add_file(request)
    library, _ = library_of(request)
    limits = limits_of(request)
    body = await read_json(request, limits, limits.documents_bytes)
    is_many = isinstance(body, dict) and "documents" in body
    rows = parse(ManyDocuments, body).documents if is_many else [parse(NewDocument, body)]
    await brief(request, _check_all, rows, is_many)
    ids = [content_id(row.title, row.text) if row.id is None else composed(row.id) for row in rows]
    documents = [_document(identifier, row) for identifier, row in zip(ids, rows)]
    version = await write(request, library.add, documents)
    audit(request, "documents.add", ids=ids[:20], count=len(ids))
    return JSONResponse({"object": "documents.added", "ids": ids, "index_version": version})


async def _add_file(request: Request) -> Response:
    """A form: `file`, and if wanted `id` (else the file's name), `title` (else its own) and `metadata` (an object as JSON)."""
    library, _ = library_of(request)
    form = await read_form(request, ("id", "title", "metadata"))
    title, text = await brief(request, file_text, form.name, form.raw)
    about: Any = None
    if "metadata" in form.fields:
        limits = limits_of(request)
        about = parse_json(
            form.fields["metadata"].encode("utf-8", "surrogatepass"), limits.json_depth, limits.json_nodes
        )
    named = {"id": form.fields.get("id", form.name), "title": form.fields.get("title", title or form.name)}
    row = parse(NewDocument, {**named, "text": text, "metadata": about})
    await brief(request, _check_all, [row], False)
    identifier = composed(named["id"])
    version = await write(request, library.add, [_document(identifier, row)])
    audit(request, "documents.add", ids=[identifier], count=1)
    return JSONResponse({"object": "documents.added", "ids": [identifier], "index_version": version})


def _document(identifier: str, row: NewDocument) -> Document:
    return Document(identifier, row.title, row.text, metadata=row.metadata or {})


def _check_all(rows: list[NewDocument], is_many: bool) -> None:
    for place, row in enumerate(rows):
        _check(row, f"documents.{place}." if is_many else "")


def _check(row: NewDocument, where: str) -> None:
    """Raises ApiError naming the field for what the library would refuse. An id is kept in the form it is sent in, as the name
    of a file is: é composed and é decomposed are two.
    """
    if row.id in (".", ".."):
        raise ApiError(400, "no URL can name the ids . and ..", f"{where}id")
    if row.id is not None:
        try:
            check_id(row.id)
            check_seen(row.id)
        except UsageError as error:
            raise ApiError(400, f"{error.what}: {error.why}", f"{where}id") from None
    check_fields(row.metadata, f"{where}metadata")
    if not row.text.strip() or "\0" in row.text:
        raise ApiError(400, "the text is empty, or holds a NUL character", f"{where}text")


def check_fields(fields: Mapping[str, FieldValue] | None, param: str) -> None:
    """Raises ApiError for what no document can have as metadata."""
    try:
        check_metadata(fields or {})
    except UsageError as error:
        raise ApiError(400, f"{error.what}: {error.why}", param) from None


def filter_of(value: dict[str, Any] | None, param: str = "filters") -> Filter | None:
    """A body's `filters`, the field `param`. Raises ApiError."""
    try:
        return None if value is None else read_filter(value)
    except UsageError as error:
        raise ApiError(400, f"{error.what}: {error.why}", param) from None


async def note_of(request: Request, where: Filter | None, namespace: str = DEFAULT) -> dict[str, str]:
    """What a search's answer says of a filter on fields that no document has."""
    library = service_of(request).library
    if where is None or library is None:
        return {}
    unknown = await brief(request, library.unknown_fields, where, namespace)
    return {"note": unknown} if unknown else {}


async def delete_document(request: Request) -> Response:
    library, _ = library_of(request)
    identifier = request.path_params["id"]
    count = await write(request, library.delete, [identifier])
    if not count:
        raise ApiError(404, f"document {identifier!r} does not exist", "id", "document_not_found")
    audit(request, "documents.delete", ids=[identifier], count=count)
    return JSONResponse({"id": identifier, "deleted": True, "index_version": library.version})


async def import_documents(request: Request) -> Response:
    """JSON lines, kept on the disk first, then added in the background. Answers 202 with the job."""
    library, importer = library_of(request)
    limits = limits_of(request)
    with tempfile.TemporaryFile(dir=library.folder) as file:
        async for chunk in read_chunks(request, limits.import_bytes, limits.progress_s):
            await asyncio.to_thread(file.write, chunk)
        if not file.tell():
            raise ApiError(400, "the body is empty", code="empty_body")
        file.seek(0)
        number = await asyncio.to_thread(importer.start, file)
    audit(request, "documents.import", job=number)
    return JSONResponse(await asyncio.to_thread(job_json, importer, number), 202)


async def get_job(request: Request) -> Response:
    _, importer = library_of(request)
    number = request.path_params["id"]
    if number >= 1 << 63:
        raise ApiError(404, f"job {number} does not exist", "id", "job_not_found")
    try:
        return JSONResponse(await brief(request, job_json, importer, number))
    except UsageError as error:
        raise ApiError(404, error.what, "id", "job_not_found") from None


def job_json(importer: Importer, number: int) -> dict[str, Any]:
    job = importer.job(number)
    errors = [{"source": source.rpartition("/")[2], "reason": reason} for source, reason in job.errors]
    names = ("state", "done", "added", "failed", "reason")
    return {"object": "job", "id": number, **{name: getattr(job, name) for name in names}, "errors": errors}


async def reset(request: Request) -> Response:
    library, _ = library_of(request)
    if not parse(Confirmation, await read_json(request, limits_of(request))).confirm:
        raise ApiError(400, 'every document would be deleted: {"confirm": true}', "confirm", "not_confirmed")
    count = await write(request, library.reset)
    audit(request, "documents.reset", count=count)
    return JSONResponse({"deleted": count, "index_version": library.version})


async def retrieve(request: Request) -> Response:
    """The best chunks for a text, as generation reads them: document, chunk, score, text, continuation, source; where there
    is none, a note why.
    """
    service = service_of(request)
    query = parse(Query, await read_json(request, limits_of(request)))
    if query.mode is not None and query.mode not in MODES:
        raise ApiError(400, f"mode {query.mode!r} is not one of {', '.join(MODES)}", "mode")
    if not query.query.strip():
        raise ApiError(400, "the query is empty: it holds no text", "query")
    if not any(query.weights):
        raise ApiError(400, "weights: one is above 0", "weights")
    where = filter_of(query.filters)
    if where is not None:
        library_of(request)
    version = service.index_version
    service.check_search(query.mode, query.min_score)
    search = partial(service.find, k=query.k, mode=query.mode, weights=query.weights, where=where)
    every = await brief(request, search, query.query)
    found = every.above(query.min_score)
    note = await note_of(request, where)
    if every.hits and not found.hits:
        note = {"note": f"no hit: the best score is {every.hits[0].score:.3f}"}
    elif not found.hits:
        note = {"note": f"no hit: {await brief(request, service.why_nothing, query.query, where)}"}
    data = neighbors_json(found.hits)
    return JSONResponse({"object": "list", "index_version": version, "data": data, **note})


def query_number(request: Request, name: str, default: int, most: int) -> int:
    """A number of the query string, from 1 on."""
    text = request.query_params.get(name, str(default))
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise ApiError(400, f"{name}={text[:40]!r} is not a number", name)
    if not 1 <= int(text) <= most:
        raise ApiError(400, f"{name}={int(text)} cannot be used: 1 to {most:,} are taken", name)
    return int(text)
