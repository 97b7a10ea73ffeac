"""The plug-in's hooks that write another drafter into a running server, and report which one is served.

The request is SGLang's `/weights_checker` with our own action, since it reaches every scheduler, takes any text
and returns one. A server without the plug-in refuses an unknown action and changes nothing. The action is
`draftsmith:` followed by the JSON of

    {"drafter": digest, "folder": path, "upload": "runs:/ID/drafter"}

It states which drafter is to be served, so the same request may be sent again. Files are read in a thread while
requests are served; the answer's `message` is {"state": "reading"} then. When all ranks have read theirs, the next
request writes the weights, and the message is {"state": "served", "since": …, "pause_s": …}.

Weights are loaded into other memory first, by the model's own loader. They are then copied into the served parameters,
whose addresses captured graphs hold. The same is done with the tensors that SGLang derived from parameters.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import torch
from safetensors.torch import load

from draftsmith.stages.engines.servers.drafter_files import (
    WantedDrafter,
    gather,
    read_drafter,
    reason_of,
    wanted_drafter,
)
from draftsmith.stages.engines.servers.state import STATE_VERSION
from draftsmith.stages.engines.sglang.plugin_hooks import Recorder
from draftsmith.stages.engines.sglang.protocol import NATIVE, SWAP_ACTION, SWAP_STATE, Json

log = logging.getLogger(__name__)

_ALGORITHMS = ("DFLASH", "DSPARK", "EAGLE3", "NEXTN", *NATIVE)
Pairs = list[tuple[torch.Tensor, torch.Tensor]]


class RefusedSwapError(Exception):
    """The drafter cannot be written into this server. Nothing was written."""


class DrafterSwap:
    """The hooks of one scheduler process, whose single thread handles requests and runs batches."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._scheduler: Any = None  # set if the server's drafter can be written
        self._since = ""
        self._reader = ThreadPoolExecutor(1, "draftsmith-swap")  # one drafter at a time
        self._reading: tuple[str, Future[dict[str, bytes]]] | None = None  # digest and files
        # digest and parameters on the CPU: those to write, and those before the last swap
        self._ready: tuple[str, dict[str, torch.Tensor]] | None = None
        self._previous: tuple[str, dict[str, torch.Tensor]] | None = None
        self._pause_s = 0.0  # pause of the last swap

    def after_start(self, _result: None, scheduler: Any, *_args: Any, **_kwargs: Any) -> None:
        """Run after `Scheduler.__init__`, which has loaded the drafter."""
        arguments = scheduler.server_args
        if arguments.speculative_algorithm not in _ALGORITHMS or arguments.pp_size > 1:
            return
        self._scheduler, self._since = scheduler, _now()

    def after_internal_state(self, result: Any, *_args: Any, **_kwargs: Any) -> None:
        """Add the served drafter to the report of every scheduler in `/server_info`."""
        if self._scheduler is not None:
            result.internal_state[SWAP_STATE] = {
                "v": STATE_VERSION,
                "drafter": self._recorder.drafter,
                "since": self._since,
                "before": "" if self._previous is None else self._previous[0],
                "pause_s": self._pause_s,
            }

    def around_check_weights(self, original: Callable[..., Any], manager: Any, request: Any) -> Any:
        """Wrap the handler of `/weights_checker`."""
        if not request.action.startswith(SWAP_ACTION):
            return original(manager, request)
        from sglang.srt.managers.io_struct import CheckWeightsReqOutput  # tests import this module without sglang

        try:
            wanted = _parsed(request.action.removeprefix(SWAP_ACTION))
            answer = self.serve(wanted, lambda state: gather(state, manager.tp_cpu_group))
        except RefusedSwapError as error:
            return CheckWeightsReqOutput(success=False, message=str(error))
        return CheckWeightsReqOutput(success=True, message=json.dumps(answer))

    def serve(self, wanted: WantedDrafter, gather: Callable[[str], list[str]]) -> Json:
        """Serve the wanted drafter as soon as possible. Returns the state, the same on every rank.

        gather: collects the states of all ranks. Raises RefusedSwapError.
        """
        started = time.monotonic()
        try:
            state = self._prepare(wanted)
        except Exception as error:  # any kind: a rank that raises would leave the others waiting
            reason = reason_of(error)
            log.warning("draftsmith: drafter %s is refused: %s", wanted.drafter[:12], reason)
            self._reading = self._ready = None
            state = f"refused: {reason}"
        states = gather(state)
        if refused := next((state for state in states if state.startswith("refused: ")), None):
            raise RefusedSwapError(refused.removeprefix("refused: "))
        if "reading" in states:
            return {"state": "reading"}
        if state == "ready":
            self._write()
            self._pause_s = time.monotonic() - started
        return {"state": "served", "since": self._since, "pause_s": self._pause_s}

    def _prepare(self, wanted: WantedDrafter) -> str:
        """Return "served", "reading" or "ready" (parameters are in `_ready`). Raises if they do not fit."""
        if self._scheduler is None:
            raise RefusedSwapError("this server's drafter cannot be written: it needs DFLASH, DSPARK, EAGLE3 or NEXTN")
        digest = wanted.drafter
        if digest == self._recorder.drafter:
            return "served"
        if self._ready is not None and self._ready[0] == digest:  # other ranks were not
            return "ready"
        if self._previous is not None and self._previous[0] == digest:
            self._ready = self._previous
            return "ready"
        if self._reading is None or self._reading[0] != digest:
            if self._reading is not None:
                self._reading[1].cancel()  # unless it has begun
            self._reading = digest, self._reader.submit(read_drafter, wanted)
        if not self._reading[1].done():
            return "reading"
        (_, reading), self._reading = self._reading, None
        content, worker = reading.result(), self._scheduler.draft_worker
        if any(getattr(module, "w_kc", None) is not None for module in draft_runner(worker).model.modules()):
            raise RefusedSwapError(
                "for a head with latent attention (MLA) SGLang keeps matrices that only its loader computes. Start the "
                "server with the new head"
            )
        target = self._scheduler.tp_worker.model_runner.model
        shared = {parameter.data_ptr() for parameter in target.parameters()}  # embedding and head of most drafters
        with torch.inference_mode(False), torch.no_grad():
            if not all(torch.equal(held, derived) for held, derived in derived_tensors(worker)):
                raise RefusedSwapError("this release of SGLang derives tensors from the drafter in an unknown way")
            tensors = load(content["model.safetensors"])
            self._ready = digest, load_aside(draft_runner(worker).model, tensors, shared)
        return "ready"

    def _write(self) -> None:
        """Empty the caches and write parameters while no request computes. Raises RefusedSwapError before writing."""
        assert self._ready is not None
        (digest, weights), worker = self._ready, self._scheduler.draft_worker
        served = dict(draft_runner(worker).model.named_parameters())
        # in inference mode like SGLang's loop: tensors that were derived in it may only be written in it
        with _paused(self._scheduler), torch.inference_mode():
            if not self._scheduler.flush_cache():
                raise RefusedSwapError("its cache cannot be emptied while requests wait for a grammar. Try again")
            self._previous = (
                self._recorder.drafter,
                {name: served[name].detach().to("cpu", copy=True) for name in weights},
            )
            for name, values in weights.items():
                served[name].copy_(values)
            for held, derived in derived_tensors(worker):
                held.copy_(derived)
            self._recorder.drafter, self._since, self._ready = digest, _now(), None
        log.info("draftsmith: serves drafter %s since %s", digest[:12], self._since)


def _parsed(text: str) -> WantedDrafter:
    """Return the fields of an action. Raises RefusedSwapError; every rank gets the same text, so all refuse it."""
    try:
        return wanted_drafter(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise RefusedSwapError(reason_of(error)) from error


def draft_runner(worker: Any) -> Any:
    """Return SGLang's runner for the draft model."""
    return worker.draft_model_runner if hasattr(worker, "draft_model_runner") else worker.draft_worker.draft_runner


def load_aside(model: Any, tensors: Mapping[str, torch.Tensor], shared: set[int]) -> dict[str, torch.Tensor]:
    """Return the model's parameters, on the CPU, as its loader fills them from a checkpoint. Writes nothing.

    shared: addresses of the target's parameters. Raises RefusedSwapError unless all others are filled.
    """
    parameters = dict(model.named_parameters())
    served = {name: parameter.data for name, parameter in parameters.items()}
    unshared = {name for name, data in served.items() if data.data_ptr() not in shared}
    if packed := next(
        (name for name in unshared if not served[name].is_floating_point() or served[name].itemsize < 2), None
    ):
        raise RefusedSwapError(f"the served drafter is quantised ({packed} is {served[packed].dtype})")
    aside = {name: torch.empty(data.shape, dtype=data.dtype) for name, data in served.items()}
    tokens = getattr(model, "hot_token_id", None)  # an attribute that EAGLE-3's loader replaces
    try:
        for name, parameter in parameters.items():
            parameter.data = aside[name].fill_(torch.nan) if name in unshared else aside[name]
        model.load_weights(tensors.items())
        now = getattr(model, "hot_token_id", None)
    except Exception as error:
        raise RefusedSwapError(f"the drafter's weights do not fit ({type(error).__name__}: {error})") from error
    finally:
        for name, parameter in parameters.items():
            parameter.data = served[name]
        if tokens is not None:
            model.hot_token_id = tokens
    if tokens is not None and (now is None or not torch.equal(now.cpu(), tokens.cpu())):
        raise RefusedSwapError("the drafter proposes other tokens of the vocabulary. Start the server with it")
    if missing := sorted(name for name in unshared if aside[name].isnan().any()):
        raise RefusedSwapError(f"the drafter's weights lack {missing[0]}, or are NaN ({len(missing)} parameters)")
    return {name: aside[name] for name in unshared}


def derived_tensors(worker: Any) -> Pairs:
    """Return the tensors that SGLang derived from the drafter's parameters and keeps, each with its current value."""
    pairs: Pairs = []
    if (helper := getattr(worker, "_fused_kv_helper", None)) is not None:  # DFLASH on a GPU: keys and values of layers
        fresh = type(helper)(
            layers=worker.draft_model.layers,
            rotary_emb=helper.rotary_emb,
            num_kv_heads=helper.num_kv_heads,
            head_dim=helper.head_dim,
            device=helper.device,
        )
        pairs += [(getattr(helper, name), getattr(fresh, name)) for name in ("flat_kv_weight_t", "k_norm_weights")]
    model: Any = draft_runner(worker).model
    if (cached := getattr(model, "_fused_kv_write_cache", None)) is not None and cached[1] is not None:  # DSPARK
        now = model._build_fused_kv_write_bundle(draft_runner(worker).token_to_kv_pool)
        pairs += list(zip(bundled(cached[1]), bundled(now), strict=True))
    if stacked := getattr(model, "_stacked_ctx_kv_cache", None):  # DSPARK where the fused write is not possible
        del model._stacked_ctx_kv_cache
        now = model._stacked_ctx_kv_params()
        model._stacked_ctx_kv_cache = stacked
        pairs += [(held, now[name]) for name, held in stacked.items() if isinstance(held, torch.Tensor)]
    return pairs


def bundled(bundle: Any) -> list[torch.Tensor]:
    """Return the tensors that DSPARK's fused write uses; from SGLang 0.5.23 on they are in a closure."""
    if isinstance(bundle, tuple):
        return [item for item in bundle if isinstance(item, torch.Tensor)]
    cells = [cell.cell_contents for cell in bundle.project.__closure__]
    return [item for item in [*cells, bundle.k_norm_weights] if isinstance(item, torch.Tensor)]


@contextmanager
def _paused(scheduler: Any) -> Iterator[None]:
    """Retract the requests in flight and let them continue afterwards."""
    from sglang.srt.managers.io_struct import (  # tests import this module without sglang
        ContinueGenerationReqInput,
        PauseGenerationReqInput,
    )

    scheduler.pause_generation(PauseGenerationReqInput(mode="retract"))
    try:
        yield
    finally:
        scheduler.continue_generation(ContinueGenerationReqInput())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
