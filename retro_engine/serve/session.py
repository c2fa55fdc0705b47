"""Signing in and out of the page: a name and a password become a session's cookie."""

import asyncio

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from retro_engine.serve.auth import MAX_PASSWORD, SESSION_S
from retro_engine.serve.gate import COOKIE, session_token
from retro_engine.serve.limits import ApiError, Strict, parse, read_json
from retro_engine.serve.state import caller_of, client_of, limits_of, state_of


class Login(Strict):
    """`setup` is the secret of the one-time link: it makes the first user."""

    name: str = Field(min_length=1, max_length=64)
    password: str = Field(min_length=1, max_length=MAX_PASSWORD)
    setup: str | None = Field(None, max_length=128)


async def login(request: Request) -> Response:
    """A new session, also where there was one. Refused before any hashing after too many failures."""
    state, limits = state_of(request), limits_of(request)
    asked = parse(Login, await read_json(request, limits, limits.sign_in_bytes))
    client = client_of(request)
    keys = [f"client {client}", f"name {asked.name}"]
    wait_s = max(state.throttle.wait_s(key) for key in keys)
    if wait_s > 0:
        state.metrics.sign_in("throttled")
        raise ApiError(
            429, "too many failed sign-ins", code="throttled", headers={"retry-after": str(int(wait_s) + 1)}
        )  # fmt: skip
    for key in keys:
        state.throttle.failed(key)  # counted now, so that tries at the same time count too
    async with state.hashing:
        if asked.setup is not None and not await asyncio.to_thread(
            state.accounts.set_up, asked.setup, asked.name, asked.password
        ):
            state.metrics.sign_in("failed")
            raise ApiError(401, "this set-up link was used, or is of an earlier start", code="setup_failed")
        token = await asyncio.to_thread(state.accounts.sign_in, asked.name, asked.password)
    state.metrics.sign_in("failed" if token is None else "ok")
    state.accounts.audit("sign-in failed" if token is None else "sign-in", asked.name, client)
    if token is None:
        raise ApiError(401, "the name or the password is wrong", code="sign_in_failed")
    for key in keys:
        state.throttle.forget(key)
    before = session_token(request.headers)
    if before:
        state.accounts.sign_out(before)
    caller = state.accounts.of_session(token)
    assert caller is not None, "a session that was just made"
    response = JSONResponse({"user": caller.about()})
    is_secure = request.url.scheme == "https"
    response.set_cookie(COOKIE, token, SESSION_S, httponly=True, samesite="strict", secure=is_secure)
    return response


async def logout(request: Request) -> Response:
    """End the session of the cookie, if there is one."""
    state, token = state_of(request), session_token(request.headers)
    if token:
        caller = state.accounts.of_session(token)
        state.accounts.sign_out(token)
        if caller is not None:
            state.accounts.audit("sign-out", caller.name, client_of(request))
    response = JSONResponse({"user": None})
    response.delete_cookie(COOKIE, httponly=True, samesite="strict")
    return response


async def me(request: Request) -> Response:
    """Who is signed in, and whether anybody can be."""
    caller = caller_of(request)
    return JSONResponse(
        {"user": caller.about() if caller else None, "needs_setup": state_of(request).accounts.is_empty}
    )
