"""OpenTelemetry spans of answers: what they say, what they never say, and that there are none unless asked for."""

import time
from typing import Any

import pytest
from serve_helpers import Server, post

from retro_engine.errors import MissingExtraError, UsageError
from retro_engine.serve.tracing import Tracing, otlp_processor

export = pytest.importorskip(
    "opentelemetry.sdk.trace.export.in_memory_span_exporter", reason="opentelemetry-sdk is not installed"
)
from opentelemetry.sdk.trace.export import SimpleSpanProcessor  # noqa: E402 (skipped above)

SECRET = "The quarry of Elmswell"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def spans(server: Server, monkeypatch: pytest.MonkeyPatch) -> Any:
    exporter = export.InMemorySpanExporter()
    monkeypatch.setattr(server.state, "tracing", Tracing(SimpleSpanProcessor(exporter)))
    return exporter.get_finished_spans


def test_a_span_of_every_answer(server: Server, spans: Any) -> None:
    chat = {
        "model": "tiny",
        "messages": [{"role": "user", "content": SECRET}],
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 3,
    }
    out = post(server, "/v1/chat/completions", **chat, max_tokens=3, n=2).json()
    with server.client(
        "read",
    ) as client:
        body = {"prompt": SECRET, "max_tokens": 4, "temperature": 0, "stream": True}
        answer = client.post("/v1/completions", json=body, headers={"traceparent": PARENT, "x-request-id": "mine-1"})
        assert answer.text.endswith("data: [DONE]\n\n")
        client.post("/v1/messages", json={"model": "tiny", "max_tokens": 2, "messages": chat["messages"]})
    first, second, third = spans()
    assert first.name == "chat tiny"
    about = dict(first.attributes)
    assert about["gen_ai.operation.name"] == "chat"
    assert about["gen_ai.response.id"] == out["id"]
    assert (about["gen_ai.usage.input_tokens"], about["gen_ai.usage.output_tokens"]) == (
        out["usage"]["prompt_tokens"],
        out["usage"]["completion_tokens"],
    )
    assert about["gen_ai.response.finish_reasons"] == tuple(choice["finish_reason"] for choice in out["choices"])
    assert (
        about["gen_ai.request.temperature"],
        about["gen_ai.request.choice.count"],
        about["gen_ai.request.seed"],
    ) == (0.5, 2, 3)
    assert 0 < about["gen_ai.response.time_to_first_chunk"] <= (first.end_time - first.start_time) / 1e9
    assert second.name == "text_completion tiny"
    assert (f"{second.context.trace_id:032x}", f"{second.parent.span_id:016x}") == tuple(PARENT.split("-")[1:3])
    assert second.attributes["gen_ai.usage.output_tokens"] == 4
    assert second.attributes["retro.request_id"] == "mine-1"
    assert third.attributes["gen_ai.request.max_tokens"] == 2
    assert all("Elmswell" not in span.to_json() for span in (first, second, third)), "never what was said"


def test_an_engine_that_answers_before_the_span_is_made(
    server: Server, spans: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Tracing._begin

    def late(*arguments: Any) -> Any:
        time.sleep(0.2)
        return begin(*arguments)

    monkeypatch.setattr(Tracing, "_begin", late)
    assert post(server, "/v1/completions", prompt="a river", max_tokens=1).status_code == 200
    (span,) = spans()
    assert 0 < span.attributes["gen_ai.response.time_to_first_chunk"] <= (span.end_time - span.start_time) / 1e9


def test_what_fails_and_who_leaves(server: Server, spans: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"prompt": "river", "max_tokens": 200, "min_tokens": 200, "stream": True, "temperature": 0}
    with server.client("read") as client, client.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    for _ in range(100):
        if spans():
            break
        time.sleep(0.05)
    (left,) = spans()
    assert left.attributes["error.type"] == "ClientLeft"
    assert left.attributes["gen_ai.usage.output_tokens"] < 200


def test_there_are_none_unless_asked_for(server: Server) -> None:
    assert post(server, "/v1/completions", prompt="a", max_tokens=1).status_code == 200
    Tracing().close()
    for wrong in ("localhost:4318", "ftp://a", "http://", "http://a?b=c"):
        with pytest.raises(UsageError, match="--otlp"):
            otlp_processor(wrong)


def test_where_spans_go() -> None:
    try:
        import opentelemetry.exporter.otlp.proto.http  # noqa: F401
    except ImportError:
        with pytest.raises(MissingExtraError, match="OpenTelemetry is not installed"):
            otlp_processor("http://127.0.0.1:9")
        return
    processor: Any = otlp_processor("http://127.0.0.1:9/base/")
    exporter = processor.span_exporter if hasattr(processor, "span_exporter") else processor._batch_processor._exporter
    assert exporter._endpoint == "http://127.0.0.1:9/base/v1/traces"
    processor.shutdown()
