"""Counts for Prometheus: requests by route and status, times, tokens, the engine, the documents.

What dashboards of vLLM show has its names (`vllm:...`) and its label, so that they show it of this server too.
"""

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily

from retro_engine.generate.engine import Times

BUCKETS_S = (0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0)
STEPS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
TIMES = {
    "time_to_first_token": "From the request to its first token",
    "inter_token_latency": "Between two pieces of a stream",
    "e2e_request_latency": "From the request to its last token",
    "request_queue_time": "Until a row was free and neighbors were found",
    "request_prefill_time": "From then to the first token",
    "request_decode_time": "From the first token to the last",
}
MODEL = ["model_name"]


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
        self._times = {
            name: Histogram(f"vllm:{name}_seconds", about, MODEL, buckets=STEPS_S, registry=self.registry)
            for name, about in TIMES.items()
        }
        counts = {"prompt_tokens": "Of prompts", "generation_tokens": "Of answers"}
        self._counts = {n: Counter(f"vllm:{n}", about, MODEL, registry=self.registry) for n, about in counts.items()}
        labels = [*MODEL, "finished_reason"]
        self._ends = Counter("vllm:request_success", "Sequences that ended", labels, registry=self.registry)
        self.model = ""  # its name, once it is loaded
        self._between = self._times["inter_token_latency"]  # of the model then
        self._sign_ins = Counter("retro_sign_ins", "By outcome", ["outcome"], registry=self.registry)

    def name_model(self, name: str) -> None:
        """The model that is served; its series are there from the beginning, at 0."""
        self.model = name
        for one in (*self._times.values(), *self._counts.values()):
            one.labels(name)
        self._between = self._times["inter_token_latency"].labels(name)

    def request(self, route: str, status: int, seconds: float) -> None:
        """`status` 0: the client left before an answer began."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def tokens(self, prompt: int, completion: int) -> None:
        self._tokens.labels("prompt").inc(prompt)
        self._tokens.labels("completion").inc(completion)
        self._counts["prompt_tokens"].labels(self.model).inc(prompt)
        self._counts["generation_tokens"].labels(self.model).inc(completion)

    def between(self, seconds: float) -> None:
        """Two pieces of one answer."""
        self._between.observe(seconds)

    def ended(self, times: Times, reason: str) -> None:
        """A sequence that ended; one that had no row or no token has no such time."""
        self._ends.labels(self.model, reason).inc()
        if times.first is None or times.started is None:
            return
        last = times.first if times.last is None else times.last
        for name, seconds in {
            "time_to_first_token": times.first - times.submitted,
            "e2e_request_latency": last - times.submitted,
            "request_queue_time": times.started - times.submitted,
            "request_prefill_time": times.first - times.started,
            "request_decode_time": last - times.first,
        }.items():
            self._times[name].labels(self.model).observe(seconds)

    def sign_in(self, outcome: str) -> None:
        self._sign_ins.labels(outcome).inc()

    def watch(self, name: str, about: str, value: Callable[[], Any]) -> None:
        """A gauge that is read when it is asked for."""
        Gauge(name, about, registry=self.registry).set_function(lambda: float(value()))

    def watch_model(self, name: str, about: str, value: Callable[[], Any]) -> None:
        """A gauge of the model's, under a name of vLLM's."""
        gauge = Gauge(f"vllm:{name}", about, MODEL, registry=self.registry)
        gauge.labels(self.model).set_function(lambda: float(value()))

    def watch_count(self, name: str, about: str, value: Callable[[], int]) -> None:
        """A count that something else keeps."""
        self.registry.register(_Count(name, about, value, self.model))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Count:
    """A count that is read when it is asked for."""

    def __init__(self, name: str, about: str, value: Callable[[], int], model: str):
        self._name, self._about, self._value, self._model = name, about, value, model

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(self._name, self._about, labels=MODEL)
        family.add_metric([self._model], float(self._value()))
        yield family
