"""Configs of the engines and of sampling."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import AfterValidator, Discriminator, Field, Tag, field_validator, model_validator

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.identifiers import ServerUrl
from draftsmith.artifacts.redaction import find_secrets
from draftsmith.stages.runtime.stage import Config, NotInKey
from draftsmith.stages.targets.sampling import SamplingParams, TopK

NO_REDUCED_HEAD = (
    "only the embedded engine can draft from a part of the vocabulary. Remove it, or set engine.kind: embedded."
)
GREEDY_ONLY = (  # follows the name of the field
    "SGLang verifies greedily on this device, as on every CPU, so a drafter would change sampled answers. Set it to 0, "
    "roll out without a drafter, or use an NVIDIA GPU."
)
OptionValue = str | int | float | bool
Options = dict[str, OptionValue | tuple[OptionValue, ...]]
Fields = TypeVar("Fields", bound=Mapping[str, object])

_HTTP_ONLY = "nothing: launched servers are used over HTTP, which the API key protects"
_LOSSLESS = "nothing: below 1 the answers are not the target's"
_OTHER_RULES = "nothing: in replay EAGLE-3 proposes argmaxes, and every proposal is verified by itself"
_NO_PIPELINES = "nothing: a server gets tensor_parallel GPUs, and DFLASH and DSPARK draft with no pipeline"
# Options that the stage sets from other fields; a second value could contradict them. Values follow "is set by".
_RESERVED_OPTIONS = {
    "model": "the section target",
    "host": "nothing: launched servers listen on this machine only",
    "port": "nothing: a free one is taken",
    "dtype": "target.dtype",
    "tensor-parallel-size": "engine.launch.tensor_parallel",
    "data-parallel-size": "engine.launch.servers",
    "pipeline-parallel-size": _NO_PIPELINES,
    "nnodes": "nothing: a launched server runs on this machine only",
    "config": "nothing: a file could set any option; write them here",
}
_RESERVED_SGLANG = _RESERVED_OPTIONS | {
    "model-path": "the section target",
    "tp": "engine.launch.tensor_parallel",
    "tp-size": "engine.launch.tensor_parallel",
    "dp": "engine.launch.servers",
    "dp-size": "engine.launch.servers",
    "pp-size": _NO_PIPELINES,
    "mem-fraction-static": "engine.launch.memory_fraction",
    "speculative-algorithm": "the drafter's checkpoint",
    "speculative-draft-model-path": "the drafter of the refresh",
    "speculative-draft-model": "the drafter of the refresh",
    "speculative-num-draft-tokens": "drafting.block_size",
    "speculative-dflash-block-size": "drafting.block_size",
    "speculative-dspark-block-size": "drafting.block_size",
    "speculative-num-steps": "drafting.block_size",
    "speculative-eagle-topk": "nothing: replay rebuilds chains, so no trees are drafted",
    "speculative-accept-threshold-single": _LOSSLESS,
    "speculative-accept-threshold-acc": _LOSSLESS,
    "speculative-use-rejection-sampling": _OTHER_RULES,
    "speculative-use-block-verification": _OTHER_RULES,
    "preferred-sampling-params": "the section sampling",
    "json-model-override-args": "the target's config.json",
    "tokenizer-worker-num": "nothing: with several workers SGLang supports no API key, which launched servers have",
    "grpc-mode": _HTTP_ONLY,
    "smg-grpc-mode": _HTTP_ONLY,
    "grpc-port": _HTTP_ONLY,
}
_RESERVED_VLLM = _RESERVED_OPTIONS | {
    "tp": "engine.launch.tensor_parallel",
    "dp": "engine.launch.servers",
    "pp": _NO_PIPELINES,
    "gpu-memory-utilization": "engine.launch.memory_fraction",
    "max-num-seqs": "engine.concurrency",
    "speculative-config": "the drafter of the refresh and drafting.block_size",
    "per-request-spec-decode-metrics": "nothing: verify steps are always read",
    "generation-config": "nothing: every request has the section sampling",
    "override-generation-config": "the section sampling",
    "hf-overrides": "the target's config.json",
    "api-key": "nothing: launched servers have a random key",
}
_RANDOM_WEIGHTS = {("load-format", "dummy"), ("speculative-draft-load-format", "dummy")}
_OPTION_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_NUMBER = re.compile(r"-\d+(\.\d+)?(e-?\d+)?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _variable_name(name: str) -> str:
    if not _VARIABLE.fullmatch(name):
        raise ValueError("is not an environment variable's name. Write one such as SGLANG_API_KEY, not the key.")
    return name


def _no_secrets(fields: Fields) -> Fields:
    """Refuse secrets: a config is written to manifests, to MLflow and to the report."""
    for name, why in find_secrets(fields):
        raise ValueError(
            f"{name} looks like a secret ({why}), and a config is shown in MLflow and in reports. Set it in the "
            "command's environment instead, which servers inherit."
        )
    return fields


def option_name(key: str) -> str:
    """Return the name of an option on a server's command line, without leading dashes."""
    return key.lstrip("-").replace("_", "-")


class EmbeddedEngineConfig(Config):
    """The engine in this process."""

    kind: Literal["embedded"] = "embedded"
    slots: Annotated[int | None, Field(ge=1, description="requests in flight; by default 8, on a GPU 64")] = None

    def slots_on(self, *, gpu: bool) -> int:
        """Return the requests in flight; a step of a GPU takes as long for a few as for many."""
        return self.slots or (64 if gpu else 8)


class LaunchConfig(Config):
    """Servers that the stage starts, waits for and stops. By default fields have the engine's defaults."""

    title: ClassVar[str]  # the engine's name
    reserved: ClassVar[Mapping[str, str]]  # option -> what sets it
    servers: Annotated[
        int, Field(ge=1, description="number of servers, each a replica on tensor_parallel GPUs"), NotInKey()
    ] = 1
    tensor_parallel: Annotated[int, Field(ge=1, description="GPUs that hold one copy"), NotInKey()] = 1
    memory_fraction: Annotated[
        float | None,
        Field(gt=0, lt=1, description="share of a GPU's memory for weights and key/value memory"),
        NotInKey(),
    ] = None
    options: Annotated[
        Options,
        AfterValidator(_no_secrets),
        Field(
            default_factory=dict,
            description="further options of the engine's server without their dashes, e.g. {max-num-batched-tokens: "
            "16384} for vLLM; true: a bare flag, false: no option",
        ),
    ]
    environment: Annotated[
        dict[str, str],
        AfterValidator(_no_secrets),
        Field(default_factory=dict, description="variables added to the servers' environment, a copy of the command's"),
    ]
    start_timeout_s: Annotated[
        float, Field(gt=0, description="wait until a server answers, with loading and graph capture"), NotInKey()
    ] = 900.0

    @field_validator("options")
    @classmethod
    def _sets_no_reserved_option(cls, options: Options) -> Options:
        """Refuse options that a field sets: by name, by prefix (argparse completes it), as the value of another one."""
        for key, value in options.items():
            name = option_name(key)
            if field := cls.reserved.get(name):
                raise ValueError(f"{key}: is set by {field}. Remove it here.")
            if not _OPTION_NAME.fullmatch(name):
                raise ValueError(f"{key}: is not an option's name. Write only the name, and its value after the colon.")
            if meant := next((option for option in cls.reserved if option.startswith(name)), None):
                raise ValueError(f"{key}: {cls.title} would read it as --{meant}, set by {cls.reserved[meant]}.")
            if (name, value) in _RANDOM_WEIGHTS:
                raise ValueError(f"{key}: {value} would serve random weights. Remove the option.")
            for item in value if isinstance(value, tuple) else (value,):
                if str(item).startswith("-") and not _NUMBER.fullmatch(str(item)):
                    raise ValueError(f"{key}: {cls.title} would read its value {item!r} as another option. Correct it.")
        return options

    @property
    def on_cpu(self) -> bool:
        """Return whether the options make the servers run on the CPU."""
        return {option_name(key): value for key, value in self.options.items()}.get("device") == "cpu"


class SGLangLaunchConfig(LaunchConfig):
    """SGLang servers that the stage starts, waits for and stops. Defaults are SGLang's."""

    title, reserved = "SGLang", _RESERVED_SGLANG


class VLLMLaunchConfig(LaunchConfig):
    """vLLM servers that the stage starts, waits for and stops. Defaults are vLLM's."""

    title, reserved = "vLLM", _RESERVED_VLLM


class ServerEngineConfig(Config):
    """Servers, running already (`urls`) or started by the stage (`launch`)."""

    kind: str
    urls: Annotated[
        tuple[ServerUrl, ...],
        Field(description="running servers of the same target, or SGLang's routers in front of some"),
        NotInKey(),
    ] = ()
    api_key_env: Annotated[
        Annotated[str, AfterValidator(_variable_name)] | None,
        Field(description="environment variable with the API key of `urls`; launched servers have their own key"),
        NotInKey(),
    ] = None
    launch: LaunchConfig | None = None
    python: Annotated[
        Path | None,
        Field(description="interpreter of the environment that has the engine; default: the one that runs Draftsmith"),
        NotInKey(),
    ] = None
    concurrency: Annotated[int, Field(ge=1, description="requests in flight per replica of the model"), NotInKey()] = 32
    request_timeout_s: Annotated[float, Field(gt=0, description="wait for one answer"), NotInKey()] = 1800.0

    @model_validator(mode="after")
    def _urls_or_launch(self) -> Self:
        if bool(self.urls) == (self.launch is not None):
            raise ValueError(
                "urls and launch: exactly one must be set. Set urls for running servers, or launch to start them."
            )
        if self.api_key_env is not None and not self.urls:
            raise ValueError("api_key_env: is for urls; launched servers get a random key. Remove it.")
        return self

    @property
    def interpreter(self) -> Path:
        """Return the engine's interpreter; not resolved, since a virtual environment is found by its link."""
        return (self.python or Path(sys.executable)).expanduser().absolute()

    def api_key(self) -> str | None:
        """Return the API key of the servers of `urls`. Raises DraftsmithError if its variable is not set."""
        if self.api_key_env is None:
            return None
        if not (key := os.environ.get(self.api_key_env, "").strip()):
            raise DraftsmithError(f"engine.api_key_env: the variable {self.api_key_env} is not set. Export it.")
        return key


class SGLangEngineConfig(ServerEngineConfig):
    """SGLang servers, running already (`urls`) or started by the stage (`launch`)."""

    kind: Literal["sglang"]
    launch: SGLangLaunchConfig | None = None


class VLLMEngineConfig(ServerEngineConfig):
    """vLLM servers, running already (`urls`) or started by the stage (`launch`)."""

    kind: Literal["vllm"]
    launch: VLLMLaunchConfig | None = None


def _engine_kind(value: Any) -> str:
    """Return the kind of an engine section, embedded by default."""
    kind = value.get("kind", "embedded") if isinstance(value, dict) else getattr(value, "kind", "")
    return str(kind)


EngineConfig = Annotated[
    Annotated[EmbeddedEngineConfig, Tag("embedded")]
    | Annotated[SGLangEngineConfig, Tag("sglang")]
    | Annotated[VLLMEngineConfig, Tag("vllm")],
    Discriminator(_engine_kind),
]


class SamplingConfig(Config):
    """The length of answers and the sampling of their tokens."""

    max_new_tokens: Annotated[int, Field(ge=2, description="longest answer, in tokens")] = 512
    temperature: Annotated[float, Field(ge=0, description="0 = greedy")] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1, description="nucleus; 1: all tokens")] = 1.0
    top_k: TopK = 0

    def params(self, temperature: float | None = None) -> SamplingParams:
        """Return the sampling parameters, at this section's temperature or another."""
        return SamplingParams(self.temperature if temperature is None else temperature, self.top_p, self.top_k)
