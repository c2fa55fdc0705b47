"""What people build with: LangChain, LiteLLM and llama-index against a served model; each is skipped where it is not installed."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from serve_helpers import Server, make_run, serving_run

from retro_engine.data.store import Store

QUESTION = "What is the harbor?"
NEVER = ["langchain_openai", "litellm", "llama_index.llms.openai_like"]


@pytest.fixture(scope="module")
def server(small_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Only where one of the three is there: it takes seconds."""
    found = []
    for name in NEVER:
        try:
            found.append(__import__(name))
        except ImportError:
            continue
    if not found:
        pytest.skip(f"none of {', '.join(NEVER)} is installed")
    folder = tmp_path_factory.mktemp("clients")
    with serving_run(make_run(small_store, folder / "run"), folder) as server:
        yield server


@pytest.fixture
def whole(server: Server) -> str:
    """What OpenAI's client gets."""
    messages: Any = [{"role": "user", "content": QUESTION}]
    out = server.openai("read").chat.completions.create(model="tiny", messages=messages, max_tokens=8, temperature=0)
    return str(out.choices[0].message.content)


def test_langchain(server: Server, whole: str) -> None:
    module = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    key = server.keys["read"]
    model = module.ChatOpenAI(model="tiny", base_url=f"{server.url}/v1", api_key=key, temperature=0, max_tokens=8)
    out = model.invoke(QUESTION)
    assert (out.content, out.usage_metadata["output_tokens"]) == (whole, 8)
    assert "".join(piece.content for piece in model.stream(QUESTION)) == whole
    assert asyncio.run(model.ainvoke([("system", "Be brief."), ("human", QUESTION)])).content
    assert [one.content for one in model.batch([QUESTION, QUESTION])] == [whole, whole]
    tool = {
        "name": "look",
        "description": "Look up",
        "parameters": {"type": "object", "properties": {"what": {"type": "string"}}},
    }
    assert isinstance(model.bind_tools([tool]).invoke(QUESTION).tool_calls, list)
    completion = module.OpenAI(model="tiny", base_url=f"{server.url}/v1", api_key=key, temperature=0, max_tokens=4)
    assert isinstance(completion.invoke("The harbor"), str)


def test_litellm(server: Server, whole: str) -> None:
    litellm = pytest.importorskip("litellm", reason="litellm is not installed")
    asked: dict[str, Any] = {
        "model": "openai/tiny", "api_base": f"{server.url}/v1", "api_key": server.keys["read"], "temperature": 0, "max_tokens": 8,
        "messages": [{"role": "user", "content": QUESTION}],
    }  # fmt: skip
    assert litellm.completion(**asked).choices[0].message.content == whole
    pieces = [piece.choices[0].delta.content or "" for piece in litellm.completion(**asked, stream=True)]
    assert "".join(pieces) == whole
    assert asyncio.run(litellm.acompletion(**asked)).choices[0].message.content == whole
    text = {name: value for name, value in asked.items() if name != "messages"} | {"prompt": "The harbor"}
    assert litellm.text_completion(**{**text, "model": "text-completion-openai/tiny"}).choices[0].text is not None


def test_llama_index(server: Server, whole: str) -> None:
    module = pytest.importorskip("llama_index.llms.openai_like", reason="llama-index-llms-openai-like is not installed")
    from llama_index.core.llms import ChatMessage

    about = {"api_base": f"{server.url}/v1", "api_key": server.keys["read"], "temperature": 0, "max_tokens": 8}
    model = module.OpenAILike(model="tiny", is_chat_model=True, context_window=2048, **about)
    messages = [ChatMessage(role="user", content=QUESTION)]
    assert model.chat(messages).message.content == whole
    assert list(model.stream_chat(messages))[-1].message.content == whole
    assert asyncio.run(model.achat(messages)).message.content == whole
    plain = module.OpenAILike(model="tiny", is_chat_model=False, context_window=2048, **about)
    assert isinstance(plain.complete("The harbor").text, str)


def test_a_key_that_is_wrong_is_told_so(server: Server) -> None:
    module = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    openai = pytest.importorskip("openai")
    model = module.ChatOpenAI(model="tiny", base_url=f"{server.url}/v1", api_key="rk_wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        model.invoke(QUESTION)
