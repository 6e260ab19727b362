"""Conversations become texts, by the chat template that the model's tokenizer has; one that cannot be is said why.

Knows messages and a tokenizer; must not read a file or tokenise anything, which is done of the text as of any other.
"""

from typing import Any, Final

import jinja2

from mistudio_schemas import ErrorCode
from mistudio_train.errors import ModelRefused

TODAY: Final = (
    ("%d", "26"), ("%-d", "26"), ("%m", "07"), ("%B", "July"), ("%b", "Jul"), ("%Y", "2024"), ("%y", "24"),
    ("%A", "Friday"), ("%a", "Fri"), ("%H", "00"), ("%I", "12"), ("%M", "00"), ("%S", "00"), ("%p", "AM"),
)  # fmt: skip
"""The day that templates which write the date are given: the one that Llama's write where they are given none. The real
one would make another corpus of the same request every day."""
TEMPLATE_ERRORS: Final = (
    jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError,
)  # fmt: skip
"""What a template, which is a program, may end with."""


class ChatTemplate:
    """Renders conversations.

    Args:
        tokenizer: the model's.
        model_name: for errors.

    Raises:
        ModelRefused: `model.unsupported`, if the tokenizer has no chat template.

    """

    def __init__(self, tokenizer: Any, model_name: str) -> None:
        try:
            template = tokenizer.get_chat_template()
        except ValueError as error:
            raise ModelRefused(
                f"The tokenizer of {model_name} has no chat template, and conversations need one",
                "Name a model that was trained on conversations, or a corpus of texts (corpus_holds).",
                ErrorCode.MODEL_UNSUPPORTED,
            ) from error
        self._tokenizer, self._template = tokenizer, _on_the_same_day(template)

    def __call__(self, messages: Any) -> str:
        """The text of one conversation; empty if it has no message.

        Raises:
            ValueError: saying what is wrong with it.

        """
        _check(messages)
        if not messages:
            return ""
        try:
            text: str = self._tokenizer.apply_chat_template(messages, chat_template=self._template, tokenize=False)
        except TEMPLATE_ERRORS as error:
            raise ValueError(f"the model's chat template refuses this conversation: {error}") from error
        return text


def _check(messages: Any) -> None:
    if not isinstance(messages, list):
        raise ValueError(f"a conversation (a list of messages) is expected, not {type(messages).__name__}")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise ValueError(f"message {number} is no object of role and content, but {type(message).__name__}")
        called = message.get("content") is None and message.get("tool_calls")
        for field in ("role",) if called else ("role", "content"):
            if not isinstance(message.get(field), str):
                what = type(message[field]).__name__ if field in message else f"only {', '.join(map(str, message))}"
                raise ValueError(f"message {number} needs a text as its {field}, and has {what}")


def _on_the_same_day(template: str) -> str:
    """The template, with a function of its own in the place of the one that tells the time."""
    if "strftime_now" not in template:
        return template
    replaced = "".join(f".replace('{code}', '{text}')" for code, text in TODAY)
    # the newline behind a block is no part of what is rendered
    return f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n{template}"
