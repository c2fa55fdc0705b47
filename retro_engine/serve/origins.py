"""Pages of other origins that may ask (`--allow-origin`), and the path that a proxy puts before every address (`--root-path`).

An allowed page's script is a client like any other: it shows a key. Cookies are of the server's own page alone, whatever a
browser sends: else an allowed page could do what its reader may.
"""

import re
from collections.abc import Sequence

from starlette.datastructures import Headers

from retro_engine.errors import UsageError

ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#@*,]+")
FIELD_NAMES = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~, -]{1,1024}")
ROOT_PATH = re.compile(r"(?:/[A-Za-z0-9._~-]+)+")
METHODS = "GET, HEAD, POST, PUT, DELETE"
MAX_AGE_S = 600


def check_origins(origins: Sequence[str]) -> frozenset[str]:
    """Raises UsageError for what is no origin, which would match nothing, and for * and null, which are everybody."""
    for origin in origins:
        if ORIGIN.fullmatch(origin) is None:
            why = "an origin is written as browsers send it: scheme://host or scheme://host:port, in small letters, no path"
            raise UsageError(
                f"--allow-origin {origin!r} cannot be used", why, "--allow-origin https://chat.example.org"
            )
    return frozenset(origins)


def check_root_path(path: str) -> str:
    """Raises UsageError for what no proxy puts before an address; an empty one is none."""
    if path and (ROOT_PATH.fullmatch(path) is None or {".", ".."} & set(path.split("/"))):
        raise UsageError(
            f"--root-path {path!r} cannot be used", "a path begins with / and does not end with it", "/retro"
        )
    return path


def is_preflight(method: str, headers: Headers) -> bool:
    """Whether a browser asks what it may ask."""
    return method == "OPTIONS" and "access-control-request-method" in headers


def allowed(origin: str, headers: Headers | None = None) -> dict[str, str]:
    """What an answer to a page of an allowed origin has; `headers`: those of a preflight request."""
    found = {"access-control-allow-origin": origin, "access-control-expose-headers": "x-request-id, retry-after"}
    if headers is not None:
        names = headers.get("access-control-request-headers", "")
        found["access-control-allow-methods"] = METHODS
        found["access-control-max-age"] = str(MAX_AGE_S)
        if FIELD_NAMES.fullmatch(names) is not None:
            found["access-control-allow-headers"] = names
    return found
