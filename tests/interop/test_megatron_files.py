"""Megatron and NeMo files: synthetic ones in their layout, whole and in tensor-parallel shards, load as the same model."""

import argparse
import io
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import small_inputs
from torch import Tensor

from retro_engine.config import ModelConfig, preset_model
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import MissingInputError, StoreError
from retro_engine.interop.imports import import_model
from retro_engine.interop.megatron import State, import_state_dict
from retro_engine.interop.megatron_files import merge_shards, read_checkpoint
from retro_engine.model.retro import RetroModel

SIZES: dict[str, Any] = {
    "vocab_size": 320, "encoder_seq_length": 32, "chunk_size": 4, "hidden_size": 32, "ffn_hidden_size": 24,
    "num_attention_heads": 4, "num_query_groups": 2, "dec_num_layers": 3, "enc_num_layers": 2, "dec_cross_attention": [1, 2],
    "enc_cross_attention": [0], "hidden_dropout": 0.0, "attention_dropout": 0.0,
}  # fmt: skip
PUBLISHED: dict[str, Any] = {  # what nvidia/retro-* were trained with
    "bias": False, "activation": "swiglu", "rotary_percentage": 0.5, "share_embeddings": False, "decoder_final_norm": True,
}  # fmt: skip
ARGUMENTS = argparse.Namespace(
    num_layers=3, retro_encoder_layers=2, retro_chunk_length=4, retro_num_neighbors=2, hidden_size=32, ffn_hidden_size=24,
    num_attention_heads=4, group_query_attention=True, num_query_groups=2, seq_length=32, rotary_percent=0.5, swiglu=True,
    apply_layernorm_1p=True, layernorm_epsilon=1e-5, use_rotary_position_embeddings=True,
    untie_embeddings_and_output_weights=True,
)  # fmt: skip
NAMES = {
    "megatron": {
        "qkv": "self_attention.query_key_value", "out": "self_attention.dense", "cross.q": "inter_attention.query",
        "cross.kv": "inter_attention.key_value", "cross.out": "inter_attention.dense", "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    },
    "mcore": {
        "qkv": "self_attention.linear_qkv", "out": "self_attention.linear_proj", "cross.q": "cross_attention.attn.linear_q",
        "cross.kv": "cross_attention.attn.linear_kv", "cross.out": "cross_attention.attn.linear_proj", "up": "mlp.linear_fc1",
        "down": "mlp.linear_fc2",
    },
}  # fmt: skip


def random_model(config: ModelConfig) -> RetroModel:
    torch.manual_seed(3)
    model = RetroModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1))
    return model


def stacked(parts: list[Tensor], groups: int, width: int) -> Tensor:
    """Rows group by group: those of the first part's heads in this group, then the second's, ..."""
    rows = []
    for group in range(groups):
        for part in parts:
            size = len(part) // groups
            assert size % width == 0
            rows.append(part[group * size : (group + 1) * size])
    return torch.cat(rows)


def foreign(model: RetroModel, source: str) -> State:
    """The model in another implementation's layout: layernorm-1p, no bias, gated FFN, grouped queries, untied."""
    ours, c, names = model.state_dict(), model.config, NAMES[source]
    out: State = {}
    root = {"megatron": "language_model.encoder", "mcore": "decoder"}[source]
    first = c.cross_layers[0]

    def norm(target: str, name: str) -> None:
        out[f"{target}.weight"], out[f"{target}.bias"] = ours[f"{name}.weight"] - 1, ours[f"{name}.bias"]

    def layer(target: str, name: str, keys: list[str] | None) -> None:
        part = lambda key: ours[f"{name}.{key}.weight"]  # noqa: E731
        norm(f"{target}.input_layernorm", f"{name}.attention_norm")
        qkv = [part(f"attention.{letter}") for letter in "qkv"]
        out[f"{target}.{names['qkv']}.weight"] = stacked(qkv, c.key_value_heads, c.head_width)
        out[f"{target}.{names['out']}.weight"] = part("attention.out")
        before_ffn = "pre_mlp_layernorm" if source == "mcore" else "post_attention_layernorm"
        if keys is not None:
            before_cross = "pre_cross_attn_layernorm" if source == "mcore" else "post_attention_layernorm"
            norm(f"{target}.{before_cross}", f"{name}.cross_norm")
            out[f"{target}.{names['cross.q']}.weight"] = part("cross.q")
            pair = [ours[f"{key}.weight"] for key in keys]
            out[f"{target}.{names['cross.kv']}.weight"] = stacked(pair, c.key_value_heads, c.head_width)
            out[f"{target}.{names['cross.out']}.weight"] = part("cross.out")
            is_encoder = ".retriever." in target or ".encoder." in target.removeprefix("language_model.encoder")
            if source == "megatron":
                before_ffn = "post_inter_attention_layernorm"
            elif is_encoder:
                before_ffn = "pre_mlp_layernorm.norm"
        norm(f"{target}.{before_ffn}", f"{name}.ffn_norm")
        out[f"{target}.{names['up']}.weight"] = torch.cat((part("ffn.gate"), part("ffn.up")))
        out[f"{target}.{names['down']}.weight"] = part("ffn.down")

    for i in range(c.dec_num_layers):
        place = c.cross_layers.index(i) if i in c.cross_layers else None
        keys = None if place is None else [f"neighbor_projection.{letter}.{place}" for letter in "kv"]
        layer(f"{root}.layers.{i}", f"layers.{i}", keys)
    inner = f"{root}.layers.{first}." + ("retriever" if source == "megatron" else "cross_attention.encoder")
    for i in range(c.enc_num_layers):
        name = f"encoder.layers.{i}"
        layer(f"{inner}.layers.{i}", name, [f"{name}.cross.{letter}" for letter in "kv"] if i == 0 else None)
    norm(f"{root}.final_layernorm", "final_norm")
    prefix = "language_model." if source == "megatron" else ""
    out[f"{prefix}embedding.word_embeddings.weight"] = ours["embedding.weight"]
    out[f"{prefix}output_layer.weight"] = ours["head.weight"]
    return {name: value.clone() for name, value in out.items()}


def nested(state: State) -> dict[str, Any]:
    """As legacy Megatron saves it: dicts for the first levels."""
    tree: dict[str, Any] = {}
    for name, value in state.items():
        words = name.split(".")
        node, depth = tree, 2 if words[1] in ("encoder", "output_layer") else 3
        for word in words[:depth]:
            node = node.setdefault(word, {})
        node[".".join(words[depth:])] = value
    return tree


def cut(state: State, rank: int, ranks: int) -> State:
    """A tensor-parallel rank's share, cut head by head and feature by feature."""
    out = {}
    for name, value in state.items():
        module = name.split(".")[-2]
        if module in ("mlp", "dense_h_to_4h", "linear_fc1"):
            out[name] = torch.cat([half.chunk(ranks)[rank] for half in value.chunk(2)]).clone()
        elif module in (
            "query_key_value",
            "query",
            "key_value",
            "linear_qkv",
            "linear_q",
            "linear_kv",
            "word_embeddings",
            "output_layer",
        ):
            out[name] = value.chunk(ranks)[rank].clone()
        elif module in ("dense", "dense_4h_to_h", "linear_proj", "linear_fc2"):
            out[name] = value.chunk(ranks, 1)[rank].clone()
        else:
            out[name] = value
    return out


def config_of(source: str) -> ModelConfig:
    residual = {"encoder_ca_residual": "input"} if source == "megatron" else {}
    return preset_model("mcore", **(SIZES | PUBLISHED | residual))


def save_shards(model: RetroModel, source: str, folder: Path, ranks: int) -> Path:
    state = foreign(model, source)
    for rank in range(ranks):
        place = folder / f"mp_rank_{rank:02d}"
        place.mkdir(parents=True)
        part = cut(state, rank, ranks)
        content = nested(part) if source == "megatron" else part
        torch.save({"model": content, "args": ARGUMENTS, "iteration": 3}, place / "model_optim_rng.pt")
    return folder


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(Tokenizer.train(["river stone amber"] * 3, 300).json)
    return path


@pytest.mark.parametrize("source", ["megatron", "mcore"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_layout_of_the_published_checkpoints(source: str, ranks: int, tmp_path: Path, tokenizer_file: Path) -> None:
    model = random_model(config_of(source))
    path = save_shards(model, source, tmp_path / "iter_0000003", ranks)
    imported = import_model(path, tokenizer=tokenizer_file)
    assert imported.source == source
    found = imported.model.config
    assert (found.rotary_percentage, found.activation, found.bias, found.share_embeddings) == (
        0.5,
        "swiglu",
        False,
        False,
    )
    dropouts = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "retrieved_length": None}
    assert replace(found, **dropouts) == model.config
    tokens, neighbors = small_inputs(model, n=16)
    with torch.no_grad():
        expected = model(tokens, neighbors)
        torch.testing.assert_close(imported.model(tokens, neighbors), expected, rtol=0, atol=1e-5)


def test_encoder_residuals_tell_the_layouts_apart(tmp_path: Path, tokenizer_file: Path) -> None:
    assert config_of("megatron") != config_of("mcore")
    path = save_shards(random_model(config_of("megatron")), "megatron", tmp_path / "x", 1)
    assert import_model(path, tokenizer=tokenizer_file).model.config.encoder_ca_residual == "input"


def test_norms_that_transformer_engine_fuses(tmp_path: Path, tokenizer_file: Path) -> None:
    model = random_model(config_of("mcore"))
    state = foreign(model, "mcore")
    for name in list(state):
        for norm, module in (
            ("input_layernorm.", "self_attention.linear_qkv"),
            ("pre_mlp_layernorm.", "mlp.linear_fc1"),
        ):
            if norm in name and "norm.norm" not in name:
                state[name.replace(norm, f"{module}.layer_norm_")] = state.pop(name)
    state["decoder.layers.0.self_attention._extra_state"] = torch.zeros(1)
    torch.save({"model": state, "args": vars(ARGUMENTS)}, tmp_path / "x.pt")
    found = import_model(tmp_path / "x.pt", tokenizer=tokenizer_file).model
    tokens, neighbors = small_inputs(model, n=16)
    torch.testing.assert_close(found(tokens, neighbors), model(tokens, neighbors), rtol=0, atol=1e-5)


def test_shards_that_do_not_fit(tmp_path: Path) -> None:
    state = foreign(random_model(config_of("megatron")), "megatron")
    shards = [cut(state, rank, 2) for rank in range(2)]
    name = "language_model.encoder.layers.0.self_attention.dense.weight"
    for change, message in (
        ({name: shards[1][name][:-1]}, rf"{name} has shapes that do not match\n.*\(32, 16\), \(31, 16\)"),
        (
            {"language_model.encoder.final_layernorm.weight": torch.zeros(32)},
            "final_layernorm.weight differs between ranks",
        ),
        ({"odd": torch.zeros(2)}, r"rank 1 has other tensors than rank 0\n  \['odd'\]"),
    ):
        with pytest.raises(StoreError, match=message):
            merge_shards([shards[0], shards[1] | change], True, "it")


def test_folders_that_are_no_checkpoint(tmp_path: Path, tokenizer_file: Path) -> None:
    path = save_shards(random_model(config_of("megatron")), "megatron", tmp_path / "x", 2)
    with pytest.raises(MissingInputError, match="has no tokenizer"):
        import_model(path)
    (path / "mp_rank_01").rename(path / "mp_rank_02")
    with pytest.raises(MissingInputError, match="a rank is missing"):
        read_checkpoint(path)
    (path / "mp_rank_02").rename(path / "mp_rank_00_001")
    with pytest.raises(StoreError, match="pipeline-parallel: mp_rank_00_001"):
        read_checkpoint(path)
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(StoreError, match="distributed checkpoint's pickle"):
        import_model(tmp_path / "dcp", tokenizer=tokenizer_file)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingInputError, match="not a model that is known"):
        import_model(tmp_path / "empty")


def test_settings_and_tensors_that_are_missing(tmp_path: Path, tokenizer_file: Path) -> None:
    state = foreign(random_model(config_of("megatron")), "megatron")
    torch.save({"model": nested(state)}, tmp_path / "x.pt")
    with pytest.raises(StoreError, match="L is missing"):
        import_model(tmp_path / "x.pt", tokenizer=tokenizer_file)
    settings = {
        "L": 3,
        "enc": 2,
        "m": 4,
        "k": 2,
        "hidden": 32,
        "ffn": 24,
        "heads": 4,
        "groups": 2,
        "pos": "rope",
        "ns": 32,
    }
    settings |= {"rotary": 0.5, "tie": False, "swiglu": True, "layernorm_1p": True}
    import_model(tmp_path / "x.pt", tokenizer=tokenizer_file, metadata=settings)
    with pytest.raises(StoreError, match=r"does not fit the model\n.*ffn.gate.weight \(24, 32\), expected \(20, 32\)"):
        import_model(tmp_path / "x.pt", tokenizer=tokenizer_file, metadata=settings | {"ffn": 20})
    gone = "language_model.encoder.layers.1.inter_attention.key_value.weight"
    torch.save({"model": nested({name: v for name, v in state.items() if name != gone})}, tmp_path / "y.pt")
    with pytest.raises(StoreError, match=r"layers.1.inter_attention.key_value.weight is missing"):
        import_model(tmp_path / "y.pt", tokenizer=tokenizer_file, metadata=settings)


def test_a_nemo_file(tmp_path: Path, tokenizer_file: Path) -> None:
    """The weights of NeMo's layout, cut for two ranks; the mapping itself is held to NeMo's logits by test_golden."""
    state, meta = nemo_state()
    expected = import_state_dict(state, meta, "nemo")
    path = tmp_path / "x.nemo"
    yaml = (
        "dec_num_layers: 2\nenc_num_layers: 1\ndec_cross_attention: [1]\nenc_cross_attention: [0]\nversion: 1\n"
        "chunk_size: 4\nhidden_size: 8\nffn_hidden_size: 12\nnum_attention_heads: 2\nencoder_seq_length: 16\ndata:\n  neighbors: 2\n"
    )
    with tarfile.open(path, "w") as tar:
        members = {"model_config.yaml": yaml.encode()}
        for rank in range(2):
            buffer = io.BytesIO()
            shard = cut_nemo(state, rank)
            torch.save({f"model.{name}": value for name, value in shard.items()}, buffer)
            members[f"mp_rank_{rank:02d}/model_weights.ckpt"] = buffer.getvalue()
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    found = import_model(
        path, tokenizer=tokenizer_file, metadata={"eod_id": meta["eod_id"], "pad_id": meta["pad_id"]}
    ).model
    assert found.config == expected.config
    tokens, neighbors = small_inputs(expected, n=8)
    torch.testing.assert_close(found(tokens, neighbors), expected(tokens, neighbors), rtol=0, atol=1e-5)


def nemo_state() -> tuple[State, dict[str, str]]:
    generator = torch.Generator().manual_seed(0)
    state: State = {}

    def linear(name: str, rows: int, columns: int) -> None:
        state[f"{name}.weight"] = torch.randn(rows, columns, generator=generator)
        state[f"{name}.bias"] = torch.randn(rows, generator=generator)

    def norm(name: str) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = torch.rand(8, generator=generator), torch.zeros(8)

    def attention(name: str) -> None:
        norm(f"{name}.input_layernorm")
        linear(f"{name}.self_attention.query_key_value", 24, 8)
        linear(f"{name}.self_attention.dense", 8, 8)

    def cross(name: str) -> None:
        for part, rows in (("query", 8), ("key_value", 16), ("dense", 8)):
            linear(f"{name}.{part}", rows, 8)

    def ffn(name: str, norm_name: str) -> None:
        norm(f"{name}.{norm_name}")
        linear(f"{name}.mlp.dense_h_to_4h", 12, 8)
        linear(f"{name}.mlp.dense_4h_to_h", 8, 12)

    state["encoder_embedding.word_embeddings.weight"] = torch.randn(300, 8, generator=generator)
    state["tokens_head.bias"] = torch.randn(300, generator=generator)
    before, after = "pre_decoder.model.layers", "post_decoder.model.layers"
    attention(f"{before}.0")
    ffn(f"{before}.0", "post_attention_layernorm")
    attention(f"{before}.1")
    norm(f"{before}.1.post_attention_layernorm")
    cross(f"{after}.0.inter_attention.cross_attention")
    ffn(f"{after}.0", "post_inter_attention_layernorm")
    attention("encoder.model.layers.0")
    norm("encoder.model.layers.0.post_attention_layernorm")
    cross("encoder.model.layers.0.inter_attention")
    ffn("encoder.model.layers.0", "post_inter_attention_layernorm")
    norm("encoder.model.final_layernorm")
    norm("post_decoder.model.final_layernorm")
    meta = {
        "dec": "2",
        "enc": "1",
        "dec_ca": "(1,)",
        "enc_ca": "(0,)",
        "version": "1",
        "chunk": "4",
        "k": "2",
        "hidden": "8",
    }
    return state, meta | {"ffn": "12", "heads": "2", "pad_id": "1", "eod_id": "0", "ns": "16"}


def cut_nemo(state: State, rank: int) -> State:
    out = {}
    for name, value in state.items():
        module, kind = name.split(".")[-2:]
        if module in ("query_key_value", "query", "key_value", "dense_h_to_4h", "word_embeddings", "tokens_head"):
            out[name] = value.chunk(2)[rank].clone()
        elif module in ("dense", "dense_4h_to_h") and kind == "weight":
            out[name] = value.chunk(2, 1)[rank].clone()
        else:
            out[name] = value
    return out
