"""Write docs/configuration.md, the reference of all settings, from the schema.

python -m kantai.config.reference > docs/configuration.md
"""

import json
from collections.abc import Iterator
from typing import Any

from kantai.config.schema import Config

_HEAD = """\
# Configuration

*This page lists every setting of a run: its type, default, meaning, and whether it may change when
a run is resumed.* It is generated from `kantai/config/schema.py`:

```bash
python -m kantai.config.reference > docs/configuration.md
```

A run is one YAML file, such as [configs/quickstart.yaml](../configs/quickstart.yaml). Any key can
be overridden on the command line as `--section.key=value`:

```bash
python scripts/pretrain.py --config configs/roberta-base.yaml --run_dir=runs/mine --check
```

`--check` reads config, data and run directory, says how many steps are done, and starts nothing.
An unknown key, a wrong type and a value out of range end the program with one line that names the
key.

| file | what it trains |
|---|---|
| `configs/quickstart.yaml` | a small model that learns from a megabyte, in minutes on two cores |
| `configs/kantai-fast.yaml` | what does best on the tutorial's data, in minutes on two cores |
| `configs/tutorial.yaml` | the well-known tutorial's 83,504,416 parameters and recipe, exactly |
| `configs/roberta-base.yaml` | the paper's recipe for the base model (Liu et al. 2019, table 9) |
| `configs/roberta-large.yaml` | the same for the large model |

**On resume**, a setting marked *yes* may differ from the run's last start: it changes speed, place
or reporting, and not the result. (`spike_factor` is one, so that a run whose steps are wrongly
skipped can go on.) Any other difference is refused, with the key and both values: a run has one
learning rate, one precision and one seed from its first step to its last, and a change of them is a
new run. What a config leaves out is taken from the settings that the run recorded in
`RUN/config.yaml`.

If the file that a run began with is edited later, the run goes on with the settings it began with,
and its first lines say what the file says differently. Settings marked *yes* are taken up. If the
file cannot be read any more, `RUN/config.yaml` counts in its place. A value
given on the command line is never passed over: one that would change the result is refused.

"""
_TYPES = {
    "integer": "int",
    "number": "float",
    "boolean": "bool",
    "string": "text",
    "null": "`null`",
}
_LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def reference() -> str:
    """Return docs/configuration.md."""
    schema = Config.model_json_schema()
    definitions = schema["$defs"]
    single = {}
    sections = []
    for name, field in schema["properties"].items():
        if "$ref" in field:
            sections.append(_section(name, definitions[_target(field)]))
            continue
        single[name] = field
        if "$ref" in field.get("items", {}):
            item = definitions[_target(field["items"])]
            sections.append(_section(name, item, f"Each entry of the list `{name}`:\n"))
    top = _section("Top level", {**schema, "properties": single})
    return _HEAD + "\n".join([top, *sections])


def _target(reference: dict[str, str]) -> str:
    return reference["$ref"].rpartition("/")[2]


def _section(title: str, section: dict[str, Any], note: str = "") -> str:
    required = section.get("required", [])
    lines = [
        f"## {title}",
        "",
        note + section["description"].replace("``", "`"),
        "",
        "| key | type | default | on resume | meaning |",
        "|---|---|---|---|---|",
    ]
    for key, field in section["properties"].items():
        default = "required" if key in required else _code(field.get("default"))
        may_change = field.get("may_change", False)
        resume = {True: "yes", False: "no"}.get(may_change, may_change)
        cells = [f"`{key}`", " or ".join(_kinds(field)), default, resume, field["description"]]
        lines.append(f"| {' | '.join(_escaped(cell) for cell in cells)} |")
    return "\n".join([*lines, ""])


def _kinds(field: dict[str, Any]) -> Iterator[str]:
    """Yield the types of a field as a user would write its values."""
    if "anyOf" in field:
        for option in field["anyOf"]:
            yield from _kinds(option)
    elif "enum" in field:
        yield ", ".join(f"`{value}`" for value in field["enum"])
    elif field.get("type") == "array":
        yield "list"
    else:
        limits = (f" {sign} {_number(field[key])}" for key, sign in _LIMITS.items() if key in field)
        yield _TYPES[field["type"]] + ",".join(limits)


def _number(value: float) -> str:
    return "2^63" if value == 2**63 else f"{value:g}"


def _escaped(cell: str) -> str:
    """Return text as Markdown shows it unchanged in a table."""
    return cell.replace("|", "\\|").replace("<", "&lt;")


def _code(value: Any) -> str:
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


if __name__ == "__main__":
    print(reference(), end="")
