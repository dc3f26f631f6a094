"""Seeding known bugs into the running code: see ``mutants``, where they stand.

A mutant replaces one function or method, everywhere it is bound, while a test runs::

    with seeded(MUTANTS["bonus from the wrong row"]):
        ...
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock


class Seeding(ExitStack):
    """What a mutant replaces; undone on exit."""

    def put(self, owner: Any, name: str, wrong: Any) -> None:
        """An attribute of a class or a module."""
        self.enter_context(mock.patch.object(owner, name, wrong))

    def everywhere(self, honest: Callable[..., Any], wrong: Callable[..., Any]) -> None:
        """A function, in every module that has imported it."""
        for module in list(sys.modules.values()):
            for name, value in list(getattr(module, "__dict__", {}).items()):
                if value is honest:
                    self.put(module, name, wrong)


@dataclass(frozen=True, kw_only=True, slots=True)
class Mutant:
    name: str
    bug: str
    """What is wrong, in words."""
    killers: tuple[str, ...]
    """Tests, by node id below ``tests/unit``, each of which fails; the first is the quickest."""
    seed: Callable[[Seeding], None]


MUTANTS: dict[str, Mutant] = {}


@contextmanager
def seeded(mutant: Mutant) -> Iterator[None]:
    with Seeding() as seeding:
        mutant.seed(seeding)
        yield


def mutant(name: str, *killers: str) -> Callable[[Callable[[Seeding], None]], Callable[[Seeding], None]]:
    def register(seed: Callable[[Seeding], None]) -> Callable[[Seeding], None]:
        MUTANTS[name] = Mutant(name=name, bug=" ".join((seed.__doc__ or "").split()), killers=killers, seed=seed)
        return seed

    return register


# Tests that kill, by node id.


def law_of(rule: str, shape: str = "chain of 2", case: str = "full rows-V=3") -> str:
    return f"decoding/test_laws.py::test_law[{rule}-{shape}-{case}]".replace(" ", "_")


def joint_of(case: str) -> str:
    return f"decoding/test_chi_square.py::test_joint_law[{case}]"


EQUAL = "equality/test_played.py::test_tokens_are_plain_decodings"
RIGHT = "equality/test_played.py::test_a_draft_that_is_the_target_is_never_wrong"
OWN_DISTRIBUTIONS = "pipeline/sampling/test_rules.py::test_every_row_is_judged_by_what_its_own_tree_was_drawn_from"
UNIFORMS = "pipeline/sampling/test_rules.py::test_uniforms_are_independent"
STREAMS = "pipeline/sampling/test_rules.py::test_candidates_are_independent_of_other_noise"
POSSIBLE = "equality/test_played.py::test_guesses_are_possible_outcomes"
