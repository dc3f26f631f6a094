"""Chat messages as a prompt, by the tokenizer's template or a configured one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from ...config.load import MODEL_FOLDER, PACKAGE
from ...config.sections import ServerConfig
from ...errors import ConfigError
from ..http.errors import APIError, shown

TEMPLATE_FAULTS = (
    TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a template raises on messages that it was not written for."""
KEPT_FORMATS = 16
"""Templates whose form of content is remembered."""
PROBE = "a probing text"

Message = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendering:
    """What a request says about its chat template."""

    template: str | None = None
    """A Jinja template to use instead of the server's."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the template, before the server's own."""
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    """End with the beginning of an assistant's message."""
    continue_final_message: bool = False
    """Leave the last message open; the answer continues it."""
    add_special_tokens: bool = False
    """Add the tokenizer's special tokens. Most templates write them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ContentForms:
    """Which forms of ``content`` a template renders."""

    text: bool
    parts: bool

    def adapted(self, message: Message) -> dict[str, Any]:
        """Returns a message whose content has a form that the template renders, the given one where possible."""
        content = message["content"]
        if isinstance(content, str):
            if not self.text:
                content = [{"type": "text", "text": content}] if content else []
        # Only a user's message was probed with parts; templates often search the text of the other roles.
        elif self.text and not (self.parts and message["role"] == "user"):
            content = "".join(part["text"] for part in content)
        return {**message, "content": content}


class ChatTemplate:
    """Renders messages. Safe to call from any thread.

    Args:
        tokenizer: of the target.
        config: names a template to use instead of the tokenizer's (the path of a Jinja file, a shipped file, or one
            of the tokenizer's named templates), and defaults of template variables.

    Raises:
        ConfigError: the template cannot be read.
    """

    def __init__(self, tokenizer: Any, config: ServerConfig):
        self._tokenizer = tokenizer
        self._variables = config.chat_template_kwargs
        self._trusting = config.trust_request_chat_template
        self._reserved = {
            *inspect.signature(tokenizer.apply_chat_template).parameters,
            "messages",
            "conversations",
            "self",
        }
        self._forms = lru_cache(maxsize=KEPT_FORMATS)(self._probed)
        self._template = None if config.chat_template is None else self._read(config.chat_template)
        _check_variables(self._variables, self._reserved)

    def tokens(
        self,
        messages: Sequence[Message],
        *,
        tools: list[dict[str, Any]] | None = None,
        rendering: Rendering | None = None,
    ) -> list[int]:
        """Returns prompt token ids, up to where the answer begins.

        Args:
            messages: ``role`` and ``content`` (a text, or text parts) of each, and what else the template reads.
            tools: OpenAI's descriptions of the functions that the model may call.

        Raises:
            APIError: 400: there is no template, or it cannot render these messages.
        """
        rendering = rendering or Rendering()
        text = self._text(messages, tools or None, rendering)
        return list(self._tokenizer(text, add_special_tokens=rendering.add_special_tokens)["input_ids"])

    @property
    def source(self) -> str | None:
        """The Jinja text of the template, with tools; None if there is none."""
        try:
            return self._selected(None, [{}])
        except APIError:
            return None

    def _text(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None, rendering: Rendering) -> str:
        if rendering.template is not None and not self._trusting:
            raise APIError(
                400,
                "this server does not render the templates of requests; start it with "
                "server.trust_request_chat_template=true if its clients are trusted",
                param="chat_template",
            )
        self._check(rendering)
        template = self._selected(rendering.template, tools)
        try:
            forms = self._forms(template)
            text = self._tokenizer.apply_chat_template(
                [forms.adapted(message) for message in messages],
                tools=tools,
                documents=rendering.documents,
                chat_template=template,
                add_generation_prompt=rendering.add_generation_prompt,
                continue_final_message=rendering.continue_final_message,
                tokenize=False,
                **{**self._variables, **rendering.variables},
            )
            text.encode()  # a template can write what is not Unicode text
        except TEMPLATE_FAULTS as error:
            raise _refused(error, rendering) from None
        return text

    def _check(self, rendering: Rendering) -> None:
        """Raises: APIError: variables that are not the request's to set, or two endings at once."""
        try:
            _check_variables(rendering.variables, self._reserved)
        except ConfigError as error:
            raise APIError(400, str(error), param="chat_template_kwargs") from None
        if rendering.continue_final_message and rendering.add_generation_prompt:
            raise APIError(
                400,
                "continue_final_message and add_generation_prompt cannot both be true",
                param="continue_final_message",
            )

    def _selected(self, given: str | None, tools: list[dict[str, Any]] | None) -> str:
        """Returns the Jinja text to render. Raises: APIError: there is none."""
        chosen = self._template if given is None else given
        named = getattr(self._tokenizer, "chat_template", None) or {}
        if chosen is None and not named:
            raise APIError(
                400,
                "this model's tokenizer has no chat template; use /v1/completions, "
                "or start the server with server.chat_template",
                code="chat_template_missing",
            )
        try:
            return self._tokenizer.get_chat_template(chosen, tools)
        except ValueError:
            raise APIError(
                400,
                f"this model has the chat templates {', '.join(sorted(named))} and none is the default; "
                "start the server with one of these names as server.chat_template",
                code="chat_template_missing",
            ) from None

    def _probed(self, template: str) -> ContentForms:
        """Returns which forms of content a template renders, by rendering one message in either."""

        def rendered(content: Any) -> str:
            try:
                return self._tokenizer.apply_chat_template(
                    [{"role": "user", "content": content}], chat_template=template, tokenize=False
                )
            except TemplateSyntaxError:
                raise
            except TEMPLATE_FAULTS:
                return ""

        parts = rendered([{"type": "text", "text": PROBE}])
        # A template that prints a list as Python writes it does not read parts.
        reads_parts = PROBE in parts and "'text'" not in parts and '"text"' not in parts
        return ContentForms(text=PROBE in rendered(PROBE) or not reads_parts, parts=reads_parts)

    def _read(self, name: str) -> str:
        """Returns the configured template. Raises: ConfigError."""
        named = getattr(self._tokenizer, "chat_template", None)
        path = next((p for p in (Path(name).expanduser(), MODEL_FOLDER / name, PACKAGE / name) if p.is_file()), None)
        if path is None:
            if isinstance(named, dict) and name in named:
                return named[name]
            known = f", or one of the tokenizer's: {', '.join(sorted(named))}" if isinstance(named, dict) else ""
            raise ConfigError(f"server.chat_template: no file {name!r}; give the path of a Jinja template{known}")
        try:
            text = path.read_text(encoding="utf-8")
            self._forms(text)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"server.chat_template: {path} cannot be read: {error}") from None
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"server.chat_template: {path} is not a Jinja template: {error.message} (line {error.lineno})"
            ) from None
        return text


def _check_variables(variables: Mapping[str, Any], reserved: set[str]) -> None:
    """Raises: ConfigError: a variable that the request's other fields set."""
    for name in variables:
        if name in reserved:
            raise ConfigError(f"chat_template_kwargs.{shown(name)} is not a variable that can be set here")


def _refused(error: Exception, rendering: Rendering) -> APIError:
    """Returns the answer to a request that a template cannot render."""
    if str(error).startswith("continue_final_message"):
        first = str(error).partition("!")[0]
        return APIError(400, first, param="continue_final_message", code="chat_template_failed")
    param = "messages" if rendering.template is None else "chat_template"
    if type(error) is TemplateError:  # raised by the template itself
        said = f"the chat template refuses these messages: {error}"
    else:
        said = f"the chat template fails on these messages: {type(error).__name__}: {error}"
    return APIError(400, said, param=param, code="chat_template_failed")
