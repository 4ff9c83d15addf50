"""Training images per second, coming and going: ``pytest benchmarks/test_loading.py --benchmark-only``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from loading import BATCH, IMAGES, LOADING, MODELS, epoch_samples, training_step, write_images
from timing import interleaved


def test_loading(benchmark: Any, recorder: Any, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    recorder.refuse_if_late(LOADING)
    samples = epoch_samples(write_images(tmp_path))
    summaries = interleaved(samples, min_rounds=request.config.getoption("rounds"))
    recorder.loading.append(
        {
            "name": LOADING,
            "direction": f"an epoch of {IMAGES}",
            "images": IMAGES,
            "variants": {name: summary.as_dict() for name, summary in summaries.items()},
        }
    )
    benchmark.group = LOADING
    benchmark.pedantic(samples["in memory, 0 workers"], rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("model", MODELS)
def test_training_step(benchmark: Any, model: str, recorder: Any, request: pytest.FixtureRequest) -> None:
    name = f"{model}, training step, B={BATCH}"
    recorder.refuse_if_late(name)
    if recorder.device != "cpu":
        pytest.skip("the network is measured on the CPU")
    step = training_step(model)
    summary = interleaved({"ours": step}, min_rounds=request.config.getoption("rounds"))["ours"]
    recorder.loading.append(
        {"name": name, "direction": "training step", "images": BATCH, "variants": {"training step": summary.as_dict()}}
    )
    benchmark.group = name
    benchmark.pedantic(step, rounds=3, warmup_rounds=1)
