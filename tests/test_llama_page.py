"""llama.cpp's own page: the requests that it made when it was driven in a browser, asked again; and the page itself, in Chromium,
where a build of it is named (RETRO_LLAMA_PAGE: the folder that `npm run build` makes of llama.cpp's tools/ui).
"""

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

import uvicorn
from serve_helpers import Server, make_run, serving_run
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Route

from retro_engine.data.store import Store

PAGE = os.environ.get("RETRO_LLAMA_PAGE")
CHROMIUM = shutil.which("chromium")


def tool(name: str, description: str) -> dict[str, Any]:
    parameters = {"properties": {}, "required": [], "type": "object"}
    return {"function": {"description": description, "name": name, "parameters": parameters}, "type": "function"}


# Recorded from the page of its sources of October 2026 (tools/ui), with a question, another behind its answer, and "regenerate".
BESIDE: dict[str, Any] = {
    "return_progress": True, "sse_ping_interval": 1, "stream": True, "reasoning_format": "auto", "reasoning_control": True,
    "backend_sampling": False, "timings_per_token": True,
    "tools": [
        tool("get_datetime", "Returns the current local date and time in ISO 8601 format, with the IANA time zone name"),
        tool("get_info", "Get runtime info (OS name), may call when user asks about local files or shell commands"),
    ],
}  # fmt: skip
BEFORE = [  # method, address, body, status: what is not here is told so, and the page goes on without it
    ("GET", "/tools", None, 404),
    ("GET", "/props", None, 200),
    ("POST", "/tools", {"params": {"limit": 1, "max_depth": 1, "path": "~", "type": "dir"}, "tool": "file_glob_search"}, 404),
    ("GET", "/props?autoload=false", None, 200),
    ("GET", "/props?model=tiny&autoload=false", None, 200),
    ("GET", "/v1/models", None, 200),
    ("POST", "/v1/streams/lookup", {"conversation_ids": ["f3a0b04a-b275-4488-a07e-6385b7cbbffc::tiny"]}, 404),
]  # fmt: skip


@pytest.fixture(scope="module")
def server(small_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("llama-page")
    with serving_run(make_run(small_store, folder / "run"), folder) as server:
        yield server


def test_what_it_asked_is_answered(server: Server) -> None:
    messages = [{"content": "What is the harbor?", "role": "user"}]
    with server.client("read") as client:
        for method, address, body, status in BEFORE:
            assert client.request(method, address, json=body).status_code == status, address
        for question in ("And the river?", None):
            out = client.post("/v1/chat/completions", json={**BESIDE, "messages": messages})
            assert out.status_code == 200 and out.text.endswith("data: [DONE]\n\n"), out.text
            pieces = [json.loads(line[6:]) for line in out.text.splitlines() if line.startswith("data: {")]
            said = "".join(choice["delta"].get("content") or "" for piece in pieces for choice in piece["choices"])
            assert said and sum("timings" in piece for piece in pieces) == 1, "the page shows tokens and seconds"
            notes = [note for piece in pieces for note in piece.get("retro", {}).get("notes", ())]
            assert "taken, without effect here: return_progress, sse_ping_interval" in notes
            messages += [{"content": said, "role": "assistant"}, {"content": question, "role": "user"}]


@pytest.fixture
def front(server: Server) -> Iterator[tuple[str, list[str]]]:
    """The page's files, and behind them the server, as one address; what was asked of the server and refused."""
    folder, refused = Path(PAGE or ""), list[str]()

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=60) as app.state.client:
            yield

    async def answer(request: Request) -> Response:
        file = folder / (request.url.path.lstrip("/") or "index.html")
        if request.method == "GET" and file.is_file():
            return FileResponse(file)
        headers = {"authorization": f"Bearer {server.keys['read']}", "content-type": "application/json"}
        address = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        client: httpx.AsyncClient = request.app.state.client
        asked = client.build_request(request.method, address, content=await request.body(), headers=headers)
        found = await client.send(asked, stream=True)
        if found.status_code >= 400:
            refused.append(f"{request.method} {request.url.path}")
        return StreamingResponse(found.aiter_raw(), found.status_code, {"content-type": found.headers["content-type"]})

    app = Starlette(routes=[Route("/{path:path}", answer, methods=["GET", "POST", "DELETE"])], lifespan=lifespan)
    running = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}", refused
    running.should_exit = True
    thread.join(20)


@pytest.mark.skipif(PAGE is None, reason="RETRO_LLAMA_PAGE=FOLDER names no build of llama.cpp's page")
def test_the_page_itself(front: tuple[str, list[str]]) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("chromium is absent")
    address, refused = front
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_context(service_workers="block").new_page()
        tab.set_default_timeout(20_000)
        tab.goto(address)
        for number, question in enumerate(("What is the harbor?", "And the river?"), start=1):
            tab.locator("textarea").first.fill(question)
            tab.keyboard.press("Enter")
            tab.wait_for_function(
                "count => document.querySelectorAll('[aria-label=Regenerate]').length == count", arg=number
            )
        tab.get_by_role("button", name="Regenerate").last.click()
        tab.locator("[aria-label='Next version']").last.wait_for(state="attached")
        assert not tab.get_by_text("Server Error").count()
        browser.close()
    assert set(refused) <= {
        "GET /tools",
        "POST /tools",
        "POST /v1/streams/lookup",
        "GET /favicon.svg",
        "GET /favicon.ico",
    }
