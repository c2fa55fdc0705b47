"""`retro serve`. Every flag also reads RETRO_SERVE_FLAG."""

import argparse
import os
from typing import Any

from retro_engine.cli import flags
from retro_engine.cli.accounts import default_accounts, open_accounts
from retro_engine.cli.renamed import FLAGS
from retro_engine.errors import MissingExtraError, UsageError
from retro_engine.threads import wait_shortly
from retro_engine.train.__main__ import DEVICES


def add(commands: flags.Commands) -> None:
    sub = flags.command(commands, "serve", run, "OpenAI's API, live documents and a web page on a trained model")

    def flag(name: str, default: Any = None, **about: Any) -> None:
        found: Any = _variable(name)
        if found is not None and "nargs" in about:
            found = found.split()
            found = [about["type"](part) for part in found] if "type" in about else found
        elif found is not None and about.get("action") == "store_true":
            found = found.lower() in ("1", "true", "yes")
        sub.add_argument(f"--{name}", default=default if found is None else found, **about)

    sub.add_argument("path", nargs="?", metavar="RUN", help=f"{flags.MODEL_HELP} (or --reader)")
    flag("reader", metavar="NAME|DIR", help="a reader in place of a run: questions are answered from --library")
    flag("base", metavar="FILE", help="the reader's .gguf file (default: where retro fetch puts it)")
    flag("library", metavar="FOLDER", help="live documents (default RUN/library; made when it is not there)")
    follow = "folders whose files the library holds: what is added, changed and deleted there is read within seconds"
    flag("follow", [], nargs="+", metavar="DIR", help=follow)
    embedder = "of a library that is made: none, hash (default), minilm, or a SentenceTransformers folder or hub id"
    flag("embedder", metavar="NAME", help=embedder)
    stores = "published stores to read as well, by words (default: the run's; none: no store)"
    flag("stores", nargs="*", metavar="STORE", help=stores)
    flag("encodings", nargs="+", metavar="FOLDER", help="of retro encode, elsewhere than beside their store")
    retriever = "of the library: lexical (bm25), dense or hybrid (default lexical)"
    flag("retriever", "lexical", metavar="NAME", help=retriever)
    flag("source-weights", [1.0, 1.0], nargs=2, type=float, metavar="W", help="of the library, and of the stores")
    flag("dtype", choices=flags.WEIGHTS, help="of the weights (default: as saved)")
    flag("device", choices=DEVICES, help="a GPU where there is one (auto), or trainer.accelerator=")
    flag("host", "127.0.0.1", help="address to listen on; others than this machine's own need users or keys")
    flag("port", 8000, type=int, help="0 takes a free one")
    flag("name", help="of the model (default: the run's)")
    flag("alias", [], nargs="+", metavar="NAME", help="other names of the model that requests may use")
    flag("accounts", default_accounts(), metavar="FILE", help="users and keys")
    flag("allow-host", [], nargs="+", metavar="NAME", help="host names that this server is reached by")
    origins = "pages of these origins may ask with a key, exactly as browsers send them (https://chat.example.org)"
    flag("allow-origin", [], nargs="+", metavar="ORIGIN", help=origins)
    flag("root-path", "", metavar="PATH", help="that a proxy puts before every address, taken off or not (/retro)")
    flag("log", "none", choices=("none", "text", "json"), help="a line for every request, never what it says")
    spans = "send OpenTelemetry spans of answers (gen_ai.*, never what they say) to a collector; the extra otel"
    flag("otlp", metavar="URL", help=spans)
    flag("proxy", False, action="store_true", help="trust X-Forwarded-For and -Proto of a proxy on this machine")
    flag("metrics-token", metavar="TOKEN", help="GET /metrics from elsewhere takes it")
    flag("nemo-compat", False, action="store_true", help="also PUT /generate and PUT /knn, as NeMo's services")
    flag("max-batch", 8, type=int, metavar="N", help="sequences generated at once")
    flag("max-waiting", 64, type=int, metavar="N", help="requests in the queue; more get 429")
    flag(
        "reading",
        choices=("prefix", "prompt", "none"),
        help="of a plain decoder: neighbors in front of its keys, in its prompt, or none (default prefix where it can)",
    )
    flag("neighbor-bytes", type=int, metavar="N", help="of encoded neighbors that are kept, 0 = none (default 512 MiB)")
    about = "beside the model: ngram (of the run's store: retro memory ngram), or the folder of such a memory"
    flag("memory", metavar="NAME", help=about)
    flag(
        "memory-weights",
        metavar="FILE",
        help="of retro eval --memory-out, or one weight for every suffix that is found",
    )
    shares = "callers use each other's remembered prompts: the time of an answer then tells what others have asked"
    flag("share-prefixes", False, action="store_true", help=shares)


def _variable(name: str) -> str | None:
    """What the environment says of a flag, whose earlier names are read too."""
    names = [f"--{name}", *(old for old, new in FLAGS["serve"].items() if new == f"--{name}")]
    variables = [f"RETRO_SERVE_{name.removeprefix('--').upper().replace('-', '_')}" for name in names]
    return next((os.environ[variable] for variable in variables if variable in os.environ), None)


def run(args: argparse.Namespace) -> int:
    wait_shortly()
    try:
        import prometheus_client  # noqa: F401
        import pydantic  # noqa: F401
        import python_multipart  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(f"{error.name} is not installed", "serve needs it", "pip install 'retro-engine[serve]'") from error  # fmt: skip
    from retro_engine.serve.service import ServiceOptions
    from retro_engine.serve.start import Address, serve_until_signal

    _check(args)
    options = ServiceOptions(
        run=args.path or "",
        reader=args.reader,
        base=args.base,
        library=args.library,
        embedder=args.embedder,
        stores=args.stores,
        encodings=args.encodings or (),
        mode=flags.library_mode(args.retriever),
        weights=args.source_weights,
        name=args.name,
        aliases=args.alias,
        max_batch=args.max_batch,
        max_waiting=args.max_waiting,
        dtype=args.dtype,
        shares_prefixes=args.share_prefixes,
        device=args.device,
        reading=args.reading,
        neighbor_bytes=args.neighbor_bytes,
        follow=args.follow,
        memory=args.memory,
        memory_weights=args.memory_weights,
    )
    address = Address(
        host=args.host,
        port=args.port,
        allowed_hosts=args.allow_host,
        is_behind_proxy=args.proxy,
        metrics_token=args.metrics_token,
        has_nemo=args.nemo_compat,
        allowed_origins=args.allow_origin,
        root_path=args.root_path,
        log=args.log,
        otlp=args.otlp,
    )
    serve_until_signal(options, address, open_accounts(args), flags.reporter(args))
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raises UsageError for what is missing, contradicts or cannot be."""
    if (args.path is None) == (args.reader is None):
        raise UsageError("there is no model, or one too many", "RUN or --reader NAME", "retro serve RUN")
    if args.base is not None and args.reader is None:
        raise UsageError(f"--base {args.base} cannot be used", "it is of a reader", "--reader NAME")
    for name in ("max_batch", "max_waiting"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)} cannot be used", "at least 1")
    for name in args.alias:
        if not name.isprintable() or not 1 <= len(name) <= 256:
            raise UsageError(f"--alias {name[:80]!r} cannot be used", "a name has 1 to 256 characters that can be seen")
    if args.neighbor_bytes is not None and args.neighbor_bytes < 0:
        raise UsageError(f"--neighbor-bytes {args.neighbor_bytes} cannot be used", "0 or more")
