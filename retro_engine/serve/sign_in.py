"""Signing in and out of the page: a name and a password become a session's cookie."""

import asyncio
import ipaddress

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from retro_engine.serve.accounts import DEVICE_S, MAX_PASSWORD, SESSION_S
from retro_engine.serve.api_error import ApiError
from retro_engine.serve.bounds import Throttle
from retro_engine.serve.gate import COOKIE, DEVICE, cookie, cookie_name
from retro_engine.serve.limits import Strict, parse, read_json
from retro_engine.serve.request_context import ServerState, caller_of, client_of, limits_of, state_of


class Login(Strict):
    """`setup` is the secret of the one-time link: it makes the first user."""

    name: str = Field(min_length=1, max_length=64)
    password: str = Field(min_length=1, max_length=MAX_PASSWORD)
    setup: str | None = Field(None, max_length=128)


async def login(request: Request) -> Response:
    """A new session, also where there was one. Refused before any hashing after too many failures."""
    state, limits = state_of(request), limits_of(request)
    asked = parse(Login, await read_json(request, limits, limits.sign_in_bytes))
    device = state.accounts.device_of(cookie(request.scope, DEVICE), asked.name)
    tries = _tries(state, client_of(request), asked.name, device)
    _check_tries(state, tries)
    for throttle, key in tries:
        throttle.failed(key)  # counted now, so that tries at the same time count too
    token = await _sign_in(state, asked)
    state.metrics.sign_in("failed" if token is None else "ok")
    state.accounts.audit("sign-in failed" if token is None else "sign-in", asked.name, client_of(request))
    if token is None:
        raise ApiError(401, "the name or the password is wrong", code="sign_in_failed")
    for throttle, key in tries:  # this one was none; those before it count on, else one name would open the next
        throttle.take_back(key)
    before = cookie(request.scope, COOKIE)
    if before:
        state.accounts.sign_out(before)
    caller = state.accounts.of_session(token)
    if caller is None:
        raise ApiError(401, "the user was removed", code="sign_in_failed")
    response = JSONResponse({"user": caller.about()})
    _set(response, request, COOKIE, token, SESSION_S)
    if device is None and (new := await asyncio.to_thread(state.accounts.add_device, asked.name)) is not None:
        _set(response, request, DEVICE, new, DEVICE_S)
    return response


def _tries(state: ServerState, client: str, name: str, device: str | None) -> list[tuple[Throttle, str]]:
    """What a try counts for: a browser that this user signed in with before has its own count, so that nobody who guesses
    elsewhere holds him up; else an address, and the name from all of them.
    """
    if device is not None:
        return [(state.throttle, f"device {device}")]
    return [(state.throttle, f"client {network_of(client)}"), (state.names, f"name {name}")]


def network_of(client: str) -> str:
    """An address, of IPv6 the network of 2^64 that one host has for itself."""
    try:
        address = ipaddress.ip_address(client)
    except ValueError:
        return client
    if isinstance(address, ipaddress.IPv6Address):
        return str(address.ipv4_mapped or ipaddress.ip_network((int(address) >> 64 << 64, 64)))
    return str(address)


def _check_tries(state: ServerState, tries: list[tuple[Throttle, str]]) -> None:
    wait_s = max(throttle.wait_s(key) for throttle, key in tries)
    if wait_s > 0:
        state.metrics.sign_in("throttled")
        raise ApiError(
            429, "too many failed sign-ins", code="throttled", headers={"retry-after": str(int(wait_s) + 1)}
        )  # fmt: skip


async def _sign_in(state: ServerState, asked: Login) -> str | None:
    async with state.hashing:
        if asked.setup is not None and not await asyncio.to_thread(
            state.accounts.set_up, asked.setup, asked.name, asked.password
        ):
            state.metrics.sign_in("failed")
            raise ApiError(401, "this set-up link was used, or is of an earlier start", code="setup_failed")
        return await asyncio.to_thread(state.accounts.sign_in, asked.name, asked.password)


def _set(response: Response, request: Request, name: str, value: str, seconds: int) -> None:
    is_secure = request.url.scheme == "https"
    response.set_cookie(
        cookie_name(request.scope, name),
        value,
        seconds,
        path=_path(request),
        httponly=True,
        samesite="strict",
        secure=is_secure,
    )


def _path(request: Request) -> str:
    """What of the host a cookie is for."""
    return request.scope["state"]["root_path"] or "/"


async def logout(request: Request) -> Response:
    """End the session of the cookie, if there is one."""
    state, token = state_of(request), cookie(request.scope, COOKIE)
    if token:
        caller = state.accounts.of_session(token)
        state.accounts.sign_out(token)
        if caller is not None:
            state.accounts.audit("sign-out", caller.name, client_of(request))
    response = JSONResponse({"user": None})
    response.delete_cookie(cookie_name(request.scope, COOKIE), _path(request), httponly=True, samesite="strict")
    return response


async def me(request: Request) -> Response:
    """Who is signed in, and whether anybody can be."""
    caller = caller_of(request)
    return JSONResponse(
        {"user": caller.about() if caller else None, "needs_setup": state_of(request).accounts.is_empty}
    )
