"""Threads of a step follow the cores that other processes leave, and no bit of what it computes follows them."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import small_config

from retro_engine.data.store import Store
from retro_engine.generate import decoding_batch
from retro_engine.generate.free_cores import FreeCores, settled
from retro_engine.generate.generator import Generator
from retro_engine.generate.request import Request
from retro_engine.model import ops
from retro_engine.model.quantize import use_weights
from retro_engine.model.retro import RetroModel

TICKS = os.sysconf("SC_CLK_TCK")
pytestmark = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores are Linux'")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Machine:
    """Two cores, a clock, and /proc/stat."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.stat, self.now, self.own, self.priority = folder / "stat", 100.0, 7.0, 0
        self.times = {field: 50.0 for field in ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")}
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
        monkeypatch.setattr(os, "getpriority", lambda *_: self.priority)
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "process_time", lambda: self.own)
        self.write()

    def write(self) -> None:
        fields = " ".join(str(round(seconds * TICKS)) for seconds in self.times.values())
        idle = " ".join("0" for _ in self.times)
        self.stat.write_text(f"cpu  {fields} 0 0\ncpu0 {fields} 0 0\ncpu1 {idle} 0 0\ncpu2 {fields} 0 0\nintr 1 2\n")

    def passes(self, seconds: float, own: float, **cores: float) -> None:
        """Time, of which this process has `own` cores and the others what is named."""
        self.now += seconds
        self.own += own * seconds
        self.times["user"] += own * seconds
        for field, share in cores.items():
            self.times[field] += share * seconds
        self.write()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_a_core_that_is_taken_is_left_and_used_again(machine: Machine) -> None:
    cores = FreeCores(machine.stat)
    assert cores.count(2) == 2
    machine.passes(0.2, 1.5, user=0.5)  # it wants a core, and shares it with one of ours
    assert cores.count(2) == 1
    assert cores.count(1) == 1
    machine.passes(0.2, 1.0, user=1.0)
    assert cores.count(2) == 1
    machine.passes(0.2, 1.0, idle=1.0)
    assert cores.count(2) == 1  # once is chance
    machine.passes(0.2, 1.0, idle=1.0)
    assert cores.count(2) == 2


@pytest.mark.parametrize(
    ("others", "priority", "expected"),
    [
        ({"user": 0.2, "idle": 0.1}, 0, 2),  # little
        ({"nice": 1.0}, 0, 2),  # gives way
        ({"nice": 1.0}, 10, 1),  # but not to one that is as low
        ({"steal": 0.6}, 0, 2),  # a hypervisor's: another number of threads changes nothing
        ({"iowait": 1.0}, 0, 2),
        ({"system": 0.3, "irq": 0.2, "softirq": 0.2}, 0, 1),
    ],
)
def test_what_counts_as_taken(machine: Machine, others: dict[str, float], priority: int, expected: int) -> None:
    machine.priority = priority
    cores = FreeCores(machine.stat)
    machine.passes(0.2, 2 - sum(others.values()), **others)
    assert cores.count(2) == expected


def test_two_side_by_side_have_a_core_each(machine: Machine) -> None:
    both = [FreeCores(machine.stat), FreeCores(machine.stat)]
    counts = [2, 2]
    for _ in range(8):
        machine.passes(0.2, 1.0, user=1.0)  # each sees the other take one, with one thread or two
        counts = [cores.count(2) for cores in both]
    assert counts == [1, 1]


def test_a_mean_over_a_long_time_says_nothing(machine: Machine) -> None:
    cores = FreeCores(machine.stat)
    machine.passes(60, 0.0, user=2.0)
    assert cores.count(2) == 2


@pytest.mark.parametrize(("free", "before", "were_free", "expected"), [(1.7, 2, 0, (2, 1)), (1.6, 2, 0, (1, 0)), (1.7, 1, 1, (1, 1)), (1.9, 1, 1, (1, 2)), (1.9, 1, 2, (2, 0)), (0.1, 2, 0, (1, 0)), (7.9, 3, 5, (5, 0))])  # fmt: skip
def test_no_flapping(free: float, before: int, were_free: int, expected: tuple[int, int]) -> None:
    assert settled(free, before, were_free) == expected


@pytest.mark.parametrize("case", ["missing", "other", "fixed"])
def test_nothing_changes_where_nothing_is_known_or_the_number_is_fixed(
    machine: Machine, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "missing":
        machine.stat.unlink()
    elif case == "other":
        machine.stat.write_text("cpu0 user 1\n")
    else:
        monkeypatch.setenv("OMP_DYNAMIC", "false")
    cores = FreeCores(machine.stat)
    if case == "fixed":
        machine.passes(0.2, 0.0, user=2.0)
    assert cores.count(2) == 2


class OneIsFree(FreeCores):
    """Another process takes all but one."""

    def count(self, most: int) -> int:
        return min(most, 1)


@pytest.mark.parametrize("dtype", ["bf16", "int4"])
def test_no_bit_depends_on_it(dtype: str, small_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """And all cores are used where neighbors are read, and by the caller afterwards."""
    sizes = {"hidden_size": 96, "ffn_hidden_size": 256, "chunk_size": 16, "encoder_seq_length": 64}
    config = small_config(vocab_size=small_store.vocab_size, **sizes)
    model = RetroModel(config, torch.Generator().manual_seed(0)).eval()
    generator, counts = Generator(use_weights(model, dtype), small_store.tokenizer), []
    if not ops.steps_in_cpp(torch.empty(1)):
        pytest.skip("plain PyTorch keeps its threads: its products' bits depend on them")
    decode_one = decoding_batch.decode_one
    found: list[list[torch.Tensor]] = []

    def decoded(*arguments: object, **named: object) -> torch.Tensor:
        counts.append(torch.get_num_threads())
        found[-1].append(decode_one(*arguments, **named))  # type: ignore[arg-type]
        return found[-1][-1]

    monkeypatch.setattr(decoding_batch, "decode_one", decoded)
    requests = [Request(text, 4, neighbors=["river stone copper"]) for text in ("river stone", "tide", "falcon " * 9)]
    for cores in (FreeCores(Path("nowhere")), OneIsFree()):
        found.append([])
        generator.cores = cores
        generator.generate_all(requests)
        assert torch.get_num_threads() == 2
    half = len(counts) // 2
    assert counts[:half] == [2] * half
    assert counts[half:].count(1) >= half - 1
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
