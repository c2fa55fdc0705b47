"""OpenTelemetry spans of answers, with the names of its conventions for generative models (`gen_ai.*`); off unless configured.

A span says which model, how it was asked to sample, how many tokens there were, when the first came and how it ended: never a
prompt, an answer or a document. It joins the trace of a client that sends `traceparent`.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.requests import Request

from retro_engine.errors import UsageError, extra
from retro_engine.serve.answers import Answer
from retro_engine.serve.api_error import ApiError
from retro_engine.serve.fields import Completion, Sampled

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Span

SERVICE = "retro-engine"
ASKED = {  # attributes of a span by the body's field
    "model": "gen_ai.request.model", "temperature": "gen_ai.request.temperature", "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k", "max_tokens": "gen_ai.request.max_tokens", "seed": "gen_ai.request.seed",
    "presence_penalty": "gen_ai.request.presence_penalty", "frequency_penalty": "gen_ai.request.frequency_penalty",
}  # fmt: skip


def otlp_processor(url: str) -> "SpanProcessor":
    """Sends spans, in the background, to a collector's address (http://127.0.0.1:4318): OTLP over HTTP.

    Raises UsageError for what is no address, MissingExtraError without the extra `otel`.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
        raise UsageError(f"--otlp {url[:200]!r} cannot be used", "", "a collector's address: http://127.0.0.1:4318")
    with extra("otel", "OpenTelemetry is not installed", "--otlp needs it"):
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    where = url if parts.path.rstrip("/").endswith("/v1/traces") else f"{url.rstrip('/')}/v1/traces"
    return BatchSpanProcessor(OTLPSpanExporter(endpoint=where))


class Tracing:
    """Makes the spans of one server; without a processor none."""

    def __init__(self, processor: "SpanProcessor | None" = None):
        self._provider: Any = None
        if processor is None:
            return
        with extra("otel", "OpenTelemetry is not installed", "spans are made with it"):
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
        self._provider = TracerProvider(resource=Resource.create({"service.name": SERVICE}))
        self._provider.add_span_processor(processor)

    def answering(self, request: Request, body: Sampled, answer: Answer) -> contextlib.AbstractContextManager[None]:
        """A span around the making of an answer, ended with what is known of it then. It begins now: an engine may have answered
        before the block is entered.
        """
        return self._around(request, body, answer, time.monotonic())

    @contextlib.contextmanager
    def _around(self, request: Request, body: Sampled, answer: Answer, begun: float) -> Iterator[None]:
        if self._provider is None:
            yield
            return
        span = self._begin(request, body, answer, begun)
        try:
            yield
        except BaseException as error:
            status = error.status if isinstance(error, ApiError) else type(error).__name__
            span.set_attribute("error.type", str(status))
            raise
        finally:
            _end(span, answer, begun)

    def _begin(self, request: Request, body: Sampled, answer: Answer, begun: float) -> "Span":
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        operation = "text_completion" if isinstance(body, Completion) else "chat"
        about: dict[str, Any] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": SERVICE,
            "gen_ai.response.model": answer.service.name,
            "gen_ai.response.id": answer.head["id"],
            "retro.request_id": request.scope["state"]["request_id"],
        }
        about |= {name: value for field, name in ASKED.items() if (value := getattr(body, field)) is not None}
        if body.n > 1:
            about["gen_ai.request.choice.count"] = body.n
        parent = TraceContextTextMapPropagator().extract(dict(request.headers))
        tracer = self._provider.get_tracer("retro_engine.serve")
        start_ns = time.time_ns() - int(1e9 * (time.monotonic() - begun))
        name = f"{operation} {answer.service.name}"
        return tracer.start_span(name, parent, SpanKind.SERVER, about, start_time=start_ns)

    def close(self) -> None:
        """Send what has not been sent."""
        if self._provider is not None:
            self._provider.shutdown()


def _end(span: "Span", answer: Answer, begun: float) -> None:
    span.set_attribute("gen_ai.usage.input_tokens", answer.prompt_tokens)
    span.set_attribute("gen_ai.usage.output_tokens", answer.completion_tokens)
    span.set_attribute("gen_ai.usage.cache_read.input_tokens", answer.cached_tokens)
    span.set_attribute("retro.usage.neighbor_tokens", answer.neighbor_tokens)
    if answer.reasons:
        span.set_attribute("gen_ai.response.finish_reasons", answer.reasons)
    if answer.times is not None and answer.times.first is not None:
        span.set_attribute("gen_ai.response.time_to_first_chunk", answer.times.first - begun)
    span.end()
