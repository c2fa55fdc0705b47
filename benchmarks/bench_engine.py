"""What the engine costs and what batching gives: tokens/s of 1 and 8 sequences, its overhead, a schema's, a warm prompt.

97 M parameters with random weights (width 768, 12 layers, 16,384 entries, two encoder layers): large enough that
reading weights is most of a step. Two neighbors of 128 tokens, given, at every chunk boundary. Nothing is drafted: what random
weights say repeats itself, and one sequence would be as fast as eight. ROUNDS sets the rounds.
"""

import os
import random
import time
from dataclasses import replace
from typing import Any

import torch

from retro_engine.bench.frame import Measured, Options, Spread, at_least, at_most, compared, time_in_turns
from retro_engine.config import preset_model
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.generate.engine import Engine, Request
from retro_engine.generate.generator import Generator
from retro_engine.generate.grammar import schema
from retro_engine.generate.sampling import Sampling
from retro_engine.model.quantize import use_weights
from retro_engine.model.retro import RetroModel

ROUNDS = int(os.environ.get("ROUNDS", 3))
V, NEW = 16384, 128
NEIGHBORS = ["the quick brown fox " * 40, "jumps over the lazy dog " * 40]


def run(options: Options) -> Measured:
    measured = Measured([])
    for weights in ("fp32", "int8"):
        generator = make_generator(weights)
        for neighbors in ([], NEIGHBORS):
            measure_batch(measured, generator, weights, neighbors)
        if weights == "fp32":
            measure_overhead(measured, generator)
            measure_schema(measured, generator.model)
            measure_first_token(measured, generator)
    return measured


def make_generator(weights: str) -> Generator:
    config = preset_model(
        "base", vocab_size=V, hidden_size=768, ffn_hidden_size=3072, num_attention_heads=12, dec_num_layers=12,
        enc_num_layers=2, dec_cross_attention=[5, 8, 11], enc_cross_attention=[0], activation="gelu", encoder_seq_length=512,
    )  # fmt: skip
    model = RetroModel(config, torch.Generator().manual_seed(0)).eval()
    tokenizer = Tokenizer.train(["the quick brown fox jumps over the lazy dog"], 300)
    tokenizer.eod_id = -1  # nothing ends early
    return Generator(use_weights(model, weights), tokenizer, drafts=False)


def prompt(number: int, length: int = 64) -> list[int]:
    return torch.randint(0, V, (length,), generator=torch.Generator().manual_seed(number)).tolist()


def request(number: int, new: int = NEW, neighbors: list[str] = NEIGHBORS) -> Request:
    return Request(prompt(number), new, neighbors=neighbors)


def measure_batch(measured: Measured, generator: Generator, weights: str, neighbors: list[str]) -> None:
    with Engine(generator, max_batch=8, prefix_bytes=0) as engine:

        def decode(size: int) -> None:
            for stream in [engine.submit(request(number, NEW, neighbors)) for number in range(size)]:
                stream.result()

        works = {f"{size} at once": lambda size=size: decode(size) for size in (1, 8)}
        times = time_in_turns(works, rounds=ROUNDS)
    case = f"{weights}, {'two neighbors' if neighbors else 'retrieval off'}"
    rows = compared(case, times, ours=["8 at once"])
    one, eight = (size * NEW / row.median_s for size, row in zip((1, 8), rows))
    rows[0].note, rows[1].note = f"{one:.1f} tokens/s", f"{eight:.1f} tokens/s"
    measured.rows += rows
    measured.targets.append(at_least(f"{case}: tokens/s of 8 sequences against 1", eight / one, 4))


def measure_overhead(measured: Measured, generator: Generator) -> None:
    with Engine(generator, max_batch=8, prefix_bytes=0) as engine:
        works = {
            "bare generator": lambda: generator.generate_all([request(1, 64)]),
            "engine": lambda: engine.submit(request(1, 64)).result(),
        }
        rows = compared("one sequence of 64 tokens", time_in_turns(works, rounds=ROUNDS), ours=["engine"])
    measured.rows += rows
    cost = rows[1].median_s / rows[0].median_s
    measured.targets.append(at_most("engine against the bare generator, its time", cost, 1.05))


def measure_schema(measured: Measured, model: RetroModel) -> None:
    """A list of records that does not end in time, against the same number of free tokens."""
    words = random.Random(0)
    texts = [
        " ".join("".join(words.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(100)) for _ in range(200)
    ]
    generator = Generator(model, Tokenizer.train(texts, V), drafts=False)
    record: dict[str, Any] = {"type": "object", "required": ["name", "age"], "additionalProperties": False}
    record["properties"] = {"name": {"type": "string"}, "age": {"type": "integer"}}
    asked = {
        "free": request(1, NEW, []),
        "a schema": replace(request(1, NEW, []), grammar=schema({"type": "array", "items": record, "minItems": 500})),
    }
    asked = {side: replace(one, sampling=Sampling(min_tokens=NEW)) for side, one in asked.items()}
    with Engine(generator, max_batch=1, prefix_bytes=0) as engine:
        works = {side: lambda one=one: engine.submit(one).result() for side, one in asked.items()}
        rows = compared(f"{NEW} tokens, fp32", time_in_turns(works, rounds=ROUNDS), ours=["a schema"])
    measured.rows += rows
    measured.targets.append(
        at_most("tokens that match a schema, their time", rows[1].median_s / rows[0].median_s, 1.05)
    )


def measure_first_token(measured: Measured, generator: Generator) -> None:
    """A prompt of 512 tokens, new and taken in before, against one step of that sequence."""
    seconds: dict[str, list[float]] = {"cold": [], "warm": [], "a step": []}
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
                seconds["a step"].append((time.perf_counter() - first) / 32)
    rows = compared("first token of a prompt of 512", {side: Spread.of(values) for side, values in seconds.items()})
    measured.rows += rows
    steps = rows[1].median_s / rows[2].median_s
    measured.targets.append(at_most("first token of a warm prompt of 512, in steps", steps, 1.5))
