"""State dicts of three removed implementations under our names: megatron-core, NeMo and legacy Megatron.

Names and row orders were read off their parameters; docs/model.md has the table of differences. Legacy Megatron is the
layout of InstructRetro (arXiv 2310.07713): the encoder's residual is its input, and the decoder has a final norm.
"""

from functools import partial
from typing import Any

from torch import Tensor

from retro_engine.config import ModelConfig, preset_model
from retro_engine.errors import StoreError, UsageError
from retro_engine.model.retro import RetroModel
from retro_engine.model.weights import load_state

SOURCES = ("mcore", "megatron", "nemo")
State = dict[str, Tensor]


def convert(state: State, metadata: dict[str, str], source: str) -> tuple[ModelConfig, State]:
    """Config and weights, under our names, of what another implementation saved.

    source "mcore" (megatron-core <= 0.15 `RetroModel`), "megatron" (legacy Megatron-LM) or "nemo" (NeMo <= 1.23);
    `metadata` as strings: mcore and megatron L, enc, m, k, hidden, ffn, heads, pos, rotary, tie, ns, and where they apply
    groups, swiglu, layernorm_1p, ln_eps, retrieved_length; nemo dec, enc, dec_ca, enc_ca, version, chunk, k, hidden, ffn,
    heads, pad_id, eod_id, ns. Tensors that are not known keep their names. Raises StoreError for what is missing.
    """
    if source not in SOURCES:
        raise UsageError(f"source={source!r} is not known", f"one of {', '.join(SOURCES)}")
    readers = {"mcore": _from_mcore, "megatron": _from_megatron, "nemo": _from_nemo}
    try:
        return readers[source](dict(state), metadata)
    except KeyError as error:
        raise StoreError(f"{error.args[0]} is missing", f"a {source} state dict or its metadata has it") from error
    except (RuntimeError, ValueError) as error:
        if isinstance(error, StoreError | UsageError):
            raise
        raise StoreError(f"the {source} state dict does not fit its metadata", str(error).splitlines()[0]) from error


def import_state_dict(state_dict: dict[str, Tensor], metadata: dict[str, str], source: str) -> RetroModel:
    """A RetroModel with the weights of another implementation, computing exactly what that one computes.

    source and `metadata` are those of `convert`. Raises StoreError for tensors missing, extra or of another
    shape.
    """
    config, state = convert(state_dict, metadata, source)
    model = RetroModel(config)
    load_state(model, state, f"the {source} state dict")
    return model.eval()


class _Taker:
    """Moves tensors out of a foreign state dict, so that what is left over can be reported."""

    def __init__(self, state: State, is_1p: bool = False):
        """`is_1p`: norms are stored less 1 (layernorm-1p)."""
        self.state, self.taken, self.is_1p = state, State(), is_1p

    def norm(self, target: str, source: str) -> None:
        self.module(target, source)
        if self.is_1p:
            self.taken[f"{target}.weight"] = self.taken[f"{target}.weight"] + 1

    def module(self, target: str, source: str) -> None:
        """Weight and, where it has one, bias of one module."""
        self.modules([target], source)

    def modules(self, targets: list[str], source: str, heads: int = 1, shares: list[int] | None = None) -> None:
        """Weight and bias of modules whose rows are stacked in one, per head as [first; second; ...].

        `shares`: how many head widths of each target lie beside each other, where that is not one.
        """
        shares = shares or [1] * len(targets)
        for kind in ("weight", "bias"):
            if kind == "bias" and f"{source}.bias" not in self.state:
                continue
            tensor = self.state.pop(f"{source}.{kind}")
            rows = tensor.reshape(heads, sum(shares), -1, *tensor.shape[1:])
            for target, part in zip(targets, rows.split(shares, 1)):
                self.taken[f"{target}.{kind}"] = part.flatten(0, 2).contiguous()

    def attention(self, target: str, source: str, heads: int, groups: int | None = None) -> None:
        """q, k and v: per group its query heads, then its key and its value head."""
        groups = groups or heads
        self.modules([f"{target}.{part}" for part in "qkv"], source, groups, [heads // groups, 1, 1])

    def feed_forward(self, target: str, source: str, up: str, down: str, is_gated: bool) -> None:
        self.modules([f"{target}.gate", f"{target}.up"] if is_gated else [f"{target}.up"], f"{source}.{up}")
        self.module(f"{target}.down", f"{source}.{down}")

    def tensor(self, target: str, source: str) -> None:
        self.taken[target] = self.state.pop(source)

    def done(self) -> State:
        """What was taken, and what was not under its own name: `load_state` reports that as extra."""
        return self.taken | self.state


def _key_value_names(crossing: list[int], target: str) -> list[str]:
    """Where the keys and values of a layer's cross-attention are: the decoder's lie together."""
    if target.startswith("encoder."):
        return [f"{target}.cross.k", f"{target}.cross.v"]
    place = sorted(crossing).index(int(target.removeprefix("layers.")))
    return [f"neighbor_projection.k.{place}", f"neighbor_projection.v.{place}"]


def _megatron_config(meta: dict[str, str], state: State, **fields: Any) -> ModelConfig:
    """What megatron-core and legacy Megatron have in common; `fields` are the rest."""
    is_learned = meta["pos"] == "learned_absolute"
    return preset_model(
        "mcore",
        vocab_size=len(state["embedding.word_embeddings.weight"]),
        max_position_embeddings=len(state["embedding.position_embeddings.weight"]) if is_learned else 0,
        encoder_seq_length=int(meta["ns"]),
        chunk_size=int(meta["m"]),
        retrieved_length=int(meta.get("retrieved_length", 2 * int(meta["m"]))),
        num_neighbors=int(meta["k"]),
        hidden_size=int(meta["hidden"]),
        ffn_hidden_size=int(meta["ffn"]),
        num_attention_heads=int(meta["heads"]),
        num_query_groups=int(meta["groups"]) if "groups" in meta else None,
        dec_num_layers=int(meta["L"]),
        enc_num_layers=int(meta["enc"]),
        layernorm_epsilon=float(meta.get("ln_eps", "1e-5")),
        activation="swiglu" if meta.get("swiglu") == "True" else "gelu",
        share_embeddings=meta["tie"] == "True",
        position_embedding={"learned_absolute": "learned", "rope": "rope", "none": "none"}[meta["pos"]],
        encoder_position_embedding="learned" if is_learned else "none",
        rotary_percentage=float(meta.get("rotary", "1.0")),
        **fields,
    )


def _root_of(state: State, meta: dict[str, str], config: ModelConfig, final_norm: str) -> _Taker:
    """With all but the layers taken."""
    take = _Taker(state, meta.get("layernorm_1p") == "True")
    take.tensor("embedding.weight", "embedding.word_embeddings.weight")
    if config.position_embedding == "learned":
        take.tensor("position_embedding.weight", "embedding.position_embeddings.weight")
    if not config.share_embeddings:
        take.tensor("head.weight", "output_layer.weight")
    if config.decoder_final_norm:
        take.norm("final_norm", final_norm)
    return take


def _from_mcore(state: State, meta: dict[str, str]) -> tuple[ModelConfig, State]:
    layers, heads = int(meta["L"]), int(meta["heads"])
    crossing = [i for i in range(layers) if f"decoder.layers.{i}.cross_attention.attn.linear_q.weight" in state]
    for name in list(state):  # norms that Transformer Engine fuses with the product after them
        for module, norm in (("self_attention.linear_qkv", "input_layernorm"), ("mlp.linear_fc1", "pre_mlp_layernorm")):
            if f".{module}.layer_norm_" in name:
                state[name.replace(f"{module}.layer_norm_", f"{norm}.")] = state.pop(name)
    config = _megatron_config(
        meta,
        state,
        dec_cross_attention=crossing,
        bias="decoder.layers.0.self_attention.linear_proj.bias" in state,
        decoder_final_norm="decoder.final_layernorm.weight" in state,
    )
    take = _root_of(state, meta, config, "decoder.final_layernorm")
    names_kv, is_gated = partial(_key_value_names, crossing), config.activation == "swiglu"

    def layer(target: str, source: str, is_crossing: bool, ffn_norm: str) -> None:
        take.norm(f"{target}.attention_norm", f"{source}.input_layernorm")
        qkv = f"{source}.self_attention.linear_qkv"
        take.attention(f"{target}.attention", qkv, heads, config.key_value_heads)
        take.module(f"{target}.attention.out", f"{source}.self_attention.linear_proj")
        if is_crossing:
            take.norm(f"{target}.cross_norm", f"{source}.pre_cross_attn_layernorm")
            take.module(f"{target}.cross.q", f"{source}.cross_attention.attn.linear_q")
            take.modules(names_kv(target), f"{source}.cross_attention.attn.linear_kv", config.key_value_heads)
            take.module(f"{target}.cross.out", f"{source}.cross_attention.attn.linear_proj")
        take.norm(f"{target}.ffn_norm", f"{source}.{ffn_norm}")
        take.feed_forward(f"{target}.ffn", f"{source}.mlp", "linear_fc1", "linear_fc2", is_gated)

    for i in range(layers):
        layer(f"layers.{i}", f"decoder.layers.{i}", i in crossing, "pre_mlp_layernorm")
    for i in range(config.enc_num_layers):
        source = f"decoder.layers.{crossing[0]}.cross_attention.encoder.layers.{i}"
        layer(f"encoder.layers.{i}", source, i == 0, "pre_mlp_layernorm.norm" if i == 0 else "pre_mlp_layernorm")
    return config, take.done()


def _from_megatron(state: State, meta: dict[str, str]) -> tuple[ModelConfig, State]:
    state = {name.removeprefix("language_model."): value for name, value in state.items()}
    layers, heads = int(meta["L"]), int(meta["heads"])
    is_crossing = lambda source: f"{source}.inter_attention.query.weight" in state  # noqa: E731
    crossing = [i for i in range(layers) if is_crossing(f"encoder.layers.{i}")]
    if not crossing:
        raise KeyError("encoder.layers.*.inter_attention.query.weight")
    retriever = f"encoder.layers.{crossing[0]}.retriever.layers"
    config = _megatron_config(
        meta,
        state,
        dec_cross_attention=crossing,
        enc_cross_attention=[i for i in range(int(meta["enc"])) if is_crossing(f"{retriever}.{i}")],
        bias="encoder.layers.0.self_attention.dense.bias" in state,
        encoder_ca_residual="input",
        decoder_final_norm=True,
    )
    take = _root_of(state, meta, config, "encoder.final_layernorm")
    names_kv, groups = partial(_key_value_names, crossing), config.key_value_heads

    def layer(target: str, source: str) -> None:
        take.norm(f"{target}.attention_norm", f"{source}.input_layernorm")
        take.attention(f"{target}.attention", f"{source}.self_attention.query_key_value", heads, groups)
        take.module(f"{target}.attention.out", f"{source}.self_attention.dense")
        norms = ["ffn_norm"]
        if is_crossing(source):
            norms = ["cross_norm", "ffn_norm"]
            take.module(f"{target}.cross.q", f"{source}.inter_attention.query")
            take.modules(names_kv(target), f"{source}.inter_attention.key_value", groups)
            take.module(f"{target}.cross.out", f"{source}.inter_attention.dense")
        for norm, name in zip(norms, ("post_attention_layernorm", "post_inter_attention_layernorm")):
            take.norm(f"{target}.{norm}", f"{source}.{name}")
        is_gated = config.activation == "swiglu"
        take.feed_forward(f"{target}.ffn", f"{source}.mlp", "dense_h_to_4h", "dense_4h_to_h", is_gated)

    for i in range(layers):
        layer(f"layers.{i}", f"encoder.layers.{i}")
    for i in range(config.enc_num_layers):
        layer(f"encoder.layers.{i}", f"{retriever}.{i}")
    return config, take.done()


def _nemo_config(meta: dict[str, str], state: State) -> ModelConfig:
    def layers(key: str) -> list[int]:
        return [int(part) for part in meta[key].strip("()[] ").split(",") if part.strip()]

    heads, hidden = int(meta["heads"]), int(meta["hidden"])
    return preset_model(
        "nemo",
        vocab_size=len(state["encoder_embedding.word_embeddings.weight"]),
        encoder_seq_length=int(meta["ns"]),
        chunk_size=int(meta["chunk"]),
        num_neighbors=int(meta["k"]),
        hidden_size=hidden,
        ffn_hidden_size=int(meta["ffn"]),
        num_attention_heads=heads,
        dec_num_layers=int(meta["dec"]),
        enc_num_layers=int(meta["enc"]),
        dec_cross_attention=layers("dec_ca"),
        enc_cross_attention=layers("enc_ca"),
        layernorm_epsilon=float(meta.get("ln_eps", "1e-5")),
        rotary_percentage=min(hidden // heads, 32) / (hidden // heads),
        cca_query_offset=meta["version"] != "1",
        eod_id=int(meta["eod_id"]),
        pad_id=int(meta["pad_id"]),
    )


def _from_nemo(state: State, meta: dict[str, str]) -> tuple[ModelConfig, State]:
    config = _nemo_config(meta, state)
    crossing, heads = config.dec_cross_attention, config.num_attention_heads
    take, names_kv = _Taker(state), partial(_key_value_names, crossing)
    take.tensor("embedding.weight", "encoder_embedding.word_embeddings.weight")
    take.tensor("output_bias", "tokens_head.bias")

    def layer(target: str, before: str, after: str, attention: str | None) -> None:
        """`before` and `after`: its halves, which are two layers where the stacks are cut; `attention`: its cross-attention."""
        take.norm(f"{target}.attention_norm", f"{before}.input_layernorm")
        take.attention(f"{target}.attention", f"{before}.self_attention.query_key_value", heads)
        take.module(f"{target}.attention.out", f"{before}.self_attention.dense")
        if attention is not None:
            take.norm(f"{target}.cross_norm", f"{before}.post_attention_layernorm")
            take.module(f"{target}.cross.q", f"{after}.{attention}.query")
            take.modules(names_kv(target), f"{after}.{attention}.key_value", heads)
            take.module(f"{target}.cross.out", f"{after}.{attention}.dense")
        ffn_norm = "post_attention_layernorm" if attention is None else "post_inter_attention_layernorm"
        take.norm(f"{target}.ffn_norm", f"{after}.{ffn_norm}")
        take.feed_forward(f"{target}.ffn", f"{after}.mlp", "dense_h_to_4h", "dense_4h_to_h", is_gated=False)

    first = crossing[0]
    for i in range(config.dec_num_layers):
        pre, post = f"pre_decoder.model.layers.{i}", f"post_decoder.model.layers.{i - first}"
        attention = "inter_attention.cross_attention" if i in crossing else None
        layer(f"layers.{i}", pre if i <= first else post, pre if i < first else post, attention)
    for i in range(config.enc_num_layers):
        source = f"encoder.model.layers.{i}"
        layer(f"encoder.layers.{i}", source, source, "inter_attention" if i in config.enc_cross_attention else None)
    take.norm("encoder.final_norm", "encoder.model.final_layernorm")
    take.norm("final_norm", "post_decoder.model.final_layernorm")
    return config, take.done()
