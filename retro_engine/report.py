"""`retro report`: one self-contained HTML page on a run: what retrieval gave, how it trained, what it read.

Reads RUN/{run.json,config.yaml,metrics.jsonl} and the best checkpoint, evaluates a share of the run's documents,
and writes RUN/report.html: no script, no other file, no other host. Letters: M chunk length, K neighbors.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retro_engine.api import Retro
from retro_engine.config import ModelConfig
from retro_engine.data import files
from retro_engine.data.batches import Sequences
from retro_engine.data.store import Store
from retro_engine.errors import StoreError, UsageError
from retro_engine.evaluate.compare import Comparison, compare, flops_against, show_flops, show_gain
from retro_engine.evaluate.losses import show_interval
from retro_engine.generate.explain import Explanation, removed_lengths, text_log_probs
from retro_engine.model.device import describe_device
from retro_engine.model.flops import token_flops
from retro_engine.model.retro import RetroModel
from retro_engine.progress import Reporter
from retro_engine.retrieval.hit import Hit
from retro_engine.retrieval.overlap import chunk_overlaps
from retro_engine.retrieval.search import store_hit
from retro_engine.train.checkpoint import find_checkpoint, is_imported, read_trainer
from retro_engine.train.differences import Compared, Differences, differences, show_differences
from retro_engine.train.record import METRICS_FILE, checked_lines, read_facts
from retro_engine.train.run_data import open_evaluation

NUM_SAMPLES = 5
COPIED = 3  # tokens in a row that also follow the chunk are marked
WIDTH, HEIGHT = 640, 220  # of a curve
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --faint: #6a737d; --line: #d8dee4; --a: #0969da;
  --b: #bc4c00; --c: #1a7f37; --mark: #ffe28a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117; --faint: #8d96a0; --line: #30363d;
  --a: #58a6ff; --b: #f0883e; --c: #3fb950; --mark: #5c4a00; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; display: inline; }
nav a { color: var(--a); margin-right: 1rem; white-space: nowrap; }
details.section { margin-top: 1.6rem; } summary { cursor: pointer; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 7rem; } th { color: var(--faint); font-weight: 600; }
.verdict { font-size: 1.1rem; border-left: 4px solid var(--a); padding: .4rem 1rem; }
.note, figcaption { color: var(--faint); font-size: .9rem; } figure { margin: 1rem 0; }
svg { width: 100%; min-width: 32rem; height: auto; } svg text { fill: var(--faint); font: 11px system-ui, sans-serif; }
.chunk { border-top: 1px solid var(--line); padding: .6rem 0; } .neighbor { margin-left: 1.5rem; font-size: .9rem; }
mark { background: var(--mark); color: inherit; } pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; }
.scroll { overflow-x: auto; }
"""


@dataclass(frozen=True)
class Section:
    """A part of the page under its heading, which folds; `body` is HTML."""

    heading: str
    body: str
    is_open: bool = True

    @property
    def place(self) -> str:
        return self.heading.lower().replace(" ", "-")

    def __str__(self) -> str:
        state = " open" if self.is_open else ""
        heading = f"<summary><h2>{html.escape(self.heading)}</h2></summary>"
        return f'<details class="section" id="{self.place}"{state}>{heading}{self.body}</details>'


def write_report(
    run: Path,
    decoders: dict[str, Path] | None = None,
    share: str = "valid",
    limit: int | None = 32,
    reporter: Reporter | None = None,
    device: str = "auto",
) -> Path:
    """Evaluate the run's best checkpoint on a share of its documents (at most `limit` batches) and write the page.

    `decoders`: runs of plain decoders to compare with, by name. Raises MissingInputError for a run that is not there.
    """
    reporter = reporter or Reporter("quiet")
    checkpoint = find_checkpoint(run)
    if is_imported(checkpoint):
        raise UsageError(f"{run} was imported", "a report is on a run", f"retro eval {run} model.data.store=STORE")
    folder = checkpoint.parent.parent
    say = lambda text: reporter.say(f"note: {text}")  # noqa: E731
    metrics = [row for _, row in checked_lines(folder / METRICS_FILE, say) if isinstance(row.get("step"), int)]
    facts = read_facts(folder, say)
    retro = Retro.from_pretrained(checkpoint, device=device)
    sequences = open_evaluation(checkpoint, retro.model.config, [], share, reporter.say)
    if not isinstance(sequences, Sequences):
        raise UsageError(f"{run} was tuned on questions", "the report is on text", "retro eval RUN --questions FILE")
    opened = {name: _decoder(name, path, checkpoint, retro.device) for name, path in (decoders or {}).items()}
    others = {name: other.model for name, other in opened.items()}
    differs = {name: differences(_compared(retro), _compared(other)) for name, other in opened.items()}
    reporter.say(describe_device(retro.device))
    comparison = None
    if retro.model.config.retrieval:
        comparison = compare(retro.model, sequences, retro.tokenizer.token_bytes(), others, limit)
    sections = [_curves(metrics)]
    if comparison is not None:
        samples = _sampled(sequences)
        sections = [
            *_comparison(comparison, share, differs),
            _flops(retro.model.config, others),
            _curves(metrics),
            _neighbor_quality(sequences),
            _samples(sequences.store, samples),
            _explanations(retro, sequences.store, samples),
        ]
    command = f"retro report {run} --share {share}" + (f" --limit {limit}" if limit is not None else " --all")
    named = {name: f"{name}={path}" if name != str(path) else name for name, path in (decoders or {}).items()}
    command += "".join(f" --against {text}" for text in named.values())
    sections += [_throughput(metrics), _environment(facts, checkpoint, command)]
    lead = f'<p class="verdict">{html.escape(verdict(comparison, differs, share))}</p>'
    page = _page(folder.name, lead, [section for section in sections if section.body])
    files.publish(folder / "report.html", [page.encode()])
    reporter.say(f"wrote {folder / 'report.html'}")
    return folder / "report.html"


def verdict(comparison: Comparison | None, differs: dict[str, Differences], share: str) -> str:
    """What is true whatever came out; `differs`: what else than retrieval is other of each decoder."""
    if comparison is None:
        return "A plain decoder: it reads no neighbors, so there is nothing to compare."
    name = next(iter(differs), "off")
    gain, count = comparison.gain(name), len(comparison.losses["on"].nats)
    over = f"over {count:,} document{'s' * (count != 1)}, {'every share' if share == 'all' else f'the {share} share'}"
    interval = f"{abs(gain['gain']):.1%} (95 % interval {show_interval(gain['low'], gain['high'], '.1%')}, {over})"
    word = "fewer" if gain["gain"] >= 0 else "more"
    if not differs:
        return (
            f"With its neighbors the model needs {interval} {word} bits per byte than with retrieval off. Whether retrieval "
            "pays, only a decoder trained without it can say: --against NAME=RUN."
        )
    if differs[name]:
        return (
            f"The run needs {interval} {word} bits per byte than the plain decoder {name}; that is not of retrieval alone, for "
            f"they differ in more: {show_differences(differs[name])}."
        )
    if gain["low"] > 0:
        return f"Retrieval pays: {interval} fewer bits per byte than the plain decoder {name}."
    if gain["high"] < 0:
        return f"Retrieval costs: {interval} more bits per byte than the plain decoder {name}."
    return f"Retrieval makes no measurable difference against the plain decoder {name}: {interval}."


def _page(title: str, lead: str, sections: Sequence[Section] = ()) -> str:
    """`lead`: HTML before the contents and the sections."""
    links = " ".join(f'<a href="#{section.place}">{html.escape(section.heading)}</a>' for section in sections)
    contents = f"<nav>{links}</nav>" if sections else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>"
        f"{lead}{contents}{''.join(map(str, sections))}</body></html>\n"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    head = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def _text(note: str, text: str) -> str:
    """A text as it stands, and what it is."""
    return f"{_note(note)}<pre>{html.escape(text)}</pre>"


def _folded(title: str, body: str, is_open: bool = False) -> str:
    """A part of a section that shows its title alone until somebody opens it."""
    return f"<details{' open' if is_open else ''}><summary>{html.escape(title)}</summary>{body}</details>"


def _compared(retro: Retro) -> Compared:
    return Compared(retro.folder, retro.model.config, retro.model.num_parameters)


def _comparison(comparison: Comparison, share: str, differs: dict[str, Differences]) -> list[Section]:
    rows = []
    for name, losses in comparison.losses.items():
        low, high = losses.interval()
        saved = "" if name == "on" else show_gain(comparison.gain(name))
        rows.append(
            (name, f"{losses.bits_per_byte:.4f}", show_interval(low, high, ".4f"), f"{losses.perplexity:.2f}", saved)
        )
    groups = [
        (
            row["overlap"],
            f"{row['chunks']:,}",
            *("" if row[n] is None else f"{row[n]:.4f}" for n in comparison.chunks.nats),
        )
        for row in comparison.chunks.groups()
    ]
    documents, tokens = len(comparison.losses["on"].nats), int(comparison.losses["on"].tokens.sum())
    given = _table(("retrieval", "bits per byte", "95 % interval", "perplexity", "on saves"), rows)
    given += _note(f"{documents} documents of the {share} share, {tokens:,} tokens; intervals over documents.")
    for name, found in differs.items():
        if found:
            given += _note(f"{name} differs from this run in more than retrieval: {show_differences(found)}.")
    about = "Bits per byte of what a chunk's neighbors can condition, by the share of it that they state in runs of 8 tokens."
    by_overlap = _table(("overlap with neighbors", "chunks", *comparison.chunks.nats), groups) + _note(about)
    return [Section("What retrieval gives", given), Section("Gain by overlap", by_overlap)]


def _flops(config: ModelConfig, decoders: dict[str, RetroModel]) -> Section:
    """What a token takes of each model, neighbors whole and none dropped."""
    rows = []
    for name, c in (("this run", config), *((name, decoder.config) for name, decoder in decoders.items())):
        flops = token_flops(c)
        shown = [
            f"{flops[key] / 1e6:,.1f}" if key in flops else "-" for key in ("training", "inference", "kept", "plain")
        ]
        rows.append((name, *shown))
    notes = [
        f"FLOPs of this run against {name}: {show_flops(flops_against(config, d.config))}."
        for name, d in decoders.items()
    ]
    header = ("million FLOPs a token", "training", "inference", "kept encodings", "retrieval off")
    return Section("FLOPs", _table(header, rows) + "".join(map(_note, notes)))


def _curves(metrics: list[dict[str, Any]]) -> Section:
    loss = [(row["step"], row["loss"]) for row in metrics if row.get("loss") is not None]
    curves = [("training loss", "--a", loss)] if loss else []
    bits = []
    for mode, color in (("on", "--c"), ("off", "--b")):
        key = f"valid_bits_per_byte_{mode}"
        points = [(row["step"], row[key]) for row in metrics if row.get(key) is not None]
        if points:
            bits.append((f"retrieval {mode}", color, points))
    figures = [_figure("Nats per token", curves), _figure("Validation, bits per byte", bits)]
    return Section("Training", "".join(figures))


def _figure(title: str, curves: Sequence[tuple[str, str, Sequence[tuple[float, float]]]]) -> str:
    """A line chart as SVG; empty without points."""
    points = [point for _, _, curve in curves for point in curve]
    if not points:
        return ""
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*points))
    left, top = 48, 12
    plot_width, plot_height = WIDTH - left - 8, HEIGHT - top - 28
    place = lambda x, y: (  # noqa: E731
        left + plot_width * (x - x0) / max(1e-9, x1 - x0),
        top + plot_height * (1 - (y - y0) / max(1e-9, y1 - y0)),
    )
    parts = []
    for value in np.linspace(y0, y1, 4):
        _, y = place(x0, value)
        parts.append(
            f'<path d="M{left} {y:.1f}H{WIDTH - 8}" stroke="var(--line)"/><text x="4" y="{y + 4:.1f}">{value:.2f}</text>'
        )
    parts.append(f'<text x="{left}" y="{HEIGHT - 6}">step {x0:,.0f}</text>')
    parts.append(f'<text x="{WIDTH - 8}" y="{HEIGHT - 6}" text-anchor="end">step {x1:,.0f}</text>')
    for number, (name, color, curve) in enumerate(curves):
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in curve)
        parts.append(f'<polyline fill="none" stroke="var({color})" stroke-width="2" points="{path}"/>')
        if len(curve) == 1:
            x, y = place(*curve[0])
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="var({color})"/>')
        parts.append(
            f'<text x="{WIDTH - 12}" y="{top + 14 + 14 * number}" text-anchor="end" style="fill:var({color})">{name}</text>'
        )
    return (
        f'<figure class="scroll"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">{"".join(parts)}</svg>'
        f"<figcaption>{html.escape(title)}</figcaption></figure>"
    )


def _neighbor_quality(sequences: Sequences) -> Section:
    assert sequences.table is not None
    rows = sequences.in_order()
    rows = rows[rows >= 0]
    shown = sequences.neighbor_ids(rows[:, None])[:, 0]
    first = sequences.table.ids(rows, sequences.num_neighbors)
    passed_over = (shown != first).any(-1)
    cells = [
        ("chunks", f"{len(rows):,}"),
        ("chunks without a neighbor", f"{(shown[:, 0] < 0).mean():.1%}"),
        ("neighbors missing", f"{(shown < 0).mean():.1%}"),
        ("chunks whose best neighbors were passed over (held-out or own document)", f"{passed_over.mean():.1%}"),
        ("neighbors kept a chunk", f"{sequences.table.num_neighbors}"),
        ("retriever", sequences.table.manifest["retriever"].get("name", "")),
    ]
    return Section("Neighbors", _table(("", ""), cells))


@dataclass
class _Sample:
    """A chunk of `store`, the tokens that follow it, and its neighbors: as they are read, [k, r] and [k] valid ones."""

    row: int
    follows: list[int]
    hits: list[Hit]
    tokens: np.ndarray
    lengths: np.ndarray


def _sampled(sequences: Sequences) -> list[_Sample]:
    """Chunks whose neighbors state most of what follows, spread over the best fifth."""
    m, all_rows = sequences.store.chunk_size, sequences.in_order()[:400]
    assert sequences.table is not None
    batch = sequences.batch(all_rows, "on")
    overlap = chunk_overlaps(batch, m, COPIED)
    order = np.argsort(-overlap.reshape(-1), kind="stable")
    best = order[: max(NUM_SAMPLES, len(order) // 5)]
    found = []
    for flat in best[np.linspace(0, len(best) - 1, min(NUM_SAMPLES, len(best))).astype(int)]:
        s, u = divmod(int(flat), overlap.shape[1])
        if all_rows[s, u] < 0:
            continue
        first = u * m + m - 1
        follows = [int(t) for t in batch.labels[s, first : first + m] if t >= 0]
        ids = sequences.neighbor_ids(all_rows[s : s + 1])[0, u]
        tokens, lengths = sequences.neighbor_tokens(ids)
        hits = []
        for chunk, text, length in zip(ids[ids >= 0], tokens[ids >= 0], lengths[ids >= 0]):
            database, local = sequences.table.locate(int(chunk))
            read = sequences.store.tokenizer.decode(text[:length])
            hits.append(replace(store_hit(database, local), text=read, continuation=""))
        found.append(_Sample(int(all_rows[s, u]), follows, hits, tokens[ids >= 0], lengths[ids >= 0]))
    return found


def _samples(store: Store, samples: Sequence[_Sample]) -> Section:
    out = [_note(f"Marked: runs of {COPIED} tokens or more that also follow the chunk.")]
    for number, sample in enumerate(samples):
        parts = [_text("the chunk", store.text(sample.row))]
        parts.append(_text("what follows", store.tokenizer.decode(sample.follows)))
        for k, hit in enumerate(sample.hits):
            text = _marked(sample.tokens[k, : sample.lengths[k]].tolist(), sample.follows, store.tokenizer)
            name = _note(f"neighbor {k + 1}: {hit.document} {hit.title}")
            parts.append(f'<div class="neighbor">{name}<pre>{text}</pre></div>')
        body = _folded(_name(store, sample), "".join(parts), is_open=number == 0)
        out.append(f'<div class="chunk">{body}</div>')
    return Section("What it read", "".join(out))


def _name(store: Store, sample: _Sample) -> str:
    return " ".join(store.name(store.document_of(sample.row)))


def _marked(text: list[int], follows: list[int], tokenizer: Any) -> str:
    """The neighbor as HTML, with what also stands in `follows` marked."""
    grams = {tuple(follows[i : i + COPIED]) for i in range(len(follows) - COPIED + 1)}
    is_copied = [False] * len(text)
    for i in range(len(text) - COPIED + 1):
        if tuple(text[i : i + COPIED]) in grams:
            is_copied[i : i + COPIED] = [True] * COPIED
    out, start = [], 0
    for i in range(1, len(text) + 1):
        if i == len(text) or is_copied[i] != is_copied[start]:
            piece = html.escape(tokenizer.decode(text[start:i]))
            out.append(f"<mark>{piece}</mark>" if is_copied[start] else piece)
            start = i
    return "".join(out)


def heat_map(found: Explanation) -> str:
    """One row a neighbor: the text, each token shaded by how much that neighbor changed its log-probability."""
    largest = max(1e-9, float(np.abs(found.token_changes).max(initial=0.0)))
    rows = []
    for hit, change, row in zip(found.neighbors, found.changes, found.token_changes):
        cells = []
        for piece, value in zip(found.pieces, row):
            color = "var(--c)" if value > 0 else "var(--b)"
            share = 100 * abs(float(value)) / largest
            shade = f"background: color-mix(in srgb, {color} {share:.0f}%, transparent)"
            cells.append(f'<span style="{shade}" title="{value:+.3f} nats">{html.escape(piece)}</span>')
        name = f"{hit.document} {hit.title}".strip()
        read = _text(f"{name}: {change:+.3f} nats in all", hit.text)
        rows.append(f'<div class="neighbor">{read}<pre>{"".join(cells)}</pre></div>')
    on, off = float(found.log_probs_T.sum()), float(found.off_T.sum())
    note = _note(
        f"Log-probability {on:.3f} nats, {off:.3f} without neighbors. Green: likelier because of this neighbor, "
        f"orange: less likely; full color is {largest:.2f} nats."
    )
    return note + "".join(rows)


def heat_map_page(prompt: str, found: Explanation) -> str:
    """`heat_map` as a page of its own."""
    return _page("What the neighbors did", _text("after", prompt) + heat_map(found))


def _explanations(retro: Retro, store: Store, samples: Sequence[_Sample]) -> Section:
    """What each neighbor changed of what follows the sampled chunks; the whole document before the chunk is not read."""
    model, tokenizer = retro.model, store.tokenizer
    out: list[str] = []
    for sample in samples:
        follows = sample.follows
        if not sample.hits or len(follows) < 2 or model.config.partial_chunk != "last":
            continue
        prompt = store.rows(sample.row, sample.row + 1)[0][0].tolist()
        if tokenizer.eod_id in (*prompt, *follows[:-1]):
            continue  # a cache reads one document
        lengths = removed_lengths(sample.lengths)
        values = text_log_probs(
            model, prompt, follows, tokens_KR=sample.tokens, lengths_VK=lengths, pad_id=tokenizer.pad_id
        )
        pieces = [tokenizer.decode([token]) for token in follows]
        found = Explanation(
            pieces=pieces, neighbors=sample.hits, log_probs_T=values[0], without_KT=values[1:-1], off_T=values[-1]
        )
        body = _folded(_name(store, sample), _text("after", store.text(sample.row)) + heat_map(found), is_open=not out)
        out.append(f'<div class="chunk">{body}</div>')
    return Section("What each neighbor changed", "".join(out))


def _throughput(metrics: list[dict[str, Any]]) -> Section:
    rates = [row["tokens_per_s"] for row in metrics if row.get("tokens_per_s")]
    if not rates:
        return Section("Throughput and memory", "")
    last = [row for row in metrics if "train_s" in row][-1]
    cells = [
        ("tokens a second (median)", f"{np.median(rates):,.0f}"),
        (
            "MFU, share of the rate of matmuls (median)",
            f"{np.median([row['mfu'] for row in metrics if row.get('mfu')]):.1%}",
        ),
        ("tokens seen", f"{last['tokens_seen']:,}"),
        ("seconds of training", f"{last['train_s']:,.0f}"),
        ("peak memory, MiB", f"{last.get('peak_mib', 0):,.0f}"),
    ]
    return Section("Throughput and memory", _table(("", ""), cells), is_open=False)


def _environment(facts: dict[str, Any], checkpoint: Path, command: str) -> Section:
    keys = ("version", "git", "seed", "python", "torch", "machine", "threads")
    cells = [(key, facts.get(key)) for key in keys] + [("checkpoint", checkpoint.name)]
    trained = " ".join(str(word) for word in facts.get("command", []))
    body = _table(("", ""), cells) + _text("trained by", trained) + _text("this page by", command)
    return Section("Environment", body, is_open=False)


def _decoder(name: str, path: Path, against: Path, device: torch.device) -> Retro:
    """The plain decoder of another run, trained on the same store and the same share of it."""
    folder = find_checkpoint(path)
    mine, theirs = read_trainer(against), read_trainer(folder)
    for what, here, there in (
        ("store", mine["fingerprints"]["store"][:12], theirs["fingerprints"]["store"][:12]),
        ("splits_string", mine["stream"]["splits_string"], theirs["stream"]["splits_string"]),
    ):
        if here != there:
            raise StoreError(
                f"{name} was trained on {what} {there}", f"this run on {here}", "compare runs of the same data"
            )
    decoder = Retro.from_pretrained(folder, device=device)
    if decoder.model.config.retrieval:
        raise UsageError(
            f"{name} reads neighbors", "a decoder trained without retrieval is the rival", "model.retrieval=false"
        )
    return decoder
