"""Files that come in forms: one in a body of multipart/form-data, beside fields; and what their text is.

A file is what its name and its bytes both say: text in UTF-8, .html, and with the extra `documents` .pdf and .docx. What is of
another kind than its name says is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from retro_engine.data.document_files import OLD_WORD, docx_text, pdf_text
from retro_engine.data.html_text import page_text
from retro_engine.data.inputs import DOCUMENT_KINDS, PAGE_KINDS, kind_of
from retro_engine.data.streams import Unusable
from retro_engine.serve.api_error import ApiError
from retro_engine.serve.limits import read_chunks
from retro_engine.serve.request_context import limits_of

MULTIPART = "multipart/form-data"
MAX_FIELDS = 16
FORM_BYTES = 64 << 10  # of a form around its file
MAX_NAME = 255
PDF, ZIP = b"%PDF-", b"PK\x03\x04"
SIGNS = {
    PDF: "a PDF", ZIP: "a ZIP archive (as .docx and .xlsx are)", OLD_WORD: "an old Word file", b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture", b"\x1f\x8b": "compressed",
}  # fmt: skip
OF_KIND = {".pdf": (PDF, "a PDF"), ".docx": (ZIP, "a Word file")}


@dataclass(frozen=True)
class Form:
    """A file and the fields beside it."""

    name: str
    raw: bytes
    fields: dict[str, str] = field(default_factory=dict)


def kind_of_body(request: Request) -> str:
    return request.headers.get("content-type", "").split(";")[0].strip().lower()


async def read_form(request: Request, names: Sequence[str]) -> Form:
    """The body, a form with `file` and perhaps fields of these names. Raises ApiError."""
    if (kind := kind_of_body(request)) != MULTIPART:
        raise ApiError(415, f"content-type {kind[:80]!r} is not {MULTIPART}", "content-type")
    limits = limits_of(request)
    chunks = read_chunks(request, limits.documents_bytes + FORM_BYTES, limits.progress_s)
    try:
        parser = MultiPartParser(request.headers, chunks, max_files=1, max_fields=MAX_FIELDS, max_part_size=FORM_BYTES)
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise ApiError(400, f"the body is not a form: {error}"[:300], code="invalid_form") from None
    try:
        return await _parts(form, names)
    finally:
        await form.close()


async def _parts(form: FormData, names: Sequence[str]) -> Form:
    other = next((name for name in form if name not in ("file", *names)), None)
    if other is not None:
        raise ApiError(400, f"unknown field {other[:80]}", other[:80], "unknown_field")
    twice = next((name for name in form if len(form.getlist(name)) > 1), None)
    if twice is not None:
        raise ApiError(400, f"{twice} is there twice", twice, "invalid_form")
    file = form.get("file")
    if not isinstance(file, UploadFile):
        raise ApiError(400, "file is missing: a part of the form with a filename", "file", "missing")
    name = file.filename or ""
    if not 1 <= len(name) <= MAX_NAME or not name.isprintable():
        raise ApiError(400, f"the file's name has 1 to {MAX_NAME} characters that are seen", "file")
    return Form(name, await file.read(), {n: value for n in names if isinstance(value := form.get(n), str)})


def file_text(name: str, raw: bytes) -> tuple[str, str]:
    """Title (perhaps empty) and text of a file. Raises ApiError for one that has none, whatever its name says, and
    MissingExtraError where its kind cannot be read here.
    """
    kind = kind_of(Path(name))
    if kind in DOCUMENT_KINDS:
        return _document_text(name, kind, raw)
    sign = next((what for begin, what in SIGNS.items() if raw.startswith(begin)), None)
    if sign is not None:
        raise _unsupported(
            f"{name!r} is {sign}, and its name says something else: text, .html, .pdf and .docx are taken"
        )
    try:
        title, text = "", raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise _unsupported(f"{name!r} is not text in UTF-8") from None
    if kind in PAGE_KINDS:
        title, text = page_text(text)
    if not text.strip() or "\0" in text:
        raise _unsupported(f"{name!r} has no text, or holds a NUL character")
    return title, text


def _document_text(name: str, kind: str, raw: bytes) -> tuple[str, str]:
    begin, what = OF_KIND[kind]
    if not raw.startswith(begin) and not (kind == ".docx" and raw.startswith(OLD_WORD)):
        raise _unsupported(f"{name!r} is not {what}, which its name says it is")
    try:
        title, text = (pdf_text if kind == ".pdf" else docx_text)(raw)
    except Unusable as error:
        raise _unsupported(f"{name!r} cannot be read: {error}") from None
    return title, text.replace("\0", "").encode("utf-8", "replace").decode()  # their fonts' fault, no file's


def _unsupported(why: str) -> ApiError:
    return ApiError(400, why, "file", "unsupported_file")
