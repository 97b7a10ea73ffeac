"""How a person names an artifact (stage, start of key or content id), and how files are called after a run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from urllib.parse import quote

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.manifest import Manifest

_FEWEST = 4  # characters of a key or content id
_LONGEST = 200  # bytes of a file's name, of 255 that file systems take: an ending comes, and a mark while it is written


def file_name(name: str) -> str:
    """What a file that belongs to a run of this name is called, without its ending: another name, another file."""
    quoted = quote(name, safe="")
    if len(quoted) <= _LONGEST:
        return quoted
    return f"{quoted[: _LONGEST - 33]}-{hashlib.sha256(name.encode()).hexdigest()[:32]}"


def the_one_named(text: str, manifests: Sequence[Manifest], where: str) -> Manifest:
    """The one of a store's manifests that `text` names. Raises DraftsmithError, with `where`, for none or several."""
    matches = [manifest for manifest in manifests if _names(text, manifest)]
    if len(matches) == 1:
        return matches[0]
    if not matches:
        raise DraftsmithError(f"no artifact matches {text!r} in {where}: `draftsmith status` lists them")
    choices = ", ".join(f"{m.stage}/{m.key[:12]} ({m.created_at})" for m in matches[-5:])
    raise DraftsmithError(f"{text!r} names {len(matches)} artifacts: choose one by its key, e.g. {choices}")


def _names(text: str, manifest: Manifest) -> bool:
    stage, slash, prefix = text.rpartition("/")
    if slash:
        return stage == manifest.stage and bool(prefix) and manifest.key.startswith(prefix)
    if text == manifest.stage:
        return True
    return len(text) >= _FEWEST and (manifest.key.startswith(text) or manifest.content_id.startswith(text))
