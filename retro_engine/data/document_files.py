"""PDF and Word files (.pdf, .docx) to title and text; the reading of both formats is pypdf's and python-docx's.

A PDF has lines, not paragraphs: those of a page are joined where a sentence goes on, and a word that was cut at a line's
end is made whole. Of a .docx paragraphs and tables are read, a row of a table as a line; headers, notes and text boxes are not.
"""

import io
import logging
import re
import struct
import zipfile
import zlib

from retro_engine.data.streams import Unusable
from retro_engine.errors import extra

EXTRA = "documents"
MOST_FILE_BYTES = 256 << 20  # of a file, and of what a .docx unpacks to
OLD_WORD = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"  # .doc, and .docx behind a password
# What readers of damaged files raise beside their own errors: they compute with what they find.
DAMAGED = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, NotImplementedError, OSError, RecursionError,
    SyntaxError, TypeError, ValueError, struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
_CUT_WORD = re.compile(r"(\w)[-\u00ad\u2010]\n(?=[^\W\d_A-Z])")
_GOES_ON = re.compile(r"(?<![.?!:;\n])\n(?!\n)")


def pdf_text(raw: bytes) -> tuple[str, str]:
    """Title (perhaps empty) and text of a PDF file. Raises Unusable, MissingExtraError."""
    with extra(EXTRA, "pypdf is not installed", "it reads .pdf files"):
        import pypdf
        from pypdf.errors import DependencyError, PyPdfError
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it tells of what it mends
    try:
        reader = pypdf.PdfReader(io.BytesIO(raw))
        if reader.is_encrypted and not reader.decrypt(""):  # many have a password for changes alone
            raise Unusable("encrypted: it opens with a password (save it without one)")
        pages = [page.extract_text() for page in reader.pages]
        title = reader.metadata.title if reader.metadata is not None else None
    except DependencyError as error:
        with extra(EXTRA, "cryptography is not installed", "it reads encrypted .pdf files"):
            raise ImportError from error
    except (PyPdfError, *DAMAGED) as error:
        raise Unusable(_damaged(error)) from error
    text = "\n\n".join(joined for page in pages if (joined := _joined(page)))
    if not text:
        raise Unusable(f"no text on its {len(pages):,} pages: a scan (OCR makes text of it)")
    return title.strip() if isinstance(title, str) else "", text


def _joined(page: str) -> str:
    lines = "\n".join(line.strip() for line in page.splitlines())
    return _GOES_ON.sub(" ", _CUT_WORD.sub(r"\1", lines)).strip()


def docx_text(raw: bytes) -> tuple[str, str]:
    """Title (perhaps empty) and text of a Word file. Raises Unusable, MissingExtraError."""
    with extra(EXTRA, "python-docx is not installed", "it reads .docx files"):
        import docx
        from docx.exceptions import PythonDocxError
        from docx.opc.exceptions import OpcError
        from docx.table import Table
    if raw.startswith(OLD_WORD):
        raise Unusable("encrypted, or of an old kind (.doc): save it as .docx without a password")
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            if sum(member.file_size for member in archive.infolist()) > MOST_FILE_BYTES:
                raise Unusable(f"it unpacks to more than {MOST_FILE_BYTES:,} bytes")
        document = docx.Document(io.BytesIO(raw))
        lines: list[str] = []
        for part in document.iter_inner_content():
            if isinstance(part, Table):
                lines += [" ".join(_once([cell.text for cell in row.cells])) for row in part.rows]
            else:
                lines.append(part.text)
        title = document.core_properties.title
    except (PythonDocxError, OpcError, *DAMAGED) as error:
        raise Unusable(_damaged(error)) from error
    text = "\n".join(line.strip() for line in lines if line.strip())
    if not text:
        raise Unusable("empty: it has no text")
    return title.strip(), text


def _once(cells: list[str]) -> list[str]:
    """A cell that spans several columns comes once for each."""
    texts = [" ".join(text.split()) for text in cells]
    return [text for place, text in enumerate(texts) if text and text not in texts[max(0, place - 1) : place]]


def _damaged(error: BaseException) -> str:
    said = str(error).splitlines()
    return f"damaged: {said[0][:200] if said and said[0] else type(error).__name__}"
