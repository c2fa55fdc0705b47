"""The network: shapes, errors, compilation, gradients, and an independent restatement in plain torch."""

import math

import pytest
import torch
from helpers import small_config, small_inputs, small_model
from retro_kernels import reference
from retro_kernels.backend import backend
from torch import Tensor

from retro_engine.config import ModelConfig
from retro_engine.errors import UsageError
from retro_engine.model.retro import RetroModel


def restated(model: RetroModel, tokens: Tensor, neighbors: Tensor, lengths: Tensor, documents: Tensor) -> Tensor:
    """RETRO as docs/model.md states it, one token, head and neighbor at a time; no code is shared with the package."""
    c, p = model.config, dict(model.named_parameters())
    m, e, r = c.chunk_size, c.hidden_size // c.num_attention_heads, c.r
    heads = c.num_attention_heads

    def rms(x: Tensor, name: str) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + c.layernorm_epsilon) * p[f"{name}.weight"]

    def rotate(vector: Tensor, position: int) -> Tensor:
        out = vector.clone()
        for pair in range(e // 2):
            frequency = torch.tensor(1.0) / torch.tensor(c.rotary_base) ** (torch.tensor(2.0 * pair) / e)
            angle = torch.tensor(float(position)) * frequency
            cos, sin = angle.cos().double(), angle.sin().double()
            a, b = vector[pair], vector[pair + e // 2]
            out[pair], out[pair + e // 2] = a * cos - b * sin, b * cos + a * sin
        return out

    def attend(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        """One query of one head over some keys."""
        scores = torch.stack([query @ key / math.sqrt(e) for key in keys])
        return (scores.softmax(0)[:, None] * torch.stack(values)).sum(0)

    def split(x: Tensor) -> list[Tensor]:
        return [x[h * e : (h + 1) * e] for h in range(heads)]

    def attention(xq: list[Tensor], xk: list[Tensor], name: str, positions, allowed) -> list[Tensor]:
        """positions(i) of query i, and of key j as positions(None, j); allowed(i, j)."""
        d = c.hidden_size
        wq, layer = p[f"{name}.q.weight"], int(name.split(".")[-2])
        if name == f"layers.{layer}.cross":
            place = c.cross_layers.index(layer)
            wk, wv = p[f"neighbor_projection.k.{place}.weight"], p[f"neighbor_projection.v.{place}.weight"]
        else:
            wk, wv = p[f"{name}.k.weight"], p[f"{name}.v.weight"]
        keys = [[rotate(h, positions(None, j)) for h in split(wk @ x)] for j, x in enumerate(xk)]
        values = [split(wv @ x) for x in xk]
        out = []
        for i, x in enumerate(xq):
            queries = [rotate(h, positions(i, None)) for h in split(wq @ x)]
            seen = [j for j in range(len(xk)) if allowed(i, j)]
            if not seen:
                out.append(torch.zeros(d, dtype=torch.float64))
                continue
            heads_out = [
                attend(queries[h], [keys[j][h] for j in seen], [values[j][h] for j in seen]) for h in range(heads)
            ]
            out.append(p[f"{name}.out.weight"] @ torch.cat(heads_out))
        return out

    def ffn(x: Tensor, name: str) -> Tensor:
        gate, up = p[f"{name}.gate.weight"] @ x, p[f"{name}.up.weight"] @ x
        return p[f"{name}.down.weight"] @ (gate * torch.sigmoid(gate) * up)

    logits = []
    for b in range(tokens.shape[0]):
        n = tokens.shape[1]
        doc = documents[b].tolist()
        x = [p["embedding.weight"][t] for t in tokens[b]]
        encoded: dict[tuple[int, int], list[Tensor]] = {}
        for i in range(c.dec_num_layers):
            name = f"layers.{i}"
            z = [rms(v, f"{name}.attention_norm") for v in x]
            causal = attention(z, z, f"{name}.attention", lambda i, j: i if j is None else j,
                               lambda i, j: j <= i and doc[i] == doc[j] and doc[j] >= 0)  # fmt: skip
            x = [v + a for v, a in zip(x, causal)]
            if i in c.dec_cross_attention:
                z = [rms(v, f"{name}.cross_norm") for v in x]
                if not encoded:
                    for u in range(n // m):
                        last = doc[u * m + m - 1]
                        chunk = z[u * m : (u + 1) * m]
                        for j in range(neighbors.shape[2]):
                            valid = int(lengths[b, u, j]) if last >= 0 else 0
                            if valid == 0:
                                continue
                            y = [p["embedding.weight"][t] for t in neighbors[b, u, j]]
                            for le in range(c.enc_num_layers):
                                base = f"encoder.layers.{le}"
                                w = [rms(v, f"{base}.attention_norm") for v in y]
                                a = attention(
                                    w,
                                    w,
                                    f"{base}.attention",
                                    lambda i, j: i if j is None else j,
                                    lambda i, j, valid=valid: j < valid,
                                )
                                y = [v + d for v, d in zip(y, a)]
                                if le in c.enc_cross_attention:
                                    w = [rms(v, f"{base}.cross_norm") for v in y]
                                    a = attention(w, chunk, f"{base}.cross", lambda i, j: i if j is None else j,
                                                  lambda i, j, u=u, last=last: doc[u * m + j] == last)  # fmt: skip
                                    y = [v + d for v, d in zip(y, a)]
                                y = [v + ffn(rms(v, f"{base}.ffn_norm"), f"{base}.ffn") for v in y]
                            encoded[u, j] = [rms(v, "encoder.final_norm") for v in y][:valid]
                for t in range(n):
                    u = (t + 1) // m - 1
                    keys = [(q, v) for (chunk, _), y in encoded.items() if chunk == u for q, v in enumerate(y)]
                    if u < 0 or not keys or doc[t] != doc[u * m + m - 1]:
                        continue
                    position = [q for q, _ in keys]
                    (out,) = attention([z[t]], [v for _, v in keys], f"{name}.cross",
                                       lambda i, j, t=t, u=u, position=position: t - u * m if j is None else position[j],
                                       lambda i, j: True)  # fmt: skip
                    x[t] = x[t] + out
            x = [v + ffn(rms(v, f"{name}.ffn_norm"), f"{name}.ffn") for v in x]
        logits.append(torch.stack([p["embedding.weight"] @ rms(v, "final_norm") for v in x]))
    assert r == neighbors.shape[3]
    return torch.stack(logits)


def test_equals_the_restatement() -> None:
    """The same logits as an implementation that shares no line with this one, masks and documents included."""
    model = small_model(seed=5, rotary_table_precision="float32")
    tokens, neighbors = small_inputs(model, batch=2, n=14, k=2, seed=5)
    lengths = torch.randint(0, model.config.r + 1, neighbors.shape[:3], generator=torch.Generator().manual_seed(1))
    lengths[0, 1] = 0
    documents = torch.tensor([[0] * 6 + [1] * 8, [-1] * 3 + [4] * 9 + [-1] * 2])
    with torch.no_grad():
        found = model(tokens, neighbors, lengths, documents)
        expected = restated(model, tokens, neighbors, lengths, documents)
    is_token = documents >= 0
    torch.testing.assert_close(found[is_token], expected[is_token], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("retrieval", [True, False])
def test_compiles_whole(retrieval: bool) -> None:
    """torch.compile(fullgraph=True) takes the training forward and its backward, with the eager losses."""
    model = RetroModel(small_config(retrieval=retrieval), torch.Generator().manual_seed(0))
    tokens, neighbors = small_inputs(model, n=16)
    lengths = torch.randint(0, 9, neighbors.shape[:3]) if retrieval else None
    documents = (torch.arange(16) >= 7).long().expand(2, 16)
    args = (tokens, neighbors if retrieval else None, lengths, documents)
    compiled = torch.compile(model, fullgraph=True)
    eager = model(*args)
    torch.testing.assert_close(compiled(*args), eager, rtol=1e-4, atol=1e-4)
    compiled(*args).square().mean().backward()
    from_compiled = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model(*args).square().mean().backward()
    for found, parameter in zip(from_compiled, [p for p in model.parameters() if p.grad is not None]):
        torch.testing.assert_close(found, parameter.grad, rtol=1e-3, atol=1e-4)


def test_gradients_are_finite_with_missing_neighbors_and_padding() -> None:
    model = small_model().float()
    tokens, neighbors = small_inputs(model)
    lengths = torch.zeros(neighbors.shape[:3], dtype=torch.long)
    lengths[:, 0, 0] = 3
    documents = torch.tensor([[-1] * 19, [0] * 10 + [-1] * 9])
    model(tokens, neighbors, lengths, documents).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("resets", [True, False])
def test_padding_between_documents(resets: bool, dtype: torch.dtype) -> None:
    """With reset_attention=false a document reads the one before it over the padding between them; never the padding."""
    model = small_model(reset_attention=resets, cca_reset=resets).to(dtype)
    tokens, neighbors = small_inputs(model)
    documents = torch.tensor([0] * 6 + [-1] * 2 + [1] * 11).expand(2, 19)
    expected = model(tokens, neighbors, None, documents)
    other, padding = tokens.clone(), tokens.clone()
    other[:, 2], padding[:, 6:8] = (tokens[:, 2] + 1) % 50, (tokens[:, 6:8] + 1) % 50
    moved = (model(other, neighbors, None, documents) - expected)[:, 8:].abs().max()
    assert moved == 0 if resets else moved > 1e-6
    real = documents >= 0
    assert torch.equal(model(padding, neighbors, None, documents)[real], expected[real])


def test_plain_decoder_is_a_switch() -> None:
    model = small_model(retrieval=False)
    tokens, neighbors = small_inputs(small_model())
    assert not any("cross" in name or "encoder" in name for name, _ in model.named_parameters())
    assert model(tokens).shape == (2, 19, 50)
    with pytest.raises(ValueError, match="plain decoder"):
        model(tokens, neighbors)


def test_documents_are_derived_from_the_tokens() -> None:
    """eod_id and pad_id in the config: the end-of-document token closes its document, pad tokens are padding."""
    model = small_model()
    tokens, neighbors = small_inputs(model)
    tokens, neighbors = tokens.clamp(min=2), neighbors.clamp(min=2)
    tokens[:, 6] = 1
    tokens[:, 15:] = 0
    neighbors[:, 1, 0, 5:] = 0
    lengths = torch.full(neighbors.shape[:3], model.config.r)
    lengths[:, 1, 0] = 5
    documents = torch.tensor([0] * 7 + [1] * 8 + [-1] * 4).expand(2, 19)
    expected = model(tokens, neighbors, lengths, documents)
    model.config.eod_id, model.config.pad_id = 1, 0
    assert torch.equal(model(tokens, neighbors), expected)


WRONG_SHAPES = {
    "tokens": lambda t, x: (t[0], x, None, None),
    "neighbors": lambda t, x: (t, x[:, :2], None, None),
    "neighbor_lengths": lambda t, x: (t, x, torch.ones(2, 4), None),
    "document_ids": lambda t, x: (t, x, None, torch.ones(2, 3)),
    "longer": lambda t, x: (t, torch.cat((x, x), -1), None, None),
}


@pytest.mark.parametrize("name", WRONG_SHAPES)
def test_wrong_shapes_are_named(name: str) -> None:
    model = small_model()
    args = WRONG_SHAPES[name](*small_inputs(model))
    with pytest.raises(ValueError, match="at most" if name == "longer" else f"{name} has shape"):
        model(*args)


BROKEN = {
    "share_embeddings": {"share_embeddings": False},
    "as wide": {"encoder_hidden_size": 24, "encoder_num_attention_heads": 2},
    "grouped": {"num_query_groups": 1},
    "rotary": {"rotary_percentage": 0.5},
    "RoPE": {"cca_position_embedding": "none"},
    "biases": {"qk_bias": False},
}


@pytest.mark.parametrize("rule", BROKEN)
def test_retrieval_ready_names_the_condition_that_fails(rule: str) -> None:
    values = {"hidden_size": 48, "num_attention_heads": 3, "init": "retrieval_ready"} | BROKEN[rule]
    with pytest.raises(UsageError, match=rule):
        small_config(**values)


def _copy_config(**overrides: object) -> ModelConfig:
    return small_config(
        vocab_size=200, chunk_size=16, encoder_seq_length=64, hidden_size=128, num_attention_heads=4, ffn_hidden_size=256,
        dec_num_layers=4, enc_num_layers=1, dec_cross_attention=[1, 2, 3], activation="gelu", **overrides,
    )  # fmt: skip


@pytest.mark.parametrize("normalization", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize(("m", "crossing"), [(8, [0]), (16, [])])
def test_retrieval_ready_copies_at_step_0(normalization: str, m: int, crossing: list[int]) -> None:
    """Untrained, the neighbors' continuation is already more likely than chance; with `standard` it is not."""

    def gain(init: str) -> float:
        gains = []
        for seed in range(3):
            config = _copy_config(init=init, normalization=normalization, enc_cross_attention=crossing)
            config.chunk_size = m
            model = RetroModel(config, torch.Generator().manual_seed(seed)).eval()
            tokens = torch.randint(0, 200, (8, 2 * m), generator=torch.Generator().manual_seed(seed))
            # the neighbor of chunk 0 holds chunk 1, preceded by its last token
            neighbors = torch.randint(0, 200, (8, 2, 1, 2 * m), generator=torch.Generator().manual_seed(seed + 9))
            neighbors[:, 0, 0, 3 : 4 + m] = tokens[:, m - 1 :]
            with torch.no_grad():
                on = model(tokens, neighbors).log_softmax(-1)
                off = model(tokens).log_softmax(-1)
            label = tokens[:, m:, None]
            gains.append(float((on[:, m - 1 : -1] - off[:, m - 1 : -1]).gather(-1, label).mean()))
        return sum(gains) / len(gains)

    ready, standard = gain("retrieval_ready"), gain("standard")
    assert ready > 0.25, ready
    assert abs(standard) < ready / 5, standard


def test_standard_biases_are_0() -> None:
    model = RetroModel(small_config(bias=True))
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    assert len(biases) > 20 and not any(bool(p.any()) for p in biases)


@pytest.mark.parametrize("is_mixed", [False, True])
def test_dropout_of_attention_weights_is_the_kernels(monkeypatch: pytest.MonkeyPatch, is_mixed: bool) -> None:
    """No attention of the default model is left to PyTorch, and what is computed again in the backward pass drops the same."""
    if backend() == "cpp":
        for name in ("attention", "chunked_cross_attention", "masked_attention"):
            monkeypatch.setattr(reference, name, None)
    config = small_config(attention_dropout=0.4, hidden_dropout=0.1, init_method_std=0.2)
    model = RetroModel(config, torch.Generator().manual_seed(0)).train()
    tokens, neighbors = small_inputs(model)
    documents = (torch.arange(tokens.shape[1]) // 7).expand_as(tokens)
    found = []
    for recompute in (None, "selective", "full", None):
        model.set_recompute(recompute)
        torch.manual_seed(len(found) // 3)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
            model(tokens, neighbors, document_ids=documents, labels=tokens).backward()
        found.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert all(map(torch.equal, found[0], found[1]))
    plain, full, other = (torch.cat([x.flatten() for x in found[number]]) for number in (0, 2, 3))
    assert (full - plain).norm() <= (
        2e-2 if is_mixed else 1e-5
    ) * plain.norm()  # full projects neighbors layer by layer
    assert (other - plain).norm() > 0.1 * plain.norm()
