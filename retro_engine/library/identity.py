"""Under which id a document read from a file comes into a library: the same on every way in (docs/library.md).

`Reader` names what has no id of its own after its place. Here a file becomes its real path, from the folder that the
library lies in, and a row the hash of its content. A library that was made before has its documents under their places
as they were spelled then: what is known in it under such an id keeps it.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from retro_engine.data.corpus import Document
from retro_engine.data.identity import composed, content_id, file_id
from retro_engine.library.library import Library


def identified(document: Document, folder: Path) -> Document:
    """A document with the id that it has wherever it comes from; paths are from `folder`. Its own id comes in NFC."""
    if not has_no_id(document):
        name = composed(document.id)
        return document if name == document.id else replace(document, id=name)
    if document.path is not None:
        return replace(document, id=file_id(document.path, folder))
    return replace(document, id=content_id(document.title, document.text))


def has_no_id(document: Document) -> bool:
    return document.id == document.source != ""


def identified_in(library: Library, documents: Sequence[Document], namespace: str) -> list[Document]:
    """`identified` for a library that is open; where it knows a document under its older id, with that."""
    out = [identified(document, library.folder.resolve().parent) for document in documents]
    if library.file.settings.get("identity") is not None:
        return out
    return [_known(library, old, new, namespace) for old, new in zip(documents, out)]


def _known(library: Library, document: Document, new: Document, namespace: str) -> Document:
    """A row is only what is known under its place when its text is the same; a file may have changed."""
    if not has_no_id(document):
        return new
    path, colon, line = document.source, "", ""
    if not os.path.isfile(path):
        path, colon, line = document.source.rpartition(":")
    real = os.path.realpath(path)
    for place in dict.fromkeys((path, real, os.path.relpath(real))):
        statement = "SELECT id, text FROM documents WHERE namespace = ? AND id = ?"
        for identifier, text in library.read(statement, namespace, f"{place}{colon}{line}"):
            if not colon or text == document.text:
                return replace(new, id=identifier)
    return new
