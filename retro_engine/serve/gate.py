"""The one middleware: everything is denied that is not public, or asked for by somebody who may.

Also here: Host and Origin (DNS rebinding, CSRF), the time a request may take, security headers, the path before all others,
request ids, counts and log lines.
"""

import asyncio
import ipaddress
import time
from collections.abc import Sequence
from http.cookies import CookieError, SimpleCookie

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import RedirectResponse, Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retro_engine.serve.accounts import Accounts, Caller
from retro_engine.serve.api_error import ApiError
from retro_engine.serve.bounds import Limits
from retro_engine.serve.metrics import Metrics
from retro_engine.serve.origins import allowed, is_preflight
from retro_engine.serve.request_log import HEADER, RequestLog, current_id, log_failure, request_id

PUBLIC = frozenset(
    {
        ("GET", "/health"),
        ("GET", "/"),
        ("GET", "/app.css"),
        ("GET", "/app.js"),
        ("GET", "/ask.js"),
        ("GET", "/api.js"),
        ("GET", "/chat.js"),
        ("GET", "/status.js"),
        ("GET", "/playground.js"),
        ("GET", "/library.js"),
        ("GET", "/icon.svg"),
        ("POST", "/auth/login"),
        ("POST", "/auth/logout"),
        ("GET", "/auth/me"),
    }
)
OWN_CHECK = ("GET", "/metrics")  # its own token, or a client on this machine
COOKIE, DEVICE = "retro_session", "retro_device"  # `cookie_name` adds the port
HEADERS = {
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'; "
    "object-src 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}


class Gate:
    """Decides who may call what; `scopes` has what each route that is not public takes."""

    def __init__(
        self,
        app: ASGIApp,
        routes: Sequence[Route],
        scopes: dict[tuple[str, str], str],
        accounts: Accounts,
        limits: Limits,
        hosts: Sequence[str],
        metrics: Metrics,
        origins: frozenset[str] = frozenset(),
        root_path: str = "",
        log: RequestLog | None = None,
    ):
        """`origins`: of pages elsewhere that may ask; `root_path`: what a proxy may leave before every path."""
        self.app, self.routes, self.scopes = app, routes, scopes
        self.accounts, self.limits, self.metrics = accounts, limits, metrics
        self.hosts = frozenset(name.lower() for name in ("localhost", *hosts))
        self.origins, self.root_path, self.log = origins, root_path, log or RequestLog()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        start, status = time.perf_counter(), 0
        asked = request_id(Headers(scope=scope).get(HEADER))
        current_id.set(asked)
        state = scope.setdefault("state", {})
        state.update(request_id=asked, root_path=self.root_path, caller=None)

        async def send_safely(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._add_headers(scope, MutableHeaders(scope=message))
            await send(message)

        route = None
        try:
            is_root = self._strip(scope)
            route = self._route(scope)
            answer = self._at_once(scope, is_root)
            if answer is not None:
                await answer(scope, receive, send_safely)
                return
            self.check(scope, route)
            is_import = route is not None and route.path == "/v1/documents/import"
            async with asyncio.timeout(self.limits.import_s if is_import else self.limits.request_s):
                await self.app(scope, receive, send_safely)
        except ApiError as error:
            await error.response(scope["path"])(scope, receive, send_safely)
        except TimeoutError:
            if status:
                raise  # half an answer is out: the connection is closed
            await ApiError(504, "the answer took too long").response()(scope, receive, send_safely)
        except Exception:
            log_failure("a bug in retro-engine; the trace after this line is its own")
            raise
        finally:
            seconds = time.perf_counter() - start
            self.metrics.request(route.path if route else "other", status, seconds)
            self._log(scope, route, status, seconds)

    def _strip(self, scope: Scope) -> bool:
        """Take the root path off, where the proxy has left it; whether there was nothing else, not even a slash."""
        path, root = scope["path"], self.root_path
        if root and path.startswith(f"{root}/"):
            scope["path"] = path[len(root) :]
            scope["raw_path"] = scope.get("raw_path", b"").removeprefix(root.encode())
        return bool(root) and path == root

    def _at_once(self, scope: Scope, is_root: bool) -> Response | None:
        """What is answered before anybody is asked who he is: a browser's question, and the page's address without its end."""
        headers = Headers(scope=scope)
        if is_root and scope["method"] in ("GET", "HEAD"):
            return RedirectResponse(f"{self.root_path}/", 307)
        if is_preflight(scope["method"], headers) and headers.get("origin") in self.origins:
            self._check_host(headers)
            return Response(status_code=204, headers=allowed(headers["origin"], headers))
        return None

    def _add_headers(self, scope: Scope, headers: MutableHeaders) -> None:
        for name, value in HEADERS.items():
            headers[name] = value
        headers[HEADER] = scope["state"]["request_id"]
        headers.setdefault("cache-control", "no-store")
        if self.origins:
            headers.add_vary_header("origin")
        origin = Headers(scope=scope).get("origin")
        if origin in self.origins and origin is not None:
            for name, value in allowed(origin).items():
                headers[name] = value

    def _log(self, scope: Scope, route: Route | None, status: int, seconds: float) -> None:
        caller, client = scope["state"]["caller"], scope.get("client")
        self.log.write(
            {
                "id": scope["state"]["request_id"],
                "method": scope["method"],
                "route": route.path if route else "other",
                "status": status or 499,
                "seconds": round(seconds, 4),
                "caller": None if caller is None else f"{caller.kind}:{caller.name}",
                "client": client[0] if client else None,
                **scope["state"].get("tokens", {}),
            }
        )

    def check(self, scope: Scope, route: Route | None) -> None:
        """Raises ApiError for a request that must not go on; else scope["state"]["caller"] is who asks, or None."""
        headers = Headers(scope=scope)
        self._check_host(headers)
        asked = ("GET" if scope["method"] == "HEAD" else scope["method"], scope["path"])
        caller = self._caller(scope, headers)
        scope["state"]["caller"] = caller
        if asked in PUBLIC or asked == OWN_CHECK:
            return
        if caller is None:
            raise ApiError(
                401, "sign in, or send a key: Authorization: Bearer rk_...", code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )  # fmt: skip
        if route is None:
            return  # the router says 404 or 405
        needed = self.scopes.get((asked[0], route.path))
        if needed is None or not caller.may(needed):
            raise ApiError(403, f"{asked[0]} {route.path} takes scope {needed}, this is {caller.scope}", code="scope")

    def _route(self, scope: Scope) -> Route | None:
        for route in self.routes:
            if route.matches(scope)[0] == Match.FULL:
                return route
        return None

    def _check_host(self, headers: Headers) -> None:
        """A name that an attacker's DNS points here is not in `hosts`, and an address cannot be pointed."""
        host = headers.get("host", "")
        if not self._is_known(_host_name(host)):
            raise ApiError(421, "this host name is not served here (--allow-host NAME)", code="host")
        origin = headers.get("origin")
        if origin is not None and origin not in self.origins and origin.split("://")[-1] != host:
            raise ApiError(403, "a page of another origin asks (--allow-origin ORIGIN)", code="origin")

    def _is_known(self, name: str) -> bool:
        if name.lower() in self.hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _caller(self, scope: Scope, headers: Headers) -> Caller | None:
        kind, _, key = headers.get("authorization", "").partition(" ")
        if kind:
            return self.accounts.of_key(key.strip()) if kind.lower() == "bearer" else None
        if "x-api-key" in headers:  # as Anthropic's clients send it
            return self.accounts.of_key(headers["x-api-key"].strip())
        if headers.get("origin") in self.origins:
            return None  # its key, or nobody
        token = cookie(scope, COOKIE)
        if token and headers.get("content-type", "").lower().startswith("multipart/") and "origin" not in headers:
            raise ApiError(
                403, "a form of files says which page it is of (origin)", code="origin"
            )  # any page sends forms
        return self.accounts.of_session(token) if token else None


def cookie_name(scope: Scope, name: str) -> str:
    """Of this server: browsers send the cookies of a host to all of its ports."""
    server = scope.get("server")
    return f"{name}_{server[1]}" if server and server[1] else name


def cookie(scope: Scope, name: str) -> str:
    """The value of one of this server's cookies, or an empty string."""
    try:
        morsel = SimpleCookie(Headers(scope=scope).get("cookie", "")).get(cookie_name(scope, name))
    except CookieError:
        return ""
    return morsel.value if morsel else ""


def _host_name(host: str) -> str:
    """Host without its port; an IPv6 address without its brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host
