"""Drafts blocks with SGLang's own DSpark model on a CPU, without a server. Runs in SGLang's environment.

`python dspark_model.py FOLDER…`: each has `drafter`, a checkpoint, and `case`: the target's embedding and head, tokens
[B, T], features [B, T, F·H] and anchors [B, A]; written to `out` are the hidden states, step logits and confidences of
every block, and its proposals, and to `swap` what is derived from weights for a GPU. All is SGLang's program, on the
paths that are torch; attention over context and block, which its kernels read from a server's memory pool, is torch's
here. With `SGLANG_RAGGED_VERIFY_MODE=compact`: the static one leaves the confidence head out.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn


def start(checkpoint: str) -> None:
    """Set up what layers need at construction: arguments, and a group of one process."""
    from sglang.srt import server_args
    from sglang.srt.distributed import parallel_state

    arguments = server_args.ServerArgs(model_path=checkpoint, device="cpu", attention_backend="torch_native")
    server_args.set_global_server_args_for_scheduler(arguments)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    parallel_state.init_distributed_environment(world_size=1, rank=0, local_rank=0, backend="gloo")
    parallel_state.initialize_model_parallel()


def load(checkpoint: str, case: dict[str, torch.Tensor]) -> Any:
    from sglang.srt.models.dspark import DSparkDraftModel
    from transformers import AutoConfig

    torch.set_default_dtype(torch.float32)
    model = DSparkDraftModel(AutoConfig.from_pretrained(checkpoint)).eval()
    model.load_weights(load_file(f"{checkpoint}/model.safetensors").items())
    head = case["head"]
    lm_head = SimpleNamespace(weight=head, org_vocab_size=len(head), quant_method=None, tp_size=1)
    model.attach_shared_modules(embed_tokens=nn.Embedding.from_pretrained(case["embedding"]), lm_head=lm_head)
    return model


def attend(attention: Any, context: Sequence[torch.Tensor], *of_block: Any, **_: Any) -> torch.Tensor:
    """Attend from every query of the block to the context and the whole block, in place of the kernel."""
    heads, kv_heads, width = attention.num_heads, attention.num_kv_heads, attention.head_dim
    query = of_block[0].view(-1, heads, width).transpose(0, 1)
    keys, values = (
        torch.cat([seen, own.view(-1, kv_heads, width)]).transpose(0, 1).repeat_interleave(heads // kv_heads, 0)
        for seen, own in zip(context, of_block[1:3], strict=True)
    )
    out = nn.functional.scaled_dot_product_attention(query, keys, values, scale=attention.scaling)
    return out.transpose(0, 1).flatten(1)


@torch.no_grad()
def drafted(model: Any, features: torch.Tensor, anchor: int, token: torch.Tensor) -> dict[str, torch.Tensor]:
    """Draft one block. features: [T, F·H]."""
    from sglang.srt.speculative.dspark_components import dspark_draft

    seen = model.project_target_hidden(features[:anchor])
    for layer in model.layers:
        attention = layer.self_attn
        keys, values = attention.kv_proj_only(seen)
        keys = attention.apply_k_rope(torch.arange(anchor), attention.apply_k_norm(keys))
        context = [x.view(anchor, attention.num_kv_heads, attention.head_dim) for x in (keys, values)]
        attention.attn.forward = partial(attend, attention, context)
    queries = model.gamma if model.sample_from_anchor else model.gamma + 1
    ids = torch.full((queries,), model.config.dflash_config["mask_token_id"])
    ids[0] = token
    batch = SimpleNamespace(forward_mode=None, capture_hidden_mode=None, batch_size=1)
    embedded = model.embed_tokens(ids)
    hidden = model(ids, anchor + torch.arange(queries), batch, input_embeds=embedded).hidden_states[-model.gamma :]
    base = model.compute_base_logits(hidden)
    base = base[0] if isinstance(base, tuple) else base  # 0.5.23 also returns what the confidence reads
    arguments: dict[str, Any] = {}
    if hasattr(dspark_draft, "DraftNoise"):  # 0.5.23
        noise = dspark_draft.DraftNoise(key=1, offset=torch.zeros(1, dtype=torch.int64))
        arguments = {"noise": noise, "greedy_draft": False}
    block = dspark_draft.sample_draft_block(
        base_logits=base.view(1, model.gamma, -1),
        anchor_tokens=token.view(1),
        draft_hidden=hidden.view(1, model.gamma, -1),
        sampling_info=None,
        markov_head=model.markov_head,
        device=torch.device("cpu"),
        tp_sync=SimpleNamespace(sync=lambda _site, tokens: tokens),
        **arguments,
    )
    before = torch.cat([token.view(1, 1), block.draft_tokens[:, :-1]], 1)
    confidence = model.confidence_head(hidden[None], model.markov_head.get_prev_embeddings(before))
    return {
        "hidden": hidden,
        "logits": block.corrected_logits[0],
        "confidence": confidence[0],
        "proposals": block.draft_tokens[0],
    }


@torch.no_grad()
def held_over_a_swap(model: Any) -> dict[str, torch.Tensor]:
    """Return the tensors that the model derives from its weights on a GPU, after a swap, and derives again.

    The first ones are held before the weights change, and the plug-in writes into them.
    """
    from draftsmith.stages.engines.sglang import plugin_swap

    model, attention = model.to(torch.bfloat16), model.layers[0].self_attn
    heads = attention.kv_size // attention.head_dim
    keys = torch.zeros(4, heads, attention.head_dim, dtype=torch.bfloat16)
    pool = SimpleNamespace(get_key_buffer=lambda _layer: keys, get_value_buffer=lambda _layer: keys)
    bundle, stacked = model._fused_kv_write_bundle(pool), model._stacked_ctx_kv_params()
    for weights in model.parameters():
        weights.mul_(3)
    runner = SimpleNamespace(model=model, token_to_kv_pool=pool)
    for tensor, now in plugin_swap.derived_tensors(SimpleNamespace(draft_model_runner=runner)):
        tensor.copy_(now)
    held = [*plugin_swap.bundled(bundle), stacked["weight"], stacked["k_norm_weight"]]
    model._fused_kv_write_cache = None
    del model._stacked_ctx_kv_cache
    stacked = model._stacked_ctx_kv_params()
    anew = [*plugin_swap.bundled(model._fused_kv_write_bundle(pool)), stacked["weight"], stacked["k_norm_weight"]]
    return {f"{kind} {i}": x.clone() for kind, all_ in (("held", held), ("anew", anew)) for i, x in enumerate(all_)}


def compute(folder: str) -> Any:
    case = load_file(f"{folder}/case")
    model = load(f"{folder}/drafter", case)
    found: dict[str, list[torch.Tensor]] = {}
    for tokens, features, anchors in zip(case["tokens"], case["features"], case["anchors"], strict=True):
        for anchor in anchors.tolist():
            for name, value in drafted(model, features, anchor, tokens[anchor]).items():
                found.setdefault(name, []).append(value)
    shape = case["anchors"].shape
    stacked = {name: torch.stack(values).unflatten(0, shape).contiguous() for name, values in found.items()}
    save_file(stacked, f"{folder}/out")
    return model


if __name__ == "__main__":
    start(f"{sys.argv[1]}/drafter")
    for each, model in [(each, compute(each)) for each in sys.argv[1:]]:  # models share a cache, cast to bfloat16 here
        save_file(held_over_a_swap(model), f"{each}/swap")
