"""What the READMEs name is there: links, headings, commands with their options, config files, modules of benchmarks."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from draftsmith.flows.cli.main import main, parser
from draftsmith.stages.evaluation.gate import GateConfig

ROOT = Path(__file__).parents[1]
LONGEST = 10_000  # characters that a newcomer reads
_FENCED = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"\]\(([^()\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
_CONFIG = re.compile(r"(?<!\S)configs/\S+")
_BENCHMARK = re.compile(r"python -m (tests\.benchmarks\.\w+)")


FILES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "SECURITY.md",
        *(
            file
            for folder in ("artifacts", "configs", "flows", "stages", "tests")
            for file in (ROOT / folder).rglob("*.md")
            if ".cache" not in file.parts
        ),
    ]
)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(path: Path) -> str:
    """A file without its fenced blocks."""
    return _FENCED.sub("", path.read_text("utf-8"))


def snippets(path: Path) -> Iterator[str]:
    """Lines of fenced blocks without their comments, and inline code, which may go on in the next line."""
    for block in _FENCED.findall(path.read_text("utf-8")):
        yield from (line.partition(" #")[0].strip() for line in block.splitlines()[1:-1])
    for paragraph in prose(path).split("\n\n"):
        yield from (" ".join(code.split()) for code in _CODE.findall(paragraph))


def anchors(path: Path) -> set[str]:
    """The names of a file's headings as GitHub makes them."""
    found: list[str] = []
    for heading in _HEADING.findall(prose(path)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found.append(f"{name}-{times}" if (times := found.count(name)) else name)
    return set(found)


_PATH = re.compile(r"(?:flows|stages|artifacts|configs|tests)/[\w./-]+\.(?:py|yaml|json|md)")


COMMANDS = sorted({(name_of(f), s) for f in FILES for s in snippets(f) if re.match(r"draftsmith [a-z]", s)})
BENCHMARKS = sorted({(name_of(f), s) for f in FILES for s in snippets(f) if _BENCHMARK.search(s)})


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8")) <= LONGEST


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_link_leads_somewhere(path: Path) -> None:
    broken = []
    for link in _LINK.findall(prose(path)):
        file, _, anchor = link.partition("#")
        if file.startswith(("http://", "https://", "mailto:")):
            continue
        target = (path.parent / file).resolve() if file else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_file_that_is_named_from_the_top_is_there(path: Path) -> None:
    assert not [code for code in snippets(path) if _PATH.fullmatch(code) and not (ROOT / code).is_file()]


@pytest.mark.parametrize("folder", ["flows", "stages"])
def test_a_readme_names_every_module_and_folder_beside_it(folder: str) -> None:
    page = (ROOT / folder / "README.md").read_text("utf-8")
    beside = [path for path in (ROOT / folder).iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
    names = [f"{path.name}{'/' * path.is_dir()}`" for path in beside if not path.name.startswith("__")]
    assert names and not [name for name in names if name not in page]


def test_flows_tells_every_option_and_what_a_gate_asks_for() -> None:
    page = "".join((ROOT / "flows" / name).read_text("utf-8") for name in ("README.md", "refresh/README.md"))
    commands = next(action for action in parser()._actions if action.dest == "command")
    assert isinstance(commands.choices, dict)
    options = {option for each in commands.choices.values() for option in _OPTION.findall(each.format_help())}
    assert not [option for option in options - {"--help"} if option not in page]
    assert not [name for name in GateConfig.model_fields if f"`gate.{name}" not in page]


@pytest.mark.parametrize(("file", "command"), COMMANDS)
def test_a_command_is_known_with_its_options_and_its_config_is_there(
    file: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command.split()[1], "--help"])
    known = capsys.readouterr().out
    assert ended.value.code == 0, f"{file}: no such command"
    assert not [option for option in _OPTION.findall(command) if option not in _OPTION.findall(known)]
    assert not [config for config in _CONFIG.findall(command) if not (ROOT / config).is_file()]


@pytest.mark.parametrize(("file", "command"), BENCHMARKS)
def test_a_benchmark_is_there_with_its_options(file: str, command: str) -> None:
    module = _BENCHMARK.findall(command)[0]
    found = importlib.util.find_spec(module)
    assert found is not None and found.origin is not None, f"{file}: no module {module}"
    run = Path(found.origin).with_name("__main__.py") if found.submodule_search_locations else Path(found.origin)
    sources = [run, ROOT / "tests" / "benchmarks" / "harness.py"]
    known = {option for source in sources for option in re.findall(r'"(--[a-z-]+)"', source.read_text("utf-8"))}
    assert not [option for option in _OPTION.findall(command) if option not in known | {"--help"}]
