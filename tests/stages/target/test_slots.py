"""Cached forwards and features against plain forwards of transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import repeat_kv

from draftsmith.stages.target import attention
from draftsmith.stages.target.attention import grouped_attention
from draftsmith.stages.target.info import model_path
from tests.stages.bench import Bench
from tests.testbed.drafter import DrafterArtifacts


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def random_ids(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 900, (n,), generator=generator).tolist() for n in lengths]


def padded(rows: list[list[int]]) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])


def logits(bench: Bench, tokens: list[int]) -> torch.Tensor:
    """Return logits [T, V] of an uncached forward over one sequence."""
    return bench.target.logits(bench.target.read(torch.tensor([tokens])).hidden[0])


# ---- cached forwards


def test_a_padded_prefill_equals_plain_forwards(bench: Bench) -> None:
    rows = random_ids(5, 17, 11)
    ids = padded(rows)
    cache = bench.target.new_cache(3, 20)
    out = bench.target.step(ids, torch.arange(17).expand(3, -1), cache, slice(0, 3))
    for b, row in enumerate(rows):
        assert_close(bench.target.logits(out.hidden[b, : len(row)]), logits(bench, row))


def test_blocks_at_different_positions_of_rows_equal_plain_forwards(bench: Bench) -> None:
    """After a padded prefill, twice: a block that is then overwritten, and the next one."""
    rows = random_ids(4, 13, 9)
    cache = bench.target.new_cache(3, 32)
    bench.target.step(padded(rows), torch.arange(13).expand(3, -1), cache, slice(0, 3))
    for kept, seed in ((2, 1), (0, 2), (5, 3)):
        block = random_ids(5, 5, 5, seed=seed)
        starts = torch.tensor([len(row) for row in rows])
        positions = starts[:, None] + torch.arange(5)
        length = max(map(len, rows)) + 5
        out = bench.target.step(torch.tensor(block), positions, cache, slice(0, 3), length=length)
        for b in range(3):
            expected = logits(bench, rows[b] + block[b])[-5:]
            assert_close(bench.target.logits(out.hidden[b]), expected)
            rows[b] = rows[b] + block[b][: kept + b % 2]  # rows advance by different lengths


def test_rows_may_be_addressed_by_index_and_moved(bench: Bench) -> None:
    rows = random_ids(6, 8, 7)
    cache = bench.target.new_cache(4, 16)
    bench.target.step(padded(rows), torch.arange(8).expand(3, -1), cache, slice(0, 3))
    at = torch.tensor([2, 0])
    out = bench.target.step(torch.tensor([[50], [60]]), torch.tensor([[7], [6]]), cache, at, length=8)
    assert_close(bench.target.logits(out.hidden[0, 0]), logits(bench, [*rows[2], 50])[-1])
    assert_close(bench.target.logits(out.hidden[1, 0]), logits(bench, [*rows[0], 60])[-1])
    cache.move_row(1, 3)
    cache.move_row(2, 1)
    at = torch.tensor([1, 3])
    out = bench.target.step(torch.tensor([[70], [80]]), torch.tensor([[8], [8]]), cache, at, length=9)
    assert_close(bench.target.logits(out.hidden[0, 0]), logits(bench, [*rows[2], 50, 70])[-1])
    assert_close(bench.target.logits(out.hidden[1, 0]), logits(bench, [*rows[1], 80])[-1])


def test_a_tree_attends_by_its_mask(bench: Bench) -> None:
    """Two branches after different prefixes of one sequence, in free entries."""
    (row,) = random_ids(10)
    cache = bench.target.new_cache(1, 16)
    bench.target.step(torch.tensor([row]), torch.arange(10)[None], cache, slice(0, 1))
    branches = [(4, [100, 200]), (7, [300, 400])]  # (prefix length, tokens)
    visible = torch.zeros(1, 4, 14, dtype=torch.bool)
    for m, (length, _) in enumerate(branches):
        for t in range(2):
            visible[0, 2 * m + t, :length] = True
            visible[0, 2 * m + t, 10 + 2 * m : 10 + 2 * m + t + 1] = True
    out = bench.target.step(
        torch.tensor([[100, 200, 300, 400]]),
        torch.tensor([[4, 5, 7, 8]]),
        cache,
        slice(0, 1),
        write_at=torch.arange(10, 14)[None],
        visible=visible,
    )
    for m, (length, tokens) in enumerate(branches):
        expected = logits(bench, row[:length] + tokens)[-2:]
        assert_close(bench.target.logits(out.hidden[0, 2 * m : 2 * m + 2]), expected)


# ---- features


def test_features_are_the_hidden_states_after_the_named_layers(bench: Bench, tiny_drafter: DrafterArtifacts) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_path(tiny_drafter.target), dtype=torch.float32)
    ids = padded(random_ids(12, 12))
    with torch.no_grad():
        reference = model(ids, output_hidden_states=True)
    hidden_states = reference.hidden_states  # [k + 1] = after layer k; the last one after the final norm too
    for layers in ([0], [2, 0], [0, 1, 2]):
        read = bench.target.read(ids, layers)
        expected = torch.cat([hidden_states[k + 1] for k in layers], -1)
        assert read.features is not None
        assert_close(read.features, expected)
        cache = bench.target.new_cache(2, 12)
        stepped = bench.target.step(ids, torch.arange(12).expand(2, -1), cache, slice(0, 2), layer_ids=layers)
        assert stepped.features is not None
        assert_close(stepped.features, expected)
    assert_close(bench.target.logits(read.hidden), reference.logits)
    last = bench.target.read(ids, [3]).features
    assert last is not None
    assert_close(model.model.norm(last), hidden_states[-1])  # before the norm, not behind it
    assert bench.target.read(ids).features is None


@pytest.mark.parametrize("layers", [[0], [2, 0], [3, 1]])
def test_features_alone_have_the_same_bits_and_run_no_later_layer(layers: list[int], bench: Bench) -> None:
    ids = padded(random_ids(12, 12))
    ran = []
    hooks = [
        layer.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
        for index, layer in enumerate(bench.target.decoder.layers)
    ]
    alone = bench.target.features(ids, layers)
    for hook in hooks:
        hook.remove()
    assert ran == list(range(max(layers) + 1))
    after = bench.target.read(ids, layers)  # nothing of the forward that was cut short is left
    assert after.features is not None
    assert torch.equal(alone, after.features)
    assert torch.equal(bench.target.read(ids).hidden, after.hidden)


# ---- attention


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 1), (4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("T", "entries"), [(5, 2**31), (5, 60), (1, 2**31)])
@pytest.mark.parametrize("tiles", [False, True])
def test_grouped_attention_equals_repeated_keys(
    heads: int, kv_heads: int, dtype: torch.dtype, T: int, entries: int, tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """entries: of a mask in one call. tiles: as on a processor with AMX."""
    monkeypatch.setattr(attention, "_MASK_ENTRIES", entries)
    monkeypatch.setattr(attention, "_multiplies_tiles", lambda: tiles)
    n, L, D = 2, 9, 8
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(n, heads, T, D, generator=generator).to(dtype)
    key, value = (torch.randn(n, kv_heads, L, D, generator=generator).to(dtype) for _ in range(2))
    seen = torch.rand(n, 1, T, L, generator=generator) < 0.6
    seen[..., 0] = True
    mask = torch.zeros(n, 1, T, L, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    module = torch.nn.Module()
    module.num_key_value_groups = heads // kv_heads  # type: ignore[assignment]
    out, _ = grouped_attention(module, query, key, value, mask, scaling=0.3)
    assert out.is_contiguous()  # of which AFMoE takes a view
    keys, values = (repeat_kv(x, heads // kv_heads) for x in (key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=0.3)
    assert_close(out, expected.transpose(1, 2), 1e-5 if dtype == torch.float32 else 2e-2)
