"""What `distill evaluate` draws once and measures every setting against, and its intervals."""

import numpy as np
import pytest
import torch

from distill import evaluate, metrics, recipes
from distill.config import ConfigError
from distill.data import shapes

CONFIG = recipes.evaluate_shapes().model_copy(
    update={"split": "dev", "clips": 80, "seeds": 1, "diversity_pairs": 3, "diversity_samples": 4}
)


@pytest.fixture(scope="module")
def yardstick() -> evaluate.Yardstick:
    return evaluate.Yardstick(CONFIG, pipe=None)


def test_half_of_the_captions_are_closed_and_no_index_is_used_twice(yardstick):
    assert yardstick.closed.tolist() == [True] * 40 + [False] * 40
    seed, indices = yardstick.clips.source
    assert seed == 0
    assert len(set(indices)) == 80
    assert set(indices) <= set(shapes.SPLITS["dev"])


def test_fvd_shapes_of_drawn_clips_is_that_of_two_drawn_sets(yardstick):
    other = shapes.render(metrics.truth_futures(yardstick.clips, 3)[-1])
    distance, floor = yardstick.fvd_shapes([other])
    assert distance < 2 * floor
    frozen, _ = yardstick.fvd_shapes([other[:, :, :1].expand_as(other)])
    assert frozen > 5 * floor


def test_choices_are_drawn_for_every_pair(yardstick):
    assert not any(caption.closed for caption in yardstick.pairs.captions)
    assert [len(samples) for samples in yardstick.drawn_choices] == [4] * 3
    assert metrics.diversity(yardstick.drawn_choices, yardstick.drawn_choices).nan_to_num(1).eq(1).all()


def test_too_few_clips_in_the_split_are_one_clear_error():
    with pytest.raises(ConfigError, match=r"dev split does not hold 9000 closed and as many open captions; ask for"):
        evaluate.draw_clips("dev", 18_000)


def test_the_interval_holds_the_mean_and_narrows_with_more_clips():
    values = torch.randn(3, 400, generator=torch.Generator().manual_seed(0)).numpy()
    mean, low, high = evaluate.interval(values)
    assert low < mean < high
    assert mean == pytest.approx(values.mean())
    _, low_few, high_few = evaluate.interval(values[:, :40])
    assert high - low < (high_few - low_few) / 2
    # What applies to no clip has no interval; what applies to some is over those.
    assert np.isnan(evaluate.interval(np.full((3, 4), np.nan))).all()
    some = np.where(np.arange(400) % 2, np.nan, values)
    assert evaluate.interval(some)[0] == pytest.approx(np.nanmean(some))
