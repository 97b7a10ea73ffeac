"""What decoding in fixed groups costs the embedded engine: slots run empty while a group's last answers are written.

Lengths of the answers are drawn (log-normal, up to a limit), as those of chat models are: long ones are what is waited
for. Steps and rows in flight are counted and depend on the lengths alone; tokens/s are measured in alternation.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from draftsmith.stages.engines.base import Request, SamplingParams
from draftsmith.stages.engines.embedded import EmbeddedEngine
from tests.benchmarks import harness
from tests.benchmarks.decode import make_prompts


class CountingEngine(EmbeddedEngine):
    """Counts its decoding steps."""

    steps = 0

    def _decode(self, rows: list[object]) -> None:  # type: ignore[override]
        self.steps += 1
        super()._decode(rows)  # type: ignore[arg-type]


def main() -> None:
    options = harness.parser(__doc__)
    harness.add_target(options)
    options.add_argument("--answers", type=int, default=128)
    options.add_argument("--slots", type=int, default=8)
    options.add_argument("--longest", type=int, default=128, help="tokens of the longest answer")
    options.add_argument("--per-slot", type=int, nargs="+", default=[4, 8, 16], help="answers of a group, a slot")
    chosen = options.parse_args()
    harness.set_process(chosen)
    target = harness.load_target(chosen.target)

    lengths = np.random.default_rng(0).lognormal(np.log(chosen.longest / 3), 0.7, chosen.answers)
    lengths = lengths.clip(2, chosen.longest).astype(int)
    prompts = make_prompts(chosen.answers, 16, 64, target.info.vocab_size)
    requests = [
        Request(str(i), p, SamplingParams(int(n))) for i, (p, n) in enumerate(zip(prompts, lengths, strict=True))
    ]
    groups = {f"{n} a slot": n * chosen.slots for n in chosen.per_slot} | {"one": chosen.answers}
    counted: dict[str, tuple[int, int]] = {}

    def arm(name: str, group: int) -> Callable[[], None]:
        def work() -> None:
            engine = CountingEngine(target, slots=chosen.slots, capacity=64 + chosen.longest)
            tokens = 0
            for start in range(0, len(requests), group):
                tokens += sum(len(done.response_ids) for done in engine.generate(requests[start : start + group]))
            counted[name] = (tokens, engine.steps)

        return work

    seconds = harness.alternate({name: arm(name, group) for name, group in groups.items()}, chosen.repetitions)
    rows = []
    for name, group in groups.items():
        tokens, steps = counted[name]
        speed = tokens / harness.median(seconds[name])
        share = (tokens - chosen.answers) / (steps * chosen.slots)  # the first token is prefill's
        rows.append([name, group, tokens, steps, f"{share:.1%}", speed])
    columns = ["groups", "answers", "tokens", "steps", "slots in use", "tokens/s"]
    harness.print_table(f"{chosen.answers} answers, {chosen.slots} slots", columns, rows)
    harness.report("groups", {"rows": [dict(zip(columns, row, strict=True)) for row in rows]}, chosen)


if __name__ == "__main__":
    main()
