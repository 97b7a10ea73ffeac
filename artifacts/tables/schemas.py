"""Schemas of the tables that pass between stages. Token ids are int32 lists, absolute positions int32."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

_IDS = pa.list_(pa.int32())
_LOGPROBS = pa.list_(pa.float32())


@dataclass(frozen=True)
class TableSchema:
    """The schema of a named table. Raise `version` whenever a column changes its name, type or meaning."""

    name: str
    version: int
    columns: pa.Schema  # without metadata; `nullable=False` is checked when rows are written

    @property
    def with_metadata(self) -> pa.Schema:
        return self.columns.with_metadata({b"draftsmith.table": self.name, b"draftsmith.version": str(self.version)})


def _table(name: str, version: int, *, nullable: tuple[str, ...] = (), **columns: pa.DataType) -> TableSchema:
    fields = [pa.field(column, kind, nullable=column in nullable) for column, kind in columns.items()]
    return TableSchema(name, version, pa.schema(fields))


LOGS_SET = "logs"  # the prompt set of a prompt that is not in the table
PROMPTS = _table(
    "prompts",
    1,
    prompt_id=pa.string(),
    source=pa.string(),
    split=pa.string(),  # train | validation | heldout
    messages=pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
    token_ids=_IDS,  # after the chat template
)

LABELS = _table(  # next to the prompts, if section prompts names slices
    "labels",
    1,
    prompt_id=pa.string(),
    labels=pa.list_(pa.string()),  # FIELD:VALUE, such as language:de
)

QUESTIONS = _table(  # next to the prompts, if some of them begin conversations
    "questions",
    1,
    prompt_id=pa.string(),
    questions=pa.list_(pa.string()),  # the user's, after the prompt; each follows the target's answer to the one before
    chat_template_kwargs=pa.string(),  # JSON
)

TRAJECTORIES = _table(
    "trajectories",
    2,
    trajectory_id=pa.string(),  # "<prompt_id>/<sample>"
    prompt_id=pa.string(),
    split=pa.string(),
    sample=pa.int32(),  # number of the answer to a prompt; in a conversation, of the question
    prompt_ids=_IDS,
    response_ids=_IDS,
    finish_reason=pa.string(),  # stop | length
    temperature=pa.float32(),  # 0 = greedy
    top_p=pa.float32(),
    top_k=pa.int32(),  # 0 = all
    seed=pa.int64(),
    engine=pa.string(),
)

TIMINGS = _table(  # volatile, so not in the file of the trajectories
    "timings",
    3,
    trajectory_id=pa.string(),
    seconds=pa.float64(),
    first_token_seconds=pa.float64(),  # NaN = not measured
    verify_steps=pa.int32(),  # 0 = without a drafter
    retractions=pa.int32(),  # preemptions by the server, each of which generated a token without a verify step
    draft_seconds=pa.float64(),
    verify_seconds=pa.float64(),
)

TRACE = _table(  # verify steps as an engine recorded them
    "trace",
    2,
    nullable=("target_logprobs",),
    trajectory_id=pa.string(),
    step=pa.int32(),
    anchor=pa.int32(),  # position in prompt + answer
    accepted=pa.int32(),
    proposed_ids=_IDS,
    target_logprobs=_LOGPROBS,  # of the proposals, given the proposals before them; null where not recorded
)

VERIFY_STEPS = _table(
    "verify_steps",
    2,
    trajectory_id=pa.string(),
    step=pa.int32(),
    anchor=pa.int32(),  # position in prompt + answer
    accepted=pa.int32(),  # n, accepted proposals
    committed=pa.int32(),  # tokens committed by the step: n + 1, unless the answer ends before
    rejected_offset=pa.int32(),  # offset of the first rejected proposal; 0 = nothing rejected
    judged=pa.int32(),  # proposals inside the answer; those beyond its end are neither accepted nor rejected
    proposed_ids=_IDS,
    target_logprobs=_LOGPROBS,  # of the proposals, given those before them; NaN if beyond the end or not scored
    committed_id=pa.int32(),  # correction or bonus token; -1 if the answer ends before
    best_logprob=pa.float32(),  # of the target's most likely token at the rejection; NaN if nothing was rejected
)

EVALUATED = _table(  # one row per replayed answer, next to the shards of mined steps
    "evaluated",
    2,
    trajectory_id=pa.string(),
    evaluated_blocks=pa.int64(),  # blocks drafted by the replay
    outside_nucleus=pa.int64(),  # tokens that top_k and top_p exclude; 0 for greedy proposals
)

REPLAYED = _table(  # traces of an unfinished replay, a row for each trajectory and drafter
    "replayed",
    2,
    nullable=("expected", "confidence"),
    index=pa.int64(),  # index of the trajectory in the set
    drafter=pa.string(),
    length=pa.int64(),
    proposals=pa.int64(),  # proposals of a block
    evaluated_blocks=pa.int64(),
    outside_nucleus=pa.int64(),
    anchors=_IDS,
    accepted=_IDS,
    proposed=_IDS,  # of all steps
    expected=pa.list_(pa.float64()),
    confidence=pa.list_(pa.float32()),  # same order as `proposed`; null where it was not asked for
)

REQUESTS = _table(  # one row per request of an evaluation
    "requests",
    3,
    nullable=("accepted", "identical"),
    round=pa.int32(),
    request_id=pa.string(),  # "<prompt_id>/<arm>"
    prompt_id=pa.string(),
    arm=pa.string(),  # "plain" (without a drafter), or a drafter's name
    engine=pa.string(),
    block_size=pa.int32(),
    temperature=pa.float64(),  # 0 = greedy
    concurrency=pa.int32(),  # requests in flight
    tokens=pa.int32(),
    response_ids=_IDS,
    verify_steps=pa.int32(),
    accepted=_IDS,  # accepted proposals of each verify step (ascending if only counts are known); null if unknown
    latency_seconds=pa.float64(),  # from sending the request to its last token
    first_token_seconds=pa.float64(),  # NaN = not measured
    draft_seconds=pa.float64(),
    verify_seconds=pa.float64(),
    identical=pa.bool_(),  # to the baseline's answer; null where that does not apply
    first_difference=pa.int32(),  # position in the answer; -1 = none
    margin=pa.float32(),  # logit gap between the target's best and the differing token; NaN if none or unknown
)

TIMED_RUNS = _table(  # one row per timed run: an arm decodes all prompts of a setting once
    "turns",
    3,
    nullable=("others_share",),
    round=pa.int32(),  # one timed run of every arm
    order=pa.int32(),  # index of the run in its round, from 0
    arm=pa.string(),
    engine=pa.string(),
    block_size=pa.int32(),
    temperature=pa.float64(),
    concurrency=pa.int32(),
    prompts=pa.int32(),
    batches=pa.int32(),  # slices of the run, interleaved with those of other arms; 1 = timed in one piece
    tokens=pa.int64(),
    wall_seconds=pa.float64(),
    draft_seconds=pa.float64(),  # 0 if the engine does not report it
    verify_seconds=pa.float64(),
    verify_steps=pa.int64(),  # 0 = without a drafter
    others_share=pa.float64(),  # share of all cores' CPU time used by other processes meanwhile; null if unknown
)
