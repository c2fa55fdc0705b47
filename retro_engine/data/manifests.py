"""What a manifest of each kind holds: type and bounds of every field, in one place.

`files.read_manifest` and `files.write_manifest` check against it, so no reader meets a value that it does not expect,
whoever wrote the file, and no writer adds a field that is not described here. A check is a function of a value and of
what the value is called; it raises ValueError.
"""

import math
import re
from collections.abc import Callable
from typing import Any

Check = Callable[[Any, str], None]

MOST = 1 << 48  # rows, documents, bytes
MOST_IDS = (1 << 31) - 1  # of a vocabulary
MOST_ENTRIES = 1 << 20  # of a list or a mapping
MOST_CHARACTERS = 1 << 12


def _refuse(value: Any, where: str, expected: str) -> None:
    raise ValueError(f"{where} is {value!r:.60}, not {expected}")


def whole(low: int, high: int) -> Check:
    def check(value: Any, where: str) -> None:
        if type(value) is not int or not low <= value <= high:
            _refuse(value, where, f"a whole number of {low} to {high}")

    return check


def real(low: float, high: float) -> Check:
    def check(value: Any, where: str) -> None:
        if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
            _refuse(value, where, f"a number of {low} to {high}")

    return check


def text(pattern: str = r"[^\0\ud800-\udfff]*", most: int = MOST_CHARACTERS) -> Check:
    def check(value: Any, where: str) -> None:
        if not isinstance(value, str) or len(value) > most or not re.fullmatch(pattern, value, re.DOTALL):
            _refuse(value, where, f"text like {pattern}")

    return check


def yes_or_no(value: Any, where: str) -> None:
    if not isinstance(value, bool):
        _refuse(value, where, "true or false")


def loss(value: Any, where: str) -> None:
    """What training measured, if it did: also NaN and infinity."""
    if value is not None and type(value) not in (int, float):
        _refuse(value, where, "a number")


def maybe(check: Check) -> Check:
    return lambda value, where: None if value is None else check(value, where)


def each(check: Check) -> Check:
    """A list of such values."""

    def check_list(value: Any, where: str) -> None:
        if not isinstance(value, list) or len(value) > MOST_ENTRIES:
            _refuse(value, where, "a list")
        for number, item in enumerate(value):
            check(item, f"{where}[{number}]")

    return check_list


def mapping(key: Check, check: Check) -> Check:
    """Any names with such values."""

    def check_mapping(value: Any, where: str) -> None:
        if not isinstance(value, dict) or len(value) > MOST_ENTRIES:
            _refuse(value, where, "an object")
        for name, item in value.items():
            key(name, f"a name in {where}")
            check(item, f"{where}.{name}")

    return check_mapping


def anything(value: Any, where: str, depth: int = 8) -> None:
    """What nobody computes with: it is only shown."""
    if isinstance(value, str):
        text()(value, where)
    elif isinstance(value, list | dict):
        if depth == 0 or len(value) > MOST_ENTRIES:
            _refuse(value, where, "so deep or long")
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            anything(item, f"{where}.{name}", depth - 1)


def fields(required: dict[str, Check], optional: dict[str, Check] | None = None) -> Check:
    """These names; more may be there of a later version, which nobody reads."""
    known = required | (optional or {})

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            _refuse(value, where, "an object")
        missing = sorted(required.keys() - value.keys())
        if missing:
            raise ValueError(f"{where} has no {', '.join(missing)}")
        for name in known.keys() & value.keys():
            known[name](value[name], f"{where}.{name}")

    return check


COUNT = whole(0, MOST)
ID = whole(0, MOST_IDS - 1)
FINGERPRINT = text(r"[0-9a-f]{64}")
NAME = text(r"[A-Za-z0-9_.+-]{1,255}")
FILES = mapping(NAME, FINGERPRINT)  # name -> SHA-256
EMBEDDING = fields(
    {
        "name": NAME,
        "fingerprint": text(r"([0-9a-f]{64})?"),
        "width": whole(1, 1 << 16),
        "precision": text(r"fp32|bf16"),
        "pooling": text(r"model|mean"),
        "query_prompt": maybe(text()),
        "document_prompt": maybe(text()),
    }
)

STORE = {
    "chunk_size": whole(1, (1 << 16) - 1),
    "dtype": text(r"uint16|uint32"),
    "vocab_size": whole(1, MOST_IDS),
    "eod_id": ID,
    "pad_id": ID,
    "tokenizer": FINGERPRINT,
    "counts": fields(dict.fromkeys(("documents", "rows", "tokens", "bytes"), COUNT), {"set_aside": COUNT}),
    "shards": each(fields({"documents": COUNT, "rows": COUNT})),
    "files": FILES,
}
LOSS = fields({"kind": text(), "share": real(0, 1), "unit": text(), "before": text(), "after": text()})
STORE_OPTIONAL = {"minor": whole(0, 1 << 16), "losses": each(LOSS)}
NEIGHBORS = {
    "num_neighbors": whole(1, 1 << 16),
    "rows": COUNT,
    "query": FINGERPRINT,
    "databases": each(fields({"fingerprint": FINGERPRINT, "rows": COUNT, "path": text()})),
    "retriever": fields({}, {"name": text(), "weights": each(real(0, 1e9))}),
    "files": FILES,
}
EMBEDDINGS = {"embedding": EMBEDDING, "store": FINGERPRINT, "files": FILES}
INDEX = {"retriever": NAME, "store": FINGERPRINT, "chunks": COUNT, "files": FILES}
INDEX_OPTIONAL = {
    "k1": real(0, 100),
    "b": real(0, 1),
    "stopwords": text(),
    "analyzer": anything,  # analyzer.from_json looks at it
    "factory": text(r"[ -~]{1,200}"),
    "metric": text(r"ip|l2"),
    "index_rows": whole(1, MOST),
    "embeddings": FINGERPRINT,
    "embedding": EMBEDDING,
    "nprobe": whole(1, MOST_IDS),
    "recall": real(0, 1),
    "recall_k": COUNT,
    "recall_queries": COUNT,
}
ENCODINGS = {
    "format": whole(1, 1 << 16),
    "weights": FINGERPRINT,
    "tokenizer": FINGERPRINT,
    "store": FINGERPRINT,
    "r": whole(1, 1 << 24),
    "values": whole(1, MOST),  # of a token
    "files": FILES,
}
NGRAM = {
    "format": whole(1, 1 << 16),
    "tokenizer": FINGERPRINT,
    "store": FINGERPRINT,
    "vocab_size": whole(1, MOST_IDS),
    "eod_id": ID,
    "parts": each(fields({"documents": COUNT, "tokens": COUNT})),
    "files": FILES,
}
KNN = {
    "format": whole(1, 1 << 16),
    "weights": FINGERPRINT,
    "tokenizer": FINGERPRINT,
    "width": whole(1, 1 << 24),
    "states": whole(1, MOST),
    "files": FILES,
}
SEGMENT = {"library": FINGERPRINT, "documents": whole(1, MOST_IDS), "chunks": whole(1, MOST_IDS), "files": FILES}
SEGMENT_OPTIONAL = {"width": whole(1, 1 << 16), "recall_at_10": real(0, 1)}

# Files of a checkpoint, the settings of a library and the lines of a sweep, which have no kind and no version of their own.
COMPLETE = mapping(text(r"[A-Za-z0-9_.+-]{1,255}(/[A-Za-z0-9_.+-]{1,255})?"), FINGERPRINT)
TRAINER = fields(
    {"step": COUNT},
    {
        **dict.fromkeys(("tokens_seen", "good_steps"), COUNT),
        **dict.fromkeys(("train_s", "loss_scale"), real(0, 1e308)),
        "mean_loss": loss,
        "valid_loss": loss,
        "validated_on": maybe(FINGERPRINT),
        "precision": text(),
        "products": text(r"blas|onednn"),
        "processes": mapping(text(), COUNT),
        "fingerprints": mapping(text(), anything),
        "validation": mapping(text(), text()),
        "stream": mapping(text(), anything),
        "imported": anything,
        "from": text(),
    },
)
ADAPTERS = fields(
    {
        "base": text(),
        "fingerprint": FINGERPRINT,
        "rank": whole(1, MOST_ENTRIES),
        "alpha": real(0, 1e308),
        "targets": maybe(each(text())),
        "dropout": real(0, 1),
    }
)
GENERATION = fields(
    {"greedy": yes_or_no, "temperature": real(0, 1e308), "top_k": whole(0, MOST), "top_p": real(0, 1)},
)
SWEEP_CELL = fields(
    {"mup": yes_or_no, "width": COUNT, "rate": real(0, 1e308), "seed": whole(-MOST, MOST), "loss": loss}
)
SETTINGS = fields(
    {
        "tokenizer": text(r".*", 1 << 30),
        "chunk_size": whole(1, (1 << 16) - 1),
        "stride": whole(1, (1 << 16) - 1),
        "embedder": maybe(text()),
        "width": maybe(whole(1, 1 << 16)),
        "fingerprint": FINGERPRINT,
    }
)

KINDS: dict[str, tuple[dict[str, Check], dict[str, Check]]] = {  # required and optional fields
    "store": (STORE, STORE_OPTIONAL),
    "neighbors": (NEIGHBORS, {}),
    "embeddings": (EMBEDDINGS, {}),
    "index": (INDEX, INDEX_OPTIONAL),
    "encodings": (ENCODINGS, {}),
    "segment": (SEGMENT, SEGMENT_OPTIONAL),
    "ngram": (NGRAM, {}),
    "knn": (KNN, {}),
}


def check_manifest(kind: str, body: dict[str, Any]) -> None:
    """Raises ValueError for the first field that is missing or not what this kind holds there."""
    required, optional = KINDS[kind]
    fields(required, optional)(body, kind)
    anything(body, kind)


def check_names(kind: str, body: dict[str, Any]) -> None:
    """A writer's own check: what is not described here would be read unchecked."""
    required, optional = KINDS[kind]
    unknown = body.keys() - required.keys() - optional.keys()
    assert not unknown, f"{kind}: {sorted(unknown)} are not described in manifests.py"
