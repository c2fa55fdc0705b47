"""Training that begins from another checkpoint: what of its model is inherited, its weights, and which of them learn.

From a plain decoder a RETRO is made (arXiv 2112.04426 section 4.2): encoder and chunked cross-attention are new, and the
output of the latter is 0, so that step 0 computes exactly what the decoder computes; or one that reads neighbors in front
of its own keys (model.reading=prefix), with no part that is new. From a RETRO all of it is taken.
"""

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path

import torch

from retro_engine.config import Config, ModelConfig, TrainedModelConfig, check
from retro_engine.data.batches import Order, Stream
from retro_engine.data.store import Store
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import StoreError, UsageError
from retro_engine.evaluate.losses import to_tensors
from retro_engine.model.fit import fit_cross_attention, unmet
from retro_engine.model.lora import is_adapter
from retro_engine.model.retro import RetroModel
from retro_engine.model.weights import load_state, read_config
from retro_engine.train import checkpoint
from retro_engine.train.adapters import read_weights

FIT_TOKENS = 16_384  # that fit_cross_attention reads
FREE = ("encoder_seq_length", "num_neighbors", "retrieved_length", "hidden_dropout", "attention_dropout", "ffn_dropout")
DROPOUTS = FREE[3:]  # a decoder that was trained without is hurt by NeMo's default of 0.1
NEW_PARTS = (  # fields of what a plain decoder does not have
    "retrieval", "chunk_size", "enc_num_layers", "dec_cross_attention", "enc_cross_attention", "encoder_hidden_size",
    "encoder_num_attention_heads", "encoder_ffn_hidden_size", "encoder_position_embedding", "cca_position_embedding",
    "cca_query_offset", "partial_chunk", "mask_neighbors", "reset_attention", "cca_reset", "cca_bias_everywhere",
    "encoder_ca_residual", "encoder_final_norm", "eod_id", "pad_id", "init_method_std", "reading", "sink_id",
)  # fmt: skip
NEW_PREFIXES = ("encoder.", "encoder_input.", "neighbor_projection.")


def is_new(name: str) -> bool:
    """Whether a parameter belongs to the encoder or to chunked cross-attention."""
    return name.startswith(NEW_PREFIXES) or ".cross." in name or ".cross_norm." in name


def inherit(config: Config) -> Path | None:
    """Complete `config` with what model.init_from's weights fix, and check it; the checkpoint, or None without one.

    Raises UsageError for a setting that says otherwise.
    """
    m = config.model
    if m.init_from is None:
        return None
    source = checkpoint.find_checkpoint(m.init_from)
    theirs, default = read_config(source), ModelConfig()
    may_differ = FREE if theirs.retrieval else FREE + NEW_PARTS
    for item in fields(ModelConfig):
        name, mine = item.name, getattr(m, item.name)
        value = theirs.input_scale if name == "embedding_scale" else getattr(theirs, name)
        if name in may_differ:
            if (name in DROPOUTS or (name in FREE and theirs.retrieval)) and mine == getattr(default, name):
                setattr(m, name, value)
            continue
        if name == "init":
            if not theirs.retrieval and mine != "standard":
                raise UsageError(
                    f"model.init={mine} cannot be used",
                    f"{source} has its weights",
                    "model.fit_cross_attention=true builds the circuit around them",
                )
            value = "standard" if not theirs.retrieval else value
        elif name == "qk_bias":
            value = theirs.has_qk_bias
        if mine not in (getattr(default, name), getattr(theirs, name), value):
            raise UsageError(
                f"model.{name}={mine} does not fit",
                f"{source} has {value}",
                f"leave model.{name} out, or model.{name}={value}",
            )
        setattr(m, name, value)
    _settle_fit(m, source, theirs.retrieval)
    if not theirs.retrieval and m.reads_prefix and m.sink_id is None:
        m.sink_id = Tokenizer.load(source).sink_id
    if not theirs.retrieval and m.cross_layers:
        if m.dec_cross_attention == default.dec_cross_attention:
            m.dec_cross_attention = crossing_layers(m.dec_num_layers)
        m.freeze_decoder = m.freeze_decoder or m.lora.rank > 0  # what is new learns whole, beside adapters
    check(config)
    return source


def _settle_fit(m: TrainedModelConfig, source: Path, is_retro: bool) -> None:
    """Decide model.fit_cross_attention where nothing is said; with it cross-attention has no positions."""
    rule = "the weights are a plain decoder's, to be retro-fitted" if is_retro or not m.retrieval else None
    rule = "model.reading=prefix has no cross-attention" if m.reads_prefix else rule
    rule = rule or unmet(replace(m, cca_position_embedding="none"))
    if m.fit_cross_attention and rule is not None:
        raise UsageError("model.fit_cross_attention=true cannot be used", f"with {source}: {rule}", "change that")
    if m.fit_cross_attention is None:
        m.fit_cross_attention = rule is None
    if m.fit_cross_attention:
        m.cca_position_embedding = "none"


def crossing_layers(layers: int) -> list[int]:
    """Every third layer from the 6th on, or from the 9th of more than 15 (InstructRetro's choice); at least the last."""
    first = 8 if layers > 15 else 5
    return list(range(first, layers, 3)) or [layers - 1]


def check_tokenizer(source: Path, store: Store) -> None:
    """Raise StoreError where the checkpoint's token ids are not the store's."""
    theirs = Tokenizer.load(source)
    if theirs.fingerprint != store.manifest["tokenizer"]:
        raise StoreError(
            f"{source} has tokenizer {theirs.fingerprint[:12]}",
            f"{store.folder} has {store.manifest['tokenizer'][:12]}",
            f"retro prepare --tokenizer {source}",
        )


def load_initial(source: Path, model: RetroModel) -> None:
    """Copy the checkpoint's weights; adapters and what a plain decoder does not have stay as initialised, the output of
    the latter set to 0.

    Raises StoreError listing tensors that do not fit.
    """
    checkpoint.verify(source)
    state, dtype, is_retro = read_weights(source), model.dtype, read_config(source).retrieval
    for name, value in model.state_dict().items():
        if is_adapter(name) or is_new(name) and not is_retro:
            state[name] = value
    load_state(model, {name: value.to(dtype) for name, value in state.items()}, str(source))
    if is_retro:
        return
    with torch.no_grad():
        for layer in model.layers:
            if layer.is_crossing:
                for parameter in layer.cross.out.parameters():
                    parameter.zero_()


def fit(model: RetroModel, config: TrainedModelConfig, stream: Stream, seed: int) -> int:
    """Fit cross-attention to the first sequences of the training data, the same in every process; how many."""
    size = max(1, min(config.micro_batch_size, FIT_TOKENS // config.encoder_seq_length))
    count = max(1, FIT_TOKENS // (size * config.encoder_seq_length))
    device = model.device

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for number in range(count):
            batch = stream.training_batch(number, size, Order(seed), "off")
            tokens, _, documents, _, _ = to_tensors(batch, device)
            yield tokens, documents

    fit_cross_attention(model.eval(), batches())
    return count * size


def learning(config: TrainedModelConfig, step: int) -> Callable[[str], bool]:
    """Which parameters learn at this step, by name: a function of the settings and the step alone."""
    if config.lora.rank:
        return lambda name: is_adapter(name) or config.freeze_decoder and is_new(name)
    start, layers = config.unfreeze_step, config.dec_num_layers
    is_open = start is not None and step >= start
    opened = layers + 1 if is_open else 0  # the last layers that learn; one more = embedding, head and final norm too
    if is_open and config.unfreeze_every is not None:
        assert start is not None
        opened = 1 + (step - start) // config.unfreeze_every

    def learns(name: str) -> bool:
        layer = int(name.split(".")[1]) if name.startswith("layers.") else -1
        return not config.freeze_decoder or is_new(name) or layer >= layers - opened

    return learns


def set_trainable(model: RetroModel, config: TrainedModelConfig, step: int) -> None:
    """No gradients for what does not learn at this step."""
    learns = learning(config, step)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learns(name))
