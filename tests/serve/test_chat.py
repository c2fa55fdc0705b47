"""Conversations as prompts."""

import pytest
from tokenizer_helpers import CHATML, chatml

from retro_engine.data.chat_files import ChatFiles
from retro_engine.generate.chat_template import ChatTemplate
from retro_engine.serve.api_error import ApiError
from retro_engine.serve.chat import STOPS, Message, MessagePart, chat_prompt

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


def test_there_must_be_something_to_answer() -> None:
    with pytest.raises(ApiError, match="nothing to answer"):
        chat_prompt(TURNS[:3], None)
