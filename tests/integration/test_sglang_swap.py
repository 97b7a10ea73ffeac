"""A real server's drafter is swapped by the commands, A to B to A, while it answers other requests."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.home import home
from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.store.manifest import Artifact, read_manifest
from draftsmith.artifacts.tracking.registry import Registry
from draftsmith.flows.cli.main import main
from draftsmith.flows.refresh.swap import served_by
from draftsmith.flows.refresh.versions import artifact_folder, registry
from draftsmith.stages.drafters.checkpoint import load_drafter
from draftsmith.stages.drafters.digest import drafter_digest
from draftsmith.stages.engines.servers.state import NewDrafter
from draftsmith.stages.engines.sglang.protocol import SWAP_ACTION, SWAP_STATE
from tests.faults.servers import mlflow_server
from tests.flows.refresh.line_runs import config_of, finished, gated
from tests.integration.swapping import PROMISED, PROMPTS, assert_drafts_with, keep_from_servers, line_of_two, requests
from tests.sglang_cpu.server import generate
from tests.stages.bench import Bench
from tests.stages.data.logs.test_engine_logs import converted
from tests.stages.drafters.edits import without_a_layer
from tests.stages.engines.swaps import Prover, swapped
from tests.testbed.drafter import DrafterArtifacts

pytestmark = [pytest.mark.sglang, pytest.mark.integration]

LOADED, IN_FLIGHT, LONG = 24, 6, 2
LINE = "swapped"


@dataclass(frozen=True)
class Swapping:
    """A server that drafts with version 1 of a line, whose version 2 has other weights."""

    url: str
    bench: Bench  # with drafters "1" and "2"
    folders: dict[str, Path]  # of their checkpoints
    lines: Registry

    def assert_drafts_with(self, version: str) -> None:
        assert_drafts_with(self.url, self.bench, version)

    @contextmanager
    def load(self) -> Iterator[list[dict[str, Any]]]:
        """Keep other requests in flight meanwhile. Yields the list of their answers, each compared at the end.

        Two of them go on past the answer's end for seconds, so that a swap finds them in flight however slow this is.
        """
        bodies = requests(self.bench, PROMPTS, LOADED)
        on = {"max_new_tokens": 500, "ignore_eos": True}
        expected = [self.bench.greedy[p.prompt_id] for p in self.bench.prompts[PROMPTS : PROMPTS + LOADED]]
        done, stop = [], threading.Event()

        def ask(worker: int) -> None:
            mine = slice(worker, None, IN_FLIGHT)
            asked = bodies[mine]
            if worker < LONG:
                asked = [{**body, "sampling_params": {**body["sampling_params"], **on}} for body in asked]
            while not stop.is_set():  # several by one client, which takes as long to make as an answer
                answers = generate(self.url, asked, concurrency=1)
                begin = [answer["output_ids"][: len(ids)] for answer, ids in zip(answers, expected[mine], strict=True)]
                assert begin == expected[mine] and (worker < LONG or begin == [a["output_ids"] for a in answers])
                done.extend(answers)

        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            workers = [pool.submit(ask, worker) for worker in range(IN_FLIGHT)]
            try:
                yield done
            finally:
                stop.set()
            for worker in workers:
                worker.result()


@pytest.fixture(scope="module")
def swapping(
    dflash_url: str, bench: Bench, tiny_drafter: DrafterArtifacts, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Swapping]:
    with line_of_two(LINE, tmp_path_factory.mktemp("home"), tiny_drafter, bench) as folders:
        drafters = {name: load_drafter(folder, bench.target) for name, folder in folders.items()}
        yield Swapping(dflash_url, bench.with_drafters(drafters), folders, registry())


def test_a_line_is_swapped_forth_and_back_under_load(
    swapping: Swapping, sglang_logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the gate's decision over a person's approval to the server, and back; its log has the answers."""
    url, lines = swapping.url, swapping.lines
    swapping.assert_drafts_with("1")
    challenger = artifact_folder(lines.version(LINE, 2))
    made = Artifact(challenger, read_manifest(challenger))
    gate = gated(Store(home() / "store"), made, tau=PROMISED["tau"], block_size=swapping.bench.drafters["2"].block_size)
    week = config_of(LINE, registry={"name": LINE, "approve": True, "servers": [url]})
    assert finished(week, gate).name == "Waiting"
    with swapping.load() as answers:
        assert main(["promote", f"{LINE}@2"]) == 0
        promoted = finished(week, gate)
        time.sleep(1)
        forth = len(answers)
    assert promoted.name == "Promoted"
    assert re.search(rf"{url} drafts with {LINE} version 2 since \S+, after a pause of", promoted.message)
    swapping.assert_drafts_with("2")
    (served,) = served_by(lines.version(LINE, 2))
    assert (served.url, served.drafter) == (
        url,
        drafter_digest(swapping.folders["2"]),
    ) and "verify steps" in served.proof
    assert forth > IN_FLIGHT and sum(answer["meta_info"]["num_retractions"] for answer in answers) > 0

    with swapping.load():
        assert main(["rollback", LINE]) == 0  # which swaps the servers that the tags name
    swapping.assert_drafts_with("1")
    assert not served_by(lines.version(LINE, 2))
    (served,) = served_by(lines.version(LINE, 1))
    assert main(["champions", LINE]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert re.search(rf"{url} drafts with {LINE} version 1 since \S+, after a pause of", printed)
    assert f"{url} drafts with version 1." in printed
    print(promoted.message, printed)  # with the pauses
    assert main(["swap", LINE]) == 0  # nothing is left to do
    swapping.assert_drafts_with("1")
    if shutil.which("jq"):
        (tmp_path / "FOLDER").symlink_to(sglang_logs / "requests")
        logged = [row["prompt_token_ids"] + row["completion_token_ids"] for row in converted(tmp_path)]
        assert all(answer.tokens in logged for answer in swapping.bench.answered(PROMPTS))


def test_a_watch_swaps_back_a_server_that_accepts_less_than_promised(swapping: Swapping) -> None:
    url, lines = swapping.url, swapping.lines
    assert main(["swap", LINE, "--url", url]) == 0  # it drafts with version 1, and is known from then on
    with swapping.load():
        assert main(["promote", f"{LINE}@2"]) == 0  # which swaps the servers that are known
        swapping.assert_drafts_with("2")
        assert main(["watch", LINE, "--minutes", "0.1", "--then", "rollback"]) == 0
    swapping.assert_drafts_with("1")
    champion = lines.champion(LINE)
    assert champion is not None and champion.number == 1
    (served,) = served_by(champion)
    assert served.url == url and "verify steps" in served.proof


def test_a_server_without_the_store_fetches_the_upload(
    swapping: Swapping,
    served_mlflow: str,
    bench: Bench,
    tiny_drafter: DrafterArtifacts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From MLflow's server, over HTTP, in the SGLang server's own process."""
    line, url = "uploaded", ["--url", swapping.url]
    keep_from_servers("sglang", monkeypatch)
    with (
        mlflow_server(tmp_path, served_mlflow) as mlflow,
        # other weights than any that the server has had, whose last ones it keeps in memory
        line_of_two(line, tmp_path / "home", tiny_drafter, bench, mlflow.url, seed=1) as folders,
    ):
        assert main(["swap", f"{line}@2", *url]) == 0
        drafters = {"fetched": load_drafter(folders["2"], bench.target)}
        assert_drafts_with(swapping.url, bench.with_drafters(drafters), "fetched")
        version = registry().version(line, 2)
        (served,) = served_by(version)
        assert served.drafter == drafter_digest(folders["2"]) and "verify steps" in served.proof
        capsys.readouterr()
        assert main(["status", line, *url]) == 0
        shown = capsys.readouterr().out
        assert "version 2" in shown and version.content_id[:12] in shown
        assert main(["promote", f"{line}@2"]) == 0  # nothing is left to swap
        shutil.rmtree(artifact_folder(registry().version(line, 1)))
        assert main(["rollback", line]) == 0, "with its upload, and proven with what version 2 was trained with"
        (served,) = served_by(registry().version(line, 1))
        assert served.drafter == drafter_digest(swapping.folders["1"]) and "verify steps" in served.proof
    swapping.assert_drafts_with("1")


def test_a_checkpoint_that_does_not_fit_changes_nothing(swapping: Swapping, tmp_path: Path) -> None:
    """SGLang's own loader ignores a missing layer."""
    without_a_layer(other := Path(shutil.copytree(swapping.folders["2"], tmp_path / "other")))
    new = NewDrafter(drafter_digest(other), other, "DFLASH", 8)
    with pytest.raises(DraftsmithError, match="refuses the drafter"):
        swapped([swapping.url], new, Prover(prove_by=lambda: pytest.fail("written")))
    swapping.assert_drafts_with("1")


MALFORMED = ["", "{", "[]", "3", "null", "{}", '{"drafter": null}', '{"drafter": "../.."}', "[" * 100_000]


def test_a_malformed_request_is_refused_and_changes_nothing(swapping: Swapping) -> None:
    """As the stock server refuses an action that it does not know."""
    drafter = drafter_digest(swapping.folders["1"])
    wrong = [
        {"drafter": drafter, "folder": 3},
        {"drafter": drafter, "folder": "relative"},
        {"drafter": drafter, "folder": "/", "upload": ["runs:/a/drafter"]},
        {"drafter": drafter, "folder": "/", "upload": "http://127.0.0.1:9/drafter"},
    ]
    with httpx.Client(base_url=swapping.url, timeout=300) as client:
        before = client.get("/server_info").json()["internal_states"][0][SWAP_STATE]
        for text in ["unknown", *(SWAP_ACTION + text for text in [*MALFORMED, *map(json.dumps, wrong)])]:
            answer = client.post("/weights_checker", json={"action": text})
            assert answer.status_code == 400 and answer.json()["message"], text[:80]
        assert client.get("/server_info").json()["internal_states"][0][SWAP_STATE] == before
    swapping.assert_drafts_with("1")


def test_a_failed_proof_leaves_the_server_as_it_was(swapping: Swapping) -> None:
    folder = swapping.folders["2"]

    def prove() -> Any:
        swapping.assert_drafts_with("2")
        raise DraftsmithError("the proof fails.")

    new = NewDrafter(drafter_digest(folder), folder, "DFLASH", 8)
    with pytest.raises(DraftsmithError, match="again, and no server after it was touched"):
        swapped([swapping.url], new, Prover(prove_by=prove))
    swapping.assert_drafts_with("1")
