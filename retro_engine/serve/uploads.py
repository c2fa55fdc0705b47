"""OpenAI's files: texts that are kept in the library, apart from its documents, until a vector store takes them.

A file is a document of the namespace `files`: its id is the file's, its title the file's name, its text what `forms` reads of it.
"""

import secrets
import time
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from retro_engine.data.corpus import Document
from retro_engine.library.library import MAX_LIST
from retro_engine.serve.api_error import ApiError
from retro_engine.serve.documents import library_of, query_number
from retro_engine.serve.forms import file_text, read_form
from retro_engine.serve.request_context import audit, brief, write

NAMESPACE = "files"
PURPOSES = ("assistants", "user_data")


def file_json(identifier: str, name: str, size: int) -> dict[str, Any]:
    about = {"filename": name, "bytes": size, "created_at": created(identifier), "purpose": "assistants"}
    return {
        "id": identifier,
        "object": "file",
        **about,
        "status": "processed",
        "status_details": None,
        "expires_at": None,
    }


def new_id(kind: str) -> str:
    """It holds when it was made: nothing else need be kept of that."""
    return f"{kind}{int(time.time()):08x}{secrets.token_hex(12)}"


def created(identifier: str) -> int:
    """Seconds since 1970, from an id of `new_id`."""
    digits = identifier.rpartition("-")[2].rpartition("_")[2][:8]
    try:
        return int(digits, 16)
    except ValueError:
        return 0


async def upload(request: Request) -> Response:
    """Keep a file of text, a page, a PDF or a Word file: a form with `file` and `purpose`."""
    library, _ = library_of(request)
    form = await read_form(request, ("purpose", "expires_after"))
    if form.fields.get("purpose", "") not in PURPOSES:
        raise ApiError(400, f"purpose is one of {', '.join(PURPOSES)}", "purpose")
    _, text = await brief(request, file_text, form.name, form.raw)
    identifier = new_id("file-")
    await write(request, partial(library.add, namespace=NAMESPACE), [Document(identifier, form.name, text)])
    audit(request, "files.add", ids=[identifier])
    return JSONResponse(file_json(identifier, form.name, len(text.encode())))


async def list_files(request: Request) -> Response:
    """A page of files, in the order of their ids."""
    library, _ = library_of(request)
    limit = query_number(request, "limit", 100, MAX_LIST)
    after = request.query_params.get("after", "")
    entries = await brief(request, partial(library.entries, NAMESPACE, after=after, limit=limit))
    return JSONResponse(page([file_json(one.id, one.title, one.bytes) for one in entries], limit))


def page(data: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    """A list as OpenAI's client turns its pages."""
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, **ends, "has_more": len(data) == limit}


async def get_file(request: Request) -> Response:
    document = await file_of(request, request.path_params["file"])
    return JSONResponse(file_json(document.id, document.title, len(document.text.encode())))


async def file_content(request: Request) -> Response:
    """The text of a file."""
    document = await file_of(request, request.path_params["file"])
    return Response(document.text.encode(), media_type="text/plain; charset=utf-8")


async def delete_file(request: Request) -> Response:
    """Delete a file; vector stores that have taken it keep what they took."""
    library, _ = library_of(request)
    identifier = request.path_params["file"]
    await file_of(request, identifier)
    await write(request, partial(library.delete, namespace=NAMESPACE), [identifier])
    audit(request, "files.delete", ids=[identifier])
    return JSONResponse({"id": identifier, "object": "file", "deleted": True})


async def file_of(request: Request, identifier: str, param: str = "file_id") -> Document:
    """Raises ApiError 404 for a file that is not there."""
    library, _ = library_of(request)
    document = await brief(request, partial(library.get, namespace=NAMESPACE), identifier)
    if document is None:
        raise ApiError(404, f"file {identifier[:80]!r} does not exist", param, "file_not_found")
    return document
