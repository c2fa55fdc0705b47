"""The training loop: one process or many, any device.

Reads a store and its neighbor table; writes a run's folder. Each step is a function of (settings, step number,
state of the last checkpoint), so a run that is stopped anywhere goes on as the same run: losses are
bit-identical on the same machine with the same threads. Letters: B sequences, N tokens, K neighbors.
"""

import contextlib
import itertools
import math
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retro_engine.config import Config, flat_keys, to_yaml
from retro_engine.data import files
from retro_engine.data.batches import SequenceBatch, Stream
from retro_engine.data.chat_files import read_chat_files
from retro_engine.data.loader import has_native_loader
from retro_engine.errors import GateError, RetroError, UsageError
from retro_engine.evaluate.losses import autocast, reads_of, to_tensors
from retro_engine.evaluate.perplexity import evaluate
from retro_engine.model import ops
from retro_engine.model.device import describe_device
from retro_engine.model.flops import peak_flops
from retro_engine.model.initialization import width_multipliers
from retro_engine.model.lora import add_adapters
from retro_engine.model.memory import keep_freed_memory, trim
from retro_engine.model.retro import RetroModel
from retro_engine.progress import Meter, Reporter
from retro_engine.train import checkpoint, retrofit
from retro_engine.train.adapters import resume_weights
from retro_engine.train.describe import describe, kernels_in_use
from retro_engine.train.device_table import DeviceTable, gathers_on_device
from retro_engine.train.logging import RunLog, StepResult, Window, peak_mib
from retro_engine.train.optimizer import Optimizer, learning_rate
from retro_engine.train.parallel import Parallel, micro_batches, sequences_per_step
from retro_engine.train.precision import Precision, asked_precision, faster_precision
from retro_engine.train.profiling import StepProfiler, named
from retro_engine.train.resume import changes, find_start, read_start
from retro_engine.train.run_data import (
    RunData,
    open_data,
    order_of,
    steps_of_data,
    stream_settings,
    validation_mark,
)
from retro_engine.train.signals import Signals, StoppedError
from retro_engine.train.watch import Watch

OUT_OF_TIME = 1  # beside the numbers of signals
SAMPLING = ("greedy", "temperature", "top_k", "top_p")  # of `inference`, that a checkpoint keeps


@dataclass
class TrainingResult:
    """Where the run is, how far it came, and its last measurements."""

    run: Path
    checkpoint: Path
    step: int
    metrics: dict[str, Any]
    exit_code: int = 0  # 130 / 143: stopped by a signal, checkpoint saved


def train(config: Config, reporter: Reporter | None = None, resume: str = "auto") -> TrainingResult:
    """Train as `config` says. `resume`: auto (go on where the run's folder is), never, or a checkpoint's path.

    Raises a RetroError before the first step for anything in the settings or data that cannot work.
    """
    reporter = reporter or Reporter()
    _refuse_unread(config)
    if config.exp_manager.exp_dir is None:
        raise UsageError("exp_manager.exp_dir is not set", "a run needs a folder", "--out runs/NAME")
    run = Path(config.exp_manager.exp_dir)
    if (run / checkpoint.COMPLETE).is_file():  # the run in it would never be found
        why, do = "a run's folder holds checkpoints, and is none", f"another --out; --init-from {run} has its weights"
        raise UsageError(f"{run} is a checkpoint", why, do)
    source = retrofit.inherit(config)
    parallel = Parallel(config)
    try:
        data = open_data(config, (reporter if parallel.is_main else Reporter("quiet")).say)
        if source is not None:
            retrofit.check_tokenizer(source, data.store)
        config.model.vocab_size = config.model.vocab_size or data.store.vocab_size
        keep_freed_memory(parallel.device)
        with files.locked(run) if parallel.is_main else contextlib.nullcontext():
            return _Training(config, data, run, reporter, resume, parallel=parallel, source=source).run_all()
    finally:
        parallel.close()
        trim()


def _refuse_unread(config: Config) -> None:
    """Raise UsageError for a setting of generation that a checkpoint does not keep."""
    defaults, now = flat_keys(Config()), flat_keys(config)
    generation = [key for key in now if key.startswith("inference.") and key.split(".")[1] not in SAMPLING]
    for key in (*generation, "checkpoint_dir", "checkpoint_name", "prompt", "neighbors"):
        if now[key] != defaults[key]:
            raise UsageError(f"{key}={now[key]} cannot be used", "training does not read it", "retro generate does")


class _Training:
    """One run: the state that the steps share."""

    def __init__(
        self,
        config: Config,
        data: RunData,
        run: Path,
        reporter: Reporter,
        resume: str,
        parallel: Parallel,
        source: Path | None,
    ):
        self.config, self.data, self.run, self.parallel = config, data, run, parallel
        self.reporter = reporter if parallel.is_main else Reporter("quiet")
        m, keep, self.device = config.model, config.exp_manager, parallel.device
        self.order, self.accumulate = order_of(config), micro_batches(config, parallel.data)
        self.last_step = min(config.trainer.max_steps, steps_of_data(config, data) or config.trainer.max_steps)
        self.validates_every, self.valid_batches = self._validation()
        self._agree()
        base: checkpoint.Base | None = None
        if m.lora.rank and source is not None:
            base = checkpoint.Base(folder=source, fingerprint=checkpoint.weights_fingerprint(source), lora=m.lora)
        start = parallel.from_main(find_start(config, run, resume, base, self.note) if parallel.is_main else None)
        torch.manual_seed(config.seed)
        self.model = RetroModel(m)
        learns = retrofit.learning(m, 0)
        if base is not None:
            add_adapters(self.model, m.lora, learns, config.seed)
        widths = width_multipliers(self.model)
        self.step, self.tokens_seen, self.train_s, self.skipped = 0, 0, 0.0, 0
        self.is_finished = False  # before anything was done
        self.mean_loss: float | None = None
        self.validated: tuple[int, float | None] = -1, None  # the last step that was, and its loss
        self.validated_on = validation_mark(config, data, self.valid_batches)
        best = checkpoint.best_loss(run, self.validated_on) if parallel.is_main and keep.keep_best else math.inf
        self.watch, self.best_step = Watch(parallel.from_main(best)), -1
        before = self._load(start, source)
        self.precision = self._settle_precision(before.get("precision"))
        self.products = self._settle_products(before.get("products"))
        self.module = self._spread()
        steps = config.trainer.profile_steps
        self.profiler = StepProfiler(run, steps, rank=parallel.rank, device=self.device, say=reporter.say)
        is_scaled = self.precision.is_scaled
        only = None if base is None else learns  # without adapters what is frozen may learn later
        self.optimizer = Optimizer(self.model, m.optim, widths, self.precision.has_master, is_scaled, learns=only)
        torch.manual_seed(config.seed + parallel.data_rank)  # processes that share matrices drop the same features
        if start is not None:
            checkpoint.load_optimizer(start, self.optimizer, parallel)
            if is_scaled and before["precision"] == self.precision.name:
                self.optimizer.scale = before["loss_scale"] or self.optimizer.scale
                self.optimizer.good_steps = before["good_steps"]
        self.saver = checkpoint.Saver(run, parallel, keep.keep_last_n, keep.keep_best, self.note, base=base)
        self.table: DeviceTable | None = None
        if data.train.table is not None and gathers_on_device(self.device):
            self.table = DeviceTable(data.train.table.databases, self.device)
            data.train.gathers_neighbors = False
        self.metrics: dict[str, Any] = {}
        if config.trainer.compile:
            self.model.packs_neighbors = False  # a graph has fixed shapes
            self.model.hidden = torch.compile(  # type: ignore[method-assign]
                self.model.hidden, fullgraph=parallel.world == 1 and m.activations_checkpoint_granularity is None
            )

    def _agree(self) -> None:
        valid = self.data.valid and (self.data.valid.store.fingerprint, len(self.data.valid.documents))
        order = stream_settings(self.config)
        self.parallel.agree(
            {"data": self.data.fingerprints, "validation data": valid, "order of the data": order,
             "number of steps": self.last_step, "settings": to_yaml(self.config)}
        )  # fmt: skip

    def _load(self, start: Path | None, source: Path | None) -> dict[str, Any]:
        """The weights that the run begins with; trainer.json of the checkpoint that it goes on from, {} in a new run."""
        before: dict[str, Any] = {}
        if start is not None:
            flaw: RetroError | None = None
            try:  # by all, each a share: one process alone would keep the others waiting
                checkpoint.verify(start, part=(self.parallel.rank, self.parallel.world))
            except RetroError as error:
                flaw = error
            self.parallel.joined({}, flaw)
            before = read_start(start, self.config, self.data)
            self.step, self.tokens_seen, self.train_s = before["step"], before["tokens_seen"], before["train_s"]
            self.mean_loss = before["mean_loss"]
            resume_weights(start, self.model)
            saved = checkpoint.folder_of(self.run, self.step) / checkpoint.COMPLETE
            self.is_finished = self.step >= self.last_step and self.parallel.from_main(saved.is_file())
            if not self.is_finished:
                self.reporter.say(f"resuming at step {self.step} from {start}")
                for change in changes(start, self.config):
                    self.note(f"from step {self.step + 1} on {change}")
        elif source is not None:
            retrofit.load_initial(source, self.model)
            self.reporter.say(f"weights of {source}")
            if self.config.model.fit_cross_attention:
                begin = time.perf_counter()
                assert isinstance(self.data.train, Stream), "a blend is refused"
                count = retrofit.fit(self.model.to(self.device), self.config.model, self.data.train, self.config.seed)
                seconds = time.perf_counter() - begin
                self.reporter.say(f"cross-attention fitted to {count:,} sequences in {seconds:.0f} s")
        if origin := start or source:  # a chat model stays one
            self.data.store.tokenizer.chat_files = read_chat_files(origin)
        return before

    def _settle_precision(self, before: str | None) -> Precision:
        """What is asked for; with auto what a resumed run had `before`, else what is faster here."""
        asked = asked_precision(self.config)
        if before is not None and asked not in (None, before) and not self.is_finished:
            self.note(f"trainer.precision={asked} from step {self.step + 1} on; before it was {before}")
        with torch.random.fork_rng(devices=[]):
            name = self.parallel.from_main(asked or before or faster_precision(self.config, self.device))
        return Precision(name=name, is_o2=self.config.model.megatron_amp_O2, strategy=self.parallel.strategy)

    def _settle_products(self, before: str | None) -> str:
        """The library of the fp32 products: what RETRO_PRODUCTS says, else what a resumed run had `before`, else what is
        faster where the first process is; the same in all.
        """
        forced = os.environ.get("RETRO_PRODUCTS")
        if before is not None and forced not in (None, before) and not self.is_finished:
            self.note(f"fp32 products by {forced} from step {self.step + 1} on; before it was {before}")
        name = self.parallel.from_main(forced or before or ops.product_library())
        ops.use_products(name)
        return name

    def _spread(self) -> torch.nn.Module:
        """The model on its device and over the processes; the module to call."""
        m = self.config.model
        self.model.set_recompute(m.activations_checkpoint_granularity)
        self.model.to(self.device, self.precision.weights)
        # groups of processes settle at the start which gradients they exchange: all, if more will learn later
        self.drops_gradients = m.unfreeze_step is not None and self.parallel.data > 1
        if not self.drops_gradients:
            retrofit.set_trainable(self.model, m, self.step)
        finds_unused = m.retrieval and m.data.neighbor_dropout > 0
        return self.parallel.spread(self.model, m.megatron_amp_O2, finds_unused)

    def _validation(self) -> tuple[int, int | None]:
        """Steps between two validations, and batches of one; shares are of an epoch, and of the validation data."""
        config, trainer = self.config, self.config.trainer
        every, limit = trainer.val_check_interval, trainer.limit_val_batches
        if isinstance(every, float):
            epoch = self.data.train.epoch_length(self.order, 0) // sequences_per_step(config)
            every = max(1, int(every * epoch))
        if isinstance(limit, float) and self.data.valid is not None:
            count = len(self.data.valid.batch_rows(config.model.micro_batch_size))
            limit = max(1, int(limit * count)) if limit else 0
        return every, None if limit is None else int(limit)

    def note(self, text: str) -> None:
        self.reporter.say(f"note: {text}")

    def run_all(self) -> TrainingResult:
        if self.is_finished:
            return self._finished_before()
        peak_flops(self.device, self.precision.products)  # measured before anything else runs
        self._announce()
        is_main, fingerprints = self.parallel.is_main, self.data.fingerprints
        log = RunLog(
            self.run, self.config, fingerprints=fingerprints, step=self.step, reporter=self.reporter, is_main=is_main
        )
        self.model.train()
        try:
            with (
                Signals(self.reporter.say_now) as signals,
                self._prefetched() as batches,
                self.reporter.progress("training", self.last_step, "steps", self.step) as meter,
            ):
                stopped = self._run_steps(log, signals, batches, meter)
                self.profiler.end(self.step)
                self.saver.wait()
        finally:
            log.close()
        if code := 128 + stopped if stopped > OUT_OF_TIME else 0:
            saved = "checkpoint saved: the same command goes on"
            self.reporter.say(f"stopped by signal {stopped} at step {self.step}, {saved}")
        return TrainingResult(self.run, checkpoint.folder_of(self.run, self.step), self.step, self.metrics, code)

    def _announce(self) -> None:
        m, steps = self.config.model, self.config.trainer.max_steps
        self.reporter.say(describe(self.config, self.data))
        counts = [(p.numel(), p.requires_grad) for p in self.model.parameters()]
        if not all(learns for _, learns in counts):
            self.reporter.say(f"{sum(count for count, learns in counts if learns):,} of them learn")
        if self.data.warning is not None:
            self.reporter.say(self.data.warning)
        if self.last_step < steps:
            left = (self.data.train.num_sequences(self.order) or 0) % sequences_per_step(self.config)
            rest = f"; the last {left:,} sequences fill no step and are not read" if left else ""
            self.note(
                f"the data gives {self.last_step:,} of trainer.max_steps={steps:,} steps: single reads it once{rest}"
            )
        kernels = kernels_in_use(m, self.device.type, self.precision.name)
        self.reporter.say(
            f"{describe_device(self.device)} in {self.precision.name}, kernels: {kernels}, "
            f"loader: {'C++' if has_native_loader() else 'NumPy (no compiler at installation)'}, {torch.get_num_threads()} threads"
        )

    def _run_steps(self, log: RunLog, signals: Signals, batches: Iterator[list[SequenceBatch]], meter: Meter) -> int:
        """The steps from here to the last, logged, validated and saved; what stopped them before (`_stop_code`)."""
        trainer, manager = self.config.trainer, self.config.exp_manager
        saved_step, stopped, window = -1, 0, Window()
        while self.step < self.last_step and not (stopped := self._stop_code(signals)):
            start = time.perf_counter()
            step_batches = next(batches)
            waited = time.perf_counter() - start
            with self.profiler.step(self.step + 1):
                result = self._train_step(step_batches)
            elapsed = time.perf_counter() - start
            self.train_s += elapsed
            self.step += 1
            self.tokens_seen += result.tokens
            window.add(result, elapsed, waited, self.config.model, step_batches)
            meter.figures = partial(self._figures, window)
            meter.advance(1)
            if self.step % trainer.log_every_n_steps == 0:
                window = self._log(log, window)
            if self.step % self.validates_every == 0 or self.step == self.last_step:
                with contextlib.suppress(StoppedError):
                    self._validate(log, signals, result.loss)
            if self.step % manager.checkpoint_every_n_steps == 0 or self.best_step == self.step:
                self._save()
                saved_step = self.step
        if window.losses:
            self._log(log, window)
        if saved_step != self.step:
            if stopped == OUT_OF_TIME and self.validated[0] != self.step:
                with contextlib.suppress(StoppedError):
                    self._validate(log, signals, self.metrics["loss"])
            self._save()
        return stopped

    def _finished_before(self) -> TrainingResult:
        """A run that has all its steps is left as it is."""
        steps = self.config.trainer.max_steps
        has_data = self.last_step == steps
        more = f"trainer.max_steps={2 * self.step} goes on" if has_data else "dataloader_type=single has no more data"
        has = f"it has {self.step:,} of trainer.max_steps={steps:,}"
        self.note(f"{self.run} is finished: {has}. Nothing was done; {more}")
        return TrainingResult(self.run, checkpoint.folder_of(self.run, self.step), self.step, self.metrics)

    def _stop_code(self, signals: Signals) -> int:
        """The signal that any process got, OUT_OF_TIME, 0 = go on: the same in every process."""
        limit = self.config.trainer.max_time_s
        is_late = limit is not None and self.train_s >= limit
        return self.parallel.any(signals.received or (OUT_OF_TIME if is_late else 0))

    def _figures(self, window: Window) -> dict[str, float]:
        """For the line of progress: since the last log line, or of it; and of the last validation."""
        names = {"loss": "loss", "tokens_per_s": "tokens_per_s"}
        mode = "on" if self.config.model.retrieval else "off"
        names[f"valid_bits_per_byte_{mode}"] = "valid_bits_per_byte"
        return {shown: self.metrics[name] for name, shown in names.items() if name in self.metrics} | window.figures()

    def _log(self, log: RunLog, window: Window) -> Window:
        window.flops = self.parallel.sum([window.flops])[0]
        values = window.values(peak_flops(self.device, self.precision.products) * self.parallel.world)
        values["peak_mib"] = peak_mib()
        self.metrics |= values
        log.log(self.step, {**values, "tokens_seen": self.tokens_seen, "train_s": self.train_s})
        return Window()

    @contextlib.contextmanager
    def _prefetched(self) -> Iterator[Iterator[list[SequenceBatch]]]:
        """The micro-batches of each step from here on; the next step's are made while this one trains."""
        m, data = self.config.model, self.config.model.data

        def make(step: int) -> list[SequenceBatch]:
            is_dropped = np.random.default_rng((self.config.seed, step, 1)).random() < data.neighbor_dropout
            mode = "on" if m.retrieval and not is_dropped else "off"
            if mode == "on" and step < data.self_neighbor_steps:
                mode = "self"
            first = step * self.accumulate * self.parallel.data + self.parallel.data_rank
            numbers = range(first, first + self.accumulate * self.parallel.data, self.parallel.data)
            return [self.data.train.training_batch(n, m.micro_batch_size, self.order, mode) for n in numbers]

        def stream(pool: ThreadPoolExecutor) -> Iterator[list[SequenceBatch]]:
            steps = iter(range(self.step, self.last_step))
            waiting: deque[Future[list[SequenceBatch]]] = deque()
            waiting.extend(pool.submit(make, step) for step in itertools.islice(steps, data.num_workers))
            while waiting:
                batches = waiting.popleft().result()
                waiting.extend(pool.submit(make, step) for step in itertools.islice(steps, 1))
                yield batches

        if not data.num_workers:
            yield map(make, range(self.step, self.last_step))
            return
        with ThreadPoolExecutor(1) as pool:  # one: the batches of an epoch share its order
            yield stream(pool)

    def _train_step(self, micro_batches: list[SequenceBatch]) -> StepResult:
        """One optimizer step, or none where the loss or the gradient is not finite or the loss leaps."""
        optim, optimizer = self.config.model.optim, self.optimizer
        if not self.drops_gradients:
            retrofit.set_trainable(self.model, self.config.model, self.step)
        rate = learning_rate(optim, self.step, self.config.trainer.max_steps)
        labels_here = sum(int((batch.labels >= 0).sum()) for batch in micro_batches)
        tokens_here = sum(int((batch.document_ids >= 0).sum()) for batch in micro_batches)
        num_labels, num_tokens = self.parallel.sum([labels_here, tokens_here])
        weight = self.parallel.data * optimizer.scale / max(1.0, num_labels)  # gradients are averaged over `data`
        optimizer.zero_grad()
        gathered: dict[int, Tensor] = {}  # neighbors' lengths
        losses: list[Tensor] = []  # none is waited for before the last micro-batch is on its way
        for number, batch in enumerate(micro_batches):
            tokens, labels, documents, neighbors, lengths = to_tensors(batch, self.device)
            if batch.neighbor_ids is not None and self.table is not None:
                neighbors, lengths = self.table.gather(batch.neighbor_ids, self.config.model.r)
                gathered[number] = lengths
            is_last = self.optimizer.has_master or number == len(micro_batches) - 1
            with self.parallel.accumulating(self.module, is_last):
                with autocast(self.device, self.precision.autocast), named("forward"):
                    reads = reads_of(batch, self.device)
                    loss = self.module(tokens, neighbors, lengths, documents, labels, reads) * weight
                with named("backward"):
                    loss.backward()
            optimizer.collect()
            losses.append(loss.detach())
        for number, lengths in gathered.items():
            micro_batches[number].lengths = lengths.cpu().numpy()  # for the count of FLOPs
        total = self.parallel.sum([sum(map(float, losses))])[0] / self.parallel.data / optimizer.scale
        if self.drops_gradients:
            optimizer.drop(retrofit.learning(self.config.model, self.step))
        norm = optimizer.norm()
        problem = self._problem(total, norm)
        if problem is None:
            with named("optimizer"):
                optimizer.step(rate, norm)
            self.skipped = 0
            self.mean_loss = total if self.mean_loss is None else 0.98 * self.mean_loss + 0.02 * total
        else:
            self._skip(problem)
        return StepResult(total, norm, rate, int(num_tokens))

    def _problem(self, loss: float, norm: float) -> str | None:
        """Why a step is not taken, the same in every process; None = it is."""
        if self.parallel.any(int(not (math.isfinite(loss) and math.isfinite(norm)))):
            return f"loss {loss}, gradient norm {norm}"
        limit = self.config.trainer.loss_spike
        if limit is not None and self.mean_loss is not None and loss > limit * self.mean_loss:
            return f"loss {loss:.3f} is more than {limit:g} times the mean {self.mean_loss:.3f}"
        return None

    def _skip(self, problem: str) -> None:
        self.optimizer.skip()
        self.skipped += 1
        self.reporter.say(f"step {self.step + 1}: {problem}: skipped")
        if self.skipped < self.config.trainer.max_skipped_steps:
            return
        self.saver.wait()
        existing = checkpoint.complete_checkpoints(self.run, self.note)
        raise GateError(
            f"{self.skipped} steps in a row were skipped, the last for {problem}",
            f"at step {self.step + 1}; the last good checkpoint is {existing[-1] if existing else 'none'}",
            "lower model.optim.lr, or trainer.precision=32",
        )

    def _validate(self, log: RunLog, signals: Signals, loss: float) -> None:
        """Raises StoppedError between two batches when a signal has come."""
        if self.data.valid is None or self.valid_batches == 0:
            return

        def advance(_: int) -> None:
            if self.parallel.any(signals.received or 0):
                raise StoppedError

        modes = ("on", "off") if self.config.model.retrieval else ("off",)
        results = evaluate(
            self.model,
            self.data.valid,
            self.data.store.tokenizer.token_bytes(),
            modes,
            batch_size=self.config.model.micro_batch_size,
            limit=self.valid_batches,
            precision=self.precision.autocast,
            advance=advance,
            shard=(self.parallel.data_rank, self.parallel.data),
            reduce=self.parallel.sum_arrays,
        )
        if not results[modes[0]].tokens.sum():
            return  # documents of one token: nothing was measured
        values = {f"valid_bits_per_byte_{mode}": result.bits_per_byte for mode, result in results.items()}
        values |= {f"valid_loss_{mode}": result.loss for mode, result in results.items()}
        self.metrics |= values
        loss_now = results[modes[0]].loss
        self.validated = self.step, loss_now
        is_best = self.parallel.any(int(self.watch.is_best(loss_now)))  # all save, or none
        if is_best and self.config.exp_manager.keep_best:
            self.best_step = self.step
        log.log(self.step, values)
        shown = ", ".join(f"{mode} {result.bits_per_byte:.3f}" for mode, result in results.items())
        self.reporter.say(
            f"step {self.step}: loss {self.metrics.get('loss', loss):.3f}, validation bits per byte {shown}"
        )
        if (warning := self.watch.warning) is not None:
            self.note(warning)

    def _save(self) -> None:
        generation = {name: getattr(self.config.inference, name) for name in SAMPLING}
        trainer = {
            "tokens_seen": self.tokens_seen,
            "train_s": self.train_s,
            "precision": self.precision.name,
            "products": self.products,
            "mean_loss": self.mean_loss,
            "loss_scale": self.optimizer.scale,
            "good_steps": self.optimizer.good_steps,
            "valid_loss": self.validated[1] if self.validated[0] == self.step else None,  # its own, or none
            "validated_on": self.validated_on,
            "processes": {"data": self.parallel.data, "tensor": self.parallel.tensor},
            "fingerprints": self.data.fingerprints,
            "validation": self.data.validation,
            "stream": stream_settings(self.config),
        }
        try:
            self.saver.save(
                self.step,
                self.model,
                optimizer=self.optimizer,
                tokenizer=self.data.store.tokenizer,
                trainer=trainer,
                generation=generation,
            )
        except RetroError:
            self.reporter.say("the last checkpoint was not saved; earlier ones are untouched")
            raise
