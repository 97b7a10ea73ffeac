"""Output tokens/s of a DFLASH server without the plug-in, with it and no request traced, and with every one traced.

Starts two servers of the test bed's target and drafter on the CPU (`make sglang-cpu`), one that leaves the plug-in out;
or measures servers that run already, on a GPU say: `--without URL --with URL --prompts FILE`, where FILE has a JSON
list of token ids a line. The same greedy requests go to every arm, in turns. Behind it, without any server, the time of
what the plug-in does on the host in a step: without traced requests it looks at the batch's, of a share it adds sums.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.engines.sglang.plugin_hooks import Recorder, RequestLog
from draftsmith.stages.engines.sglang.protocol import KEY
from tests.benchmarks import harness
from tests.sglang_cpu.server import generate, running_server, sglang_python
from tests.testbed import target
from tests.testbed.drafter import drafter_artifacts

ABSENT, OFF, ON = "absent", "installed, off", "installed, on"


@contextmanager
def cpu_servers(logs: Path) -> Iterator[tuple[str, str, Path]]:
    """Start servers; yield their URLs without and with the plug-in, and the folder of the model that both serve."""
    python = sglang_python()
    if isinstance(python, str):
        raise DraftsmithError(python)
    model = target.target_folder()

    drafter = drafter_artifacts().drafter / "drafter"
    only_cpu = {"SGLANG_PLUGINS": "draftsmith_cpu"}  # the names of the plug-ins that are loaded
    with ExitStack() as stack:
        urls = [
            stack.enter_context(running_server(python, model, drafter, log=logs / name, environment=environment))
            for name, environment in (("without.log", only_cpu), ("with.log", {}))
        ]
        yield urls[0], urls[1], model


def arm(url: str, prompts: Sequence[list[int]], tokens: int, concurrency: int, traced: bool) -> Callable[[], None]:
    """Let a server answer all prompts."""
    sampling: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": tokens, "ignore_eos": True}
    if traced:
        sampling["custom_params"] = {KEY: True}
    requests = [{"input_ids": prompt, "sampling_params": sampling} for prompt in prompts]

    def work() -> None:
        answers = generate(url, requests, concurrency)
        assert all(len(answer["output_ids"]) == tokens for answer in answers)
        records = [any(answer["meta_info"].get(KEY) or ()) for answer in answers]
        if any(records) != traced or all(records) != traced:
            raise DraftsmithError(f"{url}: {sum(records)} of {len(records)} answers have records, asked: {traced}")

    return work


def microseconds_of_a_look(requests: int, share: float = 0.0, looks: int = 2000) -> float:
    """Measure `Recorder.traced_rows` for a batch that asks for nothing, or what is done for a share of it instead."""
    recorder = Recorder()
    recorder.active, recorder.share = True, share
    batch = SimpleNamespace(
        reqs=[
            SimpleNamespace(
                rid=str(number),
                sampling_params=SimpleNamespace(custom_params=None),
                origin_input_ids=[0] * 1000,
                output_ids=[0],
                finished_len=None,
                finished=lambda: False,
            )
            for number in range(requests)
        ]
    )
    log = RequestLog(recorder)

    def commit(*_: object) -> None:
        for request in batch.reqs:
            request.output_ids.append(0)

    started = time.perf_counter()
    for _ in range(looks):
        if share:
            log.around_decode(commit, None, batch, None)
        else:
            recorder.traced_rows(batch)
    return (time.perf_counter() - started) / looks * 1e6


def main() -> None:
    options = harness.parser(__doc__, repetitions=5)
    options.add_argument("--without", metavar="URL", help="a running server without the plug-in")
    options.add_argument("--with", metavar="URL", dest="installed", help="the same server with it")
    options.add_argument("--prompts", type=Path, help="token ids, a JSON list a line; for running servers")
    options.add_argument("--requests", type=int, default=32)
    options.add_argument("--new-tokens", type=int, default=128)
    options.add_argument("--concurrency", type=int, nargs="+", default=[1, 8])
    chosen = options.parse_args()
    if len({bool(chosen.without), bool(chosen.installed), bool(chosen.prompts)}) > 1:
        options.error("--without, --with and --prompts: give all of them, or none")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as logs, ExitStack() as stack:
        if chosen.prompts:
            without, installed = chosen.without, chosen.installed
            prompts = [json.loads(line) for line in chosen.prompts.read_text().splitlines()][: chosen.requests]
        else:
            without, installed, model = stack.enter_context(cpu_servers(Path(logs)))
            prompts = target.fresh_prompt_ids(model, chosen.requests)
        for concurrency in chosen.concurrency:
            arms = {
                name: arm(url, prompts, chosen.new_tokens, concurrency, traced)
                for name, url, traced in ((ABSENT, without, False), (OFF, installed, False), (ON, installed, True))
            }
            seconds = harness.alternate(arms, chosen.repetitions)
            for name, values in seconds.items():
                ratios = [base / value for base, value in zip(seconds[ABSENT], values, strict=True)]
                rows.append(
                    {
                        "plug-in": name,
                        "concurrency": concurrency,
                        "tokens_per_s": len(prompts) * chosen.new_tokens / harness.median(values),
                        "of_absent": harness.median(ratios),  # of the same round
                        "lowest": min(ratios),
                        "highest": max(ratios),
                    }
                )
    harness.print_rows(f"{len(prompts)} requests of {chosen.new_tokens} tokens, {chosen.repetitions} rounds", rows)
    looks = {count: microseconds_of_a_look(count) for count in (1, 16, 64, 256)}
    harness.print_table("a step without traced requests", ["requests", "microseconds"], list(looks.items()))
    sums = {f"{count}, {share:g}": microseconds_of_a_look(count, share) for count in (1, 256) for share in (0.01, 1.0)}
    harness.print_table("a step of which a share is summed up", ["requests, share", "microseconds"], list(sums.items()))
    harness.report("sglang_plugin", {"rows": rows, "look_microseconds": looks, "sum_microseconds": sums}, chosen)


if __name__ == "__main__":
    harness.run(main)
