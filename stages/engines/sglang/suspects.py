"""Requests that servers died with: of many in flight one may be the cause, and innocent ones must not be set aside."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from draftsmith.artifacts.errors import DraftsmithError

_SUSPECT = 2  # servers that died with a request: it is kept apart from others that a server died with
_CONVICTED = 3  # it is not asked again
_NAMED = 5  # in a message


class DeadlyRequestError(DraftsmithError):
    """Servers died with a request, again and again: it is asked no more."""


@dataclass(eq=False)
class Asked:
    """A request that is to be answered."""

    name: str
    died: list[str] = field(default_factory=list)  # addresses of the servers that died with it, one a death

    def check(self) -> None:
        """Raises DeadlyRequestError if it may not be sent again."""
        if len(self.died) >= _CONVICTED:
            raise DeadlyRequestError(
                f"request {self.name}: was in flight when {len(self.died)} SGLang servers died "
                f"({', '.join(self.died)}), the last time beside none that a server had died with; look at their logs"
            )

    def waits(self, unsettled: int) -> bool:
        """Must it be known first whether it killed? unsettled: servers that lost it and are being examined."""
        return unsettled > 0 and len(self.died) + unsettled >= _SUSPECT

    def fits(self, others: Collection[Asked]) -> bool:
        """May it be in flight beside these? A suspect is kept to those that no server died with, so that the next death
        tells which it was."""
        if not self.died:
            return True
        most = max((len(each.died) for each in others), default=0)
        return most == 0 or max(most, len(self.died)) < _SUSPECT


def named(asked: Collection[Asked]) -> str:
    """Which of these are suspects, for a message; nothing if none or many are."""
    suspects = sorted({each.name for each in asked if len(each.died) >= _SUSPECT})
    if not 0 < len(suspects) <= _NAMED:
        return ""
    return f"; several died while they had {', '.join(suspects)}: look there first"
