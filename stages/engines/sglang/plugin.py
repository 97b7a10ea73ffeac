"""A plug-in for SGLang's servers that records verify steps, and writes another drafter into them (`plugin_swap.py`).

SGLang loads it by the entry-point group `sglang.srt.plugins`, in an environment that has this project installed without
its dependencies: it imports only the standard library, torch, numpy, and sglang with its packages.

[README.md](README.md#plug-in) describes the records.
"""

from __future__ import annotations

import inspect
import logging
import pkgutil
from importlib import metadata

from draftsmith.stages.engines.sglang.releases import SUPPORTED, supported

log = logging.getLogger(__name__)

_DFLASH = "sglang.srt.speculative.dflash_worker_v2.DFlashWorkerV2"
_DSPARK = "sglang.srt.speculative.dspark_components.dspark_worker_v2.DSparkWorkerV2"
_DSPARK_ACCEPT = "sglang.srt.speculative.dspark_components.dspark_verify.TargetVerifyExecutor.accept_and_finalize"
_EAGLE = "sglang.srt.speculative.eagle_worker_v2.EAGLEWorkerV2"
_EAGLE_SAMPLE = "sglang.srt.speculative.eagle_utils.eagle_sample"

# The hooked or called functions, with the arguments that the hooks read
REQUIRED: dict[str, tuple[str, ...]] = {
    f"{_DFLASH}.__init__": ("server_args",),
    f"{_DFLASH}.forward_batch_generation": ("batch",),
    f"{_DFLASH}._accept_block": ("candidates", "next_token_logits", "prefix_lens"),
    f"{_DSPARK}.__init__": ("server_args",),
    f"{_DSPARK}.forward_batch_generation": ("batch",),
    _DSPARK_ACCEPT: ("verify_ids_2d", "target_logits", "layout", "prefix_lens"),
    f"{_EAGLE}.__init__": ("server_args",),
    f"{_EAGLE}.forward_batch_generation": ("batch",),
    _EAGLE_SAMPLE: ("verify_input", "batch", "logits_output"),
    "sglang.srt.managers.auxiliary_output.append_auxiliary_output": ("current", "output"),
    "sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
    ".consume_auxiliary_output": ("batch", "output", "output_starts"),
    "sglang.srt.managers.utils.GenerationBatchResult.auxiliary_host_output": (),
    "sglang.srt.layers.logits_processor.LogitsProcessorOutput.auxiliary_device_output": (),
}
# The same for the hooks that write another drafter or report about it. If one is missing, a server only records.
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_CHECK_WEIGHTS = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager.check_weights"
_DECODE = (
    "sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
    ".process_batch_result_decode"
)
SWAP_REQUIRED: dict[str, tuple[str, ...]] = {
    f"{_SCHEDULER}.__init__": ("server_args",),
    f"{_SCHEDULER}.get_internal_state": ("recv_req",),
    f"{_SCHEDULER}.pause_generation": ("recv_req",),
    f"{_SCHEDULER}.continue_generation": ("recv_req",),
    f"{_SCHEDULER}.flush_cache": (),
    f"{_SCHEDULER}.is_fully_idle": ("ignore_waiting",),  # 0.5.20 does not empty the cache while retracted requests wait
    _CHECK_WEIGHTS: ("recv_req",),
    _DECODE: ("batch", "result"),
}
_SKIPS_LOGITS = f"{_DFLASH}._can_skip_verify_logits"  # in releases that may leave the logits on their TP ranks


def installed_version() -> str:
    """Return the version of sglang, "unknown" for a source tree without metadata."""
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return "unknown"


def check_release(required: dict[str, tuple[str, ...]] = REQUIRED) -> None:
    """Raise RuntimeError if this SGLang lacks a hooked function; warn if the release is untested."""
    version = installed_version()
    for target, parameters in required.items():
        try:
            function = pkgutil.resolve_name(target)
            missing = [name for name in parameters if name not in inspect.signature(function).parameters]
        except (ImportError, AttributeError) as error:
            raise RuntimeError(_refusal(version, f"{target} is missing ({error})")) from error
        if missing:
            raise RuntimeError(_refusal(version, f"{target} takes no argument {missing[0]}"))
    if not supported(version):
        log.warning("draftsmith's plug-in is tested with sglang %s, this is %s. Check its traces.", SUPPORTED, version)


def _refusal(version: str, reason: str) -> str:
    return (
        f"draftsmith's plug-in does not work with sglang {version}: {reason}. It supports {SUPPORTED}. Install such "
        "a release, or start the server without the plug-in (SGLANG_PLUGINS lists plug-ins to load)."
    )


def activate() -> None:
    """Register the hooks. SGLang calls this entry point once in each of its processes, before loading anything.

    Raises SystemExit if the release is refused: SGLang only logs other errors of a plug-in and serves without it.
    """
    try:
        check_release()
    except RuntimeError as error:
        raise SystemExit(str(error)) from error

    # Imported after the check, which reports the causes of failing imports.
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from draftsmith.stages.engines.sglang.plugin_hooks import Recorder, RequestLog
    from draftsmith.stages.engines.sglang.plugin_swap import DrafterSwap

    recorder = Recorder()
    for worker in (_DFLASH, _DSPARK, _EAGLE):
        HookRegistry.register(f"{worker}.__init__", recorder.after_load, HookType.AFTER)
        HookRegistry.register(f"{worker}.forward_batch_generation", recorder.around_generation, HookType.AROUND)
    HookRegistry.register(f"{_DFLASH}._accept_block", recorder.around_accept_block, HookType.AROUND)
    HookRegistry.register(_DSPARK_ACCEPT, recorder.around_dspark_accept, HookType.AROUND)
    HookRegistry.register(_EAGLE_SAMPLE, recorder.around_eagle_sample, HookType.AROUND)
    try:
        check_release(SWAP_REQUIRED)
    except RuntimeError as error:
        log.info("draftsmith: the drafter of this server cannot be swapped: %s", error)
    else:
        swap = DrafterSwap(recorder)
        HookRegistry.register(f"{_SCHEDULER}.__init__", swap.after_start, HookType.AFTER)
        HookRegistry.register(f"{_SCHEDULER}.get_internal_state", swap.after_internal_state, HookType.AFTER)
        HookRegistry.register(_CHECK_WEIGHTS, swap.around_check_weights, HookType.AROUND)
        if recorder.share > 0:
            requests = RequestLog(recorder)
            HookRegistry.register(_DECODE, requests.around_decode, HookType.AROUND)
            HookRegistry.register(f"{_SCHEDULER}.get_internal_state", requests.after_internal_state, HookType.AFTER)
    try:
        pkgutil.resolve_name(_SKIPS_LOGITS)
    except AttributeError:
        return
    HookRegistry.register(_SKIPS_LOGITS, recorder.after_can_skip_logits, HookType.AFTER)
