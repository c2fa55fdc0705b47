"""The training loop: one process or many, any device.

Reads a store and its neighbor table; writes a run's folder. Each step is a function of (settings, step number,
state of the last checkpoint), so a run that is stopped anywhere goes on as the same run: losses are
bit-identical on the same machine with the same threads. Letters: B sequences, N tokens, K neighbors.
"""

import contextlib
import itertools
import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from retro_kernels.backend import backend

from retro_engine.config import Config, ModelConfig, architecture, flat_keys, load_config, named_keys, to_yaml
from retro_engine.data import files
from retro_engine.data.batches import Batch, Sequences, describe_copies, split_documents
from retro_engine.data.chat_files import read_chat_files
from retro_engine.data.loader import has_native_loader
from retro_engine.data.neighbor_table import NeighborTable, find_table, table_name
from retro_engine.data.questions import Questions, Search, fingerprint, read_questions
from retro_engine.data.store import Store
from retro_engine.errors import GateError, RetroError, StoreError, UsageError
from retro_engine.evaluate.perplexity import autocast, evaluate, to_tensors
from retro_engine.model.attention import left_to_pytorch
from retro_engine.model.device import describe_device
from retro_engine.model.fit import fit_cross_attention
from retro_engine.model.flops import training_flops
from retro_engine.model.initialization import width_multipliers
from retro_engine.model.retro import RetroModel
from retro_engine.model.weights import read_config
from retro_engine.progress import Reporter
from retro_engine.retrieval.search import Retriever
from retro_engine.train import checkpoint, places, record, retrofit
from retro_engine.train.device_table import DeviceTable
from retro_engine.train.logging import RunLog
from retro_engine.train.optimizer import Optimizer, learning_rate
from retro_engine.train.parallel import Parallel

H100_BF16_FLOPS = 989e12  # datasheet
SAMPLING = ("greedy", "temperature", "top_k", "top_p")  # of `inference`, that a checkpoint keeps
FIT_TOKENS = 16_384  # that model.fit_cross_attention reads


@dataclass
class TrainingResult:
    """Where the run is, how far it came, and its last measurements."""

    run: Path
    checkpoint: Path
    step: int
    metrics: dict[str, Any]
    exit_code: int = 0  # 130 / 143: stopped by a signal, checkpoint saved


@dataclass
class TrainingData:
    train: Sequences | Questions
    valid: Sequences | Questions | None
    store: Store
    fingerprints: dict[str, str]
    warning: str | None = None  # held-out documents that are trained on too
    validation: dict[str, str] = field(default_factory=dict)  # fingerprint of what is validated on, where that is apart


def open_data(config: Config, say: Callable[[str], None] | None = None) -> TrainingData:
    """The sequences to train and to validate on; which tables were found is written into `config`.

    `say` is told which questions cannot be used (None = standard error is).
    Raises UsageError or StoreError for data that do not fit.
    """
    m, data = config.model, config.model.data
    if data.store is None:
        raise UsageError(
            "model.data.store is not set",
            "training reads a chunk store",
            "model.data.store=STORE (retro prepare writes one)",
        )
    store = Store(data.store)
    _check_store(config, store)
    if data.questions is not None:
        return _open_questions(config, store, say or Reporter().say)
    table = NeighborTable(find_table(store, data.neighbors), store) if m.retrieval else None
    if table is not None:  # so that the run keeps it when there are more tables later
        data.neighbors = table_name(table)
    shares = split_documents(store, data.splits_string)
    has_own_valid = data.valid_store is not None
    trained = np.arange(store.num_documents) if has_own_valid else shares["train"]

    def sequences(
        of: Store, documents: np.ndarray, its_table: NeighborTable | None, database: np.ndarray | None
    ) -> Sequences:
        return Sequences(of, documents, m.encoder_seq_length, its_table, m.num_neighbors, m.r, database)

    train = sequences(store, trained, table, trained)
    if data.self_neighbor_steps and not train.holds_itself:
        raise UsageError(
            f"model.data.self_neighbor_steps={data.self_neighbor_steps} cannot be used",
            f"{store.folder} is not one of the stores that its neighbors come from",
            f"retro neighbors {store.folder} --database {store.folder} ...",
        )
    fingerprints = {"store": store.fingerprint, "tokenizer": store.manifest["tokenizer"]}
    if table is not None:
        fingerprints["neighbors"] = table.fingerprint
    valid, validation = None, {}
    if has_own_valid:
        other = Store(str(data.valid_store))
        _check_store(config, other)
        store.coding.check(other.coding)
        other_table = NeighborTable(find_table(other, data.valid_neighbors), other) if m.retrieval else None
        if other_table is not None:
            data.valid_neighbors = table_name(other_table)
        valid = sequences(other, np.arange(other.num_documents), other_table, None)
        validation["valid_store"] = other.fingerprint
    elif len(shares["valid"]):
        valid = sequences(store, shares["valid"], table, trained)
    warning = describe_copies(valid, train) if valid is not None else None
    return TrainingData(train, valid, store, fingerprints, warning, validation)


def _open_questions(config: Config, store: Store, say: Callable[[str], None]) -> TrainingData:
    m, data = config.model, config.model.data
    if data.self_neighbor_steps:
        raise UsageError("model.data.self_neighbor_steps cannot be used", "questions have neighbors of their own")
    search = question_search([store], data.question_retriever, m.r) if data.question_neighbors != "data" else None

    def opened(path: str) -> Questions:
        rows = read_questions(path, data.question_template, say)
        length = m.encoder_seq_length
        return Questions(rows, store, path, length, m.num_neighbors, m.r, data.question_neighbors, search)

    train = opened(str(data.questions))
    prints = {"store": store.fingerprint, "tokenizer": store.manifest["tokenizer"]}
    prints["questions"] = fingerprint(str(data.questions))
    valid: Questions | None = None
    validation = {}
    if data.valid_questions is not None:
        valid = opened(data.valid_questions)
        validation["valid_questions"] = fingerprint(data.valid_questions)
    else:
        train, valid = train.deal(data.splits_string)
    return TrainingData(train, valid, store, prints, validation=validation)


def question_search(stores: list[Store], retriever: str, retrieved_length: int) -> Search:
    """Retrieval for questions from `stores`."""
    found = Retriever(stores, retriever)

    def search(texts: Iterable[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        return found.loader.gather(found.search(list(texts), k)[0], retrieved_length)

    return search


def run_config(
    checkpoint_folder: Path, overrides: list[str], needed: Collection[str] = places.READ, is_strict: bool = False
) -> Config:
    """The settings a checkpoint's run was started with, with overrides; an imported checkpoint's are its model's. Paths
    are those where the data lie now, of which the `needed` ones must be there (places.py; `is_strict`: another store in
    the place of the run's is refused).

    Raises MissingInputError for a run without config.yaml, or whose data are not there, StoreError where it is not what
    the run wrote.
    """
    done = {
        "init_from": None,
        "fit_cross_attention": False,
        "freeze_decoder": False,
        "unfreeze_step": None,
        "unfreeze_every": None,
        "optim.sched.min_lr": 0.0,  # of schedules that earlier versions took
        "optim.sched.constant_steps": 0,
    }  # what they did is in the settings and weights
    file: str | None = None
    found: dict[str, str] = {}
    if checkpoint.is_imported(checkpoint_folder):
        done |= vars(read_config(checkpoint_folder))
    else:
        run = checkpoint_folder.parent.parent
        file = str(run / record.SETTINGS_FILE)
        record.check_settings(Path(file))
        state = checkpoint.read_trainer(checkpoint_folder)
        trained = state.get("fingerprints", {}) | state.get("validation", {})
        found = places.located(run, Path(file), named_keys(overrides), trained, needed, is_strict)
    settings = [(f"model.{key}", value) for key, value in done.items()]
    return load_config([*settings, *found.items(), *overrides], file=file)


def open_evaluation(
    checkpoint_folder: Path,
    model: ModelConfig,
    overrides: list[str],
    share: str,
    say: Callable[[str], None] = lambda line: None,
) -> Sequences | Questions:
    """The documents of a share (train, valid, test, all) of a run's data, for the model of one of its checkpoints.

    With a validation store of its own, valid is that store and the other shares are of the training store. Raises
    StoreError for a store of another tokenizer, or for a RETRO of another chunk size.
    """
    config = run_config(checkpoint_folder, overrides, places.ALL, is_strict=True)
    data = open_data(config)
    coding = checkpoint.read_coding(checkpoint_folder, data.store.chunk_size)
    coding.check(data.store.coding)  # a validation store has the same
    if share == "valid" and data.valid is not None:
        if data.warning is not None:
            say(data.warning)
        return data.valid
    if isinstance(data.train, Questions):
        if share != "train":
            raise UsageError(
                f"--share {share}: questions have none", "they are dealt to train and valid", "--share train"
            )
        return data.train
    store, m = data.store, config.model
    everything = np.arange(store.num_documents)
    shares = split_documents(store, m.data.splits_string)
    if m.data.valid_store is not None:  # then the whole store was trained on
        shares = {"train": everything}
    if share != "all" and share not in shares:
        raise UsageError(
            f"--share {share}: this run has none",
            f"it was trained on all of {store.folder} and validated on {m.data.valid_store}",
            "--share valid, or train",
        )
    documents = everything if share == "all" else shares[share]
    sequences = Sequences(
        store, documents, m.encoder_seq_length, data.train.table, model.num_neighbors, model.r, shares["train"]
    )
    if share == "test" and (copies := describe_copies(sequences, data.train)) is not None:
        say(copies)
    return sequences


def run_databases(checkpoint_folder: Path) -> list[Store]:
    """The stores that a run's neighbors came from."""
    data = run_config(checkpoint_folder, []).model.data
    if data.store is None:
        raise UsageError(f"{checkpoint_folder} names no store", "it was imported", "name the stores to read")
    store = Store(data.store)
    return NeighborTable(find_table(store, data.neighbors), store).databases


def _check_store(config: Config, store: Store) -> None:
    m = config.model
    if store.chunk_size != m.chunk_size:
        raise UsageError(
            f"model.chunk_size={m.chunk_size} does not match the store",
            f"{store.folder} has chunks of {store.chunk_size} tokens",
            f"model.chunk_size={store.chunk_size}, or retro prepare --chunk-size {m.chunk_size}",
        )
    if 0 < m.vocab_size < store.vocab_size:  # more are rows of padding, as imported models have
        raise UsageError(
            f"model.vocab_size={m.vocab_size} does not match the store",
            f"its tokenizer has {store.vocab_size} entries",
            "leave model.vocab_size out",
        )


def gathers_on_device(device: torch.device) -> bool:
    """Whether training batches bring neighbor ids and the device gathers the tokens; on a CPU the loader does."""
    return device.type == "cuda"


def has_fast_bf16() -> bool:
    """Whether this processor multiplies bf16; where it does not, bf16 is many times slower than fp32."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512") and torch.cpu._is_avx512_bf16_supported()


def pick_precision(config: Config, device: torch.device) -> str:
    """ "32" or "bf16-mixed". auto times a layer's forward and backward in both and takes the faster."""
    if config.trainer.precision != "auto":
        return config.trainer.precision
    if config.model.megatron_amp_O2:
        return "bf16-mixed"
    if device.type == "cuda":
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32"
    if not has_fast_bf16():
        return "32"
    m = config.model
    layer = torch.nn.Sequential(
        torch.nn.Linear(m.hidden_size, m.ffn_hidden_size),
        torch.nn.GELU(),
        torch.nn.Linear(m.ffn_hidden_size, m.hidden_size),
    )
    x = torch.zeros(m.micro_batch_size * m.encoder_seq_length, m.hidden_size)

    def best_s(is_bf16: bool) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            with autocast(device, "bf16-mixed" if is_bf16 else "32"):
                out = layer(x)
            out.float().sum().backward()
            times.append(time.perf_counter() - start)
        return min(times[1:])

    return "bf16-mixed" if best_s(True) < 0.9 * best_s(False) else "32"


def peak_flops(device: torch.device) -> float:
    """What MFU is a share of: the datasheet's bf16 rate on an H100, a measured matmul elsewhere (bf16 on another
    GPU, fp32 of 2048^3 on a CPU: a bf16 run there can pass 1).
    """
    is_gpu = device.type == "cuda"
    if is_gpu and "H100" in torch.cuda.get_device_name(device):
        return H100_BF16_FLOPS
    size = 8192 if is_gpu else 2048
    a = torch.rand(size, size, device=device, dtype=torch.bfloat16 if is_gpu else torch.float32)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        if is_gpu:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def kernels_in_use(config: ModelConfig, device: str, precision: str) -> str:
    """The backend of a run's ops, and what of its attention is PyTorch's nevertheless."""
    wide = {"64": torch.float64, "16-mixed": torch.float16}
    name = backend(device, wide.get(precision, torch.bfloat16 if "bf16" in precision else torch.float32))
    left = left_to_pytorch(config)
    return name if name == "reference" or not left else f"{name} (PyTorch: {' and '.join(left)})"


def describe(config: Config, data: TrainingData) -> str:
    """What a run with these settings would be: one line."""
    model = replace(config.model, vocab_size=config.model.vocab_size or data.store.vocab_size)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in RetroModel(model).parameters())
    valid = len(data.valid.documents) if data.valid is not None else 0
    return (
        f"{count / 1e6:.2f} M parameters, {config.trainer.max_steps:,} steps; {len(data.train.documents):,} documents in "
        f"{len(data.train.epoch(config.seed, 0, *_order(config))):,} sequences of {model.encoder_seq_length} tokens an epoch, {valid:,} held out"
    )


def _stream_settings(config: Config) -> dict[str, Any]:
    """The settings that decide which batch a step sees: a resumed run must have the same."""
    m = config.model
    is_shuffled, is_cyclic = _order(config)
    kept = {} if is_cyclic and is_shuffled else {"order": "sequences shuffled" if is_cyclic else "the corpus'"}
    return {
        "seed": config.seed,
        "sequences_per_step": _sequences_per_step(config),
        "splits_string": m.data.splits_string,
        "dataloader_type": m.data.dataloader_type,
        "shuffle_documents": is_shuffled,
        **kept,  # earlier versions had another order there, and no such entry
        "neighbor_dropout": m.data.neighbor_dropout,
        **({"self_neighbor_steps": m.data.self_neighbor_steps} if m.data.self_neighbor_steps else {}),
    }


def _sequences_per_step(config: Config) -> int:
    m = config.model
    world = int(os.environ.get("WORLD_SIZE", "1")) // m.tensor_model_parallel_size
    return m.global_batch_size or m.micro_batch_size * config.trainer.accumulate_grad_batches * max(1, world)


def _order(config: Config) -> tuple[bool, bool]:
    """Whether documents are shuffled, and whether sequences are, anew in every pass."""
    data = config.model.data
    is_cyclic = data.dataloader_type == "cyclic"
    return is_cyclic if data.shuffle_documents is None else data.shuffle_documents, is_cyclic


def steps_of_data(config: Config, data: TrainingData) -> int | None:
    """Optimizer steps that the training data gives; None = any number. Raises UsageError where it is less than one.

    A function of what every process has, so that all stop at the same step.
    """
    count = data.train.num_sequences(config.seed, *_order(config))
    if count is None:
        return None
    steps = count // _sequences_per_step(config)
    if not steps:
        raise UsageError(
            f"model.data.dataloader_type=single gives {count:,} sequences",
            f"a step takes {_sequences_per_step(config):,}: there is none",
            "a smaller model.global_batch_size, or model.data.dataloader_type=cyclic",
        )
    return steps


class _StoppedError(Exception):
    """A validation that a signal cut short."""


class _Signals:
    """SIGTERM and SIGINT ask for a checkpoint at the next step; a second one ends the process at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        with contextlib.suppress(ValueError):  # not the main thread: the caller keeps its handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = number


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
        with files.locked(run) if parallel.is_main else contextlib.nullcontext():
            return _Training(config, data, run, reporter, resume, parallel, source).run_all()
    finally:
        parallel.close()


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
        data: TrainingData,
        run: Path,
        reporter: Reporter,
        resume: str,
        parallel: Parallel,
        source: Path | None,
    ):
        self.config, self.data, self.run, self.parallel = config, data, run, parallel
        self.reporter = reporter if parallel.is_main else Reporter("quiet")
        m, self.device = config.model, parallel.device
        per_round = m.micro_batch_size * parallel.data
        if _sequences_per_step(config) % per_round:
            raise UsageError(
                f"model.global_batch_size={m.global_batch_size} does not fit",
                f"{parallel.data} data-parallel processes take model.micro_batch_size={m.micro_batch_size} each",
                f"use a multiple of {per_round}",
            )
        self.accumulate = _sequences_per_step(config) // per_round
        of_data = steps_of_data(config, data)
        self.last_step = min(config.trainer.max_steps, of_data or config.trainer.max_steps)
        self.validates_every, self.valid_batches = self._validation()
        valid = data.valid and (data.valid.store.fingerprint, len(data.valid.documents))
        parallel.agree(
            {"data": data.fingerprints, "validation data": valid, "order of the data": _stream_settings(config),
             "number of steps": self.last_step, "settings": to_yaml(config)}
        )  # fmt: skip
        start = parallel.from_main(self._find_start(resume) if parallel.is_main else None)
        torch.manual_seed(config.seed)
        self.model = RetroModel(m)
        widths = width_multipliers(self.model)
        self.step, self.tokens_seen, self.train_s = 0, 0, 0.0
        self.precision, self.skipped, self.mean_loss = "", 0, None
        scale, good_steps = None, 0
        if start is not None:
            state = self._read_start(start)
            self.step, self.tokens_seen, self.train_s = state["step"], state["tokens_seen"], state["train_s"]
            self.mean_loss = state["mean_loss"]
            self.precision = self._precision_from_here(state["precision"])
            if self.precision == state["precision"] == "16-mixed":
                scale, good_steps = state["loss_scale"], state["good_steps"]
            checkpoint.load_weights(start, self.model)
            self.reporter.say(f"resuming at step {self.step} from {start}")
        elif source is not None:
            retrofit.load_initial(source, self.model)
            self.reporter.say(f"weights of {source}")
            if m.fit_cross_attention:
                self._fit_cross_attention()
        origin = start or source
        if origin is not None:  # a chat model stays one
            data.store.tokenizer.chat_files = read_chat_files(origin)
        with torch.random.fork_rng(devices=[]):
            self.precision = parallel.from_main(self.precision or pick_precision(config, self.device))
        is_o2 = m.megatron_amp_O2
        self.model.set_recompute(m.activations_checkpoint_granularity)
        dtype = torch.float64 if self.precision == "64" else torch.float32
        shards_master = is_o2 and parallel.strategy == "fsdp"  # fp32 shards, of which bf16 copies are gathered
        has_master = is_o2 and not shards_master
        self.model.to(self.device, torch.bfloat16 if has_master else dtype)
        self.autocast = "32" if is_o2 else self.precision
        # groups of processes settle at the start which gradients they exchange: all, if more will learn later
        self.drops_gradients = m.unfreeze_step is not None and parallel.data > 1
        if not self.drops_gradients:
            retrofit.set_trainable(self.model, m, self.step)
        finds_unused = m.retrieval and m.data.neighbor_dropout > 0
        self.module = parallel.spread(self.model, shards_master, finds_unused)
        self.optimizer = Optimizer(self.model, m.optim, widths, has_master, self.precision == "16-mixed")
        torch.manual_seed(config.seed + parallel.data_rank)  # processes that share matrices drop the same features
        if start is not None:
            checkpoint.load_optimizer(start, self.optimizer, parallel)
            self.optimizer.scale, self.optimizer.good_steps = scale or self.optimizer.scale, good_steps
        keep = config.exp_manager
        self.saver = checkpoint.Saver(run, parallel, keep.keep_last_n, keep.keep_best, self.note)
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

    def _validation(self) -> tuple[int, int | None]:
        """Steps between two validations, and batches of one; shares are of an epoch, and of the validation data."""
        config, trainer = self.config, self.config.trainer
        every, limit = trainer.val_check_interval, trainer.limit_val_batches
        if isinstance(every, float):
            epoch = len(self.data.train.epoch(config.seed, 0, *_order(config))) // _sequences_per_step(config)
            every = max(1, int(every * epoch))
        if isinstance(limit, float) and self.data.valid is not None:
            count = len(self.data.valid.batch_rows(config.model.micro_batch_size))
            limit = max(1, int(limit * count)) if limit else 0
        return every, None if limit is None else int(limit)

    def note(self, text: str) -> None:
        self.reporter.say(f"note: {text}")

    def _precision_from_here(self, before: str) -> str:
        """Of a resumed run: what is asked for now; with auto what it had before."""
        asked = self.config.trainer.precision
        if asked == "auto" and self.config.model.megatron_amp_O2:
            asked = "bf16-mixed"
        if asked not in ("auto", before):
            self.note(f"trainer.precision={asked} from step {self.step + 1} on; before it was {before}")
        return before if asked == "auto" else asked

    def _fit_cross_attention(self) -> None:
        """From some sequences of the training data; the same in every process."""
        start, m = time.perf_counter(), self.config.model
        size = max(1, min(m.micro_batch_size, FIT_TOKENS // m.encoder_seq_length))
        count = max(1, FIT_TOKENS // (size * m.encoder_seq_length))
        self.model.to(self.device)

        def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for number in range(count):
                batch = self.data.train.training_batch(number, size, self.config.seed, True, True, "off")
                tokens, _, documents, _, _ = to_tensors(batch, self.device)
                yield tokens, documents

        fit_cross_attention(self.model.eval(), batches())
        seconds = time.perf_counter() - start
        self.reporter.say(f"cross-attention fitted to {count * size:,} sequences in {seconds:.0f} s")

    def _read_start(self, start: Path) -> dict[str, Any]:
        """trainer.json of the checkpoint to go on from; its data and order must be this run's."""
        if self.parallel.is_main:
            checkpoint.verify(start)
        if checkpoint.is_imported(start):
            raise UsageError(
                f"{start} was imported", "there is no training to go on with", f"--init-from {start} begins one"
            )
        state = checkpoint.read_state(start)
        for saved, now in (
            (state["fingerprints"], self.data.fingerprints),
            (state["stream"], _stream_settings(self.config)),
        ):
            if saved != now:
                raise StoreError(
                    f"{start} was trained with {_difference(saved, now)}",
                    "a run goes on with the data and the order it began with",
                    "--resume never --out ANOTHER starts a new run",
                )
        return state

    def _find_start(self, resume: str) -> Path | None:
        existing = checkpoint.complete_checkpoints(self.run, self.note)
        if resume not in ("auto", "never"):
            start: Path | None = checkpoint.find_checkpoint(resume)
            if existing and start is not None and start.resolve() != existing[-1].resolve():
                raise UsageError(
                    f"{self.run} has checkpoint {existing[-1].name}",
                    f"going on from {start} would leave two histories in one folder",
                    "choose another --out, or remove the later checkpoints",
                )
        elif existing and (resume == "never" or not self.config.exp_manager.resume_if_exists):
            raise UsageError(
                f"{self.run} holds a run", "it is not overwritten", f"choose another --out, or rm -r {self.run}"
            )
        else:
            start = existing[-1] if existing else None
        if start is not None:
            saved, now = architecture(read_config(start)), architecture(self.config.model)
            if saved != now:
                raise UsageError(
                    f"{start} has another model: {_difference(saved, now)}",
                    "a run goes on with the model it began with",
                    "--resume never --out ANOTHER starts a new run",
                )
        return start

    def run_all(self) -> TrainingResult:
        m, trainer = self.config.model, self.config.trainer
        saved = self.run / "checkpoints" / f"step-{self.step:06d}"
        if self.step >= self.last_step and self.parallel.from_main((saved / checkpoint.COMPLETE).is_file()):
            return self._finished_before(saved)
        with torch.random.fork_rng(devices=[]):  # measuring takes nothing from the run's random numbers
            peak = peak_flops(self.device)
        self.reporter.say(describe(self.config, self.data))
        if self.data.warning is not None:
            self.reporter.say(self.data.warning)
        if self.last_step < trainer.max_steps:
            self.note(
                f"the data gives {self.last_step:,} of trainer.max_steps={trainer.max_steps:,} steps: single reads it once"
            )
        self.reporter.say(
            f"{describe_device(self.device)} in {self.precision}, kernels: {kernels_in_use(m, self.device.type, self.precision)}, "
            f"loader: {'C++' if has_native_loader() else 'NumPy (no compiler at installation)'}, {torch.get_num_threads()} threads"
        )
        log = RunLog(self.run, self.config, self.data.fingerprints, self.step, self.reporter, self.parallel.is_main)
        saved_step, received = -1, None
        window = _Window()
        self.model.train()
        try:
            with (
                _Signals() as signals,
                self._prefetched() as batches,
                self.reporter.progress("training", self.last_step, "steps") as meter,
            ):
                meter.advance(self.step)
                while self.step < self.last_step:
                    if received := self._stop_code(signals):
                        break
                    start = time.perf_counter()
                    micro_batches = next(batches)
                    waited = time.perf_counter() - start
                    result = self._train_step(micro_batches)
                    elapsed = time.perf_counter() - start
                    self.train_s += elapsed
                    self.step += 1
                    self.tokens_seen += result.tokens
                    window.add(result, elapsed, waited, m, micro_batches)
                    meter.advance(1)
                    if self.step % trainer.log_every_n_steps == 0:
                        window = self._log(log, window, peak)
                    if self.step % self.validates_every == 0:
                        with contextlib.suppress(_StoppedError):
                            self._validate(log, signals, result.loss)
                    if self.step % self.config.exp_manager.checkpoint_every_n_steps == 0:
                        self._save()
                        saved_step = self.step
                if window.losses:
                    self._log(log, window, peak)
                if saved_step != self.step:
                    self._save()
                self.saver.wait()
        finally:
            log.close()
        received = received if received and received > 1 else None
        if received is not None:
            self.reporter.say(f"stopped by signal {received} at step {self.step}, checkpoint saved")
        saved = self.run / "checkpoints" / f"step-{self.step:06d}"
        return TrainingResult(self.run, saved, self.step, self.metrics, 0 if received is None else 128 + received)

    def _finished_before(self, saved: Path) -> TrainingResult:
        """A run that has all its steps is left as it is."""
        steps = self.config.trainer.max_steps
        has_data = self.last_step == steps
        more = f"trainer.max_steps={2 * self.step} goes on" if has_data else "dataloader_type=single has no more data"
        self.note(
            f"{self.run} is finished: it has {self.step:,} of trainer.max_steps={steps:,}. Nothing was done; {more}"
        )
        return TrainingResult(self.run, saved, self.step, self.metrics)

    def _stop_code(self, signals: "_Signals") -> int:
        """The signal that any process got, 1 = out of time, 0 = go on: the same in every process."""
        limit = self.config.trainer.max_time_s
        is_late = limit is not None and self.train_s >= limit
        return self.parallel.any(signals.received or int(is_late))

    def _log(self, log: RunLog, window: "_Window", peak: float) -> "_Window":
        window.flops = self.parallel.sum([window.flops])[0]
        values = window.values(peak * self.parallel.world)
        values["peak_mib"] = peak_mib()
        self.metrics |= values
        log.log(self.step, {**values, "tokens_seen": self.tokens_seen, "train_s": self.train_s})
        return _Window()

    @contextlib.contextmanager
    def _prefetched(self) -> Iterator[Iterator[list[Batch]]]:
        """The micro-batches of each step from here on; the next step's are made while this one trains."""
        m, data = self.config.model, self.config.model.data
        is_shuffled, is_cyclic = _order(self.config)

        def make(step: int) -> list[Batch]:
            is_dropped = np.random.default_rng((self.config.seed, step, 1)).random() < data.neighbor_dropout
            mode = "on" if m.retrieval and not is_dropped else "off"
            if mode == "on" and step < data.self_neighbor_steps:
                mode = "self"
            first = step * self.accumulate * self.parallel.data + self.parallel.data_rank
            numbers = range(first, first + self.accumulate * self.parallel.data, self.parallel.data)
            size, seed = m.micro_batch_size, self.config.seed
            return [self.data.train.training_batch(n, size, seed, is_shuffled, is_cyclic, mode) for n in numbers]

        def stream(pool: ThreadPoolExecutor) -> Iterator[list[Batch]]:
            steps = iter(range(self.step, self.last_step))
            waiting: deque[Future[list[Batch]]] = deque()
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

    def _train_step(self, micro_batches: list[Batch]) -> "_StepResult":
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
        total = 0.0
        for number, batch in enumerate(micro_batches):
            tokens, labels, documents, neighbors, lengths = to_tensors(batch, self.device)
            if batch.neighbor_ids is not None and self.table is not None:
                neighbors, lengths = self.table.gather(batch.neighbor_ids, self.config.model.r)
                batch.lengths = lengths.cpu().numpy()  # for the count of FLOPs
            is_last = self.optimizer.has_master or number == len(micro_batches) - 1
            with self.parallel.accumulating(self.module, is_last):
                with autocast(self.device, self.autocast):
                    loss = self.module(tokens, neighbors, lengths, documents, labels) * weight
                loss.backward()
            optimizer.collect()
            total += float(loss.detach())
        total = self.parallel.sum([total])[0] / self.parallel.data / optimizer.scale
        if self.drops_gradients:
            optimizer.drop(retrofit.learning(self.config.model, self.step))
        norm = optimizer.norm()
        problem = self._problem(total, norm)
        if problem is None:
            optimizer.step(rate, norm)
            self.skipped = 0
            self.mean_loss = total if self.mean_loss is None else 0.98 * self.mean_loss + 0.02 * total
        else:
            self._skip(problem)
        return _StepResult(total, norm, rate, int(num_tokens))

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

    def _validate(self, log: RunLog, signals: "_Signals", loss: float) -> None:
        """Raises _StoppedError between two batches when a signal has come."""
        if self.data.valid is None or self.valid_batches == 0:
            return

        def advance(_: int) -> None:
            if self.parallel.any(signals.received or 0):
                raise _StoppedError

        modes = ("on", "off") if self.config.model.retrieval else ("off",)
        results = evaluate(
            self.model,
            self.data.valid,
            self.data.store.tokenizer.token_bytes(),
            modes,
            self.config.model.micro_batch_size,
            self.valid_batches,
            self.autocast,
            advance,
            shard=(self.parallel.data_rank, self.parallel.data),
            reduce=self.parallel.sum_arrays,
        )
        values = {f"valid_bits_per_byte_{mode}": result.bits_per_byte for mode, result in results.items()}
        values |= {f"valid_loss_{mode}": result.loss for mode, result in results.items()}
        self.metrics |= values
        log.log(self.step, values)
        shown = ", ".join(f"{mode} {result.bits_per_byte:.3f}" for mode, result in results.items())
        self.reporter.say(
            f"step {self.step}: loss {self.metrics.get('loss', loss):.3f}, validation bits per byte {shown}"
        )

    def _save(self) -> None:
        generation = {name: getattr(self.config.inference, name) for name in SAMPLING}
        trainer = {
            "tokens_seen": self.tokens_seen,
            "train_s": self.train_s,
            "precision": self.precision,
            "mean_loss": self.mean_loss,
            "loss_scale": self.optimizer.scale,
            "good_steps": self.optimizer.good_steps,
            "valid_loss": self.metrics.get("valid_loss_on", self.metrics.get("valid_loss_off")),
            "processes": {"data": self.parallel.data, "tensor": self.parallel.tensor},
            "fingerprints": self.data.fingerprints,
            "validation": self.data.validation,
            "stream": _stream_settings(self.config),
        }
        try:
            self.saver.save(self.step, self.model, self.optimizer, self.data.store.tokenizer, trainer, generation)
        except RetroError:
            self.reporter.say("the last checkpoint was not saved; earlier ones are untouched")
            raise


@dataclass
class _StepResult:
    """Mean loss of a step's labels, gradient norm, learning rate, and its tokens in all processes."""

    loss: float
    norm: float
    rate: float
    tokens: int


def peak_mib() -> float:
    """Peak resident memory of this process so far."""
    with open("/proc/self/status") as file:
        return next((int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM")), 0.0)


class _Window:
    """What happened since the last log line."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.rate, self.tokens, self.flops, self.seconds, self.waited = 0.0, 0, 0.0, 0.0, 0.0

    def add(
        self, result: _StepResult, seconds: float, waited: float, config: ModelConfig, batches: list[Batch]
    ) -> None:
        """Count one step, of whose seconds so many were spent waiting for its batches."""
        self.waited += waited
        self.losses.append(result.loss)
        self.norms.append(result.norm)
        self.rate, self.seconds, self.tokens = result.rate, self.seconds + seconds, self.tokens + result.tokens
        for batch in batches:
            tokens = int((batch.document_ids >= 0).sum())
            neighbor_tokens = 0 if batch.lengths is None else int(batch.lengths.sum())
            self.flops += training_flops(config, tokens, neighbor_tokens)

    def values(self, peak: float) -> dict[str, float]:
        seconds = max(1e-9, self.seconds)
        return {
            "loss": float(np.mean(self.losses)),
            "grad_norm": float(np.mean(self.norms)),
            "lr": self.rate,
            "tokens_per_s": self.tokens / seconds,
            "mfu": self.flops / seconds / peak,
            "data_wait": self.waited / seconds,
        }


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    keys = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    shorten = lambda value: value[:12] if isinstance(value, str) else value  # noqa: E731
    return ", ".join(f"{key} {shorten(before.get(key))} -> {shorten(now.get(key))}" for key in keys[:6])
