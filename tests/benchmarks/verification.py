"""What verifying the inputs of a stage costs: an artifact of some gigabytes, read for the first time and again."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from draftsmith.artifacts.store import Claim, Store
from tests.benchmarks import harness

FILE_BYTES = 1 << 30
_PART = 1 << 24


def main() -> None:
    options = harness.parser(__doc__, repetitions=1)
    options.add_argument("--gigabytes", type=int, default=10)
    options.add_argument("--folder", type=Path, help="on the disk that is meant; left out: that of temporary files")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as home:
        store = Store(Path(home) / "store")
        with store.claim("target", "ab" * 32) as claim:
            assert isinstance(claim, Claim)
            for number in range(chosen.gigabytes):
                with (claim.out / f"model-{number}.safetensors").open("wb") as file:
                    for _ in range(FILE_BYTES // _PART):
                        file.write(os.urandom(_PART))
            committed = time.perf_counter()
            ref = store.commit(claim, config={}, inputs={}, code_digest="", seed=0)
            rows = [("commit (checksums, sync)", time.perf_counter() - committed)]
        time.sleep(3)  # what was written a moment ago is not remembered
        for name in ("first, from the disk", "again"):
            if name.startswith("first"):
                for path in ref.path.iterdir():
                    with path.open("rb") as file:
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            rows.append((name, harness.seconds_of(lambda: Store(store.root).verify_once(ref))))
    harness.print_table(f"{chosen.gigabytes} GiB", ["verification", "seconds"], rows)
    harness.report("verification", dict(rows), chosen)


if __name__ == "__main__":
    main()
