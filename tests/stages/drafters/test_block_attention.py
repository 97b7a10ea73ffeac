"""Block attention against the dense reference, and its cost."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from draftsmith.stages.drafters import block_attention as attention
from draftsmith.stages.drafters.block_attention import ContextMask, block_attention
from tests.stages.drafters.dense import dense_attention
from tests.stages.kernel_flops import KERNEL_FLOPS

FLOAT32 = 1e-5  # sums in another order, on values of order one
BFLOAT16, FLOAT16 = 0.02, 0.0025  # of the largest value: two roundings to 8 or 11 bits more or less


@dataclass
class Case:
    """The inputs of a call, with blocks of S queries and J keys."""

    queries: torch.Tensor
    prefix: tuple[torch.Tensor, torch.Tensor]
    own: tuple[torch.Tensor, torch.Tensor]
    reach: ContextMask

    @property
    def inputs(self) -> list[torch.Tensor]:
        return [self.queries, *self.prefix, *self.own]

    def to(self, device: str, dtype: torch.dtype) -> Case:
        """Return the case on another device."""
        queries, *rest = (x.to(device, dtype) for x in self.inputs)
        reach = self.reach
        seen, first = reach.seen.to(device), None if reach.first is None else reach.first.to(device)
        return Case(
            queries,
            (rest[0], rest[1]),
            (rest[2], rest[3]),
            ContextMask(seen, first, reach.window, reach.causal, reach.ring),
        )

    def attended(self) -> torch.Tensor:
        return block_attention(self.queries, self.prefix, self.own, self.reach)

    def dense(self) -> torch.Tensor:
        return dense_attention(self.queries, self.prefix, self.own, self.reach)

    def gradients(self, form: str) -> list[torch.Tensor]:
        """Return the gradients of a weighted sum of the output with respect to every input."""
        leaves = [x.detach().clone().requires_grad_() for x in self.inputs]
        moved = Case(leaves[0], (leaves[1], leaves[2]), (leaves[3], leaves[4]), self.reach)
        out = moved.attended() if form == "parts" else moved.dense()
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        (out * weights.to(out)).sum().backward()
        found = [x.grad for x in leaves]
        assert all(g is not None for g in found)
        return [g for g in found if g is not None]


def make_case(
    B: int,
    heads: tuple[int, int],
    T: int,
    A: int,
    S: int,
    J: int,
    D: int,
    *,
    seed: int = 0,
    before: int | None = None,
    window: int | None = None,
    causal: bool = False,
) -> Case:
    """heads: key heads, and query heads per key head. Blocks see between no entries and more than there are.

    before: entries before a block that it sees; window, causal: same as in `ContextMask`.
    """
    generator = torch.Generator().manual_seed(seed)
    kv_heads, shared = heads
    randn = torch.randn
    seen = torch.randint(0, T + 2, (B, A), generator=generator)
    seen[0, 0] = 0
    return Case(
        randn(B, kv_heads * shared, A, S, D, generator=generator),
        (randn(B, kv_heads, T, D, generator=generator), randn(B, kv_heads, T, D, generator=generator)),
        (randn(B, kv_heads, A, J, D, generator=generator), randn(B, kv_heads, A, J, D, generator=generator)),
        ContextMask(seen, None if before is None else seen - before, window, causal),
    )


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_merged_attention_and_its_gradients_equal_dense_attention(data: st.DataObject) -> None:
    B, T, A, S, J, D = (data.draw(st.integers(1, n)) for n in (2, 9, 5, 4, 4, 8))
    heads = data.draw(st.sampled_from([(1, 1), (1, 3), (2, 2), (3, 1)]))
    before, window = (data.draw(st.sampled_from([None, 1, 3])) for _ in range(2))
    causal = data.draw(st.booleans())
    J = S if window or causal else J
    shape = (B, heads, T, A, S, J, D)
    case = make_case(*shape, seed=data.draw(st.integers(0, 1000)), before=before, window=window, causal=causal)
    group = data.draw(st.integers(1, A))  # blocks that are read together
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_MASK_ENTRIES", group * B * heads[1] * S * T)
        torch.testing.assert_close(case.attended(), case.dense(), atol=FLOAT32, rtol=FLOAT32)
        for found, expected in zip(case.gradients("parts"), case.gradients("dense"), strict=True):
            torch.testing.assert_close(found, expected, atol=FLOAT32, rtol=FLOAT32)


@pytest.mark.parametrize(("dtype", "off"), [(torch.bfloat16, BFLOAT16), (torch.float16, FLOAT16)])
def test_in_half_precision_both_forms_are_equally_close_to_float32(dtype: torch.dtype, off: float) -> None:
    """One block among others sees nothing of the prefix."""
    case = make_case(2, (2, 2), 60, 6, 8, 8, 32)
    assert case.reach.seen[0, 0] == 0
    rounded = case.to("cpu", dtype)
    alone = case.dense()[0, 0]
    assert float((rounded.attended()[0, 0].float() - alone).abs().max() / alone.abs().max()) < off
    for form in ("parts", "dense"):
        found = [(rounded.attended() if form == "parts" else rounded.dense()), *rounded.gradients(form)]
        for x, expected in zip(found, [case.dense(), *case.gradients("dense")], strict=True):
            assert x.dtype == dtype
            assert float((x.float() - expected).abs().max() / expected.abs().max()) < off


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("before", "window", "causal", "S"), [(9, None, False, 3), (None, 6, True, 4), (None, 3, False, 4)]
)
def test_flex_attention_reads_under_the_same_mask(before: int | None, window: int | None, causal: bool, S: int) -> None:
    """The uncompiled form is tested; its gradient exists on accelerators only."""
    case = make_case(2, (2, 2), 37, 5, 4, S, 16, before=before, window=window, causal=causal)
    with pytest.MonkeyPatch.context() as patch:
        plain = attention._flex(eager=True)
        patch.setattr(attention, "_flex", lambda: plain)
        found = attention._with_flex(case.queries, case.prefix, case.own, case.reach)
    torch.testing.assert_close(found, case.dense(), atol=FLOAT32, rtol=FLOAT32)


def test_few_queries_are_computed_by_the_same_kernel_as_many() -> None:
    """Torch's own choice would be another kernel for fewer than 128 queries."""
    backends: list[str] = []

    def record(graph: torch.fx.GraphModule, _inputs: object) -> torch.fx.GraphModule:
        calls = [node for node in graph.graph.nodes if node.target is torch.ops.higher_order.flex_attention]
        backends.extend(option["BACKEND"] for node in calls for option in node.args if isinstance(option, dict))
        return graph

    with pytest.MonkeyPatch.context() as patch:
        plain, mask = attention._flex(eager=True)
        compiled = torch.compile(plain, backend=record, dynamic=True), mask
        patch.setattr(attention, "_flex", lambda: compiled)
        for blocks in (3, 50):
            case = make_case(2, (2, 2), 37, blocks, 4, 4, 16)
            attention._with_flex(case.queries, case.prefix, case.own, case.reach)
    assert set(backends) == {"TRITON"}


def test_a_window_bounds_operations_and_memory_reads() -> None:
    """The bound holds for any length of the prefix, and any distance between blocks."""
    S, W, A = 4, 16, 12

    def counted(T: int) -> int:
        case = make_case(2, (1, 2), T, A, S, S, 8, window=W, causal=True)
        case.reach = ContextMask(
            torch.stack([torch.linspace(W, T, A).long(), torch.linspace(T // 2, T, A).long()]), None, W
        )
        with FlopCounterMode(display=False, custom_mapping=KERNEL_FLOPS) as counter:
            case.gradients("parts")
        return int(counter.get_total_flops())

    needed = 7 * 2 * (2 * 2 * A * S) * (W - 1 + S) * 8
    assert counted(200) <= 2 * needed
    assert counted(20_000) <= needed  # every block is read by itself


@pytest.mark.parametrize("window", [5, 3])
def test_a_ring_reads_like_the_prefix_it_was_written_from(window: int) -> None:
    """Entries after the block's anchor were written too, over some that no window reaches."""
    T, S, C = 30, 4, window + 4
    case = make_case(3, (2, 2), T, 1, S, S, 8, window=window, causal=True)
    case.reach = ContextMask(torch.tensor([[21], [2], [0]]), None, window, True)
    written = case.reach.seen + S - 1  # positions from 0 on
    newest = written - 1 - (written - 1 - torch.arange(C)) % C
    keys, values = (x.gather(2, newest.clamp(min=0)[:, None, :, None].expand(-1, 2, -1, 8)) for x in case.prefix)
    ring = ContextMask(case.reach.seen, None, window, True, ring=True)
    found = block_attention(case.queries, (keys, values), case.own, ring)
    torch.testing.assert_close(found, case.dense(), atol=FLOAT32, rtol=FLOAT32)
