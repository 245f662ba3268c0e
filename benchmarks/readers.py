"""Load an exported model with other releases of transformers, and compare tokens and logits.

python benchmarks/readers.py model --versions 4.30.2 4.44.2 4.57.6

Each release gets a virtual environment below --work, with this environment's torch. That takes a
package index, and some minutes the first time. Exits with 1 if a release differs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import torch

VERSIONS = (
    *("4.30.2", "4.33.3", "4.37.2", "4.41.2", "4.43.4", "4.44.2", "4.45.2", "4.46.3", "4.48.3"),
    *("4.50.3", "4.57.6", "5.0.0", "5.24.0"),
)
# torch, and what it needs and transformers does not bring.
SHARED = ("torch", "torchgen", "functorch", "sympy", "mpmath", "networkx", "jinja2", "markupsafe")
MAX_DIFFERENCE = 1e-4  # of a logit
PROBE = """
import json, sys, torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

folder = sys.argv[1]
texts = [
    "The value of the <mask> is an object.", "  Two  spaces\\n\\tand a tab.", "<mask> first",
    "don't  Stop: 1234567 \\u00fcber \\u6f22\\u5b57 \\U0001f600 e\\u0301 \\u0915\\u093f",
    "", "a</s>b",
]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForMaskedLM.from_pretrained(folder).eval()
limit = tokenizer.model_max_length
encoded = [tokenizer(text, truncation=True, max_length=limit)["input_ids"] for text in texts]
with torch.no_grad():
    logits = [model(torch.tensor([ids])).logits[0].double().tolist() for ids in encoded if ids]
fill = pipeline("fill-mask", model=folder, tokenizer=folder)
filled = [found["token"] for found in fill(texts[0])]
decoded = [tokenizer.decode(ids) for ids in encoded]
print("probe:" + json.dumps([encoded, filled, decoded, limit, logits]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder that export.py wrote")
    parser.add_argument("--versions", nargs="+", default=VERSIONS, help="releases of transformers")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / "kantai-readers",
        help="folder of the virtual environments, which are kept",
    )
    arguments = parser.parse_args()

    expected = probe(Path(sys.executable), arguments.model)
    if isinstance(expected, str):
        sys.exit(expected)
    print("| transformers | tokens | logits differ by |\n|---|---|---|")
    differ = False
    for version in arguments.versions:
        found = probe(environment(arguments.work, version), arguments.model)
        verdict = compared(expected, found)
        differ = differ or verdict is None
        tokens, difference = verdict or ("fails", str(found))
        print(f"| {version} | {tokens} | {difference} |", flush=True)
    sys.exit(int(differ))


def environment(work: Path, version: str) -> Path:
    """The Python of a virtual environment with a release of transformers."""
    folder = work / version
    python = folder / "bin" / "python"
    if (folder / "done").exists():
        return python
    venv.create(folder, with_pip=True, clear=True)
    packages = Path(torch.__file__).parents[1]
    shared = folder / "shared"
    shared.mkdir()
    names = {*SHARED, *(path.name for path in packages.glob("torch-*.dist-info"))}
    for name in names:
        (shared / name).symlink_to(packages / name)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "shared.pth").write_text(f"{shared}\n", encoding="utf-8")
    # Releases of the time of numpy 1 do not say that they need it.
    numpy = "numpy<2" if tuple(map(int, version.split(".")[:2])) < (4, 45) else "numpy"
    install = [python, "-m", "pip", "install", "--quiet", f"transformers=={version}", numpy]
    subprocess.run(install, check=True, stderr=subprocess.DEVNULL)
    (folder / "done").touch()
    return python


def probe(python: Path, model: Path) -> Any:
    """What a release makes of some texts; the last line of its errors if it fails."""
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [python, "-W", "ignore", "-c", PROBE, model.absolute()],
        capture_output=True,
        text=True,
        env=variables,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("probe:")]
    if done.returncode != 0 or not lines:
        return (done.stderr.strip().splitlines() or ["no output"])[-1]
    return json.loads(lines[-1].removeprefix("probe:"))


def compared(expected: Any, found: Any) -> tuple[str, str] | None:
    """The cells of a release that agrees; None for another."""
    if isinstance(found, str) or found[:-1] != expected[:-1]:
        return None
    pairs = zip(expected[-1], found[-1], strict=True)
    difference = max(float((torch.tensor(a) - torch.tensor(b)).abs().max()) for a, b in pairs)
    return ("equal", f"{difference:.1g}") if difference <= MAX_DIFFERENCE else None


if __name__ == "__main__":
    main()
