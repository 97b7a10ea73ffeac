"""The machine's matrix product rate, in GFLOP/s, at the sizes of a small target: other benchmarks are shares of it.

A product [m, k] × [k, n] counts 2·m·k·n operations. The sizes are SmolLM2-135M's: its widest layer map, its head, and
the rows of a decode step, of a batch of verified blocks and of a prefill. Few rows are bound by reading the weights.
"""

from __future__ import annotations

import functools

import torch
from torch.nn import functional as F

from tests.benchmarks import harness

HIDDEN, INTERMEDIATE, VOCAB = 576, 1536, 49152
ROWS = (1, 8, 16, 64, 512, 1024)
MAPS = {"MLP 576 → 1536": (HIDDEN, INTERMEDIATE), "head 576 → 49152": (HIDDEN, VOCAB)}
DTYPES = (torch.bfloat16, torch.float32)
MIN_OPERATIONS = 4e9  # a measurement is repeated products of about this many operations


def matmul_rate(rows: int, k: int, n: int, dtype: torch.dtype, repetitions: int) -> float:
    """Return the GFLOP/s of `linear` with a [n, k] weight, the median of some repetitions."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, weight = torch.randn(rows, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype)
    operations = 2.0 * rows * k * n
    times = max(1, round(MIN_OPERATIONS / operations))

    def products() -> None:
        for _ in range(times):
            F.linear(x, weight)

    with torch.no_grad():
        seconds = harness.alternate({"linear": products}, repetitions)["linear"]
    return times * operations / harness.median(seconds) / 1e9


@functools.cache
def peak_rate(dtype: torch.dtype, repetitions: int = 5) -> float:
    """Return the GFLOP/s of the layer map at 512 rows: the rate that the other benchmarks divide by."""
    return matmul_rate(512, HIDDEN, INTERMEDIATE, dtype, repetitions)


def main() -> None:
    options = harness.parsed(harness.parser(__doc__, repetitions=5))
    products = []
    for name, (k, n) in MAPS.items():
        for rows in ROWS:
            rates = {str(d).removeprefix("torch."): matmul_rate(rows, k, n, d, options.repetitions) for d in DTYPES}
            products.append({"map": name, "rows": rows, **{f"{d}_gflop_per_s": rate for d, rate in rates.items()}})
    harness.print_rows("Matrix products", products)
    harness.report("machine", {"products": products}, options)


if __name__ == "__main__":
    harness.run(main)
