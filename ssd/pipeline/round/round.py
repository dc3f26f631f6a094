"""A round as a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .candidates import Candidates
from .roles import Roles


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """What is fixed before a verification.

    ``VerifierWorker.begin`` decides the roles, ``verify`` decides the outcomes, ``advance`` finds the candidates of
    the round after it.
    """

    roles: Roles
    candidates: Mapping[int, Candidates] = field(default_factory=dict)
    """By request. A request without an entry has no candidates."""
    introduced: tuple[int, ...] = ()
    """Slots whose sequences the draft does not know yet, or knows in another role."""
    waiting: tuple[int, ...] = ()
    """Slots whose candidates are still to be drafted, while the verifier waits."""
    behind: frozenset[int] = frozenset()
    """Requests for which the draft could prepare nothing, because it is still computing their keys, or because they
    are longer than its context."""

    @classmethod
    def empty(cls, batch: int) -> Round:
        """The round before the first one: nothing decodes in any of the B slots."""
        return cls(roles=Roles(("none",) * batch))

    @property
    def lookups(self) -> int:
        """Outcomes of the round before that were looked up in a speculation set."""
        return sum(one.hit is not None for one in self.candidates.values())

    @property
    def hits(self) -> int:
        """Lookups that found the outcome."""
        return sum(one.hit is True for one in self.candidates.values())

    @property
    def all_prepared(self) -> bool:
        """Whether all candidates were found in a speculation set, and there are some."""
        return bool(self.candidates) and all(one.origin == "prepared" for one in self.candidates.values())
