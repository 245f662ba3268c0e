"""Configs from YAML files and ``--a.b=c`` overrides, with messages in the user's words."""

import contextlib
import difflib
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import YAMLError

from kantai.config.conversion import RENAMED
from kantai.config.schema import MAY_CHANGE, MAY_CHANGE_WITHOUT_DROPOUT, Config
from kantai.config.synonyms import hint
from kantai.errors import UserError
from kantai.output import redact_all


def load_config(
    path: str | Path, overrides: Sequence[str] = (), recorded: Config | None = None
) -> Config:
    """Read a YAML file, lay ``--a.b=c`` overrides over it, and check the whole.

    Args:
        recorded: the settings of a run, for what neither file nor overrides give.

    Raises:
        UserError: no such file, not YAML, an unknown key (the nearest known one is named), a wrong
            type or range.
    """
    tree = read_settings(path, overrides)
    if recorded is not None:
        tree = _lay_over_record(recorded.model_dump(), tree)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"config {path}: {_in_words(error, path)}") from None
    return _with_absolute_paths(config)


def read_settings(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The settings that a file and overrides give, unchecked.

    Raises:
        UserError: no such file, or not YAML, or an override that is none.
    """
    path = Path(path)
    try:
        tree = _yaml().load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read the config {path}: {error.strerror}; configs/ has some to start from"
        ) from None
    except DuplicateKeyError as error:
        key = str(error.problem).split('"')[1]
        raise UserError(f"the config {path} is not YAML: {key} is given twice") from None
    except (YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UserError(f"the config {path} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(
            f"the config {path} has no keys; configs/quickstart.yaml is one to start from"
        )
    # A section with nothing in it is no section.
    tree = {key: value for key, value in tree.items() if value is not None}
    for override in overrides:
        _lay_over(tree, override)
    return _with_python_s_none(tree)


def read_run_dir(path: str | Path, overrides: Sequence[str] = ()) -> str | None:
    """The run directory that a file and overrides name, also where the file is only half saved.

    Raises:
        UserError: an override is none.
    """
    try:
        tree = read_settings(path, overrides)
    except UserError:
        tree = _read_line_of(path, "run_dir")
        for override in overrides:
            _lay_over(tree, override)
    run_dir = tree.get("run_dir")
    return run_dir if isinstance(run_dir, str) else None


def _read_line_of(path: str | Path, key: str) -> dict[str, Any]:
    """A setting of one line; nothing where a file, which is not YAML as a whole, lacks it."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
        lines = re.findall(rf"^{key}:.*", text, re.MULTILINE)
        tree = _yaml().load(lines[0]) if len(lines) == 1 else {}
    except (OSError, YAMLError, ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}


def save_config(config: Config, path: Path) -> None:
    """Write a config so that :func:`load_config` gives it back, but for secrets in its URLs."""
    path.write_text(to_yaml(config.model_dump()), encoding="utf-8")


def to_yaml(tree: dict[str, Any]) -> str:
    """A tree of plain values as YAML, its keys in their order, its secrets redacted."""
    text = io.StringIO()
    _yaml().dump(redact_all(tree), text)
    return text.getvalue()


def flat_settings(config: Config) -> dict[str, Any]:
    """Flat ``a.b -> value`` of all settings."""
    values = redact_all(config.model_dump())
    found = {}
    for key, _ in schema(Config):
        value: Any = values
        for part in key.split("."):
            value = value[part]
        found[key] = value
    return found


def fixed_settings(config: Config) -> dict[str, Any]:
    """Flat ``a.b -> value`` of the settings that may not change between a run's starts."""
    may_change = changeable_settings()
    if not config.model.has_dropout:
        may_change |= changeable_settings(MAY_CHANGE_WITHOUT_DROPOUT)
    return {key: value for key, value in flat_settings(config).items() if key not in may_change}


def changeable_settings(mark: dict[str, Any] = MAY_CHANGE) -> set[str]:
    """The settings that are marked so in the schema."""
    return {key for key, field in schema(Config) if field.json_schema_extra == mark}


def default_settings() -> dict[str, Any]:
    """Flat ``a.b -> default`` of the settings that have one."""
    fields = dict(schema(Config))
    return {
        key: field.get_default(call_default_factory=True)
        for key, field in fields.items()
        if not field.is_required()
    }


def refuse_other_run(config: Config, saved: Config, *, of_stream: bool = False) -> None:
    """Refuse a config that differs from its run's in a setting that decides the result.

    Args:
        of_stream: only what the model is shown counts, and not how it is dealt to micro-steps.
    """
    passed_over = changeable_settings(MAY_CHANGE_WITHOUT_DROPOUT) if of_stream else set()
    before = flat_settings(saved)
    now = fixed_settings(config)
    changed = [
        f"{key} was {as_written(before[key])} and is {as_written(now[key])}"
        for key in now
        if before[key] != now[key] and key not in passed_over
    ]
    if changed:
        raise UserError(
            f"{config.run_dir} belongs to a run of another config: {'; '.join(changed)}. "
            "What decides the result is fixed for a run: give a new --run_dir=..., or the old "
            "values to continue that run"
        )


def as_begun(
    config: Config, begun: Config, overrides: Sequence[str]
) -> tuple[Config, dict[str, tuple[Any, Any]]]:
    """A config with the fixed settings that its run began with, but for those that are overridden.

    Returns:
        The config, and by key what was in it and what the run began with.
    """
    now = flat_settings(config)
    before = fixed_settings(begun)
    lengths = {"training.max_steps", "training.epochs"}  # a run has one of the two
    given = {override.removeprefix("--").split("=")[0] for override in overrides}
    if any(_is_within(length, given) for length in lengths):
        given |= lengths
    kept = {
        key: (now[key], value)
        for key, value in before.items()
        if now[key] != value and not _is_within(key, given)
    }
    tree = config.model_dump()
    for key, (_, value) in kept.items():
        *sections, last = key.split(".")
        branch = tree
        for section in sections:
            branch = branch[section]
        branch[last] = value
    return Config.model_validate(tree), kept


def _is_within(key: str, given: set[str]) -> bool:
    """Whether a setting or the section that it is in was given."""
    parts = key.split(".")
    return any(".".join(parts[:length]) in given for length in range(1, len(parts) + 1))


def as_written(value: Any) -> str:
    """A value as a user would write it: null and true, where Python says None and True."""
    return repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def describe() -> str:
    """All keys with type, default and meaning, as text for ``--help``."""
    lines = []
    for key, field in schema(Config):
        default = "required"
        if not field.is_required():
            value = field.get_default(call_default_factory=True)
            default = f"default {value if isinstance(value, str) else as_written(value)}"
        kind = type_in_words(field.annotation)
        lines.append(f"  --{key}=...\n      {field.description} ({kind}; {default})")
    return "\n".join(lines)


def type_in_words(annotation: Any) -> str:
    """A type as a user would write its values."""
    if get_origin(annotation) is Annotated:
        return type_in_words(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return " | ".join(get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(type_in_words(part) for part in get_args(annotation))
    if annotation is type(None):
        return "null"
    return getattr(annotation, "__name__", str(annotation))


def schema(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (``a.b``, pydantic field) of all settings below a section, in their order."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from schema(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


_TEXTS = {key for key, field in schema(Config) if field.annotation is str}


def _yaml() -> YAML:
    """YAML 1.2: a number may be written 5e-4, and a key given twice is an error."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.allow_unicode = True
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    return yaml


def _with_python_s_none(tree: dict[str, Any], section: str = "") -> dict[str, Any]:
    """Take None, which YAML holds to be a text, for null where no text is wanted."""
    for key, value in tree.items():
        if isinstance(value, dict):
            _with_python_s_none(value, f"{section}{key}.")
        elif value == "None" and f"{section}{key}" not in _TEXTS:
            tree[key] = None
    return tree


def _lay_over(tree: dict[str, Any], override: str) -> None:
    match = re.fullmatch(r"--([\w.-]+)=(.*)", override, re.DOTALL)
    if match is None:
        raise UserError(
            f"cannot read the argument {override!r}: settings are given as --section.key=value"
        )
    *sections, last = match[1].split(".")
    value: Any = match[2]
    if match[1] not in _TEXTS:  # a folder may be called 2026 or "a #1"
        with contextlib.suppress(YAMLError, ValueError):
            value = _yaml().load(value)
    for key in sections:
        inner = tree.setdefault(key, {})
        if not isinstance(inner, dict):
            raise UserError(f"{override}: {key} is a value, not a section")
        tree = inner
    tree[last] = value


def _lay_over_record(record: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The settings that a run recorded, with those that are given now in their places."""
    merged = dict(record)
    for section, values in given.items():
        recorded = record.get(section)
        if isinstance(recorded, dict) and isinstance(values, dict):
            if section == "training" and {"max_steps", "epochs"} & values.keys():
                # A run has one of the two.
                recorded = recorded | {"max_steps": None, "epochs": None}
            merged[section] = recorded | values
        else:
            merged[section] = values
    return merged


def _in_words(error: ValidationError, path: str | Path) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        now = RENAMED.get(".".join(part for part in where.split(".") if not part.isdigit()))
        if now is not None:
            return (
                f"{where} is called {now} now; python scripts/convert.py {path} renames it in a "
                "file or run directory of kantai 0.1"
            )
        return f"unknown key {where!r}; {_what_was_meant(where)}"
    if first["type"] == "missing":
        return f"{where} is missing; add it to the file or give --{where}=..."
    is_section = isinstance(first["input"], dict | BaseModel)
    given = "" if is_section else f", not {first['input']!r}"
    reason = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{where}: {reason}{given}" if where else f"{reason}{given}"


def _what_was_meant(unknown: str) -> str:
    settings = [key for key, _ in schema(Config)]
    meant = hint(unknown, settings)
    if meant is not None:
        return meant
    near = difflib.get_close_matches(unknown, [*settings, *Config.model_fields], n=1)
    # Without a likely one, a guess would mislead.
    return f"the nearest known one is {near[0]!r}" if near else "pretrain.py --help lists all"


def _with_absolute_paths(config: Config) -> Config:
    """A run directory must find its data again from any working directory."""
    paths = {key: getattr(config.data, key) for key in ("shards", "tokenizer", "cache_dir")}
    given = {key: _absolute(path) for key, path in paths.items() if path is not None}
    data = config.data.model_copy(update=given)
    return config.model_copy(update={"run_dir": _absolute(config.run_dir), "data": data})


def _absolute(path: str) -> str:
    if "://" in path:
        return path
    return str(Path(path).expanduser().absolute())
