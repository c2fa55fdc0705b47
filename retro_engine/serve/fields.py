"""What the bodies of completions and chat completions may hold: each field with its bounds.

A field has an effect, or it changes no answer and is said in the answer's notes (`without_effect`), or it is taken only at
the value that asks for nothing: nobody gets less than what was asked for without being told.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr

from retro_engine.generate.sampling import MAX_BIAS, MAX_PENALTY, TINY
from retro_engine.retrieval.hit import Hit
from retro_engine.serve.chat import Message
from retro_engine.serve.constraints import Json
from retro_engine.serve.limits import Ids, Prompts, Strict, Texts
from retro_engine.serve.tools import MAX_TOOLS, Choice, Tool

MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20
MAX_BIASES = 1024
HARMLESS = (
    *("user", "safety_identifier", "prompt_cache_key", "metadata", "store", "service_tier", "parallel_tool_calls"),
    *("reasoning_effort", "verbosity", "prompt_cache_retention"),
    *("return_progress", "reasoning_format", "samplers", "backend_sampling", "priority", "cache_prompt"),
    "sse_ping_interval",  # of llama.cpp: comments in a stream that stands still
    "thinking_budget_tokens",
    *("session_id", "chat_id", "id", "message_id", "features", "variables", "background_tasks"),  # Open WebUI's own
)
SAYS_NOTHING: dict[str, tuple[Any, ...]] = {
    "service_tier": (None, "auto", "default"),
    "parallel_tool_calls": (None, True, False),
    "reasoning_effort": (None, "none"),
    "verbosity": (None, "medium"),
    "prompt_cache_retention": (None, "in_memory", "in-memory"),
    "cache_prompt": (None, True),
    "reasoning_format": (None, "none", "auto"),
    "priority": (None, 0),
    "backend_sampling": (None, False),
    "sse_ping_interval": (None, -1),
    **dict.fromkeys(("features", "variables", "background_tasks"), (None, {})),
}


class RetroOptions(Strict):
    """Retrieval of one request."""

    k: int | None = Field(None, ge=1, le=64)  # neighbors a chunk; None: the model's
    neighbors: Texts | None = Field(None, max_length=64)  # texts to read instead; [] = retrieval off
    mode: Literal["lexical", "dense", "hybrid"] | None = None
    filters: Json | None = None  # which documents of the library, by their metadata (library/filters.py)
    min_score: float | None = Field(None, ge=0)  # of what is read, as /v1/retrieve shows it
    refresh: Literal["chunk", "never"] = "chunk"
    retrieved_length: int | None = Field(None, ge=1)


class StreamOptions(Strict):
    """What a stream has besides its pieces."""

    include_usage: bool = False
    include_obfuscation: bool = False


One = Annotated[float, Field(ge=1, le=1)]
Zero = Annotated[float, Field(ge=0, le=0)]
Name = Annotated[str, Field(max_length=64)]
Value = Annotated[str, Field(max_length=512)]
Id = Annotated[str, Field(max_length=256)]
Kwargs = Annotated[dict[Name, bool | int | float | Value], Field(max_length=16)]


class Sampled(Strict):
    """The fields that completions and chat completions share; those that do nothing here and would be missed take only nothing."""

    model: str | None = None  # None: the one that is served
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, ge=TINY, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1 << 20)  # 0 is off, and -1 as in vLLM
    n: int = Field(1, ge=1, le=32)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | Texts | None = None
    stop_token_ids: Ids | None = Field(None, max_length=MAX_STOPS)
    ignore_eos: bool = False
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    max_tokens: int | None = Field(None, ge=-1)  # -1, as in llama.cpp: as many as there is room for
    n_predict: int | None = Field(None, ge=-1)  # llama.cpp's name of max_tokens
    min_tokens: int = Field(0, ge=0)
    presence_penalty: float = Field(0.0, ge=-MAX_PENALTY, le=MAX_PENALTY)
    frequency_penalty: float = Field(0.0, ge=-MAX_PENALTY, le=MAX_PENALTY)
    repetition_penalty: float = Field(1.0, ge=TINY, le=100)
    logit_bias: dict[str, Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]] | None = Field(
        None, max_length=MAX_BIASES
    )
    retro: RetroOptions = Field(default_factory=lambda: RetroOptions.model_validate({}))
    # what the answer must match (serve.constraints): OpenAI's field, vLLM's, and llama.cpp's
    response_format: Json | None = None
    structured_outputs: Json | None = None
    guided_json: str | Json | None = None
    guided_regex: str | None = None
    guided_choice: Texts | None = None
    guided_grammar: str | None = None
    grammar: str | None = None
    json_schema: Json | None = None
    timings_per_token: bool = False  # of llama.cpp: with the last piece here
    # other ways of vLLM and llama.cpp to choose and to write: at the value that asks for none of them
    length_penalty: One | None = None
    use_beam_search: Literal[False] = False
    include_stop_str_in_output: Literal[False] = False
    skip_special_tokens: Literal[True] = True
    spaces_between_special_tokens: bool | None = None  # says nothing where those are left out
    allowed_token_ids: None = None
    bad_words: Texts | None = Field(None, max_length=0)
    prompt_logprobs: None = None
    truncate_prompt_tokens: None = None
    repeat_penalty: One | None = None
    typ_p: One | None = None
    typical_p: One | None = None
    dynatemp_range: Zero | None = None
    xtc_probability: Zero | None = None
    dry_multiplier: Zero | None = None
    mirostat: Zero | None = None
    # what goes with those, and with a page's own display: says nothing beside them
    repeat_last_n: int | None = None
    dynatemp_exponent: float | None = None
    xtc_threshold: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_penalty_last_n: int | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    # without effect here: taken and said (`without_effect`)
    cache_prompt: bool | None = None
    return_progress: bool | None = None
    sse_ping_interval: int | None = Field(None, ge=-1)
    backend_sampling: bool | None = None
    reasoning_format: str | None = Field(None, max_length=64)
    samplers: str | Texts | None = None
    priority: int | None = None
    user: str | None = Field(None, max_length=512)
    safety_identifier: str | None = Field(None, max_length=512)
    prompt_cache_key: str | None = Field(None, max_length=512)
    metadata: dict[Name, Value] | None = Field(None, max_length=16)
    store: bool = False
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] | None = None

    _found: list[list[Hit]] = PrivateAttr(default_factory=list)
    _notes: list[str] = PrivateAttr(default_factory=list)

    def take_found(self, found: list[list[Hit]], notes: list[str]) -> None:
        """What stands in each prompt (serve/in_prompt.py), and what is to be said of it."""
        self._found += found
        self._notes += notes

    def found(self, place: int) -> list[Hit] | None:
        """What stands in a prompt; None where nothing is put into prompts."""
        return self._found[place] if self._found else None

    @property
    def notes(self) -> list[str]:
        """Of the server, for the answer."""
        ignored = [f"taken, without effect here: {', '.join(self.without_effect)}"] if self.without_effect else []
        return [*ignored, *self._notes]

    @property
    def candidates(self) -> int:
        """Sequences that are generated for each prompt."""
        return self.n

    @property
    def without_effect(self) -> list[str]:
        """Names of fields that ask for what is not done here, and change no answer by that."""
        asked = [
            name for name in HARMLESS if getattr(self, name, None) not in SAYS_NOTHING.get(name, (None, False, {}))
        ]
        is_padded = self.stream_options is not None and self.stream_options.include_obfuscation
        return [*asked, *(["stream_options.include_obfuscation"] if is_padded else [])]


class Completion(Sampled):
    """The body of POST /v1/completions."""

    prompt: Prompts
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool = False
    best_of: int | None = Field(None, ge=1, le=32)
    suffix: Literal[""] | None = None

    @property
    def candidates(self) -> int:
        return self.best_of or self.n


class Chat(Sampled):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=1000, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1)
    add_generation_prompt: bool | None = None  # None: unless the last message goes on
    continue_final_message: bool = False
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS, fail_fast=True)
    tool_choice: Choice | None = None
    functions: list[Any] | None = Field(None, max_length=0)
    function_call: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = Field(None, max_length=1)
    audio: None = None
    prediction: None = None
    moderation: None = None
    prompt_cache_options: None = None
    web_search_options: None = None
    chat_template_kwargs: Kwargs | None = None  # what the model's template reads beside messages
    # without effect here
    session_id: Id | None = None
    chat_id: Id | None = None
    id: Id | None = None
    message_id: Id | None = None
    features: Json | None = None
    variables: Json | None = None
    background_tasks: Json | None = None
    parallel_tool_calls: bool | None = None
    reasoning_control: bool | None = None  # llama.cpp's: whether thinking may be ended from outside
    thinking_budget_tokens: int | None = Field(None, ge=0)
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    _unread: list[str] = PrivateAttr(default_factory=list)

    def drop_thinking(self) -> None:
        """`enable_thinking` is sent by pages whatever the model: a template that does not know it asks for nothing by it; who
        wants thoughts is told.
        """
        variables = dict(self.chat_template_kwargs or {})
        if variables.pop("enable_thinking", None):
            self._unread.append("chat_template_kwargs.enable_thinking")
        self.chat_template_kwargs = variables

    @property
    def without_effect(self) -> list[str]:
        return [*super().without_effect, *self._unread]
