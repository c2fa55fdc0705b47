"""Users and keys over HTTP, as `retro users` and `retro keys` have them: for an admin who is signed in.

A key, whatever its scope, manages nobody: one that leaks makes no other. Whoever asks cannot shut himself out.
"""

import asyncio
from typing import Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from retro_engine.errors import UsageError
from retro_engine.serve.accounts import MAX_PASSWORD, Accounts, Caller
from retro_engine.serve.api_error import ApiError
from retro_engine.serve.limits import Strict, parse, read_json
from retro_engine.serve.request_context import audit, caller_of, limits_of, state_of

Scope = Literal["read", "write", "admin"]


class NewUser(Strict):
    """The body of POST /auth/users."""

    name: str = Field(max_length=64)
    password: str = Field(max_length=MAX_PASSWORD)
    scope: Scope = "read"


class ChangedUser(Strict):
    """The body of POST /auth/users/{name}: a new password; without a scope he keeps his."""

    password: str = Field(max_length=MAX_PASSWORD)
    scope: Scope | None = None


class NewKey(Strict):
    """The body of POST /auth/keys. Without days it is valid for ever."""

    name: str = Field(max_length=64)
    scope: Scope = "read"
    days: float | None = Field(None, gt=0, le=36_500)


def _admin(request: Request) -> tuple[Accounts, Caller]:
    """Raises ApiError for a key; the gate has asked for the scope."""
    caller = caller_of(request)
    assert caller is not None
    if caller.kind != "user":
        raise ApiError(403, "users and keys are managed by an admin who signs in, not by a key", code="session")
    return state_of(request).accounts, caller


async def list_users(request: Request) -> Response:
    """Who may sign in."""
    accounts, _ = _admin(request)
    rows = await asyncio.to_thread(accounts.users)
    return JSONResponse({"object": "list", "data": [{"name": name, "scope": scope} for name, scope in rows]})


async def add_user(request: Request) -> Response:
    """A new user; a name that is taken is refused."""
    accounts, _ = _admin(request)
    body = parse(NewUser, await read_json(request, limits_of(request), limits_of(request).sign_in_bytes))
    async with state_of(request).hashing:
        await asyncio.to_thread(accounts.add_user, body.name, body.password, body.scope)
    audit(request, "users.add", name=body.name, scope=body.scope)
    return JSONResponse({"name": body.name, "scope": body.scope})


async def change_user(request: Request) -> Response:
    """A new password for a user, and if wanted a scope; his sessions end."""
    accounts, caller = _admin(request)
    name = request.path_params["name"]
    body = parse(ChangedUser, await read_json(request, limits_of(request), limits_of(request).sign_in_bytes))
    if name == caller.name and body.scope not in (None, caller.scope):
        raise ApiError(400, "you would shut yourself out: another admin changes your scope", "scope", "own_access")
    _check_known(accounts, name)
    async with state_of(request).hashing:
        scope = await asyncio.to_thread(accounts.change_user, name, body.password, body.scope)
    audit(request, "users.change", name=name, scope=scope)
    return JSONResponse({"name": name, "scope": scope})


async def remove_user(request: Request) -> Response:
    """He cannot sign in any more, and his sessions end."""
    accounts, caller = _admin(request)
    name = request.path_params["name"]
    if name == caller.name:
        raise ApiError(400, "you would shut yourself out: another admin removes you", "name", "own_access")
    _check_known(accounts, name)
    await asyncio.to_thread(accounts.remove_user, name)
    audit(request, "users.remove", name=name)
    return JSONResponse({"name": name, "deleted": True})


def _check_known(accounts: Accounts, name: str) -> None:
    if name not in dict(accounts.users()):
        raise ApiError(404, f"user {name!r:.80} does not exist", "name", "user_not_found")


async def list_keys(request: Request) -> Response:
    """Keys by their ids; what they are is kept by nobody here."""
    accounts, _ = _admin(request)
    return JSONResponse({"object": "list", "data": await asyncio.to_thread(accounts.list_keys)})


async def add_key(request: Request) -> Response:
    """A new key, shown this once."""
    accounts, _ = _admin(request)
    body = parse(NewKey, await read_json(request, limits_of(request)))
    key = await asyncio.to_thread(accounts.add_key, body.name, body.scope, body.days)
    audit(request, "keys.add", name=body.name, scope=body.scope)
    return JSONResponse({"key": key, "name": body.name, "scope": body.scope})


async def remove_key(request: Request) -> Response:
    """What it opened is shut from the next request on."""
    accounts, _ = _admin(request)
    identifier = request.path_params["key"]
    try:
        await asyncio.to_thread(accounts.remove_key, identifier)
    except UsageError as error:
        raise ApiError(404, error.what, "key", "key_not_found") from None
    audit(request, "keys.remove", key=identifier)
    return JSONResponse({"id": identifier, "deleted": True})
