"""`retro eval --memory`: what a memory of tokens gives beside the model, paired over the same documents."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retro_engine.cli import flags, memory
from retro_engine.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from retro_engine.api import Retro
    from retro_engine.data.batches import Sequences
    from retro_engine.data.questions import Questions
    from retro_engine.evaluate.losses import DocumentLosses
    from retro_engine.evaluate.memories import ScoredTokens, Weights
    from retro_engine.memory.knn_memory import KnnMemory
    from retro_engine.memory.mixture import Guesses, Mixture
    from retro_engine.memory.ngram_memory import NgramMemory
    from retro_engine.model.encodings import Encodings
    from retro_engine.model.retro import RetroModel
    from retro_engine.train.parallel import Parallel

REFUSED = ("in_prompt", "weights", "words", "questions", "lm_eval")


class Leaks:
    """How many neighbors --leak-limit dropped, where retrieval is on."""

    def __init__(self) -> None:
        self.dropped = self.neighbors = 0

    def add(self, dropped: int, neighbors: int) -> None:
        self.dropped, self.neighbors = self.dropped + dropped, self.neighbors + neighbors

    def sum_over(self, parallel: "Parallel") -> None:
        """What all processes dropped."""
        self.dropped, self.neighbors = (int(count) for count in parallel.sum([self.dropped, self.neighbors]))

    def summary(self, limit: float | None) -> dict[str, Any]:
        """For JSON; empty without a limit."""
        return {} if limit is None else {"leaks": {"dropped": self.dropped, "neighbors": self.neighbors}}

    def tell(self, limit: float | None) -> None:
        if limit is not None and self.neighbors:
            share = f"{self.dropped:,} of {self.neighbors:,} neighbors ({self.dropped / self.neighbors:.1%})"
            print(f"--leak-limit {limit:g} dropped {share}, which state more of what follows")


def add_flags(sub: argparse.ArgumentParser) -> None:
    memory.add_flags(sub, "instead of those fitted on other documents")
    sub.add_argument("--memory-out", metavar="FILE", help="the fitted weights, for retro generate --memory")


def check_flags(args: argparse.Namespace) -> None:
    """Raises UsageError for what cannot be together."""
    if args.memory is None:
        memory.check_flags(args, "memory_out")
        return
    for flag in REFUSED:
        if getattr(args, flag):
            name = flag.replace("_", "-")
            raise UsageError(f"--memory with --{name}", "its figures are of documents alone", f"leave --{name} out")
    if args.memory_weights is not None and args.memory_out is not None:
        raise UsageError("--memory-weights with --memory-out", "nothing is fitted", "leave one out")


def evaluate(
    args: argparse.Namespace,
    retro: "Retro",
    sequences: "Sequences | Questions",
    modes: list[str],
    encodings: "Encodings | None",
    precision: str,
    decoders: "dict[str, RetroModel]",
    leaks: "Leaks",
) -> "tuple[dict[str, DocumentLosses], dict[str, Any]]":
    """Losses of each mode, of it with the memory (MODE_ngram, MODE_knn), of the memory alone and of --against; and about the memory."""
    from retro_engine.data.batches import Sequences
    from retro_engine.evaluate.memories import describe_left_out, held_out_marks
    from retro_engine.generate.open_memory import read_weights

    if not isinstance(sequences, Sequences):
        raise UsageError("--memory cannot be used", "this run is evaluated on questions", "name a store of documents")
    fitting = None if args.memory_weights is not None else _fitting_share(args, retro)
    shares = [sequences] if fitting is None else [sequences, fitting]
    whole = memory.open_memory(args, retro)
    if whole.kind == "knn" and (args.memory_weights is not None or args.memory_out is not None):
        raise UsageError(
            "--memory-weights and --memory-out are of n-grams", f"{whole.folder} has states", "leave them out"
        )
    given = None if args.memory_weights is None else read_weights(args.memory_weights, whole.manifest["fingerprint"])
    left, marks = whole.without(held_out_marks(*shares))
    say = flags.reporter(args).say
    if (line := describe_left_out(marks, *shares)) is not None:
        say(line)
    run = _Evaluation(
        args,
        retro,
        memory=left,
        given=given,
        sequences=sequences,
        fitting=fitting,
        encodings=encodings,
        precision=precision,
        leaks=leaks,
    )
    losses = run.losses(retro.model, modes, "")
    for path, decoder in decoders.items():
        found = run.losses(decoder, ["off"], path)
        losses |= {name.replace("off", path, 1): of for name, of in found.items()}
    share = "halves of these documents" if fitting is None else f"{len(fitting.documents):,} validation documents"
    on = "given" if args.memory_weights is not None else f"fitted on {share}"
    return losses, {**left.summary(), "folder": str(left.folder), "left_out": len(marks), "weights": on}


def beside(mode: str, about: dict[str, Any]) -> str:
    """The name of a mode with the memory."""
    return f"{mode}_{about['kind']}"


def _fitting_share(args: argparse.Namespace, retro: "Retro") -> "Sequences | None":
    """The validation documents where others are evaluated; None = halves fit each other."""
    from retro_engine.errors import StoreError
    from retro_engine.train.run_data import open_evaluation

    if args.share != "test":
        return None
    tokenizer = retro.tokenizer if retro.folder.is_file() else None
    try:
        return open_evaluation(retro.folder, retro.model.config, args.overrides, "valid", tokenizer=tokenizer)  # type: ignore[return-value]
    except StoreError:
        flags.reporter(args).say("there are no validation documents: halves of those evaluated fit each other")
        return None


class _Evaluation:
    """One memory beside models, on the same documents."""

    def __init__(
        self,
        args: argparse.Namespace,
        retro: "Retro",
        memory: "NgramMemory | KnnMemory",
        given: "Mixture | None",
        sequences: "Sequences",
        fitting: "Sequences | None",
        encodings: "Encodings | None",
        precision: str,
        leaks: "Leaks",
    ):
        self.args, self.retro, self.memory, self.given = args, retro, memory, given
        self.sequences, self.fitting, self.encodings, self.precision = sequences, fitting, encodings, precision
        self.leaks = leaks
        self.known: dict[int, Guesses] = {}  # what was looked up, by share: it is the same for every model

    def losses(self, model: "RetroModel", modes: list[str], name: str) -> "dict[str, DocumentLosses]":
        """Of the model in each mode, with the memory too; of another model than the run's, beside its own states, alone."""
        from retro_engine.evaluate.memories import mixed_nats, nothing_known

        out: dict[str, DocumentLosses] = {}
        token_bytes, kind = self.retro.tokenizer.token_bytes(), self.memory.kind
        for mode in modes:
            tokens = self._scored(model, self.sequences, mode, f"evaluating {name or mode}")
            out[mode] = tokens.by_document(token_bytes)
            if kind == "knn" and model is not self.retro.model:
                continue
            evidence, fitted_on = self._known_of(tokens), None
            if self.fitting is not None:
                others = self._scored(model, self.fitting, mode, f"fitting {name or mode}")
                fitted_on = (others, self._known_of(others))
            nats = mixed_nats(tokens, evidence, self._fit, fitted_on)
            out[f"{mode}_{kind}"] = tokens.by_document(token_bytes, nats)
            if model is self.retro.model and mode == modes[0]:
                alone = mixed_nats(tokens, evidence, self._fit_alone, fitted_on, nothing_known)
                out[kind] = tokens.by_document(token_bytes, alone)
                self._keep_weights(*(fitted_on or (tokens, evidence)))
        return out

    def _keep_weights(self, tokens: "ScoredTokens", evidence: Any) -> None:
        from retro_engine.memory.mixture import Mixture

        if self.args.memory_out is not None:
            mark = self.memory.manifest["fingerprint"]
            Mixture.fitted(tokens.probabilities, evidence).save(Path(self.args.memory_out), mark)

    def _fit(self, before: "np.ndarray", evidence: Any) -> "Weights":
        return self._fit_alone(before, evidence) if self.given is None else self.given

    def _fit_alone(self, before: "np.ndarray", evidence: Any) -> "Weights":
        from retro_engine.memory.knn_memory import KnnMixture
        from retro_engine.memory.mixture import Mixture

        return Mixture.fitted(before, evidence) if self.memory.kind == "ngram" else KnnMixture.fitted(before, evidence)

    def _known_of(self, tokens: "ScoredTokens") -> Any:
        from retro_engine.evaluate.memories import look_up
        from retro_engine.memory.ngram_memory import NgramMemory

        if not isinstance(self.memory, NgramMemory):
            return tokens.recalled
        key = id(tokens.sequences)
        if key not in self.known:
            self.known[key] = look_up(self.memory, tokens)
        return self.known[key]

    def _scored(self, model: "RetroModel", sequences: "Sequences", mode: str, what: str) -> "ScoredTokens":
        from retro_engine.evaluate.memories import score_tokens
        from retro_engine.evaluate.perplexity import Given
        from retro_engine.generate.generator import encode_neighbors
        from retro_engine.memory.ngram_memory import NgramMemory

        given, is_own = None, model is self.retro.model
        if mode == "given":
            given = Given(*encode_neighbors(self.retro.tokenizer, self.args.neighbors, model.config.r))
        with flags.reporter(self.args).progress(
            what, flags.count_sequences(self.args, sequences), "sequences"
        ) as meter:
            return score_tokens(
                model,
                sequences,
                mode,
                limit=self.args.limit,
                precision=self.precision,
                given=given,
                leak_limit=self.args.leak_limit,
                dropped=(self.leaks if sequences is self.sequences else Leaks()).add,
                encodings=self.encodings if is_own else None,
                recall=self.memory.recall if is_own and not isinstance(self.memory, NgramMemory) else None,
                advance=meter.advance,
            )
