"""Timing on a GPU, with a GPU that is made up: the host's part is not in it, and a pause that is too short is found."""

import pytest

from retro_engine.bench import gpu_time


class Made:
    """A queue: the host has its own clock, the GPU begins what is queued when both are ready."""

    def __init__(self) -> None:
        self.host = self.gpu = 0.0
        self.pauses: list[float] = []

    def launch(self, host_s: float, gpu_s: float) -> None:
        self.host += host_s
        self.gpu = max(self.gpu, self.host) + gpu_s

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.launch(1e-6, seconds)

    def mark(self) -> float:
        self.launch(1e-6, 0)
        return self.gpu

    def is_reached(self, mark: float) -> bool:
        return mark <= self.host

    def between(self, first: float, last: float) -> float:
        self.host = max(self.host, last)
        return last - first


@pytest.mark.parametrize(("host_s", "gpu_s"), [(3e-4, 4.7e-5), (6e-5, 5e-3), (1e-3, 1e-6)])
def test_what_the_host_takes_is_not_in_it(host_s: float, gpu_s: float) -> None:
    gpu = Made()
    works = {"ours": lambda: gpu.launch(host_s, gpu_s), "other": lambda: gpu.launch(host_s, 2 * gpu_s)}
    times = gpu_time.in_turns(works, gpu)
    assert [len(values) for values in times.values()] == [20, 20]
    assert all(abs(value - gpu_s) < 0.02 * gpu_s + 2e-6 / 2 for value in times["ours"])
    assert all(abs(value - 2 * gpu_s) < 0.02 * gpu_s + 2e-6 / 2 for value in times["other"])


def test_what_waits_for_the_gpu_itself_is_timed_with_its_waiting_and_ends() -> None:
    gpu = Made()

    def waits() -> None:
        gpu.launch(1e-5, 1e-4)
        gpu.host = max(gpu.host, gpu.gpu)

    times = gpu_time.in_turns({"waits": waits}, gpu, 3)
    assert all(value > 1.05e-4 for value in times["waits"])
    assert max(gpu.pauses) == gpu_time.LONGEST_PAUSE_S
