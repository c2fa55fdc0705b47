"""`retro generate`: continues a prompt, reading neighbors."""

import argparse
import contextlib
import gc
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retro_engine.cli import flags, memory
from retro_engine.errors import UsageError
from retro_engine.threads import wait_shortly

if TYPE_CHECKING:
    from retro_engine.api import Retro
    from retro_engine.config import Config
    from retro_engine.generate.request import Generation, Request
    from retro_engine.memory.next_token import MemoryBeside
    from retro_engine.retrieval.hit import NeighborSource

READS = (
    "inference.", "checkpoint_dir", "checkpoint_name", "prompt", "neighbors", "cluster_type", "megatron_amp_O2",
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "retro_model_file", "trainer.devices",
    "trainer.num_nodes", "trainer.precision", *flags.IN_FRONT,
)  # fmt: skip
REQUEST = (  # flags of the request: each is a setting's other name
    ("--max-new-tokens", "inference.tokens_to_generate", int, "N", "tokens to generate (default 64)"),
    ("--min-new-tokens", "inference.min_tokens_to_generate", int, "N", "the document does not end before (default 0)"),
    ("--temperature", "inference.temperature", float, "T", "sample; 0 takes the likeliest token"),
    ("--top-k", "inference.top_k", int, "N", "sample from the N likeliest tokens"),
    ("--top-p", "inference.top_p", float, "P", "sample from the likeliest tokens of this probability together"),
    ("--repetition-penalty", "inference.repetition_penalty", float, "X", "above 1: what was said becomes unlikely"),
    ("--stop", "inference.end_strings", str, "TEXT", "the text ends before it; may be repeated"),
    ("--k", "inference.retro_inference.retro_num_neighbors", int, "N", "neighbors (default: the model's)"),
)
GREEDY = "inference.greedy"


def add(commands: flags.Commands) -> None:
    sub = flags.command(commands, "generate", run, "continue a prompt, reading neighbors", READS)
    sub.add_argument("path", nargs="?", metavar="RUN", help=f"{flags.MODEL_HELP} (or checkpoint_dir=)")
    flags.add_device(sub)
    sub.add_argument("prompt", nargs="?")
    sub.add_argument("-i", "--interactive", action="store_true", help="one prompt a line from standard input")
    for flag, key, kind, metavar, about in REQUEST:
        action = "append" if flag == "--stop" else "store"
        sub.add_argument(flag, dest=key, type=kind, metavar=metavar, action=action, help=about)
    sub.add_argument("--seed", type=int, default=0)
    flags.add_sources(sub)
    flags.add_encodings(sub)
    library = "a live library to read from; with --stores from both, and --retriever LIBRARY'S,STORES'"
    sub.add_argument("--library", metavar="FOLDER", help=library)
    weights = "of --library and --stores"
    sub.add_argument("--source-weights", nargs=2, type=float, default=[1.0, 1.0], metavar="W", help=weights)
    sub.add_argument("--dtype", choices=flags.WEIGHTS, help="of the weights (default: as saved)")
    flags.add_neighbors(sub)
    flags.add_in_front(sub)
    memory.add_flags(sub, "needed with --memory")
    sub.add_argument("--no-retrieval", action="store_true")
    sub.add_argument("--show-neighbors", action="store_true")


def run(args: argparse.Namespace) -> int:
    wait_shortly()
    from retro_engine.config import load_config

    asked = load_config(args.overrides)  # NeMo's commands name the checkpoint, the prompt and the neighbors here
    _refuse_many_processes(asked)
    if asked.trainer.precision != "auto":
        flags.reporter(args).say("note: trainer.precision means nothing here: --dtype chooses the weights' type")
    settings = [*args.overrides, *_settings_of_flags(args, asked)]
    prompt = args.prompt if args.prompt is not None else asked.prompt
    args.neighbors = args.neighbors or asked.neighbors
    if (prompt is None) != args.interactive:
        raise UsageError(
            "there is no prompt, or one too many", "", "retro generate RUN 'The prompt', or retro generate RUN -i"
        )
    retro = _open(args, args.path or _named_checkpoint(asked))
    beside = _memory(args, retro)
    sources = None if args.no_retrieval else args.stores or args.library
    reads = flags.settle_reading(args, retro, bool(sources or args.neighbors))
    is_retrieving = reads and not args.no_retrieval and not args.neighbors
    with _source(args, retro) if is_retrieving else contextlib.nullcontext() as source:
        if reads:
            flags.read_in_front(args, retro, None if source is None else source.coding.chunk_size)
        generator = flags.open_generator(args, retro, source, beside)
        flags.say_device(args, retro)
        request = _request(args, retro, settings)
        for text in [prompt] if prompt is not None else map(str.rstrip, sys.stdin):
            if text or not args.interactive:
                _print_generation(args, text, generator.generate_all([replace(request, prompt=text)])[0], request.echo)
    return 0


def _open(args: argparse.Namespace, path: str | Path) -> "Retro":
    """The model: its files are hashed while PyTorch is loaded, and no garbage is looked for meanwhile."""
    from retro_engine.data.checkpoint_files import opening

    gc.disable()
    try:
        opened = path if Path(path).suffix == ".gguf" else opening(path)
        from retro_engine.api import Retro

        return Retro.from_pretrained(opened, args.dtype, args.device)
    finally:
        gc.enable()


def _memory(args: argparse.Namespace, retro: "Retro") -> "MemoryBeside | None":
    """What --memory names, with its weights."""
    from retro_engine.generate.open_memory import open_beside

    if args.memory is None:
        memory.check_flags(args)
        return None
    return open_beside(args.memory, args.memory_weights, retro.folder, retro.tokenizer, args.overrides)


def _refuse_many_processes(asked: "Config") -> None:
    for key, value in (("devices", asked.trainer.devices), ("num_nodes", asked.trainer.num_nodes)):
        if value not in (None, 1, -1):
            raise UsageError(
                f"trainer.{key}={value} cannot be used", "generation runs in one process", f"trainer.{key}=1"
            )


def _settings_of_flags(args: argparse.Namespace, asked: "Config") -> list[tuple[str, Any]]:
    """The flags of REQUEST as settings; one that says how to sample also says whether to.

    Raises UsageError for a flag whose setting is typed too and says another thing.
    """
    from retro_engine.config import flat_keys, named_keys

    named, said = named_keys(args.overrides, with_environment=False), flat_keys(asked)
    given = [(flag, key, getattr(args, key)) for flag, key, *_ in REQUEST if getattr(args, key) is not None]
    sampling = [(flag, value) for flag, _, value in given if flag in ("--temperature", "--top-k", "--top-p")]
    if sampling:
        is_greedy = ("--temperature", 0) in sampling
        given = [item for item in given if item[0] != "--temperature" or not is_greedy]
        given.append((" ".join(map(str, sampling[0])), GREEDY, is_greedy))
    for flag, key, value in given:
        if key in named and said[key] != value:
            typed = flag if key == GREEDY else f"{flag} {value}"
            raise UsageError(f"{typed} and {key}={said[key]}", "they say different things", "name one")
    return [(key, value) for _, key, value in given]


def _named_checkpoint(config: "Config") -> Path:
    """NeMo's checkpoint_dir and checkpoint_name: a run's folder, and the name of one of its checkpoints or of none."""
    from retro_engine.progress import note

    if config.checkpoint_dir is None:
        raise UsageError("there is no model", "RUN or checkpoint_dir= names one", "retro generate RUN 'The prompt'")
    folder = Path(config.checkpoint_dir)
    named = [folder / part / str(config.checkpoint_name) for part in ("", "checkpoints")]
    found = next((path for path in named if config.checkpoint_name and path.is_dir()), None)
    if found is None and config.checkpoint_name:
        note(f"{folder} has no checkpoint {config.checkpoint_name}: the best one is read")
    return found or folder


@contextlib.contextmanager
def _source(args: argparse.Namespace, retro: "Retro") -> "Iterator[NeighborSource]":
    """The stores, the library, or both, each with its half of --retriever (stores beside a library: lexical)."""
    from retro_engine.library.library import Library
    from retro_engine.library.live import LiveRetriever

    first, comma, second = args.retriever.partition(",")
    if comma and not (args.library and args.stores):
        raise UsageError(f"--retriever {args.retriever} names two", "one source is read", "--library with --stores")
    if not args.library:
        yield flags.open_retriever(args, retro)
        return
    stores = flags.open_retriever(args, retro, second or "lexical") if args.stores else None
    with Library(args.library, is_read_only=True) as library:
        mode = flags.library_mode(first, library.file.settings["embedder"])
        yield LiveRetriever(library, stores, args.source_weights, mode)


def _request(args: argparse.Namespace, retro: "Retro", asked: list[Any]) -> "Request":
    """A request without its prompt; what nobody asked for is as the run samples."""
    from retro_engine.config import load_config
    from retro_engine.generate.request import Request
    from retro_engine.generate.sampling import Sampling

    names = ("greedy", "temperature", "top_k", "top_p")
    defaults = [(f"inference.{name}", getattr(retro.sampling, name)) for name in names]
    settings = load_config([*defaults, *asked], say=lambda note: None).inference
    if settings.greedy and not retro.sampling.greedy:  # asked for here: how the run samples is of no use
        settings = load_config(asked, say=lambda note: None).inference
    inference = settings.retro_inference
    sampling = Sampling(
        greedy=settings.greedy,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        seed=args.seed,
        repetition_penalty=settings.repetition_penalty,
        min_tokens=settings.min_tokens_to_generate,
    )
    has_logprobs = settings.compute_logprob or settings.all_probs
    return Request(
        prompt="",
        max_new_tokens=settings.tokens_to_generate,
        sampling=sampling,
        neighbors=[] if args.no_retrieval else args.neighbors,
        num_neighbors=inference.retro_num_neighbors,
        retrieved_length=inference.retro_gpt_retrieved_length,
        stop=tuple(settings.end_strings),
        logprobs=(retro.model.config.vocab_size if settings.all_probs else 0) if has_logprobs else None,
        echo=has_logprobs,
        add_bos=settings.add_BOS,
        pad_prompt=settings.pad_prompt,
        passed_over=0 if inference.reuse_top else inference.ft_neighbours,
    )


def _print_generation(args: argparse.Namespace, prompt: str, out: "Generation", is_echoed: bool) -> None:
    for note in out.notes:
        flags.reporter(args).say(f"note: {note}")
    if args.json:
        segments = [{"text": s.text, "neighbors": [hit.to_json() for hit in s.neighbors]} for s in out.segments]
        result = {"prompt": prompt, "text": out.text, "segments": segments, "finish_reason": out.finish_reason}
        if out.logprobs is not None:
            result["logprobs"] = [vars(logprob) for logprob in out.logprobs]
        print(json.dumps(result))
        return
    print(out.text if is_echoed else f"{prompt}{out.text}", flush=True)  # whoever reads a pipe waits for no exit
    for logprob in out.logprobs or []:
        print(f"   {'' if logprob.logprob is None else f'{logprob.logprob:.4f}':>10}  {logprob.text!r}")
    for segment in out.segments if args.show_neighbors else []:
        print(f"\n-- {segment.text!r} could read:")
        for hit in segment.neighbors:
            shown = " ".join(hit.text.split())
            print(f"   {hit.score:8.2f}  {hit.where}: {shown[:160]}")
