"""Decoding with a cache: blocks, rows of different lengths, copies, padding and batches, against the full pass (float64)."""

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import small_config, small_inputs, small_model
from retro_kernels import cpp

from retro_engine.errors import UsageError
from retro_engine.model import decoding
from retro_engine.model.decode_cache import DecodeCache, new_cache
from retro_engine.model.decode_prefix import read_in_front
from retro_engine.model.decoding import decode, decode_one, prefill, step
from retro_engine.model.quantize import use_weights
from retro_engine.model.retro import RetroModel

M = 4
STARTS = (3, 9, 4, 1)  # tokens of the prompts
VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_query_groups": 1, "activation": "gelu"},
    {"cca_bias_everywhere": True, "bias": True, "output_bias": True},
    {"position_embedding": "learned", "cca_position_embedding": "none"},
    {"encoder_hidden_size": 36, "encoder_num_attention_heads": 2, "share_embeddings": False},
    {"mup": True, "mup_base_hidden_size": 12, "mup_base_ffn_hidden_size": 16},
]


def filled(model: RetroModel, tokens: torch.Tensor, neighbors: torch.Tensor, lengths: torch.Tensor) -> DecodeCache:
    rows = new_cache(model, len(STARTS) + 1, 32, 2 * model.config.r)
    for row, start in enumerate(STARTS):
        rows.clear(row, 0)
        cut, chunks = (slice(row, row + 1), slice(start)), (slice(row, row + 1), slice(start // M))
        logits = prefill(
            model, rows.part(row, row + 1), tokens[cut], neighbors[chunks], lengths[chunks], last_only=True
        )
        assert logits.shape == (1, 1, model.config.vocab_size)
    return rows


@pytest.mark.parametrize("overrides", VARIANTS, ids=lambda value: "-".join(value) or "default")
@torch.no_grad()
def test_rows_equal_the_full_pass(overrides: dict[str, Any]) -> None:
    """18 steps; the rows end their chunks at different ones, some neighbors are short or missing; one row moves."""
    model = small_model(**overrides)
    tokens, neighbors = small_inputs(model, batch=4, n=28)
    lengths = torch.randint(0, model.config.r + 1, neighbors.shape[:3], generator=torch.Generator().manual_seed(5))
    exact = model(tokens, neighbors, lengths)
    rows = filled(model, tokens, neighbors, lengths)
    order, worst = [0, 1, 2, 3], 0.0
    for number in range(18):
        if number == 7:  # the first sequence leaves, the last takes its row
            rows.move(3, 0)
            order = [3, 1, 2]
        part = rows.part(0, len(order))
        places = [int(length) for length in part.lengths_B]
        newest = torch.stack([tokens[s, place] for s, place in zip(order, places)])
        ending = [row for row, place in enumerate(places) if place % M == M - 1]
        chunks = [(order[row], places[row] // M) for row in ending]
        found = torch.stack([neighbors[chunk] for chunk in chunks]) if ending else None
        valid = torch.stack([lengths[chunk] for chunk in chunks]) if ending else None
        logits = decode_one(model, part, newest, found, valid, ending=ending)
        for row, (sequence, place) in enumerate(zip(order, places)):
            worst = max(worst, float((logits[row] - exact[sequence, place]).abs().max()))
    assert worst <= 1e-9, worst


@torch.no_grad()
def test_a_row_that_waits_is_as_if_it_had_not_been_there() -> None:
    model = small_model()
    tokens, neighbors = small_inputs(model, batch=4, n=28)
    lengths = torch.full(neighbors.shape[:3], model.config.r)
    rows, twin = (filled(model, tokens, neighbors, lengths) for _ in range(2))
    newest = torch.stack([tokens[s, start] for s, start in enumerate(STARTS)])
    part = rows.part(0, 4)
    for _ in range(3):  # row 0 ends a chunk and waits for its neighbors
        before = part.lengths_B.clone()
        decode_one(model, part, newest, advances_B=torch.tensor([False, False, False, False]))
        assert torch.equal(part.lengths_B, before)
    found = decode_one(model, part, newest, neighbors[:1, 0], lengths[:1, 0], ending=[0])
    expected = decode_one(model, twin.part(0, 4), newest, neighbors[:1, 0], lengths[:1, 0], ending=[0])
    assert torch.equal(found, expected)


@torch.no_grad()
def test_padding_on_the_left_is_not_read() -> None:
    """Rows with different padding equal the full pass over padded sequences."""
    model = small_model()
    tokens, neighbors = small_inputs(model, batch=2, n=20)
    pads = (3, 1)
    documents = torch.zeros_like(tokens)
    for row, pad in enumerate(pads):
        documents[row, :pad] = -1
    lengths = torch.full(neighbors.shape[:3], model.config.r)
    exact = model(tokens, neighbors, lengths, documents)
    rows = new_cache(model, 2, 20, 2 * model.config.r)
    for row, pad in enumerate(pads):
        rows.clear(row, pad)
        for piece in (slice(0, 4), slice(4, 8)):  # a prompt in two pieces
            at = piece.start // M
            cut, chunk = (slice(row, row + 1), piece), (slice(row, row + 1), slice(at, at + 1))
            prefill(model, rows.part(row, row + 1), tokens[cut], neighbors[chunk], lengths[chunk])
    for place in range(8, 20):
        ending = [0, 1] if place % M == M - 1 else []
        logits = decode_one(model, rows, tokens[:, place], neighbors[:, place // M] if ending else None, ending=ending)
        assert (logits - exact[:, place]).abs().max() <= 1e-9


@torch.no_grad()
def test_what_does_not_fit() -> None:
    model = small_model()
    rows = new_cache(model, 1, 2, model.config.r)
    decode_one(model, rows, torch.tensor([1]))
    decode_one(model, rows, torch.tensor([1]))
    with pytest.raises(ValueError, match="the cache holds 2 tokens"):
        decode_one(model, rows, torch.tensor([1]))
    rows = new_cache(model, 1, 8, model.config.r)
    with pytest.raises(ValueError, match="16 neighbor tokens; the cache holds 8"):
        prefill(model, rows, torch.ones(1, 4, dtype=torch.long), torch.ones(1, 1, 2, 8, dtype=torch.long))


def test_the_cache_refuses_more_than_it_holds() -> None:
    model = small_model()
    tokens, neighbors = small_inputs(model)
    with pytest.raises(ValueError, match="holds 10 tokens"):
        step(model, new_cache(model, 2, 10), tokens, neighbors)
    with pytest.raises(ValueError, match="expected \\[2, 4"):
        step(model, new_cache(model, 2, 19), tokens, neighbors[:, :1])


@torch.no_grad()
def test_copies_of_a_cache_go_their_own_ways() -> None:
    model = RetroModel(small_config(init_method_std=0.2)).eval()
    tokens = torch.randint(0, model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    cache = new_cache(model, 2, 9)
    for number in range(6):
        step(model, cache, tokens[:, number : number + 1])
    clones = {
        name: [x.clone() for x in getattr(cache, name)]
        for name in ("keys_BSGE", "values_BSGE", "cross_keys_BXGE", "cross_values_BXGE")
    }
    places = {
        name: getattr(cache, name).clone()
        for name in ("hidden_BMD", "cross_valid_BX", "lengths_B", "pads_B", "offsets_B")
    }
    copies = [copy.deepcopy(cache), dataclasses.replace(cache, **clones, **places)]
    for other in copies:
        step(model, other, tokens[:, 8:])  # another token than the original's
    whole = new_cache(model, 2, 9)
    expected = step(model, whole, tokens[:, :7])[:, -1:]
    torch.testing.assert_close(step(model, cache, tokens[:, 6:7]), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_padding_on_the_left_may_come_token_by_token() -> None:
    model = RetroModel(small_config(init_method_std=0.2, pad_id=0)).eval()
    tokens = torch.randint(1, model.config.vocab_size, (2, 6), generator=torch.Generator().manual_seed(0))
    is_token = torch.tensor([[False, False, True, True, True, True], [True] * 6])
    apart, together = new_cache(model, 2, 6), new_cache(model, 2, 6)
    for number in range(6):
        cut = slice(number, number + 1)
        found = step(model, apart, tokens[:, cut], is_token_BT=is_token[:, cut])
    expected = step(model, together, tokens, is_token_BT=is_token, last_only=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_padding_that_is_known_before_may_be_decoded_token_by_token(dtype: torch.dtype) -> None:
    """A new token that is padding attends nothing; the first chunk is half of it."""
    model = small_model().to(dtype)
    tokens, neighbors = small_inputs(model, batch=2, n=10)
    documents = torch.zeros_like(tokens)
    documents[0, :2] = documents[1, :5] = -1
    exact = model(tokens, neighbors, None, documents)
    cache = new_cache(model, 2, 10)
    for row, pad in enumerate((2, 5)):
        cache.clear(row, pad)
    for place in range(10):
        given = neighbors[:, place // M] if place % M == M - 1 else None
        found = decode_one(model, cache, tokens[:, place], given, ending=[] if given is None else [0, 1])
        for row, pad in enumerate((2, 5)):
            if place >= pad:
                torch.testing.assert_close(found[row], exact[row, place], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_block_that_was_refused_may_be_given_again_mended() -> None:
    """Nothing of it stays: neither the state of the open chunk nor the padding."""
    model = small_model()
    tokens, neighbors = small_inputs(model, batch=2, n=16)
    exact = model(tokens, neighbors)
    wrong = [
        (neighbors[:, 1:3].repeat(1, 1, 2, 1), None),  # wider than the cache
        (torch.ones(2, 2, 1, 15, dtype=torch.long), None),  # longer than the model's
        (neighbors[:, 1:3] + 1000, None),  # no ids of the vocabulary
        (neighbors[:, 1:3], torch.ones(2, 2, 7, dtype=torch.long)),
        (None, torch.ones(2, 2, 2, dtype=torch.long)),
    ]
    for given, lengths in wrong:
        cache = new_cache(model, 2, 16, 2 * model.config.r)
        step(model, cache, tokens[:, :6], neighbors[:, :1])
        with pytest.raises((ValueError, IndexError)):
            step(model, cache, tokens[:, 6:13], given, lengths)
        found = [
            step(model, cache, tokens[:, 6:13], neighbors[:, 1:3]),
            step(model, cache, tokens[:, 13:], neighbors[:, 3:]),
        ]
        assert (torch.cat(found, 1) - exact[:, 6:]).abs().max() <= 1e-9
    cache, is_token = new_cache(model, 2, 8), torch.ones(2, 8, dtype=torch.bool)
    is_token[1, :3] = False
    for given in (neighbors[:, :2] + 1000, neighbors[:, :1]):
        with pytest.raises((ValueError, IndexError)):
            step(model, cache, tokens[:, :8], given, is_token_BT=is_token)
    step(model, cache, tokens[:, :8], neighbors[:, :2], is_token_BT=is_token)
    assert cache.pads_B.tolist() == [0, 3]


@torch.no_grad()
def test_neighbors_of_rows_that_end_no_chunk_are_refused() -> None:
    model, plain = small_model(), small_model(retrieval=False)
    tokens, neighbors = small_inputs(model, batch=2, n=4)
    cache = new_cache(model, 2, 8)
    step(model, cache, tokens[:, :3])
    for ending, given, message in (
        ([0], neighbors[:, 0], "expected \\[1, k, r\\]"),
        ([], neighbors[:, 0], "expected \\[0, k, r\\]"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_one(model, cache, tokens[:, 3], given, ending=ending)
    with pytest.raises(ValueError, match="not all of them end a chunk of 4"):
        decode_one(model, new_cache(model, 2, 8), tokens[:, 0], neighbors[:1, 0], ending=[0])
    with pytest.raises(ValueError, match="plain decoder"):
        decode_one(plain, new_cache(plain, 2, 8), tokens[:, 0], neighbors[:1, 0], ending=[0])


def test_a_batch_is_its_rows_and_a_full_pass() -> None:
    model = small_model(seed=5)
    prompts = [[3, 4, 5], [7, 8, 9, 10, 11, 12, 13], [1]]
    _, neighbors = small_inputs(model, batch=3, n=4)
    neighbors, lengths = neighbors[:, 0], torch.tensor([[8, 8], [8, 3], [0, 5]])
    together = decode(model, prompts, neighbors, lengths, 6, [], 0)
    for row, prompt in enumerate(prompts):
        alone = decode(model, [prompt], neighbors[row : row + 1], lengths[row : row + 1], 6, [], 0)[0]
        assert together[row] == alone
        pad = -len(prompt) % 4
        tokens = [0] * pad + prompt
        first = len(tokens) // 4 - 1
        for token in alone:
            chunks = len(tokens) // 4
            every = lengths[row].expand(1, chunks, -1).clone()
            every[:, :first] = 0
            documents = torch.tensor([[-1] * pad + [0] * (len(tokens) - pad)])
            given = neighbors[row].expand(1, chunks, -1, -1)
            assert int(model(torch.tensor([tokens]), given, every, documents)[0, -1].argmax()) == token
            tokens.append(token)


@pytest.mark.skipif(not cpp.is_available(), reason="no C++ extension")
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "overrides",
    [{"retrieval": False}, {"retrieval": False, "position_embedding": "learned"}, {"reading": "prefix", "sink_id": 3}],
    ids=["plain", "learned", "in front"],
)
@torch.no_grad()
def test_a_few_tokens_are_rows_of_one_step(
    monkeypatch: pytest.MonkeyPatch, overrides: dict[str, Any], rows: int
) -> None:
    """Blocks that end chunks too, where what stands in front stays; and none where it is exchanged, or one is padded."""
    model = small_model(**overrides).float()
    tokens, neighbors = small_inputs(model, batch=rows, n=20)
    taken: list[bool] = []
    rows_of = decoding._prefill_rows

    def noted(*arguments: Any) -> torch.Tensor | None:
        found = rows_of(*arguments)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(decoding, "_prefill_rows", noted)

    def logits_of(few: int) -> list[torch.Tensor]:
        monkeypatch.setattr(decoding, "FEW_TOKENS", few)
        cache = new_cache(model, rows, 32, 2 * model.config.r)
        if model.config.reads_prefix:
            read_in_front(cache, range(rows), neighbors[:, 0], None)
        keeps = {"keeps_front": True}
        found = [prefill(model, cache, tokens[:, :7], **keeps), prefill(model, cache, tokens[:, 7:9], **keeps)]
        found.append(prefill(model, cache, tokens[:, 9:19], last_only=True, **keeps))
        return [*found, decode_one(model, cache, tokens[:, 19])[:, None]]

    together, tiles = logits_of(128), logits_of(0)
    assert taken == [True] * 3 + [False] * 3
    for one, other in zip(together, tiles, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= 1e-4 * other.abs().max()
    padded = new_cache(model, rows, 32, 2 * model.config.r)
    padded.clear(0, 2)
    monkeypatch.setattr(decoding, "FEW_TOKENS", 128)
    prefill(model, padded, tokens[:, :6], keeps_front=True)
    assert len(taken) == 6
    if model.config.reads_prefix:
        prefill(model, new_cache(model, rows, 32, 2 * model.config.r), tokens[:, :6])
        assert len(taken) == 6


def test_stops_and_retrieval_off() -> None:
    model = small_model(seed=5)
    answer = decode(model, [[3, 4, 5]], None, None, 6, [], 0)[0]
    place = next(i for i in range(1, 6) if answer[i] not in answer[:i])
    assert decode(model, [[3, 4, 5]], None, None, 6, [answer[place]], 0)[0] == answer[:place]
    off = torch.zeros(1, 2, dtype=torch.long)
    assert decode(model, [[3, 4, 5, 6]], torch.zeros(1, 2, 8, dtype=torch.long), off, 4, [], 0) == decode(
        model, [[3, 4, 5, 6]], None, None, 4, [], 0
    )
    plain = RetroModel(small_config(retrieval=False)).eval()
    assert len(decode(plain, [[3]], torch.zeros(1, 2, 8, dtype=torch.long), None, 3, [], 0)[0]) == 3
    with pytest.raises(ValueError, match="empty"):
        decode(model, [[3], []], None, None, 2, [], 0)


@pytest.mark.parametrize("bound", [{"max_position_embeddings": 32}, {"position_embedding": "learned"}])
def test_no_more_tokens_than_the_model_has_positions(bound: dict[str, Any]) -> None:
    """Beyond a sliding window attention would be another than the original's: refused before anything is computed."""
    model = RetroModel(small_config(retrieval=False, encoder_seq_length=32, **bound)).eval()
    assert len(decode(model, [[3] * 28, [4]], None, None, 4, [], 0)[0]) == 4
    with pytest.raises(UsageError, match=r"28 prompt and 5 new tokens\n.*32 positions"):
        decode(model, [[3] * 28, [4]], None, None, 5, [], 0)
    model(torch.ones(1, 32, dtype=torch.long))
    with pytest.raises(ValueError, match="33 tokens; the model has 32 positions"):
        model(torch.ones(1, 33, dtype=torch.long))
    cache = new_cache(model, 1, 33)
    step(model, cache, torch.ones(1, 32, dtype=torch.long))
    with pytest.raises(ValueError, match="33 tokens"):
        step(model, cache, torch.ones(1, 1, dtype=torch.long))


@pytest.mark.parametrize("size", [30, 1000])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "swiglu"])
@torch.no_grad()
def test_large_activations_decode_as_the_full_pass(activation: str, size: int) -> None:
    """What reaches the activations is in the hundreds and beyond, of both signs, as in trained models of many layers."""
    overrides = {"activation": activation, "normalization": "layernorm" if activation == "gelu_tanh" else "rmsnorm"}
    model = RetroModel(small_config(**overrides), torch.Generator().manual_seed(1)).eval()
    for layer in model.layers:
        for matrix in (layer.ffn.up, layer.ffn.gate):
            if matrix is not None:
                matrix.weight.mul_(size * 10)
        layer.ffn.down.weight.div_(size)
    tokens, neighbors = small_inputs(model, batch=2, n=24)
    exact = model(tokens, neighbors)
    cache = new_cache(model, 2, 24)
    for place in range(24):
        chunk = neighbors[:, place // M] if place % M == M - 1 else None
        logits = decode_one(model, cache, tokens[:, place], chunk, ending=[] if chunk is None else [0, 1])
        torch.testing.assert_close(logits, exact[:, place], rtol=1e-3, atol=1e-3 * float(exact.abs().max()))


def assigned(model: RetroModel) -> None:
    model.load_state_dict({name: 1.5 * value for name, value in model.state_dict().items()}, assign=True)


def replaced(model: RetroModel) -> None:
    for parameter in model.parameters():
        parameter.data = 1.5 * parameter.data


def optimized(model: RetroModel) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(model.parameters(), 0.1).step()


def given_another_module(model: RetroModel) -> None:
    model.layers[1].ffn.up = copy.deepcopy(model.layers[1].ffn.up)
    model.layers[1].ffn.up.weight.mul_(3)


CHANGES: list[Callable[[RetroModel], Any]] = [
    assigned,
    replaced,
    optimized,
    given_another_module,
    lambda model: model.share_memory(),
    lambda model: model.to(torch.bfloat16),
    lambda model: model.to(torch.bfloat16).to(torch.float32),
    lambda model: use_weights(model, "int8"),
]


@pytest.mark.parametrize("change", CHANGES, ids=range(len(CHANGES)))
@torch.no_grad()
def test_other_weights_while_decoding(change: Callable[[RetroModel], Any]) -> None:
    """Prepared steps follow: as state that was never stepped with the old weights, which a copy is."""
    model = RetroModel(small_config(), torch.Generator().manual_seed(0)).eval()
    tokens, neighbors = small_inputs(model, batch=2, n=12)
    cache = new_cache(model, 2, 12)

    def decoded(state: DecodeCache, place: int) -> torch.Tensor:
        ends = place % M == M - 1
        found = neighbors[:, place // M] if ends else None
        return decode_one(model, state, tokens[:, place], found, ending=[0, 1] if ends else [])

    for place in range(6):
        before = decoded(cache, place)
    change(model)
    twins = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    assert all(twin.steps is None for twin in twins)
    for place in range(6, 12):
        found = decoded(cache, place)
        for twin in twins:
            assert torch.equal(decoded(twin, place), found)
    assert found.isfinite().all()
    assert not torch.equal(found, before)


@torch.no_grad()
def test_a_cache_goes_on_with_the_weights_that_the_model_has() -> None:
    """`.to` gives parameters other memory: C++ neither reads what was freed nor what the weights were."""
    model = RetroModel(small_config(bias=True, normalization="layernorm", init_method_std=0.2)).eval()
    tokens = torch.randint(0, model.config.vocab_size, (1, 12), generator=torch.Generator().manual_seed(0))
    caches = [new_cache(model, 1, 12) for _ in range(3)]
    for number in range(10):  # the next token does not begin a chunk
        for cache in caches:
            step(model, cache, tokens[:, number : number + 1])
    expected = step(model, caches[0], tokens[:, 10:11])
    model.double().float()
    rubbish = [torch.full_like(p, 1e3) for p in model.parameters() for _ in range(3)]  # in memory that is free now
    assert len(rubbish) and torch.equal(step(model, caches[1], tokens[:, 10:11]), expected)
    for layer in model.layers:
        for parameter in layer.parameters():
            parameter.mul_(2)
    fresh = copy.deepcopy(caches[2])
    changed = step(model, caches[2], tokens[:, 10:11])
    assert torch.equal(step(model, fresh, tokens[:, 10:11]), changed)
    assert not torch.equal(changed, expected)


@torch.no_grad()
def test_a_cache_that_another_model_goes_on_with() -> None:
    model = RetroModel(small_config(), torch.Generator().manual_seed(0)).eval()
    tokens, _ = small_inputs(model, batch=2, n=12)
    cache = new_cache(model, 2, 12)
    step(model, cache, tokens[:, :1])
    other = copy.deepcopy(model)
    replaced(other)
    twin = copy.deepcopy(cache)
    assert torch.equal(step(other, cache, tokens[:, 1:2]), step(other, twin, tokens[:, 1:2]))
