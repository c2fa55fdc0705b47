"""What one server's requests may cost, and how often one may fail to sign in."""

import time
from collections import OrderedDict, deque
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of one server."""

    sign_in_bytes: int = 16 << 10  # of a body before anybody is known
    body_bytes: int = 1 << 20
    documents_bytes: int = 8 << 20
    import_bytes: int = 1 << 30
    json_depth: int = 32
    json_nodes: int = 1 << 15  # lists, objects and members of objects
    prompt_tokens: int = 4096
    new_tokens: int = 2048
    choices: int = 32  # prompts x n of one request
    work_tokens: int = 1 << 19  # that one request computes: of prompts and answers, and of the neighbors of each chunk
    logprobs: int = 1 << 17  # numbers of one answer
    sent_bytes: int = 64 << 20  # of given neighbors, which are sent back with each piece that could read them
    header_bytes: int = 16 << 10  # of a request's first line and headers together
    path_bytes: int = 8 << 10  # of the first line
    connections: int = 800
    header_s: float = 10.0  # from the first byte of a request, or of a connection, to the end of its headers
    progress_s: float = 15.0  # without a byte of a body that is read, or of an answer that is sent
    idle_s: float = 15.0  # between requests
    request_s: float = 120.0
    import_s: float = 900.0
    shutdown_s: float = 30.0


class Throttle:
    """At most `count` failures in `window_s` for each key; then the caller waits. Holds at most `max_keys` keys."""

    def __init__(self, count: int, window_s: float, max_keys: int = 10_000):
        self.count, self.window_s, self.max_keys = count, window_s, max_keys
        self._failures: OrderedDict[str, deque[float]] = OrderedDict()

    def wait_s(self, key: str) -> float:
        """Seconds until the next try is allowed; 0 = now."""
        times = self._failures.get(key, deque())
        now = time.monotonic()
        while times and now - times[0] >= self.window_s:
            times.popleft()
        return self.window_s - (now - times[0]) if len(times) >= self.count else 0.0

    def failed(self, key: str) -> None:
        self._failures.setdefault(key, deque(maxlen=self.count)).append(time.monotonic())
        self._failures.move_to_end(key)
        while len(self._failures) > self.max_keys:
            self._failures.popitem(last=False)

    def take_back(self, key: str) -> None:
        """The newest failure was none."""
        times = self._failures.get(key)
        if times:
            times.pop()

    def forget_all(self) -> None:
        self._failures.clear()
