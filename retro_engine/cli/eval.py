"""`retro eval`: bits per byte with retrieval on, off, random or given; other figures are in eval_tasks.py."""

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retro_engine.cli import eval_memory, eval_tasks, flags, processes
from retro_engine.errors import UsageError

if TYPE_CHECKING:
    from retro_engine.api import Retro
    from retro_engine.data.batches import Sequences
    from retro_engine.data.questions import Questions
    from retro_engine.evaluate.losses import DocumentLosses
    from retro_engine.model.encodings import Encodings
    from retro_engine.model.retro import RetroModel
    from retro_engine.train.differences import Differences

READS = ("model.data.", "model.encoder_seq_length", "model.chunk_size", *flags.IN_FRONT)
ROUGH = 20  # documents: with fewer, an interval over them is said to be rough
PRECISIONS = {"fp32": "32", "bf16": "bf16-mixed"}  # of the model's products


def add(commands: flags.Commands) -> None:
    sub = flags.command(commands, "eval", run, "bits per byte with retrieval on, off, random or given", READS)
    sub.add_argument("path", metavar="RUN", help=flags.MODEL_HELP)
    flags.add_device(sub)
    flags.add_share(sub)
    modes = "of on,off,random,given (default on,off,random); questions: of retrieved,gold,random,off,prompt"
    sub.add_argument("--modes", help=modes)
    flags.add_neighbors(sub)
    flags.add_in_front(sub)
    sub.add_argument("--limit", type=int, help="batches, or questions, a mode")
    sub.add_argument("--dtype", choices=[*PRECISIONS], default="fp32", help="of the model's products")
    leak = "neighbors that state more of the next chunk are missing"
    sub.add_argument("--leak-limit", type=float, metavar="SHARE", help=leak)
    stride = "find neighbors anew every N tokens, of which a chunk has a multiple (modes on and off)"
    sub.add_argument("--stride", type=int, metavar="N", help=stride)
    flags.add_against(sub)
    sub.add_argument("--in-prompt", action="store_true", help="also the same decoder with the neighbors in its prompt")
    rounded = "the same with weights of these types, of bf16,int8,int4, as generate and serve have them"
    sub.add_argument("--weights", metavar="TYPES", help=rounded)
    words = "perplexity per word of FILE, the share's text as the papers count it"
    sub.add_argument("--words", metavar="FILE", help=words)
    sub.add_argument("--fail-if", metavar="EXPR", help="exit 6 when true, like 'bpb_on>bpb_off'")
    flags.add_sources(sub)
    eval_memory.add_flags(sub)
    eval_tasks.add_flags(sub)
    processes.add_flag(sub)


def run(args: argparse.Namespace) -> int:
    flags.check_limit(args.limit)
    if args.stride is not None:
        _check_stride(args)
    eval_memory.check_flags(args)
    for flag in ("questions", "lm_eval", "memory", "in_prompt"):
        if getattr(args, flag):
            processes.refuse_several(args, f"--{flag.replace('_', '-')}")
    if args.questions is not None or args.lm_eval is not None:
        return eval_tasks.run(args)
    if args.nproc is not None and not processes.are_started():
        return processes.start(args)
    with processes.joined(args) as args.parallel:
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    if args.stores is not None:
        raise UsageError("--stores is for --questions and --lm-eval", "documents have the neighbors of their table")
    if args.words is not None and args.limit is not None:
        raise UsageError("--words needs the whole share", "its words are those of all documents", "leave --limit out")
    from retro_engine.evaluate.compare import flops_against, gain_of
    from retro_engine.evaluate.gate import check_gate, check_readable
    from retro_engine.evaluate.perplexity import count_words, pick_modes
    from retro_engine.model.quantize import check_weights
    from retro_engine.retrieval.overlap import check_share
    from retro_engine.train.run_data import open_evaluation

    check_share("leak-limit", args.leak_limit)
    for weights in _types(args):
        check_weights(weights)
    named, words = flags.named_runs(args), None if args.words is None else count_words(Path(args.words))
    retro = _open(args, None)
    decoders = {name: _plain_decoder(path, retro) for name, path in named.items()}
    sequences = open_evaluation(
        retro.folder,
        retro.model.config,
        args.overrides,
        args.share,
        flags.reporter(args).say,
        tokenizer=retro.tokenizer if retro.folder.is_file() else None,
    )
    encodings = _encodings(args, retro, sequences)
    modes = pick_modes(args.modes, retro.model.config.retrieval, bool(args.neighbors))
    if args.in_prompt:
        _check_in_prompt(sequences)
    if args.fail_if and args.memory is None:
        check_readable(args.fail_if, [*modes, *decoders, *["prompt"] * args.in_prompt])
    flags.say_device(args, retro)
    if args.memory is not None:
        return _run_beside_memory(args, retro, sequences, modes, encodings, decoders=decoders)
    leaks = eval_memory.Leaks()
    results = _evaluate(args, retro, sequences, modes, encodings, leaks)
    leaks.sum_over(args.parallel)
    for weights in _types(args):
        model, what = _open(args, weights).model, f"evaluating {weights}"
        found = _losses(args, model, retro=retro, sequences=sequences, modes=modes, what=what)
        results |= {f"{mode} {weights}": losses for mode, losses in found.items()}
    summary = {mode: losses.summary() for mode, losses in results.items()}
    if words is not None:
        _add_word_perplexity(words, results, summary)
    gains, flops = {}, {}
    for name, decoder in decoders.items():
        what, plain = f"evaluating {name}", decoder.model
        losses = _losses(args, plain, retro=retro, sequences=sequences, modes=["off"], what=what)["off"]
        gains[name], summary[name] = gain_of(results[modes[0]], losses), losses.summary()
        flops[name] = flops_against(retro.model.config, plain.config)
    differs = _differing(retro, decoders)
    saves = {mode: gain_of(results["on"], results[mode]) for mode in modes if "on" in modes and mode != "on"}
    if args.json:
        about = {"checkpoint": str(retro.folder), "share": args.share}
        paired = {"saves": _finite(saves), "gains": _finite(gains), "flops": flops, "differs": differs}
        print(json.dumps({**about, **summary, **paired, **leaks.summary(args.leak_limit)}))
    else:
        _print_table(f"{retro.folder}", args.share, summary)
        leaks.tell(args.leak_limit)
        _print_rounding(modes, _types(args), summary)
        _print_saves(saves, summary[modes[0]]["documents"])
        _print_gains(modes[0], gains, summary, flops, differs)
    if args.fail_if:
        check_gate(args.fail_if, summary)
    return 0


def _run_beside_memory(
    args: argparse.Namespace,
    retro: "Retro",
    sequences: "Sequences | Questions",
    modes: list[str],
    encodings: "Encodings | None",
    decoders: "dict[str, Retro]",
) -> int:
    """The figures of --memory: each mode with and without it, and what the best of them saves against the others."""
    from retro_engine.evaluate.compare import gain_of, show_gain
    from retro_engine.evaluate.gate import check_gate

    leaks = eval_memory.Leaks()
    results, about = eval_memory.evaluate(
        args,
        retro,
        sequences,
        modes,
        encodings,
        precision=PRECISIONS[args.dtype],
        decoders={name: other.model for name, other in decoders.items()},
        leaks=leaks,
    )
    differs = _differing(retro, decoders)
    summary = {name: losses.summary() for name, losses in results.items()}
    first = eval_memory.beside(modes[0], about)
    gains = {name: gain_of(results[first], losses) for name, losses in results.items() if name != first}
    if args.json:
        head = {"checkpoint": str(retro.folder), "share": args.share}
        of_leaks = leaks.summary(args.leak_limit)
        print(json.dumps({**head, **summary, "memory": about, "gains": gains, "differs": differs, **of_leaks}))
    else:
        _print_table(f"{retro.folder}", args.share, summary)
        leaks.tell(args.leak_limit)
        print(
            f"memory: {about['tokens']:,} tokens, {about['bytes_per_token']:.2f} bytes each; weights {about['weights']}"
        )
        for name, gain in gains.items():
            print(f"{first} saves {show_gain(gain)} against {name}")
        _print_differences(differs)
    if args.fail_if:
        check_gate(args.fail_if, summary)
    return 0


def _check_stride(args: argparse.Namespace) -> None:
    """--stride with what it is not measured beside."""
    from retro_engine.evaluate.strides import MODES

    for flag in ("questions", "lm_eval", "leak_limit", "in_prompt", "memory", "neighbors"):
        if getattr(args, flag):
            name = flag.replace("_", "-")
            raise UsageError(f"--stride with --{name}", "it has neighbors of chunks", f"leave --{name} out")
    args.modes = args.modes or ",".join(MODES)
    if others := set(args.modes.split(",")) - {*MODES}:
        raise UsageError(f"--stride has no mode {', '.join(sorted(others))}", "", f"--modes {','.join(MODES)}")


def _types(args: argparse.Namespace) -> list[str]:
    return [] if args.weights is None else args.weights.split(",")


def _open(args: argparse.Namespace, weights: str | None) -> "Retro":
    """The model, told how it reads; `weights`: a type that they are rounded to."""
    from retro_engine.api import Retro
    from retro_engine.train.run_data import store_chunk_size

    retro = Retro.from_pretrained(args.path, weights, args.parallel.device if processes.are_started() else args.device)
    if flags.settle_reading(args, retro, bool(args.neighbors), changes_count=True):
        flags.read_in_front(args, retro, store_chunk_size(retro.folder, args.overrides))
    return retro


def _evaluate(
    args: argparse.Namespace,
    retro: "Retro",
    sequences: "Sequences | Questions",
    modes: list[str],
    encodings: "Encodings | None",
    leaks: eval_memory.Leaks,
) -> "dict[str, DocumentLosses]":
    """Each mode, and with --in-prompt the rival that needs no RETRO, on the same documents."""
    from retro_engine.data.batches import Sequences
    from retro_engine.evaluate.in_prompt import evaluate_in_prompt

    results = _losses(
        args,
        retro.model,
        retro=retro,
        sequences=sequences,
        modes=modes,
        what="evaluating",
        encodings=encodings,
        leaks=leaks,
    )
    if not args.in_prompt:
        return results
    assert isinstance(sequences, Sequences), "_check_in_prompt"
    token_bytes, precision = retro.tokenizer.token_bytes(), PRECISIONS[args.dtype]
    what, count = "evaluating neighbors in the prompt", flags.count_sequences(args, sequences)
    with flags.reporter(args).progress(what, count, "sequences") as meter:
        prompt = evaluate_in_prompt(
            retro.model,
            sequences,
            token_bytes=token_bytes,
            limit=args.limit,
            advance=meter.advance,
            precision=precision,
        )
    return {**results, "prompt": prompt}


def _check_in_prompt(sequences: "Sequences | Questions") -> None:
    from retro_engine.data.batches import Sequences

    if not isinstance(sequences, Sequences) or sequences.table is None:
        raise UsageError(
            "--in-prompt has no neighbors to read", "the run has no neighbor table", "retro eval a RETRO's run"
        )


def _losses(
    args: argparse.Namespace,
    model: "RetroModel",
    retro: "Retro",
    sequences: "Sequences | Questions",
    modes: list[str],
    what: str,
    *,
    encodings: "Encodings | None" = None,
    leaks: eval_memory.Leaks | None = None,
) -> "dict[str, DocumentLosses]":
    """Losses of `retro`'s model, or of another one with its tokenizer."""
    from retro_engine.evaluate.perplexity import Given, evaluate
    from retro_engine.evaluate.strides import Stride
    from retro_engine.generate.generator import encode_neighbors

    stride = None
    if args.stride is not None and model.config.retrieval:
        stride = Stride(sequences, args.stride, model)
    given = None
    if "given" in modes:
        given = Given(*encode_neighbors(retro.tokenizer, args.neighbors, model.config.r))
    count = flags.count_sequences(args, sequences) * len(modes) // args.parallel.world
    with flags.reporter(args).progress(what, count, "sequences") as meter:
        return evaluate(
            model,
            sequences,
            retro.tokenizer.token_bytes(),
            modes,
            limit=args.limit,
            precision=PRECISIONS[args.dtype],
            advance=meter.advance,
            given=given,
            leak_limit=args.leak_limit,
            dropped=(leaks or eval_memory.Leaks()).add,
            shard=(args.parallel.rank, args.parallel.world),
            reduce=args.parallel.sum_arrays,
            encodings=encodings,
            stride=stride,
        )


def _encodings(args: argparse.Namespace, retro: "Retro", sequences: "Sequences | Questions") -> "Encodings | None":
    """Those of --encodings: they are rounded to bf16, so none that lie beside a store change a figure unasked."""
    from retro_engine.data.batches import Sequences
    from retro_engine.generate.encode_store import open_encodings
    from retro_engine.model.encodings import Encodings

    if not args.encodings:
        return None
    c, what = retro.model.config, f"--encodings {args.encodings[0]} cannot be used"
    if not c.reads_prefix:
        raise UsageError(what, "a whole pass encodes what an encoder reads itself (model.reading=prefix: it need not)")
    if not isinstance(sequences, Sequences) or sequences.table is None:
        raise UsageError(what, "encodings are of a store, and no neighbor table is read", "leave it out")
    files = open_encodings(retro.folder, c, retro.tokenizer, sequences.table.databases, args.encodings)
    return Encodings(retro.model, 0, files)


def _plain_decoder(path: str, retro: "Retro") -> "Retro":
    """The model of a run that reads no neighbors, with the tokenizer of `retro`."""
    from retro_engine.api import Retro

    other = Retro.from_pretrained(path, device=retro.device)
    if other.model.config.retrieval:
        raise UsageError(
            f"{path} is a RETRO", "--against takes plain decoders (model.retrieval=false)", "retro eval it"
        )
    if other.tokenizer.json != retro.tokenizer.json:
        raise UsageError(
            f"{path} has another tokenizer", "losses are compared token by token", "train it on the same store"
        )
    return other


def _differing(retro: "Retro", decoders: "dict[str, Retro]") -> "dict[str, Differences]":
    """What else than retrieval is other of each decoder: the gain is of that too."""
    from retro_engine.train.differences import Compared, differences

    mine, *others = (Compared(r.folder, r.model.config, r.model.num_parameters) for r in (retro, *decoders.values()))
    return {name: differences(mine, other) for name, other in zip(decoders, others)}


def _add_word_perplexity(words: int, results: "dict[str, DocumentLosses]", summary: dict[str, dict[str, Any]]) -> None:
    """exp(nats of the share / words of the file): comparable between tokenizers, as WikiText-103's papers report it."""
    from retro_engine.evaluate.perplexity import word_perplexity

    for mode, losses in results.items():
        summary[mode] |= {"word_perplexity": word_perplexity(losses, words), "words": words}


def _print_table(checkpoint: str, share: str, summary: dict[str, dict[str, Any]]) -> None:
    from retro_engine.evaluate.losses import show_interval

    first = next(iter(summary.values()))
    counts = f"{first['documents']} documents, {first['tokens']:,} tokens, {first['bytes']:,} bytes"
    print(f"{checkpoint}: {counts} ({share})")
    print(f"{'retrieval':14}{'bits per byte':>15}{'95 % interval':>20}{'perplexity':>12}{'loss':>9}")
    for mode, s in summary.items():
        low, high = s["interval"] or (math.nan, math.nan)
        interval = show_interval(low, high, ".4f")
        print(f"{mode:14}{s['bits_per_byte']:>15.4f}{interval:>20}{s['perplexity']:>12.2f}{s['loss']:>9.4f}")


def _print_rounding(modes: list[str], types: list[str], summary: dict[str, dict[str, Any]]) -> None:
    for mode in modes:
        for weights in types:
            more = summary[f"{mode} {weights}"]["perplexity"] / summary[mode]["perplexity"] - 1
            print(f"{mode}: weights in {weights} have {abs(more):.2%} {'more' if more >= 0 else 'less'} perplexity")


def _finite(gains: dict[str, dict[str, float]]) -> dict[str, dict[str, float | None]]:
    """Bounds that too few documents do not give are null: JSON has no NaN."""
    return {
        name: {part: value if math.isfinite(value) else None for part, value in gain.items()}
        for name, gain in gains.items()
    }


def _print_saves(saves: dict[str, dict[str, float]], documents: int) -> None:
    """What neighbors give this model, paired over documents; and whether there are enough of those."""
    from retro_engine.evaluate.compare import show_gain
    from retro_engine.evaluate.losses import MIN_UNITS

    if saves:
        shown = ", ".join(f"{show_gain(gain)} against {mode}" for mode, gain in saves.items())
        print(f"on saves {shown}: share of the bits, {documents} documents, paired")
    if documents < MIN_UNITS:
        print(f"too few documents for an interval: {documents}, at least {MIN_UNITS} are drawn from")
    elif documents < ROUGH:
        print(f"few documents: intervals over {documents} are rough")


def _print_differences(differs: "dict[str, Differences]") -> None:
    from retro_engine.train.differences import show_differences

    for name, found in differs.items():
        if found:
            print(f"  {name} differs: {show_differences(found)}; the gain is of that too")


def _print_gains(
    mode: str,
    gains: dict[str, dict[str, float]],
    summary: dict[str, dict[str, Any]],
    flops: dict[str, dict[str, float]],
    differs: "dict[str, Differences]",
) -> None:
    from retro_engine.evaluate.compare import show_flops, show_gain

    for name, gain in gains.items():
        print(f"{mode} saves {show_gain(gain)} against {name}; FLOPs a token: {show_flops(flops[name])}")
        _print_differences({name: differs[name]})
    for name, s in summary.items():
        if "word_perplexity" in s:
            print(f"{name:12} perplexity per word {s['word_perplexity']:.2f}")
