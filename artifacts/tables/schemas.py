"""The tables that pass between stages: columns, types and versions (ids are int32 lists, absolute positions int32)."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

_IDS = pa.list_(pa.int32())
_LOGPROBS = pa.list_(pa.float32())


@dataclass(frozen=True)
class TableSchema:
    """A named, versioned table. Raise `version` whenever a column changes its name, type or meaning."""

    name: str
    version: int
    columns: pa.Schema  # no metadata; `nullable=False` columns are checked when rows are written

    @property
    def with_metadata(self) -> pa.Schema:
        return self.columns.with_metadata({b"draftsmith.table": self.name, b"draftsmith.version": str(self.version)})


def _table(name: str, version: int, *, nullable: tuple[str, ...] = (), **columns: pa.DataType) -> TableSchema:
    fields = [pa.field(column, kind, nullable=column in nullable) for column, kind in columns.items()]
    return TableSchema(name, version, pa.schema(fields))


PROMPTS = _table(
    "prompts",
    1,
    prompt_id=pa.string(),
    source=pa.string(),
    split=pa.string(),  # train | validation | heldout
    messages=pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
    token_ids=_IDS,  # after the chat template
)

TOKENISED = _table(  # of an unfinished attempt
    "tokenised",
    1,
    key=pa.string(),
    prompt_ids=_IDS,
    response_ids=_IDS,
    reason=pa.string(),  # why the row is not used; empty
)

TRAJECTORIES = _table(
    "trajectories",
    2,
    trajectory_id=pa.string(),  # "<prompt_id>/<sample>"
    prompt_id=pa.string(),
    split=pa.string(),
    sample=pa.int32(),
    prompt_ids=_IDS,
    response_ids=_IDS,
    finish_reason=pa.string(),  # stop | length
    temperature=pa.float32(),  # 0 = greedy
    top_p=pa.float32(),
    top_k=pa.int32(),  # 0 = all
    seed=pa.int64(),
    engine=pa.string(),
)

TIMINGS = _table(  # volatile: beside the trajectories, in a file of its own
    "timings",
    3,
    trajectory_id=pa.string(),
    seconds=pa.float64(),
    first_token_seconds=pa.float64(),  # NaN = not measured
    verify_steps=pa.int32(),  # 0 = plain decoding
    retractions=pa.int32(),  # times that a server read it again: each made a token without a verify step
    draft_seconds=pa.float64(),
    verify_seconds=pa.float64(),
)

TRACE = _table(  # what an engine recorded while it served
    "trace",
    2,
    nullable=("target_logprobs",),
    trajectory_id=pa.string(),
    step=pa.int32(),
    anchor=pa.int32(),  # position in prompt + response
    accepted=pa.int32(),
    proposed_ids=_IDS,
    target_logprobs=_LOGPROBS,  # of the proposals on their draft-induced prefix; null where not recorded
)

VERIFY_STEPS = _table(
    "verify_steps",
    2,
    trajectory_id=pa.string(),
    step=pa.int32(),
    anchor=pa.int32(),  # position in prompt + response
    accepted=pa.int32(),  # n, proposals kept
    committed=pa.int32(),  # tokens committed by the step: n + 1 unless the end cut it
    rejected_offset=pa.int32(),  # of the first rejected proposal; 0 = nothing rejected
    judged=pa.int32(),  # proposals that lie inside the answer; the others are neither accepted nor rejected
    proposed_ids=_IDS,
    target_logprobs=_LOGPROBS,  # of the proposals on their draft-induced prefix; NaN where not judged or not scored
    committed_id=pa.int32(),  # correction or bonus; -1 if the end cut the step
    best_logprob=pa.float32(),  # of the target's best token at the rejection; NaN where nothing was rejected
)

EVALUATED = _table(  # an answer a row, beside the shards of mined steps
    "evaluated",
    2,
    trajectory_id=pa.string(),
    evaluated_blocks=pa.int64(),  # drafted to find the trace
    outside_nucleus=pa.int64(),  # its tokens that the stated top-k and top-p leave out; 0 where proposals are argmaxes
)

REQUESTS = _table(  # what evaluation decoded
    "requests",
    3,
    nullable=("accepted", "identical"),
    round=pa.int32(),
    request_id=pa.string(),  # "<prompt_id>/<arm>"
    prompt_id=pa.string(),
    arm=pa.string(),  # plain, or a drafter's name
    engine=pa.string(),
    block_size=pa.int32(),
    temperature=pa.float64(),  # 0 = greedy
    concurrency=pa.int32(),  # requests in flight
    tokens=pa.int32(),
    response_ids=_IDS,
    verify_steps=pa.int32(),
    accepted=_IDS,  # proposals kept by each verify step (only counted: ascending); null where not known
    latency_seconds=pa.float64(),  # from the request to its last token
    first_token_seconds=pa.float64(),  # NaN = not measured
    draft_seconds=pa.float64(),
    verify_seconds=pa.float64(),
    identical=pa.bool_(),  # to plain decoding of the same prompt; null where that does not apply
    first_difference=pa.int32(),  # position in the response; -1 = none
    margin=pa.float32(),  # logits of the worse token there below the target's best; NaN = none, or not known
)

TURNS = _table(  # how long evaluation took: an arm decodes all prompts of a setting
    "turns",
    3,
    nullable=("others_share",),
    round=pa.int32(),  # in which all arms had their turn
    order=pa.int32(),  # place of the arm's turn in its round, from 0
    arm=pa.string(),
    engine=pa.string(),
    block_size=pa.int32(),
    temperature=pa.float64(),
    concurrency=pa.int32(),
    prompts=pa.int32(),
    batches=pa.int32(),  # parts of the turn, between which the other arms had theirs; 1: timed as a whole
    tokens=pa.int64(),
    wall_seconds=pa.float64(),
    draft_seconds=pa.float64(),  # 0 where the engine does not say
    verify_seconds=pa.float64(),
    verify_steps=pa.int64(),  # 0 = plain decoding
    others_share=pa.float64(),  # of the CPU time of all cores that others took meanwhile; null where it is unknown
)
