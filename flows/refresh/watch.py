"""Asks a line's servers which drafter they serve, and whether its tau is what it was at its promotion.

Requests that servers traced are compared depth by depth.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Literal, TypeVar

import numpy as np

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.artifacts.results.base import SetMetrics
from draftsmith.artifacts.results.evaluation import ALL
from draftsmith.artifacts.tracking.registry import CHAMPION, Version
from draftsmith.flows.execution.display import Display
from draftsmith.flows.refresh.drift import degraded_sets
from draftsmith.flows.refresh.registry_commands import named_servers
from draftsmith.flows.refresh.swap import swapped_servers
from draftsmith.flows.refresh.versions import BLOCK_SIZE, KIND, registry
from draftsmith.stages.drafters.registry import is_native
from draftsmith.stages.engines.server_state import ask_servers, count_finished, served_tau
from draftsmith.stages.engines.servers.state import ServerState, TracedRequest
from draftsmith.stages.evaluation.verdicts import FEWEST_IN_SLICE, too_small
from draftsmith.stages.replay.steps import DEPTHS
from draftsmith.stages.runtime.statistics import Estimate, jackknife, ratio

_T = TypeVar("_T")
Sets = dict[str, SetMetrics]
Outcome = Literal["promised", "below", "inconclusive", "mismatched"]  # mismatched: a server has another drafter


def show_servers(display: Display, line: str, urls: Sequence[str]) -> None:
    """Print which drafter each server has, since when, and its tau. urls: same as for `watch`."""
    versions = registry().versions(line)
    if not versions:
        raise registry().unknown_line(line)
    rows = []
    for url, state in ask_servers(_servers(line, urls), named=bool(urls)).items():
        if isinstance(state, DraftsmithError):
            rows.append([url, str(state), "-", "-", "-", "-"])
            continue
        version = _version(state, versions)
        content = "-" if version is None else version.content_id[:12]
        tau = "-" if state.tau is None else f"{state.tau:.3f}"
        since, block = state.since or "-", str(state.block_size or "-")
        rows.append([url, _drafter(state, version), content, since, block, tau])
    head = ["server", "drafter", "content", "since", "block", "tau"]
    caption = "tau: over all verify steps since the server started, whatever drafter it had"
    display.table(head, rows, title=line, text_columns=4, caption=caption)


def watch(line: str, urls: Sequence[str], minutes: float, threshold: float) -> tuple[Outcome, str]:
    """Compare tau of the champion on the servers with what it was at its promotion; return the outcome and why.

    If all servers trace requests, it compares the last requests that ended, at once. Otherwise it counts all requests
    that finish within `minutes` minutes. urls: servers to ask; empty: all that a version of the line was swapped into.
    Those that do not answer are ignored. threshold: share of its tau that the champion may have lost, as in the drift
    check.

    Raises RetryableError if no server answers, DraftsmithError if one has no metrics or its engine is unknown.
    """
    lines = registry()
    champion, versions = lines.champion(line), lines.versions(line)
    if champion is None:
        raise DraftsmithError(f"{line} has no champion. Promote one.") if versions else lines.unknown_line(line)
    servers, named = _servers(line, urls), bool(urls)
    states = _answered(ask_servers(servers, named=named))
    for url, state in states.items():
        same_kind = not state.own_head or is_native(champion.tags.get(KIND, ""))
        if (
            state.algorithm is None
            or not same_kind
            or state.digest not in (None, "", champion.tags.get("drafter_digest"))
        ):
            served = f"{url} serves {_drafter(state, _version(state, versions))}, and {champion} is the champion"
            return "mismatched", f"{served}. Run `draftsmith swap {line}{f' --url {url}' if named else ''}`."
    measured_with = champion.json("measured_with", {}).get(BLOCK_SIZE)
    for url, state in states.items():
        if measured_with not in (None, state.block_size):
            served = f"{url} drafts blocks of {state.block_size}, and {champion} was measured with {measured_with}"
            return "inconclusive", f"{served}. Serve that block size."
    then = {name: SetMetrics.model_validate(metrics) for name, metrics in champion.metrics().items()}
    if ALL in then and (ends := champion.json("tau_interval", [])):
        (low, high), tau = ends, float(champion.tags["tau"])
        if tau != then[ALL].tau:  # as served, which differs from replay; slices are only replay's
            then = {ALL: then[ALL].model_copy(update={"tau": tau, "low": low, "high": high})}
    traced = {url: state.traced for url, state in states.items() if state.traced is not None}
    ended = [request for url, by_drafter in traced.items() for request in by_drafter.get(states[url].digest or "", ())]
    asked: Collection[str] = states
    if len(traced) == len(states) and len(ended) >= FEWEST_IN_SLICE:
        now, then, outside = by_depth(ended, then)
        begin = datetime.fromtimestamp(min(request.ended for request in ended), UTC).isoformat(timespec="minutes")
        counted = f"{len(ended)} traced requests since {begin}"
        total = sum(len(requests) for by_drafter in traced.values() for requests in by_drafter.values())
        if others := total - len(ended):
            counted += f", without {others} of other drafters"
        if outside:
            counted += f", without {outside:.0%} of their steps, at depths that the promotion did not measure"
    else:
        asked = windows = _answered(count_finished(list(states), 60 * minutes, named=named))
        by_now = _answered(ask_servers(list(windows), named=named))
        if any((state.digest, state.since) != (states[url].digest, states[url].since) for url, state in by_now.items()):
            again = "a server has changed its drafter or started again. Watch again."
            return "inconclusive", f"{line}: {again}"
        finished = [window for server in windows.values() for window in server]
        now = {ALL: served_tau(finished)}
        counted = f"{sum(window.requests for window in finished):.0f} requests"
    outcome, reason = compare(now, then, threshold)
    counted += f", of {', '.join(asked)}"
    if silent := [url for url in servers if url not in asked]:
        counted += f"; no answer from {', '.join(silent)}"
    return outcome, f"{champion}: {reason} ({counted})"


def compare(now: Mapping[str, SetMetrics], then: Mapping[str, SetMetrics], threshold: float) -> tuple[Outcome, str]:
    """Return the outcome for served taus, overall and by slice, and why; `below` if any fell measurably.

    A false `below` is as rare as a false alarm of the drift check.
    """
    served, promised = now[ALL], then.get(ALL)
    if promised is None or not promised.has_interval:
        return "inconclusive", "its tau at its promotion is unknown"
    if not served.has_interval or (served.prompts or 0) < FEWEST_IN_SLICE:
        return "inconclusive", "too few requests ended"
    text = f"tau {served.tau:.3f} [{served.low:.3f}, {served.high:.3f}], {promised.tau:.3f} promised"
    if fallen := degraded_sets(now, then, threshold):
        places = ["overall" if place.startswith(f"{ALL}:") else place for place in fallen]
        return "below", f"{text}; measurably more than {threshold:.1%} below: {'; '.join(places)}"
    assert served.tau is not None and promised.tau is not None
    if served.tau < (1 - threshold) * promised.tau:
        return "inconclusive", f"{text}; below, but not measurably. Watch more requests"
    return "promised", f"{text}; at most {threshold:.1%} below"


def by_depth(requests: Sequence[TracedRequest], promotion: Mapping[str, SetMetrics]) -> tuple[Sets, Sets, float]:
    """Return the requests' tau overall and by depth, the promised tau of each, and the share of omitted steps.

    A request is one unit. Overall, the promised tau weights the depths as these requests do, so longer requests are no
    fall by themselves. Steps at depths that the promotion did not measure are omitted. If it measured no depth, because
    all its steps were at the same one, its tau of all prompts is promised at any depth.
    """
    then = {name: metrics for name, metrics in promotion.items() if metrics.has_interval}
    if ALL not in then:
        return {ALL: SetMetrics()}, then, 0.0
    depths = {name: then[name] for name in DEPTHS if name in then} or dict.fromkeys(DEPTHS, then[ALL])
    sums = np.array([[request.depths.get(name, (0, 0)) for name in depths] for request in requests], dtype=float)
    total = sum(steps for request in requests for _, steps in request.depths.values())
    outside = 1 - float(sums[..., 1].sum()) / total
    committed, steps = np.moveaxis(sums[sums[..., 1].any(1)], 2, 0)  # [requests, depths] each
    if len(steps) < FEWEST_IN_SLICE:
        return {ALL: SetMetrics(prompts=len(steps))}, then, outside
    measured = [then[ALL], *depths.values()]
    tau, low = (np.array([getattr(metrics, end) for metrics in measured]) for end in ("tau", "low"))
    promised = committed / tau[1:]  # [requests, depths] steps for the tokens that were committed
    promised_tau = float(committed.sum() / promised.sum())
    # the depths' error if different prompts measured each; at least that of all prompts, as if the same ones did
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


def _servers(line: str, urls: Sequence[str]) -> list[str]:
    """Return the servers at `urls`, or else all that a version of the line was swapped into."""
    if servers := named_servers(urls) or swapped_servers(line):
        return servers
    raise DraftsmithError(f"{line}: no server is known. Name those that serve it with --url.")


def _answered(answers: Mapping[str, _T | DraftsmithError]) -> dict[str, _T]:
    """Return the answers of the servers that gave one. Raises the first error if no server did, or if it is final."""
    errors = [answer for answer in answers.values() if isinstance(answer, DraftsmithError)]
    final = [error for error in errors if not isinstance(error, RetryableError)]
    if final or len(errors) == len(answers):
        raise (final or errors)[0]
    return {url: answer for url, answer in answers.items() if not isinstance(answer, DraftsmithError)}


def _version(state: ServerState, versions: Sequence[Version]) -> Version | None:
    """Return the version whose drafter a server has; None if no version of the line is known to have it."""
    known = [version for version in versions if version.tags.get("drafter_digest") == state.digest]
    return known[-1] if state.digest is not None and known else None


def _drafter(state: ServerState, version: Version | None) -> str:
    """Describe the drafter of a server."""
    if version is not None:
        return f"version {version.number}" + (" (champion)" if CHAMPION in version.aliases else "")
    if state.algorithm is None:
        return "no drafter"
    if state.own_head and not state.digest:
        return "the target's own head (NEXTN)"
    if not state.digest:
        return f"{state.algorithm}, which one is unknown without Draftsmith's plug-in"
    return f"{state.digest[:12]}, no version of the line"
