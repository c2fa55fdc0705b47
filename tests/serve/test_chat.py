"""Conversations as prompts."""

import pytest

from retro_engine.serve.chat import STOPS, Message, chat_prompt
from retro_engine.serve.limits import ApiError

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
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    assert chat_prompt(TURNS[1:2], template) == ("<user> What? <assistant>", ())


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('only users') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% if %}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_template_that_refuses_or_reaches_out(template: str) -> None:
    with pytest.raises(ApiError, match="chat template"):
        chat_prompt(TURNS, template)


def test_there_must_be_something_to_answer() -> None:
    with pytest.raises(ApiError, match="nothing to answer"):
        chat_prompt(TURNS[:3], None)
