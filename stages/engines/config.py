"""Which engine generates, and how tokens are drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from draftsmith.stages.contract import Config, Operational

NO_REDUCED_HEAD = (
    "only the embedded engine drafts from a part of the vocabulary; leave it out, or set engine.kind: embedded"
)
GREEDY_ONLY = (  # behind the name of the field
    "SGLang on a CPU verifies greedily, so a drafter would change sampled answers; set it to 0, roll out without a "
    "drafter, or use a GPU"
)
OptionValue = str | int | float | bool

# Set by the stage from other fields: given twice, the two could contradict each other.
_OWN_OPTIONS = {
    "model-path": "the section target",
    "model": "the section target",
    "host": "nothing: launched servers listen on this machine alone",
    "port": "nothing: a free one is taken",
    "dtype": "engine.launch.dtype",
    "tp": "engine.launch.tensor_parallel",
    "tp-size": "engine.launch.tensor_parallel",
    "tensor-parallel-size": "engine.launch.tensor_parallel",
    "mem-fraction-static": "engine.launch.memory_fraction",
    "speculative-algorithm": "engine.launch.algorithm",
    "speculative-draft-model-path": "the drafter of the refresh",
    "speculative-draft-model": "the drafter of the refresh",
    "speculative-num-draft-tokens": "drafting.block_size, or engine.launch.tree",
    "speculative-dflash-block-size": "drafting.block_size",
    "speculative-num-steps": "drafting.block_size",
    "speculative-eagle-topk": "engine.launch.tree",
}


def _http_address(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{url!r} is no address: write http://{url}")
    return url


def _no_secrets(named: dict[str, Any]) -> dict[str, Any]:
    """A config is written to manifests, to MLflow and to the report."""
    for name in named:
        if {"TOKEN", "KEY", "SECRET", "PASSWORD"} & set(name.upper().replace("-", "_").split("_")):
            raise ValueError(
                f"{name} looks like a secret, and a config is shown in MLflow and in reports: set what is needed in "
                "the environment of the command instead, the servers inherit it"
            )
    return named


def option_name(key: str) -> str:
    """The name of an option of SGLang's server as its command line has it, without the dashes before it."""
    return key.lstrip("-").replace("_", "-")


def _not_our_own(options: dict[str, Any]) -> dict[str, Any]:
    for key in options:
        if field := _OWN_OPTIONS.get(option_name(key)):
            raise ValueError(f"{key}: is set by {field}; leave it out here")
    return options


class EmbeddedEngineConfig(Config):
    """The engine in this process."""

    kind: Literal["embedded"] = "embedded"
    slots: Annotated[int, Field(ge=1, description="requests in flight")] = 8


class TreeConfig(Config):
    """Trees of drafts (EAGLE-3): as deep as the chain would be long, several branches at every token."""

    branches: Annotated[int, Field(ge=2, description="--speculative-eagle-topk")]
    draft_tokens: Annotated[
        int, Field(ge=3, description="verified in one step, the anchor included: --speculative-num-draft-tokens")
    ]


class LaunchConfig(Config):
    """SGLang servers that the stage starts, waits for and stops. What is left out is SGLang's own default."""

    servers: Annotated[int, Field(ge=1, description="how many; each takes `tensor_parallel` GPUs"), Operational()] = 1
    tensor_parallel: Annotated[int, Field(ge=1), Operational()] = 1
    memory_fraction: Annotated[
        float | None,
        Field(gt=0, lt=1, description="of a GPU's memory, for weights and key/value memory"),
        Operational(),
    ] = None
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, Field(description="left out: the target's")] = (
        None
    )
    algorithm: Annotated[
        Literal["DFLASH", "EAGLE3"] | None, Field(description="left out: as the drafter's checkpoint says")
    ] = None
    tree: Annotated[
        TreeConfig | None,
        Field(
            description="EAGLE-3 only, and only for an evaluation's speed: replay rebuilds chains, so trees are not "
            "mined, and not compared with it; left out: chains"
        ),
    ] = None
    options: Annotated[
        dict[str, OptionValue | tuple[OptionValue, ...]],
        AfterValidator(_no_secrets),
        AfterValidator(_not_our_own),
        Field(
            default_factory=dict,
            description="further options of SGLang's server without their dashes, e.g. {attention-backend: fa3}; "
            "true: a bare flag, false: left out",
        ),
    ]
    environment: Annotated[
        dict[str, str],
        AfterValidator(_no_secrets),
        Field(default_factory=dict, description="variables added to the servers' environment, which is the command's"),
    ]
    start_timeout_s: Annotated[
        float, Field(gt=0, description="until a server answers; loading and graph capture included"), Operational()
    ] = 900.0

    @property
    def on_cpu(self) -> bool:
        """Are the servers told to run on the CPU?"""
        return {option_name(key): value for key, value in self.options.items()}.get("device") == "cpu"


class SGLangEngineConfig(Config):
    """SGLang servers, running already (`urls`) or started by the stage (`launch`)."""

    kind: Literal["sglang"]
    urls: Annotated[
        tuple[Annotated[str, AfterValidator(_http_address)], ...],
        Field(description="running servers of the same target"),
        Operational(),
    ] = ()
    launch: LaunchConfig | None = None
    python: Annotated[
        Path | None,
        Field(description="interpreter of the environment that has SGLang; needed to launch"),
        Operational(),
    ] = None
    trace: Annotated[
        bool, Field(description="ask the plug-in for verify steps, where the server has it"), Operational()
    ] = True
    concurrency: Annotated[int, Field(ge=1, description="requests in flight, a server"), Operational()] = 32
    request_timeout_s: Annotated[float, Field(gt=0), Operational()] = 1800.0
    retries: Annotated[
        int, Field(ge=0, description="of one request, after lost connections and 5xx answers"), Operational()
    ] = 5
    restarts: Annotated[int, Field(ge=0, description="of launched servers that died, in all"), Operational()] = 1

    @model_validator(mode="after")
    def _given_or_launched(self) -> SGLangEngineConfig:
        if bool(self.urls) == (self.launch is not None):
            raise ValueError("give urls (running servers) or launch (start them), one of the two")
        if self.launch is not None and self.python is None:
            raise ValueError(
                "python: needed to launch, the interpreter of the environment that has SGLang "
                "(`make sglang-gpu` and `make sglang-cpu` build one and print its path)"
            )
        return self


def _kind(value: Any) -> str:
    """Which engine a section means: embedded unless it says otherwise."""
    kind = value.get("kind", "embedded") if isinstance(value, dict) else getattr(value, "kind", "")
    return str(kind)


EngineConfig = Annotated[
    Annotated[EmbeddedEngineConfig, Tag("embedded")] | Annotated[SGLangEngineConfig, Tag("sglang")],
    Discriminator(_kind),
]


class SamplingConfig(Config):
    """How the target's tokens are drawn."""

    max_new_tokens: Annotated[int, Field(ge=2)] = 512
    temperature: Annotated[float, Field(ge=0, description="0 = greedy")] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0


def served_dtype(engine: EmbeddedEngineConfig | SGLangEngineConfig, target_dtype: str) -> str | None:
    """What an engine computes in; None for running servers, which say it nowhere in the config."""
    if isinstance(engine, SGLangEngineConfig):
        return (engine.launch.dtype or target_dtype) if engine.launch else None
    return target_dtype
