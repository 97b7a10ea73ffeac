"""Stage `diagnosis`: does a running server draft as replay does, and if not, why?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from draftsmith.artifacts.atomic import write_text
from draftsmith.artifacts.errors import DraftsmithError, RetryableError, StageInterrupted
from draftsmith.stages.engines.config import SamplingConfig, SGLangEngineConfig
from draftsmith.stages.replay.options import MaxParityMismatch
from draftsmith.stages.runtime.stage import Compute, Config, NotInKey, Stage, StageContext, progress_callback

if TYPE_CHECKING:
    from draftsmith.stages.data.trajectories import Trajectory
    from draftsmith.stages.engines.base import Completion

RESULT = "diagnosis.json"
_TIMEOUT_S = 30.0


class DiagnosisConfig(Config):
    """One server, and the drafter that it should serve."""

    url: str
    api_key_env: Annotated[str | None, NotInKey()] = None
    """As `engine.api_key_env`: the variable of the environment that holds the server's API key."""
    drafter: Annotated[str, Field(description="folder of the checkpoint")]
    prompts: Annotated[int, Field(ge=1, description="validation and held-out prompts that the server answers")] = 16
    sampling: SamplingConfig = SamplingConfig()
    max_parity_mismatch: MaxParityMismatch = 0.25

    def external_files(self) -> list[Path]:
        folder = Path(self.drafter)
        if not folder.is_dir():
            raise DraftsmithError(f"{folder}: no such folder: give the checkpoint that the server should draft with")
        return sorted(path for path in folder.iterdir() if path.is_file())


def preflight(config: DiagnosisConfig, target: Path) -> None:
    """The drafter is whole and one of this target, before anything is asked."""
    from draftsmith.stages.drafters.checkpoint import check_drafter, check_shape, check_whole
    from draftsmith.stages.target.info import model_path, read_target_info

    folder = Path(config.drafter)
    check_drafter(folder, read_target_info(target).digest)
    check_shape(folder, model_path(target))
    check_whole(folder)


def run(ctx: StageContext, config: DiagnosisConfig) -> None:
    """Write `diagnosis.json`: a sentence, and what was tried."""
    from draftsmith.artifacts.tables.parquet import to_table
    from draftsmith.artifacts.tables.schemas import TRACE
    from draftsmith.stages.data.load import load_prompts, positions_needed
    from draftsmith.stages.drafters.checkpoint import load_drafter
    from draftsmith.stages.drafters.spec import DraftingConfig
    from draftsmith.stages.engines.base import Request
    from draftsmith.stages.engines.sglang.client import key_header
    from draftsmith.stages.engines.sglang.engine import open_sglang
    from draftsmith.stages.engines.sglang.requirements import server_requirements
    from draftsmith.stages.evaluation.step_differences import Served, diagnose
    from draftsmith.stages.target.causal_lm import Target
    from draftsmith.stages.target.info import read_target_info

    engine = SGLangEngineConfig(kind="sglang", urls=(config.url,), api_key_env=config.api_key_env)
    said = _server_info(config.url, key_header(engine.api_key()))
    info, folder = read_target_info(ctx.inputs["target"]), Path(config.drafter)
    prompts = load_prompts(ctx.inputs["prompts"], ("validation", "heldout"))[: config.prompts]
    max_new, sampling = config.sampling.max_new_tokens, config.sampling.params()
    block = said.get("speculative_num_draft_tokens")
    longest = positions_needed(prompts, max_new, info.max_positions)
    try:
        drafting = DraftingConfig(block_size=block)
        required = server_requirements(engine, ctx.inputs["target"], folder, drafting, longest)
        with open_sglang(engine, required, ctx.work, ctx.log, ctx.check_interrupted) as server:
            requests = [Request(p.prompt_id, p.token_ids, max_new, sampling, ctx.seed) for p in prompts]
            answers = []
            for answer in server.generate(requests):
                answers.append(answer)
                ctx.progress(len(answers), len(requests), "answers")
                ctx.check_interrupted()
    except (RetryableError, StageInterrupted):
        raise
    except DraftsmithError as error:  # what the server says of itself is enough
        _write(ctx, {"sentence": str(error), "agrees": False, "causes": [{"cause": "told by the server"}]})
        return
    answers = [answer for answer in answers if len(answer.response_ids) >= 2]
    if not answers:
        raise DraftsmithError("diagnosis: no answer of two or more tokens: raise sampling.max_new_tokens")
    target = Target.load(ctx.inputs["target"])
    found = diagnose(
        target,
        load_drafter(folder, target),
        Served(
            [trajectory_of(answer) for answer in answers],
            [answer.verify_steps for answer in answers],
            to_table(TRACE, [row for answer in answers for row in answer.trace_rows()]),
            sampling,
        ),
        DraftingConfig(),
        allowed=config.max_parity_mismatch,
        served_block=block,
        special_ids=target.tokenizer.all_special_ids,
        progress=progress_callback(ctx, "changes"),
    )
    told = {"sentence": found.sentence, "agrees": found.agrees, "served_tau": found.served_tau}
    lists = {name: [each.row() for each in getattr(found, name)] for name in ("causes", "tried")}
    _write(ctx, {**told, "as_it_is": found.as_it_is.row(), **lists})


def trajectory_of(answer: Completion) -> Trajectory:
    from draftsmith.stages.data.trajectories import Trajectory

    prompt = answer.request.prompt_ids
    return Trajectory(answer.request.request_id, prompt + answer.response_ids, len(prompt))


def _write(ctx: StageContext, found: dict[str, Any]) -> None:
    write_text(ctx.out / RESULT, json.dumps(found, indent=2) + "\n")
    ctx.log(found["sentence"])


def _server_info(url: str, headers: dict[str, str]) -> dict[str, Any]:
    """What a SGLang server says of itself. Raises RetryableError if it does not answer, DraftsmithError if it is
    none or refuses the key."""
    import httpx

    from draftsmith.stages.engines.sglang.client import RequestLostError, check_status

    try:
        for name in ("server_info", "get_server_info"):
            response = httpx.get(f"{url}/{name}", timeout=_TIMEOUT_S, headers=headers)
            if response.status_code != 404:
                check_status(name, url, response.status_code, response.text)
                return dict(response.json())
    except RequestLostError as error:
        raise RetryableError(f"{url} {error}: is the server up?") from error
    except (httpx.HTTPError, ValueError, TypeError) as error:
        raise RetryableError(f"{url} cannot be reached ({type(error).__name__} {error}): is the server up?") from error
    raise DraftsmithError(f"{url} has no /server_info: is it a SGLang server of a supported release?")


STAGE = Stage(
    name="diagnosis", config=DiagnosisConfig, inputs=("target", "prompts"), body=__name__, compute=Compute.HEAVY,
    preflight=preflight,
)  # fmt: skip
