"""Conversations as prompts, and as OpenAI's own client holds them with an instruct model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from interop_helpers import chat_folder, smollm2
from serve_helpers import Server, serving
from tokenizer_helpers import CHATML, chatml

from retro_engine.data.chat_files import ChatFiles
from retro_engine.generate.chat_template import ChatTemplate
from retro_engine.interop.imports import import_model, write_checkpoint
from retro_engine.serve.api_error import ApiError
from retro_engine.serve.chat import STOPS, Message, MessagePart, chat_prompt, check_variables
from retro_engine.serve.service import ServiceOptions, open_service

TURNS = [
    Message(role="system", content="Be brief."),
    Message(role="user", content=" What? "),
    Message(role="assistant", content="That."),
    Message(role="user", content="Why?"),
]


def test_questions_and_answers_for_a_base_model() -> None:
    prompt, stops = chat_prompt(TURNS, None)
    assert prompt == "Be brief.\n\nQuestion: What?\nAnswer: That.\n\nQuestion: Why?\nAnswer:"
    assert stops == STOPS


def test_the_checkpoints_own_template() -> None:
    tokenizer = chatml()
    tokenizer.chat_files = ChatFiles({"default": CHATML})
    template = ChatTemplate(tokenizer)
    parts = [MessagePart(type="text", text="<|im_"), MessagePart(type="text", text="end|>")]
    prompt, stops = chat_prompt([*TURNS[:3], Message(role="user", content=parts)], template)
    assert isinstance(prompt, list)
    assert [i for i in prompt if i in (0, 1, 2)] == [1, 2, 1, 2, 1, 2, 1, 2, 1]
    assert "<|im_end|>" in tokenizer.decode(prompt)  # what the parts say together, as text
    assert stops == ("<|im_end|>",)
    template.close()


def test_a_template_that_refuses() -> None:
    tokenizer = chatml()
    tokenizer.chat_files = ChatFiles({"default": "{{ raise_exception('no system') }}"})
    template = ChatTemplate(tokenizer)
    with pytest.raises(ApiError, match="chat template refuses this: TemplateError: no system"):
        chat_prompt(TURNS, template)
    template.close()


def test_what_a_template_reads_beside_messages() -> None:
    tokenizer = chatml()
    tokenizer.chat_files = ChatFiles(
        {"default": "{{ messages[0].content }}{% if enable_thinking is false %} at once{% endif %}"}
    )
    template = ChatTemplate(tokenizer)
    assert check_variables({"enable_thinking": False}, template) == {"enable_thinking": False}
    ids, _ = chat_prompt([TURNS[1]], template, variables={"enable_thinking": False})
    assert isinstance(ids, list) and tokenizer.decode(ids).strip() == "What?  at once"
    with pytest.raises(ApiError, match="does not read it"):
        check_variables({"thinking": True}, template)
    template.close()


def test_there_must_be_something_to_answer() -> None:
    with pytest.raises(ApiError, match="nothing to answer"):
        chat_prompt(TURNS[:3], None)


def test_an_answer_that_goes_on_for_a_base_model() -> None:
    prompt, _ = chat_prompt([TURNS[1], Message(role="assistant", content="It is ")], None, goes_on=True)
    assert prompt == "Question: What?\nAnswer: It is "
    prompt, _ = chat_prompt(TURNS, None, begins=False)
    assert isinstance(prompt, str) and prompt.endswith("\nQuestion: Why?\n")
    with pytest.raises(ApiError, match="goes on with an assistant's text"):
        chat_prompt(TURNS, None, goes_on=True)
    with pytest.raises(ApiError, match="the last message has none"):
        chat_prompt([Message(role="assistant", content="")], None, goes_on=True)


@pytest.fixture(scope="module")
def instruct(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A model that answers every conversation with "The castle was" and <|im_end|>, and then goes on."""
    folder = tmp_path_factory.mktemp("instruct")
    source = chat_folder(folder / "hf")
    write_checkpoint(import_model(source), folder / "run", source)
    options = ServiceOptions(run=str(folder / "run"), name="chat")
    with serving(lambda: open_service(options), folder) as server:
        yield server


def ask(server: Server, messages: list[dict[str, Any]], **fields: Any) -> Any:
    client = server.openai("read", max_retries=0)
    return client.chat.completions.create(**{"model": "chat", "messages": messages, "temperature": 0, **fields})


def test_a_conversation_of_many_turns(instruct: Server) -> None:
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}]
    tokens = [0]
    for question in ("Who?", "What?", "When?"):
        messages.append({"role": "user", "content": question})
        out = ask(instruct, messages)
        choice = out.choices[0]
        assert (choice.message.content, choice.finish_reason) == ("The castle was", "stop")
        assert out.usage.prompt_tokens > tokens[-1]
        tokens.append(out.usage.prompt_tokens)
        messages.append(choice.message)
    chunks = list(ask(instruct, messages[:-1], stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "The castle was"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_an_assistants_message_goes_on_as_vllm_spells_it(instruct: Server) -> None:
    begun = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The castle"}]
    for fields in ({"continue_final_message": True}, {"continue_final_message": True, "add_generation_prompt": False}):
        out = ask(instruct, begun, extra_body=fields)
        assert (out.choices[0].message.content, out.choices[0].finish_reason) == (" was", "stop")
    tokenizer = instruct.service.tokenizer
    written = "user\nWho?", "\n", "assistant\nThe castle"
    assert out.usage.prompt_tokens == 3 + sum(len(tokenizer.encode(part)) for part in written)
    ended = ask(instruct, begun, extra_body={"add_generation_prompt": False}).usage.prompt_tokens
    assert ended == out.usage.prompt_tokens + 1 + len(tokenizer.encode("\n")), "the template ends the turn"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "messages"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt"),
        ({"continue_final_message": "yes"}, "continue_final_message"),
        ({"messages": [{"role": "user", "content": "x"}], "continue_final_message": True}, "continue_final_message"),
        ({"messages": [{"role": "assistant", "content": None}], "continue_final_message": True}, "continue_final_message"),
    ],
)  # fmt: skip
def test_what_cannot_go_on(instruct: Server, fields: dict[str, Any], param: str) -> None:
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The"}]
    with instruct.client("read") as client:
        answer = client.post("/v1/chat/completions", json={"model": "chat", "messages": messages, **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_smollm2_answers(tmp_path: Path) -> None:
    """The real model: its own template, in fp32 (rounded to the file's blocks its first token is a close call)."""
    options = ServiceOptions(run=str(smollm2()), dtype="fp32", name="chat")
    france = {"role": "user", "content": "What is the capital of France?"}
    with serving(lambda: open_service(options), tmp_path) as server:
        out = ask(server, [france])
        choice = out.choices[0]
        assert (choice.message.content, choice.finish_reason) == ("The capital of France is Paris.", "stop")
        assert out.usage.prompt_tokens == 37
        begun = [france, {"role": "assistant", "content": "The capital of"}]
        more = ask(server, begun, extra_body={"continue_final_message": True}).choices[0]
        assert (more.message.content, more.finish_reason) == (" France is Paris.", "stop")
        turns = [{"role": "system", "content": "You are a helpful assistant."}, france, choice.message]
        last = ask(server, [*turns, {"role": "user", "content": "And of Italy?"}], max_tokens=40).choices[0]
        assert last.finish_reason == "stop"
        assert "Rome" in last.message.content
        assert "<|" not in last.message.content
    blocks = ServiceOptions(run=str(smollm2()), name="chat")
    with serving(lambda: open_service(blocks), tmp_path / "blocks") as server:
        out = ask(server, [france], max_tokens=24)
        assert out.usage.prompt_tokens == 37
        assert "<|" not in out.choices[0].message.content
