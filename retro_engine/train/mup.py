"""muP (arXiv 2203.03466) from the outside: base widths, the coordinate check, the learning-rate sweep (docs/mup.md).

The model, its initialization and the optimizer compute muP; here it is asked whether what they compute holds. Writes
coordinates.json and coordinates.png; sweep.json, cells.jsonl (one line a trained model) and sweep.png.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from retro_engine.config import Config, ModelConfig, OptimConfig, check_model, load_config, to_yaml
from retro_engine.data import files
from retro_engine.data.batches import Order
from retro_engine.data.manifests import SWEEP_CELL
from retro_engine.data.store import Store
from retro_engine.errors import GateError, StoreError, UsageError, extra
from retro_engine.evaluate.losses import to_tensors
from retro_engine.model.initialization import width_multipliers
from retro_engine.model.retro import RetroModel
from retro_engine.progress import Reporter
from retro_engine.train import record
from retro_engine.train.optimizer import Optimizer, learning_rate
from retro_engine.train.run_data import RunData, open_data

FLAT, STEEP = 0.1, 0.3  # |slope| at most with muP, somewhere at least without
NUM_TOKENS = 256  # vocabulary of random tokens
# The model that is checked when no preset is named; sequences of four chunks.
SMALL = {
    "model.hidden_size": 64,
    "model.ffn_hidden_size": 256,
    "model.num_attention_heads": 4,
    "model.dec_num_layers": 3,
    "model.enc_num_layers": 2,
    "model.dec_cross_attention": [1, 2],
    "model.enc_cross_attention": [0],
    "model.hidden_dropout": 0.0,
    "model.attention_dropout": 0.0,
    "model.chunk_size": 16,
    "model.encoder_seq_length": 64,
    "model.optim.lr": 1e-3,
    "model.optim.sched.warmup_steps": 10,
}
TensorBatch = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]  # what `evaluate.to_tensors` returns


def open_config(overrides: list[str], preset: str | None, store: str | None) -> Config:
    """The settings of a check or a sweep: SMALL or a preset, chunks as the store's, then the overrides."""
    settings: dict[str, Any] = {} if preset else dict(SMALL)
    if store is not None:
        size = Store(store).chunk_size
        settings |= {"model.data.store": store, "model.chunk_size": size}
        settings |= {} if preset else {"model.encoder_seq_length": 4 * size}
    config = load_config([*settings.items(), *overrides], preset)
    if config.trainer.accelerator == "gpu":
        raise UsageError(
            "trainer.accelerator=gpu cannot be used", "muP is checked on the CPU", "trainer.accelerator=cpu"
        )
    return config


def write_base(m: ModelConfig, path: Path) -> dict[str, int]:
    """Publish the widths of `m` as the YAML that model.shape_file reads."""
    widths = {
        "model.mup_base_hidden_size": m.hidden_size,
        "model.mup_base_ffn_hidden_size": m.ffn_hidden_size,
        "model.mup_base_num_attention_heads": m.num_attention_heads,
    }
    if m.retrieval:
        widths["model.mup_base_encoder_hidden_size"] = m.encoder_width
    files.make_folder(path.parent)
    files.publish(path, ["".join(f"{key}: {value}\n" for key, value in widths.items()).encode()])
    return widths


def at_width(m: ModelConfig, width: int, is_mup: bool, keeps_head_width: bool = False) -> ModelConfig:
    """`m` scaled in proportion to hidden_size=`width`; heads get wider, or more with `keeps_head_width`.

    The base widths are those that `m` gives, else its own. Raises UsageError for a width that makes no model.
    """

    def scaled(value: int | None) -> int | None:
        return None if value is None else value * width // m.hidden_size

    grow: Callable[[int | None], int | None] = scaled if keeps_head_width else lambda value: value
    heads = grow(m.num_attention_heads) or 1
    model = replace(
        m,
        hidden_size=width,
        ffn_hidden_size=m.ffn_hidden_size * width // m.hidden_size,
        encoder_hidden_size=scaled(m.encoder_hidden_size),
        encoder_ffn_hidden_size=scaled(m.encoder_ffn_hidden_size),
        num_attention_heads=heads,
        num_query_groups=grow(m.num_query_groups),
        encoder_num_attention_heads=grow(m.encoder_num_attention_heads),
        mup=is_mup,
        mup_base_hidden_size=m.mup_base_hidden_size or m.hidden_size,
        mup_base_num_attention_heads=m.mup_base_num_attention_heads or m.num_attention_heads,
    )
    check_model(model)
    return model


def coordinate_changes(model: RetroModel, optim: OptimConfig, batch: TensorBatch, steps: int) -> dict[str, list[float]]:
    """Mean |activation - activation at step 0| after each of `steps` steps on one batch at the fixed rate optim.lr.

    Of the logits, the decoder layers, what their self-attention and CCA add, and the encoder.
    """
    optimizer = Optimizer(model, optim, width_multipliers(model))
    tokens, labels, documents, neighbors, lengths = batch
    first: dict[str, Tensor] = {}
    changes: dict[str, list[float]] = {}
    for step in range(steps + 1):
        with torch.no_grad(), _recorded(model) as seen:
            seen["logits"] = model(tokens, neighbors, lengths, documents)
        first = first or seen
        for name, value in seen.items():
            changes.setdefault(name, []).append(float((value - first[name]).abs().mean()))
        if step < steps:
            _train_step(model, optimizer, batch, optim.lr)
    return {name: values[1:] for name, values in changes.items()}


@contextmanager
def _recorded(model: RetroModel) -> Iterator[dict[str, Tensor]]:
    """What the parts of the model output in a forward pass, by name."""
    seen: dict[str, Tensor] = {}
    parts: dict[str, nn.Module] = {}
    for index, layer in enumerate(model.layers):
        parts |= {f"layer {index}": layer, f"attention {index}": layer.attention.out}
        if layer.is_crossing:
            parts[f"cca {index}"] = layer.cross.out
    if model.encoder is not None:
        parts["encoder"] = model.encoder

    def record(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _module, _inputs, output: seen.update({name: output})

    handles = [part.register_forward_hook(record(name)) for name, part in parts.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _train_step(model: RetroModel, optimizer: Optimizer, batch: TensorBatch, rate: float) -> float:
    """One step; the loss, not finite where the step was not taken."""
    tokens, labels, documents, neighbors, lengths = batch
    optimizer.zero_grad()
    loss = model(tokens, neighbors, lengths, documents, labels) / max(1, int((labels >= 0).sum()))
    loss.backward()
    value, norm = float(loss.detach()), optimizer.norm()
    if not (math.isfinite(value) and math.isfinite(norm)):
        return math.nan
    optimizer.step(rate, norm)
    return value


def random_batch(m: ModelConfig, size: int, seed: int) -> TensorBatch:
    """Tokens and neighbors with the frequencies of words (Zipf's law, exponent 1).

    Of uniform random tokens nothing but noise could be learned, and noise shrinks with the width.
    """
    generator = torch.Generator().manual_seed(seed)
    frequency = 1 / torch.arange(1, m.vocab_size + 1)

    def draw(*shape: int) -> Tensor:
        return torch.multinomial(frequency, math.prod(shape), replacement=True, generator=generator).reshape(shape)

    N, L = m.encoder_seq_length, m.encoder_seq_length // m.chunk_size
    tokens = draw(size, N + 1)
    neighbors = draw(size, L, m.num_neighbors, m.r) if m.retrieval else None
    return tokens[:, :-1], tokens[:, 1:], None, neighbors, None


def slope(changes: dict[int, list[float]]) -> float:
    """Of the mean over seeds of log change against log width, by least squares; NaN where a change is 0 or not finite."""
    logs = [np.mean([math.log(x) if 0 < x < math.inf else math.nan for x in values]) for values in changes.values()]
    return float(np.polyfit(np.log(list(changes)), logs, 1)[0]) if np.isfinite(logs).all() else math.nan


@dataclass
class CoordinateCheck:
    """Changes at the last step by place, width and seed, with muP and without."""

    with_mup: dict[str, dict[int, list[float]]]
    without: dict[str, dict[int, list[float]]]

    def slopes(self, is_mup: bool) -> dict[str, float]:
        return {name: slope(widths) for name, widths in (self.with_mup if is_mup else self.without).items()}

    def table(self) -> str:
        widths = list(next(iter(self.with_mup.values())))
        head = "".join(f"{width:>10}" for width in widths)
        lines = [f"{'mean |change|, muP':20}{head}{'slope':>9}{'without':>9}"]
        slopes, others = self.slopes(True), self.slopes(False)
        for name, by_width in self.with_mup.items():
            cells = "".join(f"{np.mean(values):>10.2e}" for values in by_width.values())
            lines.append(f"{name:20}{cells}{slopes[name]:>9.3f}{others[name]:>9.3f}")
        return "\n".join(lines)

    def gate(self) -> None:
        """Raises GateError where muP is not flat, or where the check would not have shown it."""
        steep = {name: round(value, 3) for name, value in self.slopes(True).items() if not abs(value) <= FLAT}
        if steep:
            raise GateError(
                f"with muP activations change with the width: {steep}",
                f"|slope| of log change against log width must be at most {FLAT} everywhere",
                "lower model.optim.lr, raise --seeds or the widths; docs/mup.md says what makes a slope",
            )
        if not any(value >= STEEP for value in self.slopes(False).values()):
            raise GateError(
                f"without muP no slope reaches {STEEP}, so that flat slopes mean nothing", "", "raise --steps or lr"
            )


def coordinate_check(
    config: Config, widths: Sequence[int], steps: int, seeds: int, keeps_head_width: bool, reporter: Reporter
) -> CoordinateCheck:
    """Train models of each width with muP and without, on random tokens or on the store of `config`; no dropout."""
    m = replace(config.model, hidden_dropout=0.0, attention_dropout=0.0, ffn_dropout=0.0)
    data = open_data(config) if m.data.store is not None else None
    m.vocab_size = data.store.vocab_size if data is not None else m.vocab_size or NUM_TOKENS
    optim = replace(m.optim, clip=None)  # a clipped norm would not change Adam's steps but for its epsilon
    found: dict[bool, dict[str, dict[int, list[float]]]] = {True: {}, False: {}}
    models = {(on, width): at_width(m, width, on, keeps_head_width) for on in found for width in widths}
    with reporter.progress("training", len(models) * seeds, "models") as meter:
        for (is_mup, width), model_config in models.items():
            for seed in range(config.seed, config.seed + seeds):
                size = m.micro_batch_size
                batch = random_batch(m, size, seed) if data is None else _batch(config, data, 0, seed)
                model = RetroModel(model_config, torch.Generator().manual_seed(seed))
                for name, values in coordinate_changes(model, optim, batch, steps).items():
                    found[is_mup].setdefault(name, {}).setdefault(width, []).append(values[-1])
                meter.advance(1)
    return CoordinateCheck(found[True], found[False])


def save_check(check: CoordinateCheck, config: Config, steps: int, out: Path) -> None:
    """coordinates.json and coordinates.png in `out`."""
    modes = {"mup": (check.with_mup, check.slopes(True)), "standard": (check.without, check.slopes(False))}
    known = {mode: {name: s if math.isfinite(s) else None for name, s in slopes.items()} for mode, (_, slopes) in modes.items()}  # fmt: skip
    facts = {
        "steps": steps,
        "slopes": known,
        "changes": {mode: changes for mode, (changes, _) in modes.items()},
        "settings": to_yaml(config),
    }
    files.make_folder(out)
    files.publish(out / "coordinates.json", [files.json_bytes(facts)])
    ylabel = f"mean |activation change| after {steps} steps"
    with _figure(out / "coordinates.png", "width", ylabel, fontsize=7) as axes:
        for axis, (changes, _) in zip(axes, modes.values()):
            for name, by_width in changes.items():
                axis.loglog(list(by_width), [np.mean(values) for values in by_width.values()], marker="o", label=name)


@contextmanager
def _figure(path: Path, xlabel: str, ylabel: str, fontsize: int | None = None) -> Iterator[Any]:
    """Two plots beside each other: with muP, and without."""
    with extra("train", "matplotlib is not installed", "the plot needs it"):
        import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.5), sharey=True, layout="constrained")
    yield axes
    for axis, title in zip(axes, ("muP", "without")):
        axis.set_title(title)
        axis.set_xlabel(xlabel)
    axes[0].set_ylabel(ylabel)
    axes[1].legend(fontsize=fontsize)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _batch(config: Config, data: RunData, step: int, seed: int) -> TensorBatch:
    m = config.model
    size, mode = m.global_batch_size or m.micro_batch_size, "on" if m.retrieval else "off"
    return to_tensors(data.train.training_batch(step, size, Order(seed), mode), torch.device("cpu"))


Cell = tuple[bool, int, float, int]  # with muP, width, learning rate, seed


@dataclass
class Sweep:
    """Final losses of trained models, of this call and of those before it in the same folder."""

    losses: dict[Cell, float]

    def curve(self, is_mup: bool, width: int) -> dict[float, float]:
        """Mean loss by rate, of the rates that have been trained with the most seeds."""
        rates: dict[float, list[float]] = {}
        for (on, of, rate, _), loss in sorted(self.losses.items()):
            if (on, of) == (is_mup, width):
                rates.setdefault(rate, []).append(loss)
        most = max((len(values) for values in rates.values()), default=0)
        return {rate: float(np.mean(values)) for rate, values in rates.items() if len(values) == most}

    def widths(self, is_mup: bool) -> list[int]:
        return sorted({width for on, width, _, _ in self.losses if on == is_mup})

    def best(self, is_mup: bool) -> dict[int, float]:
        """The rate with the lowest loss, by width; a width of which every model diverged is left out."""
        best = {}
        for width in self.widths(is_mup):
            finite = {rate: loss for rate, loss in self.curve(is_mup, width).items() if math.isfinite(loss)}
            if finite:
                best[width] = min(finite, key=lambda rate: finite[rate])
        return best

    def moved(self, is_mup: bool) -> float | None:
        """How many factors of 2 the best rate moved from the smallest width to the largest; None = unknown."""
        best = list(self.best(is_mup).values())
        return math.log2(best[-1] / best[0]) if len(best) > 1 else None

    def summary(self) -> dict[str, Any]:
        return {
            name: {"best_rate": self.best(is_mup), "moved_factors_of_2": self.moved(is_mup)}
            for name, is_mup in (("mup", True), ("standard", False))
        }

    def table(self) -> str:
        lines = []
        for is_mup in (True, False):
            curves, best = {width: self.curve(is_mup, width) for width in self.widths(is_mup)}, self.best(is_mup)
            rates = sorted({rate for curve in curves.values() for rate in curve})
            lines.append(f"{'with muP' if is_mup else 'without':10}" + "".join(f"{rate:>9.2g}" for rate in rates))
            for width, curve in curves.items():
                cells = "".join(f"{curve[rate]:>9.4f}" if rate in curve else f"{'-':>9}" for rate in rates)
                is_edge = best.get(width) in (rates[0], rates[-1])
                note = (
                    f"{best[width]:.2g}" + (" (at the edge of the grid)" if is_edge else "") if width in best else "-"
                )
                lines.append(f"width {width:<4}{cells}  best {note}")
            moved = self.moved(is_mup)
            lines.append("  the best rate moved " + ("?" if moved is None else f"{moved:+.1f} factors of 2"))
        return "\n".join(lines)


def sweep(
    config: Config,
    widths: Sequence[int],
    rates: Sequence[float],
    seeds: int,
    steps: int,
    out: Path,
    keeps_head_width: bool,
    reporter: Reporter,
) -> Sweep:
    """Train a model for each width, rate and seed with muP and without; cells of `out` that are done are kept.

    Raises UsageError where `out` holds the cells of other settings, data or steps.
    """
    m = config.model
    if m.optim.sched.warmup_steps >= steps:
        key = "model.optim.sched.warmup_steps"
        raise UsageError(
            f"{key}={m.optim.sched.warmup_steps} with --steps {steps}", "the rate is never reached", f"{key}=10"
        )
    floor = m.optim.sched.min_lr
    if min(rates) < floor and m.optim.sched.name != "constant":
        key = "model.optim.sched.min_lr"
        raise UsageError(f"--rates {min(rates):g} cannot be used", f"it is below {key}={floor:g}", f"{key}=0")
    data = open_data(config)
    m.vocab_size = data.store.vocab_size
    modes = (True, False)
    models = {(on, width): at_width(m, width, on, keeps_head_width) for on in modes for width in widths}
    cells = [
        (on, width, rate, seed)
        for seed in range(config.seed, config.seed + seeds)
        for (on, width) in models
        for rate in rates
    ]
    with files.locked(out):
        _keep_facts(out, {"steps": steps, "keeps_head_width": keeps_head_width, **data.fingerprints}, config)
        losses = _read_cells(out / "cells.jsonl")
        with (
            open(out / "cells.jsonl", "a") as file,
            reporter.progress("sweeping", len(cells), "models") as meter,
        ):
            for cell in cells:
                if cell not in losses:
                    losses[cell] = _train_cell(config, data, models[cell[:2]], rate=cell[2], seed=cell[3], steps=steps)
                    row = dict(zip(("mup", "width", "rate", "seed"), cell))
                    loss = losses[cell] if math.isfinite(losses[cell]) else None
                    file.write(record.checked_line({**row, "loss": loss}))
                    file.flush()
                meter.advance(1)
        result = Sweep(losses)
        _plot_sweep(result, out / "sweep.png")
    return result


def _train_cell(config: Config, data: RunData, model_config: ModelConfig, rate: float, seed: int, steps: int) -> float:
    """Mean training loss of the last tenth of the steps; NaN when it diverged."""
    model = RetroModel(model_config, torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)  # of dropout
    optim = replace(config.model.optim, lr=rate)
    optimizer = Optimizer(model, optim, width_multipliers(model))
    losses: list[float] = []
    for step in range(steps):
        batch = _batch(config, data, step, seed)
        losses.append(_train_step(model, optimizer, batch, learning_rate(optim, step, steps)))
        if not math.isfinite(losses[-1]):
            return math.nan
    return float(np.mean(losses[-max(1, steps // 10) :]))


def _keep_facts(out: Path, facts: dict[str, Any], config: Config) -> None:
    """sweep.json says what the cells beside it are of."""
    facts = {**facts, "settings": to_yaml(config)}
    path = out / "sweep.json"
    if not path.exists():
        files.publish(path, [files.json_bytes(facts)])
        return
    before = files.read_object(path, "choose another --out")
    keys = [key for key in facts if before.get(key) != facts[key]]
    if keys:
        raise UsageError(
            f"{out} holds a sweep with other {', '.join(keys)}",
            "its cells could not be compared with the new ones",
            "choose another --out",
        )


def _read_cells(path: Path) -> dict[Cell, float]:
    """The cells that are done; a line that a kill cut short is dropped."""
    if not path.exists():
        return {}
    found = list(record.checked_lines(path))
    for _, row in found:
        try:
            SWEEP_CELL(row, "a cell")
        except ValueError as error:
            raise StoreError(f"{path} is not what a sweep wrote", str(error), "choose another --out") from error
    files.publish(path, ["".join(line for line, _ in found).encode()], is_read_only=False)
    return {
        (row["mup"], row["width"], row["rate"], row["seed"]): math.nan if row["loss"] is None else row["loss"]
        for _, row in found
    }


def _plot_sweep(result: Sweep, path: Path) -> None:
    with _figure(path, "learning rate", "training loss") as axes:
        for axis, is_mup in zip(axes, (True, False)):
            for width in result.widths(is_mup):
                curve = result.curve(is_mup, width)
                axis.plot(list(curve), list(curve.values()), marker="o", label=f"width {width}")
            axis.set_xscale("log", base=2)
