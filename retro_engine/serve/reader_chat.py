"""Chats with a reader: the user's last message is a question, answered as `POST /v1/ask` answers it.

Of the passages that are found one is read, chosen as there, behind the prompt that the reader was taught with; it is named first in
the answer's neighbors. What else is said in the conversation is left out, and the answer's notes say so.
"""

from starlette.requests import Request

from retro_engine.errors import UsageError
from retro_engine.readers.ahead import checked_question
from retro_engine.readers.ask import choose, passages_of
from retro_engine.serve.api_error import ApiError
from retro_engine.serve.fields import Chat, RetroOptions
from retro_engine.serve.in_prompt import search_for
from retro_engine.serve.request_context import brief, service_of

NOTE = "this model is a reader: it was asked the user's last message alone"
STOPS = ("\n",)


async def reader_prompt(request: Request, body: Chat) -> tuple[str, tuple[str, ...]]:
    """The prompt of a conversation, and the texts that end its answer; what it reads becomes the body's neighbors. Raises ApiError."""
    service, options = service_of(request), body.retro
    reader = service.reader
    assert reader is not None
    last = body.messages[-1]
    if last.role != "user" or body.tools:
        why = "functions" if body.tools else f"messages that end with the {last.role}'s"
        raise ApiError(400, f"a reader answers a question from documents, and knows no {why}", "messages")
    try:
        question = checked_question(last.text)
    except UsageError as error:
        raise ApiError(400, f"{error.what}: {error.why}", "messages") from error
    notes = [NOTE] if len(body.messages) > 1 else []
    if options.neighbors is not None:
        body.take_found([], notes)
        return reader.prompt(question), STOPS
    found, said = await search_for(request, options, question, reader.reading.num_neighbors)
    passages = await brief(request, passages_of, found, service.tokenizer)
    passages = await brief(request, choose, service.generator, reader, question, passages)
    body.take_found([[hit for hit, _ in passages]], [*notes, *said])
    read = [reader.shown(hit.title, text) for hit, text in passages[:1]]
    body.retro = RetroOptions.model_validate({"neighbors": read, "retrieved_length": options.retrieved_length})
    return reader.prompt(question), STOPS
