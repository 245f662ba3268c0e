"""Configs from YAML files and ``--a.b=c`` overrides, with messages in the user's words."""

import contextlib
import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from kantai.config.schema import MAY_CHANGE, Config
from kantai.errors import UserError


class _Loader(yaml.SafeLoader):
    """YAML, but a number may be written 5e-4, as every paper does, and a key may not be given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse what SafeLoader skips: that a second section of one name replaces the first."""
        keys = [key.value for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.YAMLError(f"{twice[0]} is given twice")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that :class:`_Loader` would read as numbers."""


_FLOAT = re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, lay ``--a.b=c`` overrides over it, and check the whole.

    Raises:
        UserError: no such file, not YAML, an unknown key (the nearest known one is named), a wrong type or range.
    """
    path = Path(path)
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}; configs/ has some to start from") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UserError(f"the config {path} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"the config {path} has no keys; configs/quickstart.yaml is one to start from")
    tree = {key: value for key, value in tree.items() if value is not None}  # a section with nothing in it
    for override in overrides:
        _lay_over(tree, override)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"config {path}: {_in_words(error)}") from None
    return _with_absolute_paths(config)


def save_config(config: Config, path: Path) -> None:
    """Write a config so that :func:`load_config` gives it back."""
    path.write_text(yaml.dump(config.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True), encoding="utf-8")


def fixed_settings(config: Config) -> dict[str, Any]:
    """Flat ``a.b -> value`` of the settings that may not change between a run's starts."""
    return {key: value for key, value, field in _leaves(config) if field.json_schema_extra != MAY_CHANGE}


def refuse_other_run(config: Config, saved: Config) -> None:
    """Compare a config with the one a run directory was started with.

    Raises:
        UserError: a setting that decides the run's result differs.
    """
    before, now = fixed_settings(saved), fixed_settings(config)
    changed = [f"{key} was {before[key]!r} and is {now[key]!r}" for key in now if before[key] != now[key]]
    if changed:
        raise UserError(
            f"{config.run_dir} belongs to a run of another config: {'; '.join(changed)}. "
            "Give a new --run_dir=..., or the old values to continue that run"
        )


def describe() -> str:
    """All keys with type, default and meaning, as text for ``--help``."""
    lines = []
    for key, field in _schema(Config):
        default = "required" if field.is_required() else f"default {field.default}"
        lines.append(f"  --{key}=...\n      {field.description} ({_kind(field.annotation)}; {default})")
    return "\n".join(lines)


def _kind(annotation: Any) -> str:
    """A type as a user would write its values."""
    if get_origin(annotation) is Annotated:
        return _kind(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return " | ".join(get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(_kind(part) for part in get_args(annotation))
    return "None" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))


def _lay_over(tree: dict[str, Any], override: str) -> None:
    match = re.fullmatch(r"--([\w.]+)=(.*)", override, re.DOTALL)
    if match is None:
        raise UserError(f"cannot read the argument {override!r}: settings are given as --section.key=value")
    keys = match[1].split(".")
    value: Any = match[2]
    if match[1] not in _TEXTS:  # a folder may be called 2026 or "a #1"
        with contextlib.suppress(yaml.YAMLError, ValueError):
            value = yaml.load(value, _Loader)
    for key in keys[:-1]:
        inner = tree.setdefault(key, {})
        if not isinstance(inner, dict):
            raise UserError(f"{override}: {key} is a value, not a section")
        tree = inner
    tree[keys[-1]] = value


def _in_words(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = [key for key, _ in _schema(Config)] + list(Config.model_fields)
        near = difflib.get_close_matches(where, known, n=1, cutoff=0) if where else []
        return f"unknown key {where!r}; the nearest known one is {near[0]!r}" if near else f"unknown key {where!r}"
    if first["type"] == "missing":
        return f"{where} is missing; add it to the file or give --{where}=..."
    given = "" if isinstance(first["input"], dict | BaseModel) else f", not {first['input']!r}"
    reason = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{where or 'it'}: {reason}{given}" if where else f"{reason}{given}"


def _with_absolute_paths(config: Config) -> Config:
    """A run directory must find its data again from any working directory."""
    given = {key: value for key in ("shards", "tokenizer", "cache_dir") if (value := getattr(config.data, key)) is not None}
    data = config.data.model_copy(update={key: _absolute(value) for key, value in given.items()})
    return config.model_copy(update={"run_dir": _absolute(config.run_dir), "data": data})


def _absolute(path: str) -> str:
    if "://" in path:
        return path
    return str(Path(path).expanduser().absolute())


def _schema(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _schema(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


_TEXTS = {key for key, field in _schema(Config) if field.annotation is str}


def _leaves(config: Config) -> Iterator[tuple[str, Any, Any]]:
    values = config.model_dump()
    for key, field in _schema(Config):
        value: Any = values
        for part in key.split("."):
            value = value[part]
        yield key, value, field
