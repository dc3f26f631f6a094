"""Prompts and parameters as callers give them."""

from __future__ import annotations

from typing import Any

import pytest

from ssd.errors import RequestError
from ssd.request import prompts
from ssd.request.sampling_params import SamplingParams

SEVEN = SamplingParams(seed=7)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("text", ["text"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2, 3], [[1, 2, 3]]),  # one prompt of token ids
        ((1, 2), [[1, 2]]),
        ([[1, 2], (3,)], [[1, 2], [3]]),
        (["a", [3]], ["a", [3]]),
        ([], []),
        ([[]], [[]]),
    ],
)
def test_forms_of_prompts(given: Any, expected: list[Any]) -> None:
    assert [one.prompt for one in prompts.pair(given)] == expected
    assert [one.params for one in prompts.pair(given, SEVEN)] == [SEVEN] * len(expected)
    assert [one.params for one in prompts.pair(given, [SEVEN] * len(expected))] == [SEVEN] * len(expected)


@pytest.mark.parametrize(
    "given",
    [
        "\ud800",
        ["a", "b\udfff"],
        5,
        None,
        b"x",
        [1.5],
        [[1, "x"]],
        [[-1]],
        [[2**31]],
        [[True]],
        {"a": 1},
        [None],
        ["a", 3],
    ],
)
def test_other_values_are_one_clear_error(given: Any) -> None:
    with pytest.raises(RequestError, match=r"^prompts? .*|^prompt: ") as caught:
        prompts.pair(given)
    assert "\n" not in str(caught.value) and str(caught.value).encode()


def test_as_many_parameters_as_prompts() -> None:
    with pytest.raises(RequestError, match="2 prompts but 1 sampling parameters"):
        prompts.pair(["a", "b"], [SEVEN])
    with pytest.raises(RequestError, match="params must be SamplingParams"):
        prompts.pair(["a"], [{"seed": 7}])  # type: ignore[list-item]
