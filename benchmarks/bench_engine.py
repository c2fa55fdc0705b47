"""What the engine costs and what batching gives: tokens/s of 1 and 8 sequences, its overhead, a warm prompt, weights.

97 M parameters with random weights (width 768, 12 layers, 16,384 entries, two encoder layers): large enough that
reading weights is most of a step. Two neighbors of 128 tokens, given, at every chunk boundary. One thread. Ratios are
medians over rounds in which the sides take turns.
"""

import os
import statistics
import time

import pytest
import torch

from retro_engine.config import preset_model
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.generate.engine import Engine, Request
from retro_engine.generate.generator import Generator
from retro_engine.model.quantize import use_weights
from retro_engine.model.retro import RetroModel

ROUNDS = int(os.environ.get("ROUNDS", 3))
V, NEW = 16384, 128
NEIGHBORS = ["the quick brown fox " * 40, "jumps over the lazy dog " * 40]


def make_generator(weights: str) -> Generator:
    torch.set_num_threads(1)
    config = preset_model(
        "base", vocab_size=V, hidden_size=768, ffn_hidden_size=3072, num_attention_heads=12, dec_num_layers=12,
        enc_num_layers=2, dec_cross_attention=[5, 8, 11], enc_cross_attention=[0], activation="gelu", encoder_seq_length=512,
    )  # fmt: skip
    model = RetroModel(config, torch.Generator().manual_seed(0)).eval()
    tokenizer = Tokenizer.train(["the quick brown fox jumps over the lazy dog"], 300)
    tokenizer.eod_id = -1  # nothing ends early
    return Generator(use_weights(model, weights), tokenizer)


def prompt(number: int, length: int = 64) -> list[int]:
    return torch.randint(0, V, (length,), generator=torch.Generator().manual_seed(number)).tolist()


def request(number: int, new: int = NEW, neighbors: list[str] = NEIGHBORS) -> Request:
    return Request(prompt(number), new, neighbors=neighbors)


def ratio(sides: dict[str, list[float]], above: str, below: str) -> float:
    return statistics.median(a / b for a, b in zip(sides[above], sides[below]))


@pytest.mark.parametrize("weights", ["fp32", "int8"])
@pytest.mark.parametrize("neighbors", [[], NEIGHBORS], ids=["off", "neighbors"])
def test_batch_of_8_against_1(weights: str, neighbors: list[str]) -> None:
    generator = make_generator(weights)
    rates: dict[str, list[float]] = {"1": [], "8": []}
    with Engine(generator, max_batch=8, prefix_bytes=0) as engine:
        engine.submit(request(99, 4)).result()
        for _ in range(ROUNDS):
            for size in (1, 8):
                start = time.perf_counter()
                for stream in [engine.submit(request(number, NEW, neighbors)) for number in range(size)]:
                    stream.result()
                rates[str(size)].append(size * NEW / (time.perf_counter() - start))
    print(f"\n{weights}, {'two neighbors' if neighbors else 'retrieval off'}: tokens/s of 1: {statistics.median(rates['1']):.1f}, "
          f"of 8: {statistics.median(rates['8']):.1f}: {ratio(rates, '8', '1'):.2f}x (target 4x)")  # fmt: skip


def test_overhead_over_the_bare_generator() -> None:
    generator = make_generator("fp32")
    seconds: dict[str, list[float]] = {"bare": [], "engine": []}
    with Engine(generator, max_batch=8, prefix_bytes=0) as engine:
        for number in range(ROUNDS + 1):
            start = time.perf_counter()
            generator.generate_all([request(number, 64)])
            middle = time.perf_counter()
            engine.submit(request(number, 64)).result()
            if number:
                seconds["bare"].append(middle - start)
                seconds["engine"].append(time.perf_counter() - middle)
    print(f"\nengine against the bare generator: {ratio(seconds, 'engine', 'bare'):.3f}x its time (target 1.05x)")


def test_first_token_after_a_warm_prefix() -> None:
    """A prompt of 512 tokens, taken in before, against one step of that sequence."""
    generator = make_generator("fp32")
    seconds: dict[str, list[float]] = {"cold": [], "warm": [], "step": []}
    with Engine(generator, max_batch=8) as engine:
        for number in range(ROUNDS + 1):
            asked = Request(prompt(number, 512), 33, neighbors=NEIGHBORS)
            for side in ("cold", "warm"):
                start = time.perf_counter()
                events = iter(engine.submit(asked))
                next(events)
                first = time.perf_counter()
                for _ in events:
                    pass
                if number:
                    seconds[side].append(first - start)
            if number:
                seconds["step"].append((time.perf_counter() - first) / 32)
    warm, cold = ratio(seconds, "warm", "step"), ratio(seconds, "cold", "step")
    print(f"\nfirst token of a prompt of 512, in steps: cold {cold:.1f}, warm {warm:.2f} (target 1.5)")
