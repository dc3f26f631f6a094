"""Chat templates of all kinds: what a request can say about one, and which form of content each takes."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ssd.config.sections import ServerConfig
from ssd.errors import ConfigError
from ssd.serving.http.errors import APIError
from ssd.serving.openai.chat import ChatTemplate, Rendering
from ssd.testing.twins.served import Served

CHATML = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TRIMMING = CHATML.replace("message['content']", "message['content'] | trim")
PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}{% if part.type == 'text' %}[{{ part.text }}]"
    "{% endif %}{% endfor %}</>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
EITHER = PARTS.replace(
    "{% for part in m.content %}", "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
).replace("{% endfor %}</>", "{% endfor %}{% endif %}</>")
MACRO = (
    "{% macro shown(it) %}{% if it is string %}{{ it }}{% else %}{% for x in it %}[{{ x.text }}]{% endfor %}{% endif %}"
    "{% endmacro %}{% for m in messages %}<{{ m.role }}>{{ shown(m.content) }}</>\n{% endfor %}"
)
THINKING = CHATML + "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
TOOLS = "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}" + CHATML
CALLS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for call in m.tool_calls or [] %}{{ call.function.name }}("
    "{% for key, value in call.function.arguments.items() %}{{ key }}={{ value }};{% endfor %}){% endfor %}</>\n"
    "{% endfor %}"
)
USER = {"role": "user", "content": "hello"}
TWO_PARTS = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = Served(
        "server.trust_request_chat_template=true", "server.chat_template_kwargs={who: server, style: plain}"
    )
    yield server
    server.close()


def made(served: Served, template: Any, **server: Any) -> ChatTemplate:
    """The chat template of a tokenizer that has this one."""
    tokenizer = copy.deepcopy(served.engine.tokenizer)
    tokenizer.chat_template = template
    return ChatTemplate(tokenizer, ServerConfig(**server))


def rendered(
    served: Served, template: Any, /, *messages: dict[str, Any], tools: list[dict[str, Any]] | None = None, **asked: Any
) -> str:
    """The prompt as text."""
    ids = made(served, template).tokens(messages, tools=tools, rendering=Rendering(**asked))
    return served.engine.tokenizer.decode(ids)


def refused(served: Served, template: Any, /, *messages: dict[str, Any], **asked: Any) -> APIError:
    with pytest.raises(APIError) as error:
        rendered(served, template, *messages, **asked)
    assert error.value.status == 400 and "\n" not in error.value.message
    return error.value


@pytest.mark.parametrize(
    ("template", "message", "expected"),
    [
        (CHATML, USER, "<user>hello</>\n"),
        (CHATML, TWO_PARTS, "<user>ab</>\n"),
        (TRIMMING, TWO_PARTS, "<user>ab</>\n"),
        (PARTS, USER, "<user>[hello]</>\n"),
        (PARTS, TWO_PARTS, "<user>[a][b]</>\n"),
        (PARTS, {"role": "assistant", "content": ""}, "<assistant></>\n"),
        (PARTS, {**TWO_PARTS, "role": "system"}, "<system>[a][b]</>\n"),
        (EITHER, USER, "<user>hello</>\n"),
        (EITHER, TWO_PARTS, "<user>[a][b]</>\n"),
        (EITHER, {**TWO_PARTS, "role": "assistant"}, "<assistant>ab</>\n"),
        (MACRO, USER, "<user>hello</>\n"),
        (MACRO, TWO_PARTS, "<user>[a][b]</>\n"),
    ],
    ids=[
        "text",
        "text-of-parts",
        "trimmed-parts",
        "parts-of-text",
        "parts",
        "no-parts",
        "system-parts",
        "either-text",
        "either-parts",
        "either-past-parts",
        "macro-text",
        "macro-parts",
    ],
)
def test_content_has_the_form_that_the_template_reads(
    served: Served, template: str, message: dict[str, Any], expected: str
) -> None:
    assert rendered(served, template, message, add_generation_prompt=False) == expected


def test_templates_that_fail_on_the_probe_get_text(served: Served) -> None:
    picky = "{% if messages | length < 2 %}{{ raise_exception('two messages') }}{% endif %}" + CHATML
    assert rendered(served, picky, USER, TWO_PARTS) == "<user>hello</>\n<user>ab</>\n<assistant>"


def test_names_reach_the_template(served: Served) -> None:
    template = "{% for m in messages %}{{ m.name }}: {{ m.content }}{% endfor %}"
    assert rendered(served, template, {**USER, "name": "ada"}) == "ada: hello"


def test_variables(served: Served) -> None:
    assert rendered(served, THINKING, USER).endswith("<assistant>")
    off = rendered(served, THINKING, USER, variables={"enable_thinking": False})
    assert off.endswith("<assistant><think></think>")
    defaults = made(served, THINKING, chat_template_kwargs={"enable_thinking": False})
    assert served.engine.tokenizer.decode(defaults.tokens([USER])) == off
    on = defaults.tokens([USER], rendering=Rendering(variables={"enable_thinking": True}))
    assert served.engine.tokenizer.decode(on) == rendered(served, THINKING, USER)


@pytest.mark.parametrize("name", ["messages", "tools", "tokenize", "chat_template", "conversation", "self", "kwargs"])
def test_variables_that_other_fields_set_are_refused(served: Served, name: str) -> None:
    error = refused(served, CHATML, USER, variables={name: 1})
    assert error.param == "chat_template_kwargs" and name in error.message
    with pytest.raises(ConfigError, match=f"chat_template_kwargs.{name}"):
        made(served, CHATML, chat_template_kwargs={name: 1})


def test_documents(served: Served) -> None:
    template = "{% for d in documents or [] %}{{ d.title }}: {{ d.text }}\n{% endfor %}" + CHATML
    documents = [{"title": "A", "text": "x"}, {"title": "B", "text": "y"}]
    assert rendered(served, template, USER, documents=documents).startswith("A: x\nB: y\n<user>")


def test_tools(served: Served) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    assert rendered(served, TOOLS, USER, tools=[tool]).startswith(json.dumps(tool) + "\n<user>")
    assert rendered(served, TOOLS, USER, tools=[]) == rendered(served, TOOLS, USER)


def test_calls_reach_the_template_as_mappings(served: Served) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "x"}}}
    asked = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert rendered(served, CALLS, USER, asked) == "<user>hello</>\n<assistant>add(a=1;b=x;)</>\n"
    broken = {**asked, "tool_calls": [{**call, "function": {"name": "add", "arguments": '{"a'}}]}
    assert refused(served, CALLS, USER, broken).param == "messages"


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        ("The answer is", "<user>hello</>\n<assistant>The answer is"),
        ("", "<user>hello</>\n<assistant>"),
        ("ends with a space ", "<user>hello</>\n<assistant>ends with a space "),
        ("two\n\nlines", "<user>hello</>\n<assistant>two\n\nlines"),
    ],
    ids=["text", "empty", "space", "lines"],
)
def test_the_last_message_can_be_continued(served: Served, last: str, expected: str) -> None:
    options: dict[str, Any] = {"continue_final_message": True, "add_generation_prompt": False}
    assert rendered(served, CHATML, USER, {"role": "assistant", "content": last}, **options) == expected
    parts = {"role": "assistant", "content": [{"type": "text", "text": last}]}
    assert rendered(served, CHATML, USER, parts, **options) == expected


def test_continuing_what_a_template_drops_is_refused(served: Served) -> None:
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    error = refused(
        served,
        template,
        USER,
        {"role": "assistant", "content": "gone"},
        continue_final_message=True,
        add_generation_prompt=False,
    )
    assert error.param == "continue_final_message"
    assert refused(served, CHATML, USER, continue_final_message=True).param == "continue_final_message"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
        ("{% for m in messages %}{{ 1 + m.content }}{% endfor %}", "TypeError"),
        ("{{ nothing.there.at_all }}", "UndefinedError"),
        ("{{ messages[0].content.items() }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].content | int(base=99) }}{{ [1][5].x }}", "fails on these messages"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{% for m in messages %}{{ m.content.index('zzz') }}{% endfor %}", "ValueError"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ '\\ud800' }}", "surrogates"),
        ("{% include 'other' %}", "TypeError"),
    ],
    ids=lambda value: value[:40],
)
def test_faults_of_a_template_are_the_requests(served: Served, template: str, said: str) -> None:
    error = refused(served, template, USER)
    assert error.param == "messages" and said in error.message
    assert refused(served, CHATML, USER, template="{{ 1 + 'x' }}").param == "chat_template"


def test_named_templates(served: Served, tmp_path: Path) -> None:
    named = {"default": "plain", "tool_use": "with tools", "rag": "with documents"}
    tool = {"type": "function", "function": {"name": "f"}}
    assert rendered(served, named, USER) == "plain"
    assert rendered(served, named, USER, tools=[tool]) == "with tools"
    assert rendered(served, {"default": "plain"}, USER, tools=[tool]) == "plain"
    chosen = made(served, named, chat_template="rag").tokens([USER])
    assert served.engine.tokenizer.decode(chosen) == "with documents"
    del named["default"]
    error = refused(served, named, USER)
    assert error.code == "chat_template_missing" and "rag, tool_use" in error.message
    assert rendered(served, named, USER, tools=[tool]) == "with tools"
    with pytest.raises(ConfigError, match=r"no file 'other'.*rag, tool_use"):
        made(served, named, chat_template="other")
    file = tmp_path / "mine.jinja"
    file.write_text("from a file")
    chosen = made(served, named, chat_template=str(file)).tokens([USER])
    assert served.engine.tokenizer.decode(chosen) == "from a file"


@pytest.mark.parametrize(
    ("content", "said"), [(b"{% for %}", "not a Jinja template"), (b"\xff", "cannot be read")], ids=["syntax", "bytes"]
)
def test_a_broken_file_is_reported_at_startup(served: Served, tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "broken.jinja").write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        made(served, CHATML, chat_template=str(tmp_path / "broken.jinja"))


def test_special_tokens_are_added_on_request(served: Served) -> None:
    plain = made(served, CHATML)
    tokenizer = plain._tokenizer
    for added in (False, True):
        ids = plain.tokens([USER], rendering=Rendering(add_special_tokens=added))
        assert ids == tokenizer("<user>hello</>\n<assistant>", add_special_tokens=added)["input_ids"]


# Over HTTP


def ask(served: Served, **change: Any) -> tuple[int, dict[str, Any]]:
    body = {"model": "tiny", "messages": [USER], "max_tokens": 2, "seed": 1, **change}
    status, _, text = served.ask("POST", "/v1/chat/completions", body)
    return status, json.loads(text)


def prompt_tokens(served: Served, **change: Any) -> int:
    status, answer = ask(served, **change)
    assert status == 200, answer
    return answer["usage"]["prompt_tokens"]


def test_requests_bring_templates_variables_and_documents(served: Served) -> None:
    def length(text: str) -> int:
        return len(served.engine.tokenize(text))

    shows = "{{ who }} {{ style }} {{ reasoning_effort }} {{ enable_thinking }} {{ (documents or []) | length }}"
    assert prompt_tokens(served, chat_template=shows) == length("server plain   0")
    changed = {"chat_template_kwargs": {"who": "request"}, "documents": [{"text": "x"}], "reasoning_effort": "low"}
    assert prompt_tokens(served, chat_template=shows, **changed) == length("request plain low True 1")
    none = {"reasoning_effort": "none", "chat_template_kwargs": None}
    assert prompt_tokens(served, chat_template=shows, **none) == length("server plain none False 0")
    own = {"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": "mine"}}
    assert prompt_tokens(served, chat_template=shows, **own) == length("server plain high mine 0")


def test_endings_over_http(served: Served) -> None:
    template = "{{ messages[-1].content }}{% if add_generation_prompt %} generation{% else %}.{% endif %}"
    tokenize = served.engine.tokenize
    assert prompt_tokens(served, chat_template=template) == len(tokenize("hello generation"))
    assert prompt_tokens(served, chat_template=template, add_generation_prompt=False) == len(tokenize("hello."))
    assert prompt_tokens(served, chat_template=template, continue_final_message=True) == len(tokenize("hello"))
    status, answer = ask(served, add_generation_prompt=True, continue_final_message=True)
    assert (status, answer["error"]["param"]) == (400, "continue_final_message")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"chat_template": "{{ 1 + 'x' }}"}, "chat_template"),
        ({"chat_template": "{% for %}"}, "chat_template"),
        ({"chat_template": ""}, "messages"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs"),
        ({"documents": ["x"]}, "documents"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(served: Served, change: dict[str, Any], param: str) -> None:
    status, answer = ask(served, **change)
    assert (status, answer["error"]["param"]) == (400, param), answer


def test_templates_of_requests_need_trust() -> None:
    server = Served()
    try:
        status, answer = ask(server, chat_template="{{ messages }}")
        assert (status, answer["error"]["param"]) == (400, "chat_template")
        assert "server.trust_request_chat_template" in answer["error"]["message"]
        assert ask(server, chat_template=None)[0] == 200
    finally:
        server.close()
