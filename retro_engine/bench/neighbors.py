"""`bench neighbors`: what reading costs where encoded neighbors are kept, against retrieval off and neighbors in the prompt.

Two readers of random weights: `cross-attention` (its encoder reads nothing but the neighbor) and `in front` (the plain
decoder itself). The first token comes after a prompt of 512 tokens, in pieces of four chunks as generation takes it, with
two neighbors of 128 tokens a chunk. In the prompt the plain decoder makes a pass for each chunk, over its neighbors and
all text so far.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from retro_engine.bench.contestants import SHAPES, K, M, Shape
from retro_engine.bench.frame import Measured, Options, Row, Target, Work, at_least, at_most, compared, time_in_turns
from retro_engine.config import ModelConfig
from retro_engine.model.decode_cache import DecodeCache, new_cache
from retro_engine.model.decoding import decode_one, prefill
from retro_engine.model.encodings import Encodings
from retro_engine.model.prefix import Encode
from retro_engine.model.quantize import use_weights
from retro_engine.model.retro import RetroModel

PROMPT, NEW, SEQUENCES, PIECE = 512, 2 * M, 8, 4 * M
KEPT_BYTES = 4 << 30


def readers(shape: Shape) -> dict[str, ModelConfig]:
    config = replace(shape.config(), mask_neighbors=True, reset_attention=True, cca_reset=True)
    return {
        "cross-attention": replace(config, enc_cross_attention=[]),
        "in front": replace(config, reading="prefix", sink_id=0),
    }


@torch.no_grad()
def run(options: Options) -> Measured:
    measured = Measured([])
    for size in options.sizes:
        for name, config in readers(SHAPES[size]).items():
            case = f"{size}, {name}"
            rows = [*_first_token(case, config), *_together(case, config)]
            measured.rows += rows
            measured.targets += targets(case, rows)
    return measured


def targets(case: str, rows: list[Row]) -> list[Target]:
    found = {(row.case, row.implementation): row.median_s for row in rows}
    first, together = _cases(case)
    kept, off = found[first, "kept"], found[first, "off"]
    return [
        at_most(f"{first}: two kept neighbors a chunk against off, its time", kept / off, 1.05),
        at_most(f"{first}: nothing kept against in the prompt, its time", found[first, "not kept"] / found[first, "in the prompt"], 0.2),
        at_least(f"{together}: tokens/s against off", found[together, "off"] / found[together, "kept"], 0.95),
    ]  # fmt: skip


def _cases(case: str) -> tuple[str, str]:
    return f"{case}: first token after {PROMPT}", f"{case}: {SEQUENCES} sequences, int8"


def _first_token(case: str, config: ModelConfig) -> list[Row]:
    model = _model(config)
    tokens, neighbors = _inputs(config, 1)
    encodings = Encodings(model, KEPT_BYTES)
    works = {
        "kept": lambda: _take_in(model, tokens, neighbors, encodings.of),
        "off": lambda: _take_in(model, tokens, None),
        "not kept": lambda: _take_in(model, tokens, neighbors),
        "in the prompt": lambda: _in_prompt(model, tokens, neighbors),
    }
    return compared(_cases(case)[0], time_in_turns(works, rounds=5), ours=["kept"])


def _together(case: str, config: ModelConfig) -> list[Row]:
    model = use_weights(_model(config), "int8")
    tokens, neighbors = _inputs(config, SEQUENCES)
    encodings = Encodings(model, KEPT_BYTES)
    caches = {
        "kept": _take_in(model, tokens[:, :M], neighbors, encodings.of),
        "off": _take_in(model, tokens[:, :M], None),
    }
    works: dict[str, Work] = {
        "kept": partial(_decode, model, caches["kept"], neighbors),
        "off": partial(_decode, model, caches["off"], None),
    }
    rows = compared(_cases(case)[1], time_in_turns(works, rounds=5), ours=["kept"])
    for row in rows:
        row.note = f"{SEQUENCES * NEW / row.median_s:.0f} tokens/s"
    return rows


def _model(config: ModelConfig) -> RetroModel:
    return RetroModel(config, torch.Generator().manual_seed(0)).eval()


def _inputs(config: ModelConfig, batch: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    neighbors = torch.randint(1, config.vocab_size, (batch, PROMPT // M, K, config.r), generator=rng)
    return torch.randint(1, config.vocab_size, (batch, PROMPT), generator=rng), neighbors


def _take_in(model: RetroModel, tokens: Tensor, neighbors: Tensor | None, encode: Encode | None = None) -> DecodeCache:
    width = 0 if neighbors is None else K * model.config.r
    cache = new_cache(model, len(tokens), tokens.shape[1] + NEW, width, encode)
    for start in range(0, tokens.shape[1], PIECE):
        stop = min(start + PIECE, tokens.shape[1])
        given = None if neighbors is None else neighbors[:, start // M : stop // M]
        prefill(model, cache, tokens[:, start:stop], given, last_only=True)
    return cache


def _in_prompt(model: RetroModel, tokens: Tensor, neighbors: Tensor) -> None:
    for chunk in range(PROMPT // M):
        model.logits(model.hidden(torch.cat((neighbors[:, chunk].flatten(1), tokens[:, : (chunk + 1) * M]), 1))[:, -1:])


def _decode(model: RetroModel, cache: DecodeCache, neighbors: Tensor | None) -> None:
    """NEW tokens of every row after its first chunk, again and again from there."""
    for row in range(SEQUENCES):
        cache.rewind(row, M)
    tokens = torch.ones(SEQUENCES, dtype=torch.long)
    for place in range(M, M + NEW):
        ends = (place + 1) % M == 0
        given = neighbors[:, place // M] if ends and neighbors is not None else None
        decode_one(model, cache, tokens, given, ending=range(SEQUENCES) if given is not None else ())
