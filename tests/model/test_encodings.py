"""Encoded neighbors that are kept: the same as encoded anew, bounded, and never those of other weights."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from helpers import small_inputs, small_model

from retro_engine.errors import UsageError
from retro_engine.model.decode_cache import new_cache
from retro_engine.model.decoding import decode_one, prefill
from retro_engine.model.encodings import Encodings, encode_each, encode_sink
from retro_engine.model.retro import RetroModel

ALONE: list[dict[str, Any]] = [
    {"enc_cross_attention": []},
    {"enc_cross_attention": [], "encoder_hidden_size": 36, "encoder_num_attention_heads": 2, "num_query_groups": 1},
    {"reading": "prefix", "sink_id": 3},
]


def neighbors_of(model: RetroModel, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, neighbors = small_inputs(model, batch=1, n=4 * count)
    lengths = torch.randint(1, model.config.r + 1, (count,), generator=torch.Generator().manual_seed(3))
    return neighbors[0, :, 0], lengths


@torch.no_grad()
def test_the_sink_is_kept_until_the_weights_change() -> None:
    model = small_model(reading="prefix", sink_id=3)
    first = encode_sink(model)
    assert encode_sink(model) is first
    assert encode_sink(small_model(seed=1, reading="prefix", sink_id=3)) is not first
    model.layers[0].attention.k.weight.mul_(2)
    changed = encode_sink(model)
    torch.testing.assert_close(changed[0], 2 * first[0])
    model.config = replace(model.config, sink_id=4)
    assert not torch.equal(encode_sink(model), changed)
    model.config = replace(model.config, sink_id=None)
    assert encode_sink(model).shape[1] == 0


@pytest.mark.parametrize("overrides", ALONE, ids=str)
@torch.no_grad()
def test_what_is_kept_is_what_would_be_computed(overrides: dict[str, Any]) -> None:
    """A prompt and steps of two sequences, with and without memory of what was read, and read a second time."""
    model = small_model(**overrides)
    tokens, neighbors = small_inputs(model, batch=2, n=24)
    lengths = torch.randint(0, model.config.r + 1, neighbors.shape[:3], generator=torch.Generator().manual_seed(5))
    exact = model(tokens, neighbors, lengths)
    encodings = Encodings(model, 1 << 20)
    for _ in range(2):
        cache = new_cache(model, 2, 24, 2 * model.config.r, encodings.of)
        got = [prefill(model, cache, tokens[:, :14], neighbors[:, :3], lengths[:, :3])]
        for place in range(14, 24):
            ends = (place + 1) % 4 == 0
            given = (neighbors[:, place // 4], lengths[:, place // 4]) if ends else (None, None)
            got.append(decode_one(model, cache, tokens[:, place], *given, ending=[0, 1] if ends else [])[:, None])
        assert torch.allclose(torch.cat(got, 1), exact, atol=1e-5)  # tables of angles are float32
    some = {(*neighbors[b, u, k, :length].tolist(),) for (b, u, k), length in zip(
        torch.cartesian_prod(*map(torch.arange, lengths.shape)).tolist(), lengths.flatten().tolist()
    ) if length}  # fmt: skip
    assert encodings.stats.misses == len(some)
    assert encodings.stats.hits >= len(some)


def test_padding_is_no_part_of_a_neighbor() -> None:
    model = small_model(enc_cross_attention=[])
    tokens, lengths = neighbors_of(model, 3)
    other = torch.where(torch.arange(model.config.r) < lengths[:, None], tokens, 0)
    encodings = Encodings(model, 1 << 20)
    first, second = encodings.of(tokens, lengths), encodings.of(other, lengths)
    assert all(one is two for one, two in zip(first, second))


def test_memory_is_bounded_and_the_least_used_is_forgotten() -> None:
    model = small_model(enc_cross_attention=[])
    tokens, _ = neighbors_of(model, 4)
    lengths = torch.full((4,), model.config.r)
    nbytes = encode_each(model, tokens, lengths)[0].nbytes
    encodings = Encodings(model, 2 * nbytes)
    for row in (0, 1, 0, 2, 0):  # 2 takes the place of 1
        encodings.of(tokens[[row]], lengths[[row]])
        assert encodings.stats.nbytes <= 2 * nbytes
    assert (encodings.stats.hits, encodings.stats.misses) == (2, 3)
    encodings.of(tokens, lengths)
    assert (encodings.stats.hits, encodings.stats.misses, encodings.stats.nbytes) == (4, 5, 2 * nbytes)


@pytest.mark.parametrize("how", ["in place", "replaced", "other type"])
def test_other_weights_forget_everything(how: str) -> None:
    model = small_model(enc_cross_attention=[])
    tokens, lengths = neighbors_of(model, 2)
    encodings = Encodings(model, 1 << 20)
    before = encodings.of(tokens, lengths)
    with torch.no_grad():
        if how == "in place":
            model.neighbor_projection.v[0].weight.mul_(2)  # type: ignore[union-attr]
        elif how == "replaced":
            weight = model.neighbor_projection.v[0].weight  # type: ignore[union-attr]
            model.neighbor_projection.v[0].weight = torch.nn.Parameter(2 * weight)  # type: ignore[union-attr]
        else:
            model.to(torch.bfloat16)
    after = encodings.of(tokens, lengths)
    assert after[0].dtype == model.cache_dtype
    assert not torch.equal(before[0].double(), after[0].double())
    assert all(torch.equal(one, two) for one, two in zip(after, encode_each(model, tokens, lengths)))
    assert encodings.stats.nbytes == sum(one.nbytes for one in after)


def test_one_by_one_no_bit_depends_on_the_others() -> None:
    model = small_model(enc_cross_attention=[]).float()
    tokens, lengths = neighbors_of(model, 5)
    alone = [encode_each(model, tokens[[row]], lengths[[row]])[0] for row in range(5)]
    together = partial(Encodings(model, 1 << 20).of, apart=True)(tokens, lengths)
    assert all(torch.equal(one, two) for one, two in zip(alone, together))


def test_what_cannot_be_kept_is_refused() -> None:
    with pytest.raises(UsageError, match="depend on the chunk"):
        Encodings(small_model(enc_cross_attention=[0]), 1 << 20)
    with pytest.raises(UsageError, match="one neighbor of 8 tokens takes"):
        Encodings(small_model(enc_cross_attention=[]), 100)
