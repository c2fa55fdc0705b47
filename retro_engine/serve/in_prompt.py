"""Documents for a model that reads no neighbors, not even in front: what is found stands in its prompt, before what is asked.

It is found once, for the prompt (of a chat for what the user said last), by the search that every other model reads through; the
answer names it as its neighbors, and says in its notes where it stands.
"""

from collections.abc import Sequence
from functools import partial

from starlette.requests import Request

from retro_engine.library.documents import MAX_QUERY_CHARACTERS
from retro_engine.retrieval.hit import Found, Hit
from retro_engine.serve.api_error import ApiError
from retro_engine.serve.documents import filter_of, note_of
from retro_engine.serve.fields import Chat, Completion, RetroOptions, Sampled
from retro_engine.serve.request_context import brief, service_of

NOTE = "what was found stands in the prompt: this model reads no neighbors"


def written(hits: Sequence[Hit]) -> str:
    """Passages as a model reads them in a text."""
    passages = [f"{hit.title}\n" * bool(hit.title) + (hit.text + hit.continuation).strip() for hit in hits]
    return "\n\n".join(["Documents:", *passages]) if passages else ""


def before(hits: Sequence[Hit], text: str) -> str:
    return f"{written(hits)}\n\n{text}" if hits else text


async def put_in_chat(request: Request, body: Chat) -> None:
    """Passages before what the user said last, where this server reads so."""
    if service_of(request).in_prompt is None:
        return
    place = next((n for n in reversed(range(len(body.messages))) if body.messages[n].role == "user"), None)
    text = "" if place is None else body.messages[place].text
    hits = await _found(request, body, text)
    if place is not None and hits:
        body.messages[place] = body.messages[place].model_copy(update={"content": before(hits, text)})
    _tell(body, [hits])


async def put_in_prompts(request: Request, body: Completion) -> None:
    """Passages before each prompt that is a text; none before one that is shown or scored itself (`echo`)."""
    if service_of(request).in_prompt is None:
        return
    texts = [body.prompt] if isinstance(body.prompt, str) else list(body.prompt)
    if body.echo or not all(isinstance(text, str) for text in texts):
        why = "echo" if body.echo else "token ids"
        if body.retro.neighbors != [] and body.retro.model_dump(exclude_defaults=True):
            raise ApiError(400, f"{why}: nothing is put into such a prompt, so there is nothing to choose", "retro")
        body.take_found([], [f"{why}: no document stands in the prompt"] if body.retro.neighbors != [] else [])
        body.retro = RetroOptions.model_validate({})
        return
    found = [await _found(request, body, str(text)) for text in texts]
    body.prompt = [before(hits, str(text)) for hits, text in zip(found, texts)]
    _tell(body, found)


def _tell(body: Sampled, found: list[list[Hit]]) -> None:
    body.take_found(found, [NOTE] if any(found) else [])
    body.retro = RetroOptions.model_validate({})  # it is done


async def _found(request: Request, body: Sampled, text: str) -> list[Hit]:
    """What a prompt gets: what is given, or the best of what is there. Raises ApiError."""
    service, options = service_of(request), body.retro
    if options.retrieved_length is not None:
        why = "passages stand in the prompt as they are found: retro.retrieved_length says nothing"
        raise ApiError(400, why, "retro.retrieved_length", "contradiction")
    chosen = (options.k, options.mode, options.filters, options.min_score)
    if options.neighbors is not None:
        if any(one is not None for one in chosen):
            why = "neighbors are given: k, mode, filters and min_score say nothing"
            raise ApiError(400, why, "retro.neighbors", "contradiction")
        return [Hit.given(number, given) for number, given in enumerate(options.neighbors)]
    query = text[-MAX_QUERY_CHARACTERS:]
    found, notes = await search_for(request, options, query, service.generator.model.config.num_neighbors)
    body.take_found([], notes)
    return found.hits


async def search_for(request: Request, options: RetroOptions, query: str, k: int) -> tuple[Found, list[str]]:
    """What is found for a prompt, `k` where the options do not say how many, and notes. Raises ApiError for options that cannot apply."""
    service = service_of(request)
    service.check_search(options.mode, options.min_score, "retro.min_score")
    where = filter_of(options.filters, "retro.filters")
    if not query.strip():
        return Found.of([], 0, 0, 0), []
    search = partial(service.find, k=options.k or k, mode=options.mode, where=where)
    found = (await brief(request, search, query)).above(options.min_score)
    return found, list((await note_of(request, where)).values())
