"""A server's live library over HTTP, with the methods of `Library` that `retro docs` calls.

The key is `RETRO_API_KEY`. Redirects are not followed: the key goes to the server that was named and to no other.
"""

import http.client
import json
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO
from urllib.parse import quote, urlencode, urlsplit

from retro_engine.data.corpus import Document
from retro_engine.errors import MissingInputError, OutOfResourceError, RetroError, UsageError
from retro_engine.library.filters import Filter
from retro_engine.library.importer import Job
from retro_engine.library.library import DEFAULT, Entry
from retro_engine.retrieval.hit import Hit

TIMEOUT_S = 120
BATCH_BYTES = 4 << 20  # of documents in one request: servers take 8 MiB
BATCH = 500
POLL_S = 0.2


class RemoteLibrary:
    """The documents of the server at `url`. Raises UsageError for a URL that cannot be used."""

    def __init__(self, url: str, key: str | None = None):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
            raise UsageError(f"{url} cannot be used", "a server's address is http://HOST:PORT", "name it so")
        self.url, self._root = url, parts.path.rstrip("/").removesuffix("/v1")
        self._key = os.environ.get("RETRO_API_KEY", "") if key is None else key
        self._host, self._port, self._is_tls = parts.hostname, parts.port, parts.scheme == "https"
        self.version = 0  # of the last answer
        self.note = ""  # of the last search

    def __enter__(self) -> "RemoteLibrary":
        return self

    def __exit__(self, *_: object) -> None:
        return  # every call has a connection of its own

    def add(self, documents: Sequence[Document], namespace: str = DEFAULT) -> int:
        """Add or replace documents, those of each request all or none; return the library's version."""
        for batch in _batches([_row(document) for document in documents]):
            self._call("POST", "documents", namespace, {"documents": batch})
        return self.version

    def delete(self, ids: Sequence[str], namespace: str = DEFAULT) -> int:
        """Delete documents; return how many there were."""
        count = sum(self._call("DELETE", f"documents/{quote(i, '')}", namespace) is not None for i in ids)
        if count < len(ids):  # what is not there says no version
            self._whole("GET", "documents?limit=1", namespace)
        return count

    def reset(self, namespace: str = DEFAULT) -> int:
        """Delete every document; return how many there were."""
        return int(self._whole("POST", "documents/reset", namespace, {"confirm": True})["deleted"])

    def get(self, identifier: str, namespace: str = DEFAULT) -> Document | None:
        found = self._call("GET", f"documents/{quote(identifier, '')}", namespace)
        return (
            None
            if found is None
            else Document(found["id"], found["title"], found["text"], metadata=found.get("metadata", {}))
        )

    def entries(self, namespace: str = DEFAULT, after: str = "", limit: int = 100) -> list[Entry]:
        page = self._whole("GET", f"documents?{urlencode({'after': after, 'limit': limit})}", namespace)
        return [Entry(**{name: row[name] for name in Entry.__annotations__ if name in row}) for row in page["data"]]

    def statistics(self) -> dict[str, Any]:
        page = self._whole("GET", "documents?limit=1")
        return {"kind": "library", "version": self.version, "namespaces": {DEFAULT: page["statistics"]}}

    def search(
        self,
        text: str,
        k: int = 10,
        mode: str = "lexical",
        namespace: str = DEFAULT,
        weights: Sequence[float] = (1.0, 1.0),
        where: Filter | None = None,
    ) -> list[Hit]:
        body = {"query": text, "k": k, "mode": mode, "weights": list(weights)}
        about = {} if where is None else {"filters": where.json}
        answer = self._whole("POST", "retrieve", namespace, {**body, **about})
        self.note = str(answer.get("note", "")).removeprefix("no hit: ")
        return [Hit(**{name: row[name] for name in Hit.__annotations__}) for row in answer["data"]]

    def why_nothing(self, text: str, namespace: str = DEFAULT, where: Filter | None = None) -> str:
        """Why the last search had no hit, as the server said."""
        return self.note or "the server does not say why"

    def import_rows(self, source: BinaryIO, namespace: str = DEFAULT) -> Iterator[Job]:
        """Send JSON lines, then give the job until it has ended."""
        answer = self._whole("POST", "documents/import", namespace, source)
        while True:
            numbers = {name: answer[name] for name in ("state", "done", "added", "failed", "reason")}
            errors = [(error["source"], error["reason"]) for error in answer["errors"]]
            yield Job(number=answer["id"], path=self.url, namespace=namespace, errors=errors, **numbers)
            if answer["state"] != "running":
                return
            time.sleep(POLL_S)
            answer = self._whole("GET", f"jobs/{answer['id']}", namespace)

    def _whole(self, method: str, route: str, namespace: str = DEFAULT, body: Any = None) -> dict[str, Any]:
        """The answer of a route that exists."""
        answer = self._call(method, route, namespace, body)
        if answer is None:
            raise MissingInputError(f"{self.url} has no {route}", "it is not a server of retro-engine", "retro serve")
        return answer

    def _call(self, method: str, route: str, namespace: str, body: Any = None) -> dict[str, Any] | None:
        """The answer, or None where there is no such thing. Raises the server's errors as ours."""
        if namespace != DEFAULT:
            raise UsageError(f"namespace {namespace} is not served", f"a server has {DEFAULT} only", "leave it out")
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        content: Any = body
        if body is not None and not hasattr(body, "read"):
            content = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        elif body is not None:
            headers["Content-Type"] = "application/x-ndjson"
        kind = http.client.HTTPSConnection if self._is_tls else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=TIMEOUT_S)
        try:
            connection.request(method, f"{self._root}/v1/{route}", content, headers)
            response = connection.getresponse()
            status, text = response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            raise MissingInputError(f"{self.url} does not answer", str(error), "start it: retro serve") from error
        finally:
            connection.close()
        try:
            answer = json.loads(text)
            message = "" if status < 400 else str(answer["error"]["message"])
        except (ValueError, KeyError, TypeError):
            raise MissingInputError(
                f"{self.url} answered {status} {response.reason}", "it is not a server of retro-engine", "retro serve"
            ) from None
        if status == 404 and answer["error"]["code"] == "document_not_found":
            return None
        if status >= 400:
            raise _error(self.url, status, message)
        self.version = int(answer.get("index_version", self.version))
        return dict(answer)


def _error(url: str, status: int, message: str) -> RetroError:
    what = f"{url} answered {status}"
    if status in (401, 403):
        return UsageError(what, message, "RETRO_API_KEY=rk_... (retro keys add NAME --scope write)")
    if status in (503, 507):
        return OutOfResourceError(what, message, "look at the server, and run it again")
    return MissingInputError(what, message, "") if status >= 500 else UsageError(what, message, "")


def _row(document: Document) -> dict[str, Any]:
    """As it is sent; servers of before take no metadata."""
    about = {"metadata": dict(document.metadata)} if document.metadata else {}
    return {"id": document.id, "title": document.title, "text": document.text, **about}


def _batches(rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Rows in their order, in batches of at most BATCH_BYTES as JSON, or of one that is larger."""
    batch: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        length = len(json.dumps(row))
        if batch and (size + length > BATCH_BYTES or len(batch) == BATCH):
            yield batch
            batch, size = [], 0
        batch.append(row)
        size += length
    if batch:
        yield batch
