"""Base classes of results: records that keep unknown keys, and JSON files of artifacts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from draftsmith.artifacts.atomic import write_text
from draftsmith.artifacts.errors import DraftsmithError


class Record(BaseModel):
    """A JSON object: keys that were not set are not written, and keys of other versions are kept.

    The keys in the file have the order of the fields.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    def to_json(self) -> dict[str, Any]:
        """Return the object as the file holds it."""
        return self.model_dump(exclude_unset=True)


class ResultFile(BaseModel):
    """A JSON file of an artifact."""

    FILE: ClassVar[str]
    INDENT: ClassVar[int] = 2

    @classmethod
    def read(cls, folder: Path, name: str | None = None) -> Self:
        """Read the file of an artifact, by default under its own name.

        Raises DraftsmithError if it is missing or is not such a file.
        """
        path, again = folder / (name or cls.FILE), f"Make it again: add `--force {folder.parent.name}` to the command."
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise DraftsmithError(f"{path}: missing. {again}") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "content"
            raise DraftsmithError(f"{path}: {where}: {first['msg']}. {again}") from None

    @classmethod
    def read_if_there(cls, folder: Path | None) -> Self | None:
        """Read the file of an artifact; None without the artifact or the file."""
        return cls.read(folder) if folder is not None and (folder / cls.FILE).is_file() else None

    def write(self, folder: Path, name: str | None = None) -> None:
        """Write the file, by default under its own name."""
        content = self.model_dump(exclude_unset=True)
        write_text(folder / (name or self.FILE), json.dumps(content, indent=self.INDENT) + "\n")


class SetMetrics(Record):
    """Metrics of a drafter on one slice of the prompts, each with its 95 % interval."""

    tau: float | None = None
    low: float | None = None  # ends of tau's interval; None for a slice that is too small
    high: float | None = None
    prompts: int | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None

    @property
    def has_interval(self) -> bool:
        """Return whether tau has an interval."""
        return self.low is not None
