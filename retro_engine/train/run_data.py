"""What a run reads: its stores, their neighbor tables or its questions, shared out to train, validation and test, and the
order of them; for training, and for what evaluates a run afterwards.

A resumed run must have the same data (`RunData.fingerprints`) in the same order (`stream_settings`).
"""

import hashlib
from collections.abc import Callable, Collection, Iterable
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from retro_engine.config import Config, LoraConfig, ModelConfig, load_config, named_keys
from retro_engine.data import files
from retro_engine.data.batches import Order, Sequences, describe_copies, split_documents
from retro_engine.data.blend import Blend, read_blend
from retro_engine.data.coding import Coding
from retro_engine.data.neighbor_table import NeighborTable, find_table, table_name
from retro_engine.data.question_groups import QuestionGroups
from retro_engine.data.questions import Questions, Search, fingerprint, read_questions
from retro_engine.data.store import Store
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import UsageError
from retro_engine.model.weights import read_config
from retro_engine.progress import Reporter
from retro_engine.retrieval.search import Building, Retriever
from retro_engine.train import checkpoint, places, record
from retro_engine.train.parallel import sequences_per_step

LATER = ("self_neighbor_steps", "question_distractors", "question_absent")  # settings of the stream that came later
IN_FRONT = ("retrieval", "reading", "num_neighbors", "retrieved_length", "sink_id", "chunk_size")


@dataclass
class RunData:
    """What is trained on and what is validated on, opened."""

    train: Sequences | Questions | Blend
    valid: Sequences | Questions | None
    store: Store
    fingerprints: dict[str, str]
    warning: str | None = None  # held-out documents that are trained on too
    validation: dict[str, str] = field(default_factory=dict)  # fingerprint of what is validated on, where that is apart


def open_data(config: Config, say: Callable[[str], None] | None = None) -> RunData:
    """The sequences to train and to validate on; which tables were found is written into `config`.

    `say` is told which questions cannot be used (None = standard error is).
    Raises UsageError or StoreError for data that do not fit.
    """
    data = config.model.data
    if data.blend is not None:
        return _open_blend(config)
    if data.store is None:
        raise UsageError(
            "model.data.store is not set",
            "training reads a chunk store",
            "model.data.store=STORE (retro prepare writes one)",
        )
    store = _open_store(config, data.store)
    if data.questions is not None:
        return _open_questions(config, store, say or Reporter().say)
    return _open_sequences(config, store)


def _open_sequences(config: Config, store: Store) -> RunData:
    m, data = config.model, config.model.data
    table = _open_table(m, store, data.neighbors)
    if table is not None:  # so that the run keeps it when there are more tables later
        data.neighbors = table_name(table)
    shares = split_documents(store, data.splits_string)
    has_own_valid = data.valid_store is not None
    trained = np.arange(store.num_documents) if has_own_valid else shares["train"]
    train = Sequences.of_model(m, store, trained, table, trained)
    if data.self_neighbor_steps and not train.holds_itself:
        raise UsageError(
            f"model.data.self_neighbor_steps={data.self_neighbor_steps} cannot be used",
            f"{store.folder} is not one of the stores that its neighbors come from",
            f"retro neighbors {store.folder} --stores {store.folder} ...",
        )
    fingerprints = {"store": store.fingerprint, "tokenizer": store.manifest["tokenizer"]}
    if table is not None:
        fingerprints["neighbors"] = table.fingerprint
    valid, validation = None, {}
    if has_own_valid:
        other = _open_store(config, str(data.valid_store))
        store.coding.check(other.coding)
        other_table = _open_table(m, other, data.valid_neighbors)
        if other_table is not None:
            data.valid_neighbors = table_name(other_table)
        valid = Sequences.of_model(m, other, np.arange(other.num_documents), other_table, None)
        validation["valid_store"] = other.fingerprint
    elif len(shares["valid"]):
        valid = Sequences.of_model(m, store, shares["valid"], table, trained)
    warning = describe_copies(valid, train) if valid is not None else None
    return RunData(train, valid, store, fingerprints=fingerprints, warning=warning, validation=validation)


def _open_blend(config: Config) -> RunData:
    """The stores of `model.data.blend`. What is held out is `valid_store`, or the first store's validation share."""
    data = config.model.data
    weights, paths = read_blend(data.blend or ())
    _refuse_beside_blend(config, paths)
    first, neighbors = paths[0], data.neighbors
    opened: list[RunData] = []
    names: set[str | None] = set()
    for number, path in enumerate(paths):
        own = deepcopy(config)
        own.model.data.store, own.model.data.neighbors, own.model.data.blend = path, neighbors, None
        store = _open_store(config, path)
        if opened:
            opened[0].store.coding.check(store.coding)
        opened.append(_open_sequences(own, store))
        names.add(own.model.data.neighbors)
        if not number:
            data.store = first
            data.valid_neighbors = own.model.data.valid_neighbors
    if len(names) == 1:  # else no one name finds them all: each store is asked for its only table again
        (data.neighbors,) = names
    prints = dict(opened[0].fingerprints)
    for number, other in enumerate(opened[1:], 2):
        prints |= {f"{name} {number}": mark for name, mark in other.fingerprints.items() if name != "tokenizer"}
    valid = opened[0].valid
    streams = [part.train for part in opened if isinstance(part.train, Sequences)]
    _hold_out_everywhere(streams)
    warnings = [describe_copies(valid, stream) for stream in streams] if isinstance(valid, Sequences) else []
    warning = next((text for text in warnings if text is not None), None)
    return RunData(
        Blend(streams, weights),
        valid,
        store=opened[0].store,
        fingerprints=prints,
        warning=warning,
        validation=opened[0].validation,
    )


def _hold_out_everywhere(streams: list[Sequences]) -> None:
    """What one store holds out is nobody's neighbor: the tables of the others may have it too."""
    reading = [stream for stream in streams if stream.table is not None]
    held_out = [stream.held_out for stream in reading]
    for number, stream in enumerate(reading):
        for marks in held_out[:number] + held_out[number + 1 :]:
            stream.hold_out(marks)


def _refuse_beside_blend(config: Config, paths: list[str]) -> None:
    """Raise UsageError for settings that a blend cannot have."""
    data = config.model.data
    for key, value, is_refused, why in (
        (
            "model.data.store",
            data.store,
            data.store not in (None, paths[0]),
            "the stores are those of model.data.blend",
        ),
        ("model.data.questions", data.questions, data.questions is not None, "questions have one store"),
        ("model.data.dataloader_type", "single", data.dataloader_type == "single", "a blend has no end"),
        ("model.fit_cross_attention", True, config.model.fit_cross_attention, "it is fitted to one store's neighbors"),
    ):
        if is_refused:
            raise UsageError(
                f"{key}={value} cannot be used with model.data.blend", why, f"leave {key} or the blend out"
            )


def _open_store(config: Config, folder: str) -> Store:
    """Raises UsageError for one of other chunks or with more tokens than the model's."""
    m, store = config.model, Store(folder)
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
    return store


def _open_table(m: ModelConfig, store: Store, name: str | None) -> NeighborTable | None:
    return NeighborTable(find_table(store, name), store) if m.retrieval else None


def _open_questions(config: Config, store: Store, say: Callable[[str], None]) -> RunData:
    m, data = config.model, config.model.data
    if data.self_neighbor_steps:
        raise UsageError("model.data.self_neighbor_steps cannot be used", "questions have neighbors of their own")
    search = question_search([store], data.question_retriever, m.r) if data.question_neighbors != "data" else None

    def opened(path: str) -> Questions:
        rows = read_questions(path, data.question_template, say)
        common = (rows, store, path, m.encoder_seq_length, m.num_neighbors, m.r, data.question_neighbors, search)
        found = QuestionGroups(*common, settings=data) if m.reads_prefix else Questions(*common)
        if found.num_left_out:
            say(f"{path}: {found.num_left_out:,} questions are longer than {m.encoder_seq_length:,} tokens: left out")
        return found

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
    return RunData(train, valid, store, prints, validation=validation)


def question_search(
    stores: list[Store], retriever: str, retrieved_length: int, building: Building | None = None
) -> Search:
    """Retrieval for questions from `stores`."""
    found = Retriever(stores, retriever, building=building)

    def search(texts: Iterable[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        return found.loader.gather(found.search(list(texts), k)[0], retrieved_length)

    return search


def run_config(
    checkpoint_folder: Path,
    overrides: list[str],
    needed: Collection[str] = places.READ,
    is_strict: bool = False,
    read_as: ModelConfig | None = None,
    alone: ModelConfig | None = None,
) -> Config:
    """The settings a checkpoint's run was started with, with overrides; an imported checkpoint's are its model's. Paths
    are those where the data lie now, of which the `needed` ones must be there (places.py; `is_strict`: another store in
    the place of the run's is refused). `read_as`: a plain decoder that was opened to read in front; `alone`: a model
    whose file is no checkpoint.

    Raises MissingInputError for a run without config.yaml, or whose data are not there, StoreError where it is not what
    the run wrote.
    """
    done = {
        "init_from": None,
        "data.blend": None,  # its first store is what is held out from
        "fit_cross_attention": False,
        "freeze_decoder": False,
        "unfreeze_step": None,
        "unfreeze_every": None,
        **{f"lora.{name}": value for name, value in asdict(LoraConfig()).items()},
        "optim.sched.min_lr": 0.0,  # of schedules that earlier versions took
        "optim.sched.constant_steps": 0,
    }  # what they did is in the settings and weights
    file: str | None = None
    found: dict[str, str] = {}
    if alone is not None or checkpoint.is_imported(checkpoint_folder):
        done |= vars(alone or read_config(checkpoint_folder))
    else:
        run = checkpoint_folder.parent.parent
        file = str(run / record.SETTINGS_FILE)
        record.check_settings(Path(file))
        state = checkpoint.read_trainer(checkpoint_folder)
        trained = state.get("fingerprints", {}) | state.get("validation", {})
        found = places.located(run, Path(file), named_keys(overrides), trained, needed, is_strict=is_strict)
    settings = [(f"model.{key}", value) for key, value in done.items()]
    named = named_keys(overrides)
    keys = {f"model.{name}": name for name in IN_FRONT if name != "chunk_size" or "model.chunk_size" not in named}
    last: list[tuple[str, Any]] = []
    if read_as is not None:
        last = [(key, getattr(read_as, name)) for key, name in keys.items()]
        last.append(("model.max_position_embeddings", read_as.most_tokens or 0))  # however long the sequences are
    return load_config([*settings, *found.items(), *overrides, *last], file=file)


def store_chunk_size(checkpoint_folder: Path, overrides: list[str]) -> int | None:
    """Tokens a chunk of what a checkpoint is evaluated on; None = no store is named."""
    store = training_store(checkpoint_folder, overrides)
    return None if store is None else store.chunk_size


def training_store(checkpoint_folder: Path, overrides: list[str]) -> Store | None:
    """The store of a checkpoint's data; None = none is named."""
    of_data = [text for text in overrides if text.lstrip("+").startswith("model.data.")]
    alone = ModelConfig(retrieval=False) if checkpoint_folder.is_file() else None
    store = run_config(checkpoint_folder, of_data, places.ALL, is_strict=True, alone=alone).model.data.store
    return None if store is None else Store(store)


def open_evaluation(
    checkpoint_folder: Path,
    model: ModelConfig,
    overrides: list[str],
    share: str,
    say: Callable[[str], None] = lambda line: None,
    *,
    tokenizer: Tokenizer | None = None,
) -> Sequences | Questions:
    """The documents of a share (train, valid, test, all) of a run's data, for the model of one of its checkpoints; or of a file
    that is none, with its `tokenizer`.

    With a validation store of its own, valid is that store and the other shares are of the training store. Raises
    StoreError for a store of another tokenizer, or for a RETRO of another chunk size.
    """
    read_as = model if model.reads_prefix else None
    alone = None if tokenizer is None else model
    config = run_config(checkpoint_folder, overrides, places.ALL, is_strict=True, read_as=read_as, alone=alone)
    data = open_data(config)
    if tokenizer is None:
        coding = checkpoint.read_coding(checkpoint_folder, data.store.chunk_size)
    else:
        coding = Coding(str(checkpoint_folder), tokenizer.fingerprint, data.store.chunk_size, "model")
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
        store,
        documents,
        sequence_length=m.encoder_seq_length,
        table=data.train.table,
        num_neighbors=model.num_neighbors,
        retrieved_length=model.r,
        database_documents=shares["train"],
    )
    assert isinstance(data.train, Sequences), "a run is evaluated on one store"
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


def order_of(config: Config) -> Order:
    data = config.model.data
    is_cyclic = data.dataloader_type == "cyclic"
    is_shuffled = is_cyclic if data.shuffle_documents is None else data.shuffle_documents
    return Order(config.seed, is_shuffled, is_cyclic)


def stream_settings(config: Config) -> dict[str, Any]:
    """The settings that decide which batch a step sees: a resumed run must have the same."""
    data, order = config.model.data, order_of(config)
    kept = {"order": "sequences shuffled" if order.is_cyclic else "the corpus'"}
    return {
        "seed": config.seed,
        "sequences_per_step": sequences_per_step(config),
        "splits_string": data.splits_string,
        "dataloader_type": data.dataloader_type,
        "shuffle_documents": order.is_shuffled,
        **(
            {} if order.is_cyclic and order.is_shuffled else kept
        ),  # earlier versions had another order, and no such entry
        "neighbor_dropout": data.neighbor_dropout,
        **({} if data.blend is None else {"blend": read_blend(data.blend)[0]}),
        **{key: getattr(data, key) for key in LATER if getattr(data, key)},  # earlier versions had no such entry
    }


def validation_mark(config: Config, data: RunData, limit: int | None) -> str | None:
    """Of what a validation of `limit` batches measures: losses with another mark are of something else, and are not
    compared with it. None = nothing is validated.
    """
    if data.valid is None or limit == 0:
        return None
    m, settings = config.model, config.model.data
    read = hashlib.sha256()
    for rows in data.valid.batch_rows(m.micro_batch_size, limit):
        read.update(rows.astype(np.int64).tobytes())
    table = data.valid.table
    parts: dict[str, Any] = {
        "data": data.fingerprints | data.validation,
        "store": data.valid.store.fingerprint,
        "sequences": read.hexdigest(),
        "neighbors": None if table is None else table.fingerprint,
        **{name: getattr(m, name) for name in ("retrieval", "reading", "num_neighbors", "retrieved_length")},
    }
    if settings.questions is not None:  # where questions of a batch are distractors of each other
        names = [item.name for item in fields(settings) if item.name.startswith("question_")]
        parts |= {"batch": m.micro_batch_size, **{name: getattr(settings, name) for name in names}}
    return hashlib.sha256(files.json_bytes(parts, is_sorted=True)).hexdigest()


def steps_of_data(config: Config, data: RunData) -> int | None:
    """Optimizer steps that the training data gives; None = any number. Raises UsageError where it is less than one.

    A function of what every process has, so that all stop at the same step.
    """
    count = data.train.num_sequences(order_of(config))
    if count is None:
        return None
    steps = count // sequences_per_step(config)
    if not steps:
        raise UsageError(
            f"model.data.dataloader_type=single gives {count:,} sequences",
            f"a step takes {sequences_per_step(config):,}: there is none",
            "a smaller model.global_batch_size, or model.data.dataloader_type=cyclic",
        )
    return steps
