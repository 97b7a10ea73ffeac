"""Lists the architectures by kind; no other module does. Plans read this module, so it imports no torch."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from draftsmith.stages.drafters.dflash.config import TRAITS as DFLASH
from draftsmith.stages.drafters.dflash.config import DFlashConfig
from draftsmith.stages.drafters.dflash2.config import TRAITS as DFLASH2
from draftsmith.stages.drafters.dflash2.config import DFlash2Config
from draftsmith.stages.drafters.dspark.config import TRAITS as DSPARK
from draftsmith.stages.drafters.dspark.config import DSparkConfig
from draftsmith.stages.drafters.eagle3.config import TRAITS as EAGLE3
from draftsmith.stages.drafters.eagle3.config import Eagle3Config
from draftsmith.stages.drafters.spec import Traits

KINDS: dict[str, Traits] = {traits.kind: traits for traits in (DFLASH, DFLASH2, DSPARK, EAGLE3)}
# The modules that create, load and save them, each an `Architecture`. They import torch.
CHECKPOINTS = {
    "dflash": "draftsmith.stages.drafters.dflash.checkpoint",
    "dflash2": "draftsmith.stages.drafters.dflash2.checkpoint",
    "dspark": "draftsmith.stages.drafters.dspark.checkpoint",
    "eagle3": "draftsmith.stages.drafters.eagle3.checkpoint",
}


def _kind_of(value: Any) -> str:
    kind = value.get("kind", "dflash") if isinstance(value, dict) else getattr(value, "kind", "")
    return str(kind)


# The shape of a new drafter; `drafter` in a config.
DrafterConfig = Annotated[
    Annotated[DFlashConfig, Tag("dflash")]
    | Annotated[DFlash2Config, Tag("dflash2")]
    | Annotated[DSparkConfig, Tag("dspark")]
    | Annotated[Eagle3Config, Tag("eagle3")],
    Discriminator(
        _kind_of,
        custom_error_type="drafter_kind",
        custom_error_message=f"kind must be {' or '.join(', '.join(KINDS).rsplit(', ', 1))}",
    ),
]
