"""Tests of README and docs/: links resolve, named files and settings exist, commands parse."""

import argparse
import contextlib
import io
import re
import runpy
import shlex
import unicodedata
from pathlib import Path

import pytest

import kantai.data.tokenizer
from kantai.config.loading import load_config, schema
from kantai.config.reference import reference
from kantai.config.schema import Config
from kantai.errors import UserError

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *DOCS]
BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
# The tests know only the names of these programs, and do not check their arguments.
OTHER_PROGRAMS = ("export", ".", "pip", ".venv/bin/tensorboard")
STARTS = ("bash ", "sbatch ", "srun ", "python ", ".venv/bin/python ", "accelerate launch ")
FOLDERS = ("kantai", "scripts", "slurm", "benchmarks", "tests")
FOREIGN_FILES = {"run_mlm.py"}


class Parsed(Exception):
    """Raised when a program has parsed its arguments; it stops the program."""

    def __init__(self, arguments: argparse.Namespace, rest: list[str]) -> None:
        super().__init__()
        self.arguments = arguments
        self.rest = rest


def prose(page: Path) -> str:
    """Return a page without its code blocks."""
    return BLOCK.sub("", page.read_text(encoding="utf-8"))


def code_spans(page: Path) -> list[str]:
    """Return the inline code of a page."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes from a page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        kept = [c for c in heading.lower() if c in " -_" or unicodedata.category(c)[0] in "LN"]
        found.add("".join(kept).replace(" ", "-"))
    return found


def broken_links(page: Path) -> list[str]:
    """Return the relative links of a page that do not resolve."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]+`", "", prose(page))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(target)
    return broken


def commands(page: Path) -> list[str]:
    """Return the commands of a page, from the lines of shell blocks and from inline code."""
    blocks = [
        text for kind, text in BLOCK.findall(page.read_text(encoding="utf-8")) if kind == "bash"
    ]
    blocks += [
        code for code in code_spans(page) if re.sub(r"^(\w+=\S* )+", "", code).startswith(STARTS)
    ]
    blocks += re.findall(r"^ {4}((?:sbatch|bash|python) .*)$", prose(page), re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if shlex.split(line, comments=True)]


def parse(program: str, arguments: list[str]) -> Parsed:
    """Parse arguments with a program's own parser."""
    path = ROOT / program
    assert path.is_file(), f"there is no {program}"
    known_args = argparse.ArgumentParser.parse_known_args

    def stop(parser: argparse.ArgumentParser, *_: object) -> None:
        raise Parsed(*known_args(parser, arguments))

    def stop_where_unknown(parser: argparse.ArgumentParser, *_: object) -> None:
        found, rest = known_args(parser, arguments)
        assert not rest, f"{program} does not know {rest}"
        raise Parsed(found, [])

    messages = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(messages):
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        patch.setattr(argparse.ArgumentParser, "parse_args", stop_where_unknown)
        # The tokenizers that pages name do not exist.
        patch.setattr(kantai.data.tokenizer, "load_tokenizer", lambda _: None)
        patch.syspath_prepend(path.parent)
        try:
            runpy.run_path(str(path), run_name="__main__")
        except Parsed as parsed:
            return parsed
        except SystemExit:
            pass
    raise AssertionError(f"{program} cannot parse {arguments}: {messages.getvalue()}")


def check_config(name: str, overrides: list[str]) -> None:
    """Load a config of configs/; a reader's config, such as my.yaml, stands for roberta-base."""
    is_ours = name.startswith("configs/")
    load_config(ROOT / (name if is_ours else "configs/roberta-base.yaml"), overrides)


def check_program(program: str, arguments: list[str]) -> None:
    parsed = parse(program, arguments)
    config = getattr(parsed.arguments, "config", None)
    if config is not None:
        check_config(config, parsed.rest)
    else:
        known = [f"--{key}" for key, _ in schema(Config)]
        unknown = [argument for argument in parsed.rest if argument.split("=")[0] not in known]
        assert not unknown, f"{program} does not know {unknown}"


def check_launch(arguments: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    found = launch_command_parser().parse_args(arguments)
    assert (ROOT / found.config_file).is_file(), f"there is no {found.config_file}"
    check_program(found.training_script, found.training_script_args)


def check_batch_job(arguments: list[str]) -> None:
    scripts = [word for word in arguments if word.endswith(".sbatch")]
    if not scripts:  # inline code that names an option of sbatch
        return
    assert (ROOT / scripts[0]).is_file(), f"there is no {scripts[0]}"
    arguments = arguments[arguments.index(scripts[0]) + 1 :]
    if scripts[0] == "slurm/tokenize.sbatch":
        check_program("scripts/tokenize_corpus.py", arguments)
    elif arguments != ["..."]:
        config, backend, *overrides = arguments
        check_config(config, overrides)
        assert (ROOT / f"configs/accelerate/{backend}.yaml").is_file(), f"no backend {backend}"


def check_shell_script(script: str, arguments: list[str]) -> None:
    assert (ROOT / script).is_file(), f"there is no {script}"
    text = (ROOT / script).read_text(encoding="utf-8")
    settings = [word for word in arguments if re.match(r"--\w+\.", word)]
    check_config("configs/quickstart.yaml", settings)
    for option in (word for word in arguments if word.startswith("--") and word not in settings):
        assert option in text, f"{script} does not know {option}"


def check(command: str) -> None:
    """Fail where a command names a file, an option or a setting that does not exist.

    Raises:
        UserError: a setting does not fit the schema.
    """
    line = re.sub(r" > \S+$", "", command.split(" && ", maxsplit=1)[0])
    words = shlex.split(line, comments=True)
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if words[0] == "srun":
        words = words[next(index for index, word in enumerate(words) if word == "python") :]
    name, *arguments = words
    if name == "sbatch":
        check_batch_job(arguments)
    elif words[:2] == ["accelerate", "launch"]:
        check_launch(arguments[1:])
    elif name == "bash":
        check_shell_script(arguments[0], arguments[1:])
    elif name in ("python", ".venv/bin/python") and arguments[0] == "-m":
        assert (ROOT / f"{arguments[1].replace('.', '/')}.py").is_file(), f"no {arguments[1]}"
    elif name in ("python", ".venv/bin/python"):
        program, *arguments = arguments
        # Some benchmarks import torch before they parse, which takes seconds.
        if arguments or not program.startswith("benchmarks/"):
            check_program(program, arguments)
        assert (ROOT / program).is_file(), f"there is no {program}"
    else:
        assert name in OTHER_PROGRAMS, f"no test checks {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    assert not broken_links(page)


@pytest.mark.parametrize(
    ("page", "command"),
    [
        pytest.param(page.name, line, id=f"{page.name}: {line}")
        for page in PAGES
        for line in commands(page)
    ],
)
def test_documented_commands_parse(page: str, command: str) -> None:
    try:
        check(command)
    except UserError as error:
        pytest.fail(f"{page}: {command}: {error}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    names = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")}
    for code in code_spans(page):
        if not re.fullmatch(r"[\w/-]+\.(py|sh|sbatch|env)", code) or code in FOREIGN_FILES:
            continue
        exists = (ROOT / code).exists() or (ROOT / "kantai" / code).exists()
        assert exists or ("/" not in code and code in names), code


@pytest.mark.parametrize("page", [ROOT / "README.md", *DOCS], ids=lambda page: page.name)
def test_named_settings_exist(page: Path) -> None:
    sections = Config.model_json_schema()["properties"]
    definitions = Config.model_json_schema()["$defs"]
    for code in code_spans(page):
        named = re.fullmatch(r"(?:--)?(\w+)\.([a-z_]+)(?:=.*)?", code)
        if named and named[2] not in ("py", "yaml") and "$ref" in sections.get(named[1], {}):
            section = definitions[sections[named[1]]["$ref"].rpartition("/")[2]]
            assert named[2] in section["properties"], code


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_pages_begin_with_summary(page: Path) -> None:
    assert re.match(r"# .+\n\n\*This page [^*]+\*", page.read_text(encoding="utf-8"))


def test_configuration_page_is_current() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == reference(), "python -m kantai.config.reference > docs/configuration.md"


def test_readme_stays_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 160
    assert not [line for line in lines if len(line) > 100]
