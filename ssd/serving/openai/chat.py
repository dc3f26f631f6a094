"""Chat messages as a prompt, by the tokenizer's template or a configured one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...config.load import MODEL_FOLDER, PACKAGE
from ...errors import ConfigError
from ..http.errors import APIError


class ChatTemplate:
    """Renders messages.

    Args:
        tokenizer: of the target.
        file: path of a Jinja template to use instead of the tokenizer's, or the name of a shipped one.

    Raises:
        ConfigError: the file cannot be read.
    """

    def __init__(self, tokenizer: Any, file: str | None):
        self._tokenizer = tokenizer
        self._template: str | None = None
        if file is not None:
            path = next(
                (p for p in (Path(file).expanduser(), MODEL_FOLDER / file, PACKAGE / file) if p.is_file()), None
            )
            if path is None:
                raise ConfigError(f"server.chat_template: no file {file!r}; give the path of a Jinja template")
            try:
                self._template = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"server.chat_template: {path} cannot be read: {error}") from None

    def tokens(self, messages: list[dict[str, str]]) -> list[int]:
        """Returns prompt token ids, up to where the answer begins.

        Args:
            messages: ``role`` and ``content`` of each.

        Raises:
            APIError: 400: there is no template, or it refuses these messages.
        """
        from jinja2 import TemplateError

        if self._template is None and not getattr(self._tokenizer, "chat_template", None):
            raise APIError(
                400,
                "this model's tokenizer has no chat template; use /v1/completions, "
                "or start the server with server.chat_template",
                code="chat_template_missing",
            )
        try:
            text = self._tokenizer.apply_chat_template(
                messages, chat_template=self._template, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise APIError(400, f"the chat template refuses these messages: {error}", param="messages") from None
        # Templates add the special tokens themselves.
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
