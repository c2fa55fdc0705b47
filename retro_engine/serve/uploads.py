"""OpenAI's files: texts that are kept in the library, apart from its documents, until a vector store takes them.

A file is a document of the namespace `files`: its id is the file's, its title the file's name. What is not text is refused by what
it is, whatever its name says.
"""

import secrets
import time
from functools import partial
from typing import Any

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from retro_engine.data.corpus import Document
from retro_engine.data.html_text import page_text
from retro_engine.library.library import MAX_LIST
from retro_engine.serve.api_error import ApiError
from retro_engine.serve.documents import library_of, query_number
from retro_engine.serve.limits import read_chunks
from retro_engine.serve.request_context import audit, brief, limits_of, write

NAMESPACE = "files"
PURPOSES = ("assistants", "user_data")
MAX_FIELDS = 16
FORM_BYTES = 64 << 10  # of a form around its file
MAX_NAME = 255
SIGNS = {b"%PDF-": "a PDF", b"PK\x03\x04": "a ZIP archive (as .docx and .xlsx are)", b"\x89PNG": "a picture", b"\xff\xd8\xff": "a picture", b"\x1f\x8b": "compressed"}  # fmt: skip


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


def file_text(name: str, raw: bytes) -> str:
    """The text of a file. Raises ApiError for what is none, whatever its name says."""
    sign = next((what for begin, what in SIGNS.items() if raw.startswith(begin)), None)
    if sign is not None:
        raise ApiError(400, f"{name!r} is {sign}: files of text are taken (and .html)", "file", "unsupported_file")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ApiError(400, f"{name!r} is not text in UTF-8", "file", "unsupported_file") from None
    if name.lower().endswith((".html", ".htm")):
        text = page_text(text)[1]
    if not text.strip() or "\0" in text:
        raise ApiError(400, f"{name!r} has no text, or holds a NUL character", "file", "unsupported_file")
    return text


async def upload(request: Request) -> Response:
    """Keep a file of text: a form with `file` and `purpose`."""
    library, _ = library_of(request)
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise ApiError(415, f"content-type {kind[:80]!r} is not multipart/form-data", "content-type")
    limits = limits_of(request)
    chunks = read_chunks(request, limits.documents_bytes + FORM_BYTES, limits.progress_s)
    try:
        parser = MultiPartParser(request.headers, chunks, max_files=1, max_fields=MAX_FIELDS, max_part_size=FORM_BYTES)
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise ApiError(400, f"the body is not a form: {error}"[:300], code="invalid_form") from None
    try:
        name, raw, purpose = await _parts(form)
    finally:
        await form.close()
    if purpose not in PURPOSES:
        raise ApiError(400, f"purpose is one of {', '.join(PURPOSES)}", "purpose")
    text = await brief(request, file_text, name, raw)
    identifier = new_id("file-")
    await write(request, partial(library.add, namespace=NAMESPACE), [Document(identifier, name, text)])
    audit(request, "files.add", ids=[identifier])
    return JSONResponse(file_json(identifier, name, len(text.encode())))


async def _parts(form: FormData) -> tuple[str, bytes, str]:
    """Name, bytes and purpose."""
    other = next((name for name in form if name not in ("file", "purpose", "expires_after")), None)
    if other is not None:
        raise ApiError(400, f"unknown field {other[:80]}", other[:80], "unknown_field")
    file, purpose = form.get("file"), form.get("purpose")
    if not isinstance(file, UploadFile):
        raise ApiError(400, "file is missing: a part of the form with a filename", "file", "missing")
    name = file.filename or ""
    if not 1 <= len(name) <= MAX_NAME or not name.isprintable():
        raise ApiError(400, f"the file's name has 1 to {MAX_NAME} characters that are seen", "file")
    return name, await file.read(), purpose if isinstance(purpose, str) else ""


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
