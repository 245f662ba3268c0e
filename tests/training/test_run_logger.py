"""What a run logs is shown as text, whatever the corpus holds."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kantai.checkpoint.store import CheckpointStore
from kantai.evaluation.held_out import Score
from kantai.training.run_logger import RunLogger
from kantai.training.throughput import Throughput


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TensorBoard's own HTML library
def test_tensorboard_shows_filled_prompts_as_text(tmp_path: Path) -> None:
    from tensorboard.plugin_util import markdown_to_safe_html

    store = CheckpointStore(tmp_path)
    store.supersede()
    throughput = Throughput(1.0)
    logger = RunLogger(tmp_path, store, throughput, done=0, max_steps=1, is_main=False)
    logger.open(0)
    fills = [
        ("![x](http://evil/x.png) <img src='http://evil/y.png'> <mask>", [("<b>", 0.5)]),
        ("\n\n# head\n[a](http://evil/z) \x1b[2J <mask>", [("`code`", 0.5)]),
    ]
    score = Score(1.0, 0.5, 2)
    logger.log_evaluation(1, score, fills, unigram_entropy=2.0, peak_memory_gib=0.0)
    logger.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (event,) = events.Tensors("fill_mask/text_summary")
    html = markdown_to_safe_html(event.tensor_proto.string_val[0])
    assert "<img" not in html and "<a" not in html and "<h1" not in html and "\x1b" not in html
    assert "![x](http://evil/x.png)" in html
    assert "&lt;mask&gt;: &lt;b&gt;" in html
    assert html.count("&lt;mask&gt;") == 2
