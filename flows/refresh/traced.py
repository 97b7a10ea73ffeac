"""Compares requests that servers traced with a promotion, depth by depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from draftsmith.artifacts.results.base import SetMetrics
from draftsmith.artifacts.results.evaluation import ALL
from draftsmith.stages.engines.servers.state import TracedRequest
from draftsmith.stages.evaluation.verdicts import FEWEST_IN_SLICE, too_small
from draftsmith.stages.replay.trace import DEPTHS
from draftsmith.stages.runtime.statistics import Estimate, jackknife, ratio

Sets = dict[str, SetMetrics]


def by_depth(requests: Sequence[TracedRequest], promotion: Mapping[str, SetMetrics]) -> tuple[Sets, Sets, float]:
    """Return tau of the requests over all and by depth, what is promised of each, and the share of steps left out.

    A request is one unit. Over all, the promise is that of the depths at which these requests have their steps, so
    longer requests alone are no fall. Steps at depths that the promotion did not measure are left out. If
    it measured none, which is so if all were at the same one, its tau of all prompts is promised at any depth.
    """
    then = {name: metrics for name, metrics in promotion.items() if metrics.has_interval}
    if ALL not in then:
        return {ALL: SetMetrics()}, then, 0.0
    depths = {name: then[name] for name in DEPTHS if name in then} or dict.fromkeys(DEPTHS, then[ALL])
    sums = np.array([[each.depths.get(name, (0, 0)) for name in depths] for each in requests], dtype=float)
    outside = 1 - float(sums[..., 1].sum()) / sum(steps for each in requests for _, steps in each.depths.values())
    committed, steps = np.moveaxis(sums[sums[..., 1].any(1)], 2, 0)  # [requests, depths] each
    if len(steps) < FEWEST_IN_SLICE:
        return {ALL: SetMetrics(prompts=len(steps))}, then, outside
    measured = [then[ALL], *depths.values()]
    tau, low = (np.array([getattr(metrics, end) for metrics in measured]) for end in ("tau", "low"))
    promised = committed / tau[1:]  # [requests, depths] steps for the tokens that were committed
    promised_tau = float(committed.sum() / promised.sum())
    # of the depths if other prompts measured each; at least that of all prompts, which holds if the same ones did
    weights, errors = promised.sum(0) / promised.sum(), 1 - low / tau
    promised_low = promised_tau * (1 - max(errors[0], float(np.linalg.norm(weights * errors[1:]))))
    now = {ALL: _metrics(jackknife(ratio, promised.sum(1), steps.sum(1)), promised_tau)}
    for depth, name in enumerate(depths):
        if (has := steps[:, depth] > 0).any():
            now[name] = _metrics(jackknife(ratio, committed[has, depth], steps[has, depth]))
    fewest = min(metrics.prompts or 0 for metrics in measured)
    return now, {**then, ALL: SetMetrics(tau=promised_tau, low=promised_low, prompts=fewest)}, outside


def _metrics(share: Estimate, of: float = 1.0) -> SetMetrics:
    """Return an estimate times `of`, without an interval if it rests on too few requests."""
    interval = None if too_small(share) else share.interval()
    low, high = (None, None) if interval is None else (of * end for end in interval)
    return SetMetrics(tau=of * share.value, low=low, high=high, prompts=share.units)
