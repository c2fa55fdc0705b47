"""`retro prepare`: files -> tokens and chunks. Reads text files; writes a chunk store.

Memory does not grow with the corpus: documents stream through in batches, the tokenizer trains on a bounded
sample. Two runs over the same files write the same bytes. Interrupted, the same command goes on after the last
finished shard: the text before it is read again, but not encoded.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from retro_engine.data import corpus, files, store
from retro_engine.data.corpus import Document, Reader, in_batches
from retro_engine.data.encoding import encoded
from retro_engine.data.inputs import KNOWN, SetAside, find_files, say_linked, shown, tell
from retro_engine.data.lossiness import Loss, Sample, as_json, describe, find_losses
from retro_engine.data.splitting import settle
from retro_engine.data.store import Store, StoreWriter
from retro_engine.data.tokenizer import Tokenizer, auto_vocab_size
from retro_engine.errors import MissingInputError, OutOfResourceError, StoreError, UsageError

SAMPLE_BYTES = 32 << 20  # of text that the tokenizer is trained on
LOSS_SAMPLE = 1 << 20  # characters that are tried for whether they come back
LOSS_TEXT = 1 << 16  # of one document
BATCH_BYTES = 2 << 20  # of text encoded at once


def prepare(
    inputs: Sequence[str | Path],
    out: Path,
    tokenizer: str = "auto",
    vocab_size: int | None = None,
    chunk_size: int = 64,
    reader: Reader | None = None,
    is_strict: bool = False,
    say: Callable[[str], None] = lambda line: None,
    end_token: str | None = None,
    workers: int = 1,
) -> Store:
    """Write the store `out` from files and folders ("-" = standard input); `tokenizer` auto trains one.

    `end_token` ends a document, where the files of `tokenizer` do not say which or another is wanted. `workers`: processes
    that encode, 1 = this one; the store is the same whatever their number. Raises MissingInputError, UsageError or StoreError; with `is_strict` also for the first row set aside.
    """
    if workers < 1:
        raise UsageError(f"--workers {workers} cannot be used", "at least one process encodes")
    reader = reader or Reader(split="auto")
    has_stdin = "-" in map(str, inputs)
    named = [given for given in inputs if str(given) != "-"]
    paths, passed_over = find_files(named, of_any_kind=reader.format is not None)
    tell(passed_over, say, f"{shown(out)}/{store.SET_ASIDE_FILE}")
    say_linked(paths, named, say)
    for row in passed_over:
        _refuse_if_strict(row, is_strict)
    if not paths and not has_stdin:
        raise MissingInputError(f"no input in {', '.join(map(shown, inputs))}", KNOWN)
    if tokenizer == "auto" and end_token is not None:
        raise UsageError(
            "--end-token cannot be used", "a tokenizer that is trained here has its own", "name --tokenizer"
        )
    given = None if tokenizer == "auto" else _given_tokenizer(tokenizer, end_token, say)
    with files.locked(out):
        store.refuse_published(out)
        spooled = corpus.spool_standard_input(out, reader.max_document_bytes) if has_stdin else None
        try:
            if spooled is not None:
                paths.append(spooled)
            reader = replace(reader, split=settle(reader.split, paths, reader.kind, say))
            mark = files.fingerprint([asdict(reader), [[str(path), files.sha256_file(path)] for path in paths]])
            chosen = given or _trained_tokenizer(
                out,
                files.fingerprint([mark, vocab_size, SAMPLE_BYTES]),
                lambda: _train_tokenizer(reader, paths, vocab_size, is_strict, say),
            )
            writer = StoreWriter(out, chosen, chunk_size, store.SHARD_ROWS, mark)
            if writer.counts["documents"]:
                say(f"{writer.counts['documents']:,} documents are in finished shards already")
            for row in passed_over:
                writer.pass_over(row)
            made = writer.close(as_json(_fill(writer, reader.read(paths), is_strict, workers)))
        finally:
            if spooled is not None:
                spooled.unlink(missing_ok=True)
    _say_what_was_made(made, shown(out), say)
    return made


def _given_tokenizer(path: str, end_token: str | None, say: Callable[[str], None]) -> Tokenizer:
    found = Tokenizer.load(path, end_token)
    if found.num_holes:
        say(
            f"note: {found.num_holes:,} of the tokenizer's {found.vocab_size:,} ids have no token: a model has rows for them"
        )
    return found


def _say_what_was_made(made: Store, out: str, say: Callable[[str], None]) -> None:
    """What was set aside, repeats, is lost, or is too little."""
    if made.counts["set_aside"]:
        say(f"{made.counts['set_aside']} rows set aside, listed in {out}/{store.SET_ASIDE_FILE}")
    copies = made.num_documents - len(np.unique(made.contents))
    if copies:
        say(
            f"note: {copies:,} of {made.num_documents:,} documents repeat others (white space aside): no neighbor is of a copy"
        )
    if losses := made.manifest["losses"]:
        say(
            "note: the tokenizer loses or changes text, which neither neighbors nor the model will see as it is; bits per byte count its own bytes"
        )
        for line in describe(losses):
            say(f"  lost: {line}")
    if made.num_rows == made.num_documents:
        say(
            f"note: every document is shorter than one chunk of {made.chunk_size} tokens; --chunk-size takes a smaller one"
        )
    if made.num_documents == 1:
        say(
            "note: one document only: it has no neighbors from other documents, and nothing can be held out "
            "(--split blank-lines makes several of a text)"
        )


def store_from_documents(documents: Sequence[Document], out: Path, tokenizer: Tokenizer, chunk_size: int) -> Store:
    """A store of documents that are in memory."""
    with files.locked(out):
        writer = StoreWriter(out, tokenizer, chunk_size)
        return writer.close(as_json(_fill(writer, iter(documents), is_strict=True)))


def _fill(writer: StoreWriter, rows: Iterator[Document | SetAside], is_strict: bool, workers: int = 1) -> list[Loss]:
    """Encode while other batches are read and packed. Returns what the tokenizer loses of a sample of the text."""
    sample = Sample(LOSS_SAMPLE)
    batches = in_batches(_unfinished(writer, rows, is_strict, sample), BATCH_BYTES)
    for documents, ids in encoded(writer.tokenizer, batches, workers):
        for document, its_ids in zip(documents, ids):
            writer.add(document, its_ids)
    return find_losses(writer.tokenizer, sample.texts)


def _unfinished(
    writer: StoreWriter, rows: Iterator[Document | SetAside], is_strict: bool, sample: Sample
) -> Iterator[Document]:
    """The documents that are in no finished shard."""
    finished = writer.counts["documents"]
    for row in rows:
        if isinstance(row, SetAside):
            _refuse_if_strict(row, is_strict)
            writer.set_aside(row)
            continue
        sample.add(row.text[:LOSS_TEXT])
        if finished:
            finished -= 1
        else:
            yield row


def _trained_tokenizer(out: Path, mark: str, trains: Callable[[], Tokenizer]) -> Tokenizer:
    """The tokenizer that an interrupted run trained on the same inputs (`mark`), else a new one, published with its marker."""
    path = out / store.TOKENIZER_FILE
    marker_path = path.with_name(path.name + ".ok")
    try:
        marker = files.read_json(marker_path)
        if marker["inputs"] == mark and marker["sha256"] == files.sha256_file(path):
            return Tokenizer.load(path)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    trained = trains()
    files.publish(path, [trained.json.encode()])
    marker = {"inputs": mark, "sha256": files.sha256_file(path)}
    files.publish(marker_path, [json.dumps(marker, sort_keys=True).encode() + b"\n"])
    return trained


def _train_tokenizer(
    reader: Reader, paths: list[Path], vocab_size: int | None, is_strict: bool, say: Callable[[str], None]
) -> Tokenizer:
    """Train on an even sample of the documents: every 2^i-th, so that at most SAMPLE_BYTES are held."""
    sample = Sample(SAMPLE_BYTES)
    first_bad: SetAside | None = None
    total = 0
    for row in reader.read(paths):
        if isinstance(row, SetAside):
            _refuse_if_strict(row, is_strict)
            first_bad = first_bad or row
            continue
        total += len(row.text)
        sample.add(row.text)
    if not sample.texts:
        why = f"{first_bad.source}: {first_bad.reason}" if first_bad else "the input is empty"
        raise StoreError("there is no document", why, "name other files")
    size = vocab_size or auto_vocab_size(total)
    say(
        f"training a tokenizer: at most {size:,} entries, on {sum(map(len, sample.texts)) / 1e6:.1f} of {total / 1e6:.1f} MB"
    )
    return Tokenizer.train(sample.texts, size)


def _refuse_if_strict(row: SetAside, is_strict: bool) -> None:
    """Also what the system let nobody read (no descriptors, a disk that fails): a store that is published without it lacks it."""
    if row.is_unread:
        do = "run the same command again: what is written stays (or leave this file out)"
        raise OutOfResourceError(f"{row.source} was not read", row.reason, do)
    if is_strict and row.is_fault:
        raise StoreError(f"{row.source}: {row.reason}", "--strict stops at the first row that cannot be used")
