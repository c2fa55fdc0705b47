"""What retrieval gives on one share of a corpus: RETRO on, off and random beside decoders trained without retrieval.

"Own off" flatters (a model that learned to lean on neighbors is bad without them), so the decoder that never had
any is the one to beat. Gains are paired over documents: both models are drawn together.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from retro_engine.config import ModelConfig
from retro_engine.data.batches import Sequences
from retro_engine.evaluate.leakage import ChunkLosses, chunk_losses
from retro_engine.evaluate.losses import DocumentLosses, bootstrap, show_interval
from retro_engine.evaluate.perplexity import evaluate
from retro_engine.model.flops import token_flops
from retro_engine.model.retro import RetroModel


@dataclass
class Comparison:
    """Losses per document and per chunk; the plain decoders are under the names they were given."""

    losses: dict[str, DocumentLosses]
    chunks: ChunkLosses

    def gain(self, name: str) -> dict[str, float]:
        """Share of bits per byte that "on" saves against `name`, with its 95 % interval."""
        return gain_of(self.losses["on"], self.losses[name])

    def summary(self) -> dict[str, Any]:
        return {
            "losses": {name: losses.summary() for name, losses in self.losses.items()},
            "gains": {name: self.gain(name) for name in self.losses if name != "on"},
            "ceiling_realized": self.chunks.realized(),
            "by_overlap": self.chunks.groups(),
            "overlap_curve": self.chunks.curve(),
        }


def gain_of(losses: DocumentLosses, other: DocumentLosses) -> dict[str, float]:
    """Share of bits per byte that one model saves against another on the same documents, with its 95 % interval."""
    a, b = losses.nats, other.nats
    low, high = bootstrap(lambda draw: 1 - a[draw].sum() / b[draw].sum(), len(a))
    return {"gain": float(1 - a.sum() / b.sum()), "low": low, "high": high}


def flops_against(config: ModelConfig, decoder: ModelConfig) -> dict[str, float]:
    """How many times the FLOPs a token of a plain decoder a model takes: training, inference, and kept (encodings) where they
    can be; all neighbors whole, none dropped.
    """
    mine, plain = token_flops(config), token_flops(decoder)
    ratios = {"training": mine["training"] / plain["training"], "inference": mine["inference"] / plain["inference"]}
    return ratios | ({"kept": mine["kept"] / plain["inference"]} if "kept" in mine else {})


def show_flops(ratios: dict[str, float]) -> str:
    """`training 2.22 x, inference 2.22 x, 1.13 x with kept encodings`."""
    kept = f", {ratios['kept']:.2f} x with kept encodings" if "kept" in ratios else ""
    return f"training {ratios['training']:.2f} x, inference {ratios['inference']:.2f} x{kept}"


def show_gain(gain: dict[str, float]) -> str:
    """`12.3% [10.1%, 14.0%]`."""
    return f"{gain['gain']:.1%} {show_interval(gain['low'], gain['high'], '.1%')}"


def compare(
    model: RetroModel,
    sequences: Sequences,
    token_bytes: np.ndarray,
    decoders: dict[str, RetroModel] | None = None,
    limit: int | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Comparison:
    """Evaluate `model` on, off and random, and plain `decoders`, on the same tokens."""
    decoders = decoders or {}
    losses = evaluate(model, sequences, token_bytes, ("on", "off", "random"), limit=limit, advance=advance)
    for name, decoder in decoders.items():
        losses[name] = evaluate(decoder, sequences, token_bytes, ("off",), limit=limit, advance=advance)["off"]
    models = {
        "on": (model, "on"),
        "off": (model, "off"),
        **{name: (decoder, "off") for name, decoder in decoders.items()},
    }
    return Comparison(losses, chunk_losses(models, sequences, token_bytes, limit=limit))
