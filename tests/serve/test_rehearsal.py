"""What a server asks itself before it is ready: every way in which its model answers, and nothing of it is counted or kept."""

from pathlib import Path

from serve_helpers import Server, serving
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from retro_engine.serve.app import ROUTES, Endpoint
from retro_engine.serve.rehearsal import rehearse
from retro_engine.serve.service import ServiceOptions, open_service


def rehearsed(server: Server) -> list[str]:
    """The paths that a rehearsal asks; what is not answered raises, for no handler makes a refusal of it."""
    asked = []

    def noted(endpoint: Endpoint) -> Endpoint:
        async def answer(request: Request) -> Response:
            asked.append(request.url.path)
            return await endpoint(request)

        return answer

    routes = [Route(path, noted(endpoint), methods=[method]) for method, path, endpoint, _ in ROUTES]
    with server.service.rehearsing() as double:
        rehearse(double, server.state, routes, {})
    return list(dict.fromkeys(asked))


def test_completions_and_chats_are_asked_and_not_counted(server: Server) -> None:
    def counted() -> list[str]:
        lines = server.state.metrics.text().decode().splitlines()
        return [line for line in lines if line.startswith(("retro_tokens", "vllm:", "retro_requests"))]

    before, stats = counted(), server.service.engine.stats()
    assert rehearsed(server) == ["/v1/completions", "/v1/chat/completions"]
    after = server.service.engine.stats()
    assert counted() == before
    for name in ("prefix_bytes", "prefix_tokens_asked", "neighbors_encoded", "neighbor_bytes", "waiting"):
        assert after[name] == stats[name], name


def test_a_reader_is_asked_a_question(reader_folder: Path, base: Path, tmp_path: Path) -> None:
    options = ServiceOptions(run="", reader=str(reader_folder), base=str(base), library=str(tmp_path / "library"))
    with serving(lambda: open_service(options), tmp_path) as server:
        assert rehearsed(server) == ["/v1/ask", "/v1/chat/completions"]
