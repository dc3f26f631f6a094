"""Regular expressions of schemas, rewritten without look-ahead, which automata do not have."""

from __future__ import annotations

import re

MAX_DIGITS = 40
"""Most digits of a decimal whose split between both sides of the point is listed."""
_LOOKAROUND = re.compile(r"\(\?(?:=|!|<=|<!)")
_CLASS = r"\[(?P<not>\^?)(?P<class>(?:[^\]\\]|\\.)+)\]"
_ALL_OF_CLASS = re.compile(rf"\^?{_CLASS}(?P<times>[*+])\$")
_CONTAINS = re.compile(rf"\^?\.\*(?:{_CLASS}|(?P<one>\\?[^\\\[\](){{}}*+?|^$.]|\\[dwsDWS.]))")
_WORDS = re.compile(r"\^?(?P<words>[\w\- ]+|\((?:\?:)?[\w\- ]+(?:\|[\w\- ]+)*\))\$")
# pydantic's decimals: at most n digits, of which d stand after the point.
_DECIMAL = re.compile(
    r"\(\?:(?P<whole>\\d\{0,\d+\})\|\(\?=\[\\d\.\]\{1,(?P<all>\d+)\}0\*\$\)"
    r"\\d(?:\*|\{0,(?P<before>\d+)\})\\\.\\d(?:\*|\{0,(?P<after>\d+)\})(?:0\*)?\$\)\$?$"
)


def conditions(pattern: str) -> list[str]:
    """Returns patterns without look-around that a string matches, all of them, exactly where it matches ``pattern``.

    Raises:
        ValueError: There is a look-around that cannot be rewritten.
    """
    pattern = re.sub(r"(?<!\\)((?:\\\\)*)\\A", r"\1^", re.sub(r"(?<!\\)((?:\\\\)*)\\[zZ]", r"\1$", pattern))
    pattern = _DECIMAL.sub(_decimal, pattern)
    found: list[str] = []
    start = "^" if pattern.startswith("^") else ""
    rest = pattern[len(start) :]
    while start and rest.startswith(("(?=", "(?!")):
        end = _closing(rest)
        inner = rest[3:end]
        found.append(f"^(?:{inner.removeprefix('^')})" if rest[2] == "=" else _absent(inner))
        rest = rest[end + 1 :]
    if found and not _is_one_branch(rest):
        raise ValueError("has look-ahead in one of several alternatives")
    found.append(start + rest)
    if any(_LOOKAROUND.search(one) for one in found):
        raise ValueError("has look-around that cannot be held")
    return found if len(found) == 1 else [one for one in found if one != "^"]


def other_than(words: list[str]) -> str:
    """Returns a pattern for all strings but these."""

    def rest(suffixes: set[str]) -> str:
        following: dict[str, set[str]] = {}
        for suffix in suffixes:
            if suffix:
                following.setdefault(suffix[0], set()).add(suffix[1:])
        branches = [f"{re.escape(first)}{rest(following[first])}" for first in sorted(following)]
        others = "".join(rf"\x{{{ord(first):x}}}" for first in sorted(following))
        branches.append(rf"[^{others}](?s:.*)" if others else "(?s:.+)")
        return f"(?:{'|'.join(branches)})" + ("" if "" in suffixes else "?")

    return f"^{rest(set(words))}$"


def listed(pattern: str) -> list[str] | None:
    """Returns the strings that match, if the pattern is a list of plain words: ``^(red|green)$``."""
    match = _WORDS.fullmatch(pattern) if pattern.startswith("^") else None
    return match["words"].strip("()").removeprefix("?:").split("|") if match else None


def _absent(inner: str) -> str:
    """Returns a pattern of the strings at whose beginning ``inner`` does not match."""
    if match := _ALL_OF_CLASS.fullmatch(inner):
        outside = f"[{'' if match['not'] else '^'}{match['class']}]"
        return outside if match["times"] == "*" else f"^$|{outside}"
    if match := _CONTAINS.fullmatch(inner):
        one = match["one"]
        negated = f"[^{one}]" if one else f"[{'' if match['not'] else '^'}{match['class']}]"
        return f"^{negated}*$"
    if match := _WORDS.fullmatch(inner):
        return other_than(match["words"].strip("()").removeprefix("?:").split("|"))
    raise ValueError("has negative look-ahead that cannot be held")


def _decimal(match: re.Match[str]) -> str:
    """Returns pydantic's pattern of a decimal's digits without its look-ahead."""
    most = int(match["all"]) - 1
    before = most if match["before"] is None else int(match["before"])
    after = most if match["after"] is None else int(match["after"])
    if before + after <= most:
        splits = [(before, after)]
    elif most > MAX_DIGITS:
        return match[0]
    else:
        splits = [(whole, min(after, most - whole)) for whole in range(min(before, most) + 1)]
    branches = [rf"\d{{0,{whole}}}\.\d{{0,{part}}}0*" for whole, part in splits]
    return f"(?:{'|'.join([match['whole'], *branches])})$"


def _closing(text: str) -> int:
    """Returns the index of the parenthesis that closes the one at the beginning."""
    depth, in_class, index = 0, False, 0
    while index < len(text):
        char = text[index]
        if char == "\\":
            index += 1
        elif in_class:
            in_class = char != "]"
        elif char == "[":
            in_class = True
            index += text[index + 1 : index + 2] == "^"
        elif char == "(":
            depth += 1
        elif char == ")":
            depth -= 1
            if not depth:
                return index
        index += 1
    raise ValueError("has an unclosed group")


def _is_one_branch(text: str) -> bool:
    """Whether no alternative begins outside of the text's groups."""
    bare = re.sub(r"\\.|\[\^?\]?(?:[^\]\\]|\\.)*\]", "", text)
    while (shorter := re.sub(r"\([^()]*\)", "", bare)) != bare:
        bare = shorter
    return "|" not in bare
