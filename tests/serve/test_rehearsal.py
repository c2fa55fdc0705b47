"""What a server asks itself before it is ready: every way in which its model answers, over a connection and through the gate, and
nothing of it is counted or kept.
"""

import asyncio
from pathlib import Path

import pytest
from serve_helpers import Server, serving, serving_run
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from retro_engine.generate.engine import Request as Asked
from retro_engine.serve.app import ROUTES, Endpoint
from retro_engine.serve.rehearsal import Rehearsal
from retro_engine.serve.service import ServiceOptions, open_service


def rehearsed(server: Server, rounds: int = 1) -> list[tuple[str, int]]:
    """The paths that a rehearsal asks, with what they answer."""
    asked = []

    def noted(endpoint: Endpoint) -> Endpoint:
        async def answer(request: Request) -> Response:
            assert request.scope["state"]["caller"].name == "rehearsal", "it came through the gate"
            response = await endpoint(request)
            asked.append((request.url.path, response.status_code))
            return response

        return answer

    routes = [Route(path, noted(endpoint), methods=[method]) for method, path, endpoint, _ in ROUTES]
    scopes = {(method, path): scope for method, path, _, scope in ROUTES}
    asyncio.run(Rehearsal(server.state, routes, scopes, {}).ask(server.service, rounds))
    return asked


def counted(server: Server) -> list[str]:
    """What a dashboard is told."""
    lines = server.state.metrics.text().decode().splitlines()
    return [line for line in lines if line.startswith(("retro_", "vllm:")) and "_created" not in line]


def test_completions_and_chats_are_asked(server: Server) -> None:
    before = [line for line in counted(server) if line.startswith(("retro_tokens", "retro_requests"))]
    assert rehearsed(server, 2) == 2 * [("/v1/chat/completions", 200), ("/v1/completions", 200)]
    assert [line for line in counted(server) if line.startswith(("retro_tokens", "retro_requests"))] == before


def test_a_reader_is_asked_a_question(reader_folder: Path, base: Path, tmp_path: Path) -> None:
    options = ServiceOptions(run="", reader=str(reader_folder), base=str(base), library=str(tmp_path / "library"))
    with serving(lambda: open_service(options), tmp_path) as server:
        assert rehearsed(server) == [("/v1/chat/completions", 200), ("/v1/ask", 200)]


def test_nothing_is_kept_or_counted(small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a server that is ready, whatever it has asked itself: it settles between, and asks again."""
    order: list[str] = []
    ask = Rehearsal.ask

    async def noted(self: Rehearsal, service: object, rounds: int) -> float:
        await ask(self, service, rounds)  # type: ignore[arg-type]
        order.append(f"asked {rounds}")
        return 0.0

    monkeypatch.setattr(Rehearsal, "ask", noted)
    with serving_run(small_run, tmp_path, settle=lambda: order.append("settled")) as server:
        assert order == ["asked 1", "settled", "asked 10"]
        about = [
            line for line in counted(server) if not line.startswith(("retro_index_version", "retro_library_merging"))
        ]
        assert [line for line in about if not line.endswith(" 0.0") and "{" not in line] == []
        stats = server.service.engine.stats()
        assert not any(stats.values()), stats
        first = Asked(server.service.known_words(), 4)
        assert server.service.engine.submit(first).result().text is not None
        assert server.service.engine.stats()["prefix_tokens_reused"] == 0
