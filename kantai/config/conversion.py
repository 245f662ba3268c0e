"""Settings of earlier releases: what they are called now."""

import re

# Settings of 0.1, where a step was called an update.
RENAMED = {
    "training.total_updates": "training.max_steps",
    "checkpoint.every_updates": "checkpoint.every_steps",
    "evaluation.every_updates": "evaluation.every_steps",
    "optimizer.warmup_updates": "optimizer.warmup_steps",
    "optimizer.decay_updates": "optimizer.decay_steps",
    "stages.until_update": "stages.until_step",
}
_REMOVED = "mtbf_hours"


def convert_text(text: str) -> str:
    """A YAML config of 0.1 with the settings' names of today. Comments and layout stay.

    The names are unique, whichever section they are in.
    """
    for old, new in RENAMED.items():
        text = re.sub(rf"\b{old.split('.')[1]}(?=['\"]?\s*:)", new.split(".")[1], text)
    text = re.sub(rf"(?m)^\s*{_REMOVED}\s*:.*\n", "", text)
    return re.sub(rf"(?<=\{{)\s*{_REMOVED}\s*:[^,}}]*,?|,\s*{_REMOVED}\s*:[^,}}]*", "", text)
