"""What tests of the pipeline share."""

from __future__ import annotations

import pytest

from draftsmith.artifacts.tracking import Tracking


@pytest.fixture(scope="session")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Tracking:
    """MLflow with a database of its own, which takes ten seconds to make."""
    return Tracking(tmp_path_factory.mktemp("mlflow"))
