"""Losses behind a frozen head in tiles of logits, against the same from whole rows of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from draftsmith.stages.drafters.head import Head
from draftsmith.stages.targets.logits import LogitMap
from draftsmith.stages.training import losses, tiled

N, H, V, CHUNK, TILE, RUN = 23, 16, 50, 7, 12, 4  # the last chunk, tile and run of columns are smaller
FLOAT32 = 1e-5  # sums in another order


@pytest.fixture(autouse=True)
def _many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "TOKENS_PER_TILE", TILE)
    monkeypatch.setattr(tiled, "RUN", RUN)


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


HEAD, TARGET_HEAD = drawn(V, H, seed=0), drawn(V, H, seed=1)
HIDDEN, TARGET_HIDDEN = drawn(N, H, seed=2), drawn(N, H, seed=3)
COLUMNS = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(4))
WEIGHTS = drawn(N, seed=5)


def of_tokens(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tiled.token_logprobs(hidden, Head(HEAD.to(dtype)), COLUMNS, CHUNK).values


def of_tokens_in_rows(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return -losses.cross_entropy(Head(HEAD.to(dtype)).logits(hidden), COLUMNS)


def divergence(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    heads = Head(HEAD.to(dtype)), Head(TARGET_HEAD.to(dtype))
    return tiled.forward_kl(hidden, heads[0], TARGET_HIDDEN, heads[1], 0.7, CHUNK).values


def divergence_in_rows(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    theirs = Head(TARGET_HEAD.to(dtype)).logits(TARGET_HIDDEN)
    return losses.forward_kl(Head(HEAD.to(dtype)).logits(hidden), losses.at_temperature(theirs, 0.7))


Loss = Callable[[torch.Tensor, torch.dtype], torch.Tensor]
BOTH = pytest.mark.parametrize(
    ("in_tiles", "in_rows"), [(of_tokens, of_tokens_in_rows), (divergence, divergence_in_rows)]
)
CAPPED, SCALED = LogitMap(0.5, 3.0), LogitMap(0.25)


def with_gradient(loss: Loss, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = HIDDEN.clone().requires_grad_()
    values = loss(hidden, dtype)
    (values * WEIGHTS).sum().backward()
    assert hidden.grad is not None
    return values.detach(), hidden.grad


@BOTH
def test_tiles_give_the_values_and_gradients_of_whole_rows(in_tiles: Loss, in_rows: Loss) -> None:
    for found, expected in zip(
        with_gradient(in_tiles, torch.float32), with_gradient(in_rows, torch.float32), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=FLOAT32, rtol=FLOAT32)
    with torch.no_grad():
        torch.testing.assert_close(in_tiles(HIDDEN, torch.float32), in_rows(HIDDEN, torch.float32))


@pytest.mark.parametrize(
    ("logit_map", "theirs"),
    [
        (CAPPED, CAPPED),
        (LogitMap(), CAPPED),
        (SCALED, LogitMap(1.0, 5.0)),
        (CAPPED.at(0.6), SCALED),
        (LogitMap().at(2.0), CAPPED),
    ],
)
def test_logits_that_are_a_function_of_the_products_have_their_slopes(logit_map: LogitMap, theirs: LogitMap) -> None:
    head, target = Head(HEAD, logit_map=logit_map), Head(TARGET_HEAD, logit_map=theirs)

    def rows(hidden: torch.Tensor, _dtype: torch.dtype) -> torch.Tensor:
        return -losses.cross_entropy(written(hidden @ HEAD.T, logit_map), COLUMNS)

    def kl_in_rows(hidden: torch.Tensor, _dtype: torch.dtype) -> torch.Tensor:
        p = losses.at_temperature(written(TARGET_HIDDEN @ TARGET_HEAD.T, theirs), 0.7)
        return losses.forward_kl(written(hidden @ HEAD.T, logit_map), p)

    for in_tiles, in_rows in (
        (lambda hidden, _dtype: tiled.token_logprobs(hidden, head, COLUMNS, CHUNK).values, rows),
        (lambda hidden, _dtype: tiled.forward_kl(hidden, head, TARGET_HIDDEN, target, 0.7, CHUNK).values, kl_in_rows),
    ):
        pairs = zip(with_gradient(in_tiles, torch.float32), with_gradient(in_rows, torch.float32), strict=True)
        for found, expected in pairs:
            torch.testing.assert_close(found, expected, atol=FLOAT32, rtol=FLOAT32)


def written(products: torch.Tensor, logit_map: LogitMap) -> torch.Tensor:
    """The function as papers have it."""
    scaled = products * logit_map.scale
    capped = scaled if logit_map.softcap is None else logit_map.softcap * torch.tanh(scaled / logit_map.softcap)
    return capped / logit_map.temperature


@BOTH
def test_under_autocast_products_are_made_in_its_dtype(in_tiles: Loss, in_rows: Loss) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = with_gradient(in_tiles, torch.float32), with_gradient(in_rows, torch.float32)
    exact = with_gradient(in_rows, torch.float32)
    for one, other, rounded in zip(found, exact, expected, strict=True):
        torch.testing.assert_close(one, rounded, atol=0.1, rtol=0.05)
        assert float((one - other).abs().max()) > 10 * FLOAT32


@BOTH
def test_in_bfloat16_they_are_as_close_to_float32_as_whole_rows(in_tiles: Loss, in_rows: Loss) -> None:
    exact = with_gradient(in_rows, torch.float32)
    tiles, rows = (with_gradient(loss, torch.bfloat16) for loss in (in_tiles, in_rows))
    for found, other, expected in zip(tiles, rows, exact, strict=True):
        assert float((found - expected).norm()) < 1.2 * float((other - expected).norm())


def test_a_probability_is_at_most_one_and_the_best_token_is_told() -> None:
    sure = 30 * HEAD[COLUMNS]
    judged = tiled.token_logprobs(sure, Head(HEAD.bfloat16()), COLUMNS, CHUNK)
    assert float(judged.values.max()) <= 0
    assert torch.equal(tiled.token_logprobs(HIDDEN, Head(HEAD), COLUMNS, CHUNK).best, (HIDDEN @ HEAD.T).argmax(-1))
    kl = tiled.forward_kl(HIDDEN, Head(HEAD), TARGET_HIDDEN, Head(TARGET_HEAD), 1.0, CHUNK)
    assert torch.equal(kl.best, (HIDDEN @ HEAD.T).argmax(-1))


def test_of_equal_logits_the_first_is_the_best() -> None:
    twice = HEAD.clone()
    twice[[3, 17, 18, 49]] = 5 * HIDDEN[0]  # in the first tile, the second and the last, whose columns are no whole run
    judged = tiled.token_logprobs(HIDDEN[:1], Head(twice), COLUMNS[:1], CHUNK)
    assert judged.best.tolist() == [3]
    twice[3] = 0
    assert tiled.token_logprobs(HIDDEN[:1], Head(twice), COLUMNS[:1], CHUNK).best.tolist() == [17]


@pytest.mark.parametrize(("loss", "products"), [(of_tokens, 2), (divergence, 3)])
def test_no_logits_are_made_twice(loss: Loss, products: int) -> None:
    with FlopCounterMode(display=False) as counter:
        with_gradient(loss, torch.float32)
    assert counter.get_total_flops() == products * 2 * N * H * V


def test_nothing_to_judge_is_no_error() -> None:
    hidden = HIDDEN[:0].clone().requires_grad_()
    tiled.token_logprobs(hidden, Head(HEAD), COLUMNS[:0], CHUNK).values.sum().backward()
    assert hidden.grad is not None


@pytest.mark.parametrize("again", ["a larger loss behind it", "a checkpoint", "inference before it"])
def test_memory_that_is_kept_for_the_next_call_is_nobodys(again: str) -> None:
    """What a loss returned and keeps for its backward is not in it; nor is it of a mode that others cannot write in."""

    def of(hidden: torch.Tensor) -> torch.Tensor:
        theirs = TARGET_HIDDEN.repeat(2, 1)[: len(hidden)]
        return tiled.forward_kl(hidden, Head(HEAD), theirs, Head(TARGET_HEAD), 0.7, 2 * N).values

    def gradient(hidden: torch.Tensor, between: Callable[[], object] = lambda: None) -> torch.Tensor:
        leaf = hidden.clone().requires_grad_()
        values = checkpoint(of, leaf, use_reentrant=False) if again == "a checkpoint" else of(leaf)
        said = values.detach().clone()
        between()
        assert torch.equal(values.detach(), said)
        (values * WEIGHTS[: len(hidden)]).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    tiled._KEPT.held.clear()
    if again == "inference before it":
        with torch.inference_mode():
            of(HIDDEN)
    alone = gradient(HIDDEN[:5])
    assert torch.equal(gradient(HIDDEN[:5], lambda: of(torch.cat([HIDDEN, -HIDDEN]))), alone)


@BOTH
def test_a_chunk_that_the_memory_does_not_hold_is_halved_once(
    in_tiles: Loss, in_rows: Loss, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of losses that read whole rows."""
    asked: list[int] = []

    def short_of_memory(largest: int) -> None:
        def slices(_count: int, size: int) -> Iterator[slice]:
            asked.append(size)
            if size > largest:
                raise torch.OutOfMemoryError("of the test")
            yield from (slice(start, min(start + size, N)) for start in range(0, N, size))

        monkeypatch.setattr(tiled, "slices", slices)

    short_of_memory(CHUNK // 2)
    found, expected = with_gradient(in_tiles, torch.float32), with_gradient(in_rows, torch.float32)
    assert asked == [CHUNK, CHUNK // 2]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=FLOAT32, rtol=FLOAT32)
    short_of_memory(CHUNK // 2 - 1)
    with pytest.raises(torch.OutOfMemoryError):
        in_tiles(HIDDEN, torch.float32)
