"""Cached generation against recomputing everything at every step: d 512, 12 layers, one thread.

A prompt of 256 tokens and 256 new ones, retrieval given. Recomputing is timed at 8 lengths spread over the 256
steps and summed up, because all of them take minutes.
"""

import time

import torch

from retro_engine.config import preset_model
from retro_engine.model.decode_cache import new_cache
from retro_engine.model.decoding import step
from retro_engine.model.retro import RetroModel

PROMPT, NEW, M = 256, 256, 64


def test_cached_against_recomputing(benchmark) -> None:
    torch.set_num_threads(1)
    config = preset_model(
        "base", vocab_size=16384, hidden_size=512, ffn_hidden_size=2048, num_attention_heads=8, dec_num_layers=12, enc_num_layers=2,
        dec_cross_attention=[5, 8, 11], enc_cross_attention=[0], activation="gelu",
    )  # fmt: skip
    model = RetroModel(config).eval()
    tokens = torch.randint(0, config.vocab_size, (1, PROMPT + NEW))
    neighbors = torch.randint(0, config.vocab_size, (1, (PROMPT + NEW) // M, 2, 2 * M))

    def cached() -> None:
        with torch.no_grad():
            cache = new_cache(model, 1, PROMPT + NEW)
            step(model, cache, tokens[:, :PROMPT], neighbors[:, : PROMPT // M], last_only=True)
            for t in range(PROMPT, PROMPT + NEW - 1):
                completed = neighbors[:, t // M : t // M + 1] if (t + 1) % M == 0 else None
                step(model, cache, tokens[:, t : t + 1], completed, last_only=True)

    benchmark.pedantic(cached, rounds=3, warmup_rounds=1)
    recomputed_s = 0.0
    lengths = range(PROMPT + 16, PROMPT + NEW, NEW // 8)
    for length in lengths:
        with torch.no_grad():
            start = time.perf_counter()
            model(tokens[:, :length], neighbors[:, : length // M])
            recomputed_s += (time.perf_counter() - start) * NEW / len(lengths)
    cached_s = benchmark.stats.stats.median
    benchmark.extra_info |= {
        "cached_tokens_per_s": NEW / cached_s,
        "recomputed_tokens_per_s": NEW / recomputed_s,
        "ratio": recomputed_s / cached_s,
    }
    print(
        f"\ncached {NEW / cached_s:.1f} tokens/s, recomputed {NEW / recomputed_s:.2f}: {recomputed_s / cached_s:.0f}x (target 20x)"
    )
