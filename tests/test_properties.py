"""The eleven properties of docs/model.md, in the same words, in float64. Chunk length 4, two CCA layers."""

import pytest
import torch
from helpers import small_inputs, small_model

from retro_engine.model.decode_cache import new_cache
from retro_engine.model.decoding import step
from retro_engine.model.retro import RetroModel

M = 4
LENGTHS = [1, 2, 3, 4, 5, 7, 8, 11, 12, 16, 19]
VARIANTS = {
    "default": {},
    "gelu-layernorm-bias": {"activation": "gelu", "normalization": "layernorm", "bias": True},
    "grouped-queries-interleaved-partial": {
        "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "rotary_interleaved": True, "rotary_percentage": 0.5,
    },
    "narrow-encoder-untied": {"encoder_hidden_size": 16, "encoder_num_attention_heads": 2, "share_embeddings": False},
    "short-neighbors-learned": {"retrieved_length": 5, "position_embedding": "learned", "encoder_position_embedding": "learned"},
    "retrieval-ready": {"hidden_size": 48, "init": "retrieval_ready"},
    "bias-everywhere": {"bias": True, "cca_bias_everywhere": True, "cca_query_offset": False},
}  # fmt: skip


@pytest.fixture(params=VARIANTS, scope="module")
def model(request: pytest.FixtureRequest) -> RetroModel:
    return small_model(**VARIANTS[request.param])


def changed(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[n] whether the logits of a token differ by more than rounding."""
    return (a - b).abs().amax((0, 2)) > 1e-9


def test_1_token_causality(model: RetroModel) -> None:
    tokens, neighbors = small_inputs(model)
    base = model(tokens, neighbors)
    for t in range(tokens.shape[1]):
        edited = tokens.clone()
        edited[:, t] = (edited[:, t] + 1) % model.config.vocab_size
        difference = changed(base, model(edited, neighbors))
        assert not difference[:t].any(), f"editing token {t} changed {difference.nonzero().flatten()}"
        assert difference[t]


def test_2_neighbor_causality(model: RetroModel) -> None:
    tokens, neighbors = small_inputs(model)
    base = model(tokens, neighbors)
    for u in range(neighbors.shape[1]):
        edited = neighbors.clone()
        edited[:, u] = (edited[:, u] + 1) % model.config.vocab_size
        difference = changed(base, model(tokens, edited))
        first = u * M + M - 1
        assert not difference[:first].any(), f"a neighbor of chunk {u} changed a token before {first}"
        assert difference[first], f"a neighbor of chunk {u} did not change token {first}"


def test_3_neighbor_permutation_invariance(model: RetroModel) -> None:
    tokens, neighbors = small_inputs(model, k=3)
    lengths = torch.randint(0, model.config.r + 1, neighbors.shape[:3], generator=torch.Generator().manual_seed(3))
    order = [2, 0, 1]
    torch.testing.assert_close(
        model(tokens, neighbors, lengths),
        model(tokens, neighbors[:, :, order], lengths[:, :, order]),
        rtol=0,
        atol=1e-11,
    )


def test_4_masking(model: RetroModel) -> None:
    """Editing padded neighbor tokens or missing neighbors changes nothing."""
    tokens, neighbors = small_inputs(model, k=3)
    lengths = torch.randint(0, model.config.r + 1, neighbors.shape[:3], generator=torch.Generator().manual_seed(4))
    lengths[0, 0] = 0
    lengths[0, 1, 1] = model.config.r
    is_padding = torch.arange(model.config.r) >= lengths[..., None]
    edited = torch.where(is_padding, (neighbors + 7) % model.config.vocab_size, neighbors)
    assert torch.equal(model(tokens, neighbors, lengths), model(tokens, edited, lengths))


def test_5_all_neighbors_missing_is_retrieval_off(model: RetroModel) -> None:
    if model.config.cca_bias_everywhere:
        pytest.skip("the output bias reaches every token: that is the switch")
    tokens, neighbors = small_inputs(model)
    missing = model(tokens, neighbors, torch.zeros(neighbors.shape[:3], dtype=torch.long))
    torch.testing.assert_close(missing, model(tokens), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", LENGTHS)
def test_6_any_length(model: RetroModel, n: int) -> None:
    """Any n >= 1, multiple of m or not, n < m included: a longer sequence's prefix has the same logits."""
    if model.config.cca_bias_everywhere and n < M:
        pytest.skip("without a chunk there is no cross-attention whose bias could reach every token")
    tokens, neighbors = small_inputs(model)
    logits = model(tokens[:, :n], neighbors[:, : n // M])
    assert logits.shape == (2, n, model.config.vocab_size)
    torch.testing.assert_close(logits, model(tokens, neighbors)[:, :n], rtol=0, atol=1e-11)


@pytest.mark.parametrize("blocks", [[1] * 19, [19], [3, 1, 8, 7], [4, 4, 4, 4, 3], [11, 1, 1, 6], [5, 14]])
def test_7_cached_decoding_equals_the_full_pass(model: RetroModel, blocks: list[int]) -> None:
    tokens, neighbors = small_inputs(model, k=3)
    lengths = torch.randint(0, model.config.r + 1, neighbors.shape[:3], generator=torch.Generator().manual_seed(7))
    lengths[:, 2] = 0
    cache = new_cache(model, 2, 19)
    out, start = [], 0
    for size in blocks:
        stop = start + size
        chunks = slice(start // M, stop // M)
        out.append(step(model, cache, tokens[:, start:stop], neighbors[:, chunks], lengths[:, chunks]))
        start = stop
    difference = (torch.cat(out, 1) - model(tokens, neighbors, lengths)).abs().max()
    assert difference <= 1e-10, f"largest difference {difference}"


def test_8_batch_independence(model: RetroModel) -> None:
    """Right-padded batches, and left-padded ones with the same left padding, equal single sequences."""
    tokens, neighbors = small_inputs(model, batch=3)
    documents = torch.zeros_like(tokens)
    for row, (left, right) in enumerate([(0, 6), (3, 0), (3, 4)]):
        documents[row, :left] = -1
        documents[row, 19 - right :] = -1
    together = model(tokens, neighbors, None, documents)
    for row in range(3):
        alone = model(tokens[row : row + 1], neighbors[row : row + 1], None, documents[row : row + 1])
        is_token = documents[row] >= 0
        torch.testing.assert_close(together[row, is_token], alone[0, is_token], rtol=0, atol=1e-11)
    without = model(tokens[:1, :13], neighbors[:1, :3])
    torch.testing.assert_close(together[:1, :13], without, rtol=0, atol=1e-11)
    edited = torch.where(documents < 0, (tokens + 5) % model.config.vocab_size, tokens)
    difference = (model(edited, neighbors, None, documents) - together).abs()[documents >= 0]
    assert difference.max() <= 1e-11, "padding is read"


def test_9_order_inside_a_neighbor_matters(model: RetroModel) -> None:
    tokens, neighbors = small_inputs(model)
    shuffled = neighbors[..., torch.arange(model.config.r - 1, -1, -1)]
    assert changed(model(tokens, neighbors), model(tokens, shuffled))[M - 1 :].all()


def test_11_no_leak_across_documents(model: RetroModel) -> None:
    """Editing document A, or the neighbors of its chunks, changes nothing in document B of the same sequence."""
    if model.config.cca_bias_everywhere or model.config.position_embedding == "learned":
        pytest.skip("one variant of each kind is enough")
    tokens, neighbors = small_inputs(model)
    for border in range(1, 19):
        documents = (torch.arange(19) >= border).long().expand(2, 19)
        base = model(tokens, neighbors, None, documents)
        edited = tokens.clone()
        edited[:, :border] = (edited[:, :border] + 3) % model.config.vocab_size
        moved = neighbors.clone()
        own = [u for u in range(neighbors.shape[1]) if (u + 1) * M - 1 < border]  # chunks that end in A
        moved[:, own] = (moved[:, own] + 3) % model.config.vocab_size
        difference = changed(base, model(edited, moved, None, documents))
        assert not difference[border:].any(), f"border {border}: {difference.nonzero().flatten()}"
        assert difference[:border].all()


def test_mcore_preset_breaks_the_properties_it_is_known_to_break() -> None:
    """Under megatron-core's switches 4, 5, 7 and 9 do not hold: neighbors are position-blind and unmasked."""
    switches = {
        "normalization": "layernorm", "activation": "gelu", "bias": True, "encoder_position_embedding": "none",
        "cca_position_embedding": "none", "partial_chunk": "first", "mask_neighbors": False, "encoder_ca_residual": "norm",
        "encoder_final_norm": False, "decoder_final_norm": False, "enc_cross_attention": [0], "cca_reset": False,
        "reset_attention": False,
    }  # fmt: skip
    model = small_model(**switches)
    tokens, neighbors = small_inputs(model)
    base = model(tokens, neighbors)
    lengths = torch.full(neighbors.shape[:3], 3)
    edited = neighbors.clone()
    edited[..., 3:] = (edited[..., 3:] + 1) % 50
    assert not torch.equal(model(tokens, neighbors, lengths), model(tokens, edited, lengths))  # 4
    assert changed(model(tokens, neighbors, lengths * 0), model(tokens)).any()  # 5
    with pytest.raises(ValueError, match="partial_chunk"):
        step(model, new_cache(model, 2, 19), tokens)  # 7
    torch.testing.assert_close(model(tokens, neighbors.flip(-1)), base, rtol=0, atol=1e-11)  # 9
    edited_tokens = tokens.clone()
    edited_tokens[:, 12] += 1
    assert not changed(base, model(edited_tokens % 50, neighbors))[:12].any()  # 1 holds
