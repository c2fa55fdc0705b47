"""Counts for Prometheus: requests by route and status, times, tokens, the engine, the documents."""

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

BUCKETS_S = (0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0)


class Metrics:
    """The registry of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ["route", "status"]
        self._requests = Counter("retro_requests", "Answers", labels, registry=self.registry)
        self._seconds = Histogram(
            "retro_request_seconds", "From the headers to the end", ["route"], buckets=BUCKETS_S, registry=self.registry
        )
        kinds = ["kind"]
        self._tokens = Counter("retro_tokens", "Tokens of prompts and answers", kinds, registry=self.registry)
        self._sign_ins = Counter("retro_sign_ins", "By outcome", ["outcome"], registry=self.registry)

    def request(self, route: str, status: int, seconds: float) -> None:
        """`status` 0: the client left before an answer began."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def tokens(self, prompt: int, completion: int) -> None:
        self._tokens.labels("prompt").inc(prompt)
        self._tokens.labels("completion").inc(completion)

    def sign_in(self, outcome: str) -> None:
        self._sign_ins.labels(outcome).inc()

    def watch(self, name: str, about: str, value: Callable[[], Any]) -> None:
        """A gauge that is read when it is asked for."""
        Gauge(name, about, registry=self.registry).set_function(lambda: float(value()))

    def text(self) -> bytes:
        return generate_latest(self.registry)
