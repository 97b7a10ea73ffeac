"""`draftsmith status` and `draftsmith watch` on real servers of a line."""

from __future__ import annotations

import re
from hashlib import blake2b
from pathlib import Path

import httpx
import pytest

from draftsmith.flows.cli.main import main
from draftsmith.stages.drafters.digest import drafter_digest
from draftsmith.stages.engines.sglang.protocol import KEY, REQUESTS_STATE
from tests.flows.refresh.watched import promoted
from tests.integration.recorded import Reference, asked_for_nothing, body
from tests.sglang_cpu.fixtures import ServingTarget
from tests.sglang_cpu.server import generate

pytestmark = [pytest.mark.sglang, pytest.mark.integration]


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def kept(url: str, digest: str) -> list[dict[str, list[int]]]:
    """The sums of a drafter's requests that a server keeps."""
    (state,) = httpx.get(f"{url}/server_info", timeout=60).json()["internal_states"]
    return [sums for _, sums in state[REQUESTS_STATE].get(digest, ())]


def test_the_servers_of_a_line_are_watched(
    dflash_url: str,
    plain_url: str,
    serving_target: ServingTarget,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts, digest = Reference(serving_target.model).prompts, drafter_digest(serving_target.drafter)
    asking = generate(dflash_url, [body(prompt) for prompt in prompts])
    recorded = [
        [[min(step["accepted"] + 1, 48 - at), 1] for at, step in enumerate(answer["meta_info"][KEY]) if at and step]
        for answer in asking
    ]
    before, answers, expected = kept(dflash_url, digest), [], []
    for number, prompt in enumerate(prompts):
        answers += generate(dflash_url, [{**body(prompt, trace=False), "rid": f"watched-{number}"}])
        if blake2b(f"watched-{number}".encode(), digest_size=4).digest()[0] < 128:  # half of the hashes
            expected.append({"depth:below-1k": [sum(column) for column in zip(*recorded[number], strict=True)]})
    assert [answer["output_ids"] for answer in answers] == [answer["output_ids"] for answer in asking]
    assert all(asked_for_nothing(answer) for answer in answers)
    assert 4 < len(expected) < len(prompts)
    assert kept(dflash_url, digest) == before + expected, "their steps are those that the others recorded"

    committed, steps = map(sum, zip(*(sums["depth:below-1k"] for sums in kept(dflash_url, digest)), strict=True))
    tau = committed / steps
    watch = ["watch", "tiny", "--url", dflash_url]
    first = promoted("tiny", "a", digest, tau)
    assert main(["status", "tiny", "--url", dflash_url, "--url", plain_url]) == 0
    shown = capsys.readouterr().out
    assert "version 1 (champion)" in shown and first.content_id[:12] in shown and "no drafter" in shown
    assert re.search(r"\d{4}-\d\d-\d\dT\d\d:\d\d", shown), "since when"
    assert main([*watch, "--url", "http://127.0.0.1:9"]) == 0
    shown = capsys.readouterr().out
    assert f"promised: tiny version 1: tau {tau:.3f}" in shown and "no answer from http://127.0.0.1:9" in shown
    assert f"({len(before + expected)} traced requests since 20" in " ".join(shown.split())

    promoted("tiny", "b", "0" * 64, tau)
    assert main(watch) == 3
    assert "version 1" in capsys.readouterr().err, "the server has the drafter before"

    promoted("tiny", "c", digest, 1.5 * tau)
    assert main([*watch, "--then", "refresh"]) == 2, "a line's name is no config"
    assert main(watch) == 3
    assert "measurably more than 3.0% below: overall" in capsys.readouterr().err


def test_what_cannot_be_asked_is_an_error(plain_url: str) -> None:
    assert main(["status", "tiny", "--url", plain_url]) == 2, "no such line"
    promoted("tiny", "a", "0" * 64, 2.0)
    assert main(["status", "tiny", "--url", "http://127.0.0.1:9"]) == 0
    assert main(["watch", "tiny", "--url", "http://127.0.0.1:9"]) == 75
    assert main(["watch", "tiny", "--url", plain_url]) == 3, "it has no drafter"
