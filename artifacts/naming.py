"""How a person names an artifact: by its stage, or by the start of its key or content id."""

from __future__ import annotations

from collections.abc import Sequence

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.manifest import Manifest

_FEWEST = 4  # characters of a key or content id


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
