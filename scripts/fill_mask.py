"""Fill in the <mask> of texts with a model from a folder or the Hugging Face Hub.

python scripts/fill_mask.py model "Human thinking involves human <mask>."
"""

import argparse
from pathlib import Path

from kantai.errors import UserError, run_command


def main() -> None:
    model, texts, top_k = parse()
    from transformers import pipeline
    from transformers.pipelines.base import PipelineException
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        fill = pipeline("fill-mask", model=model, top_k=top_k)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{model} is no model that can be loaded: {reason}") from None
    for text in texts:
        try:
            guesses = fill(text, tokenizer_kwargs={"truncation": True})
        except PipelineException:
            limit = fill.tokenizer.model_max_length
            raise UserError(
                f"the <mask> of {text!r} lies beyond the {limit} tokens that {model} sees"
            ) from None
        print(text)
        for guess in guesses:
            print(f"    {guess['token_str'].strip():<20}{guess['score']:.3f}")


def parse() -> tuple[str, list[str], int]:
    """Model, texts and number of words a text."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder written by export.py, or a model of the Hub")
    parser.add_argument("texts", nargs="*", help="texts with one <mask> each")
    parser.add_argument("--prompts", type=Path, help="file with such texts, one a line")
    parser.add_argument("--top_k", type=int, default=5, help="words a text (default 5)")
    arguments = parser.parse_args()

    texts = arguments.texts
    if arguments.prompts:
        texts = texts + arguments.prompts.read_text(encoding="utf-8").splitlines()
    for text in texts:
        if text.count("<mask>") != 1:
            raise UserError(f"{text!r} must have exactly one <mask>")
    if not texts or arguments.top_k < 1:
        raise UserError("give at least one text with a <mask>, and a --top_k of at least 1")
    if arguments.model.startswith((".", "/")) and not Path(arguments.model).is_dir():
        raise UserError(f"no model at {arguments.model}: write one with scripts/export.py")
    return arguments.model, texts, arguments.top_k


if __name__ == "__main__":
    run_command(main)
