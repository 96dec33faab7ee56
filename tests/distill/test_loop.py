"""`fit`: a run that is interrupted and resumed is the run that was not."""

import json
import signal

import pytest
import torch
from torch import nn

from distill.config import FitConfig
from distill.loop import Interrupted, Run, compiled, fit

CONFIG = FitConfig(
    steps=12,
    batch=4,
    learning_rate=1e-2,
    warmup_steps=3,
    betas=(0.9, 0.95),
    weight_decay=0.01,
    clip_norm=1.0,
    ema_decay=0.9,
    log_every=2,
    checkpoint_every=5,
    sample_every=6,
)


def train(folder, stop_after: int | None = None) -> dict[str, torch.Tensor]:
    """A small regression whose batches come from the step's own generator."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def loss(step, generator):
        x = torch.randn(CONFIG.batch, 3, generator=generator)
        if stop_after is not None and step + 1 == stop_after:
            signal.raise_signal(signal.SIGTERM)
        return (model(x) - x.sum(1, keepdim=True)).square().mean(), {"extra": float(step)}

    run = Run(folder, seed=3)
    with run.handling_signals():
        fit(run, "stage", model, loss, CONFIG, lambda _path: {"quality": 1.0})
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("stop_after", [1, 5, 7])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, stop_after):
    whole = train(tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(tmp_path / "broken", stop_after)
    resumed = train(tmp_path / "broken")
    assert whole.keys() == resumed.keys()
    for name in whole:
        assert torch.equal(whole[name], resumed[name])


def test_a_finished_stage_is_loaded_and_not_trained_again(tmp_path):
    first = train(tmp_path)
    events = (tmp_path / "events.jsonl").read_text()
    again = train(tmp_path, stop_after=1)  # would be interrupted if it trained
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert (tmp_path / "events.jsonl").read_text() == events


def test_events_carry_losses_rates_and_samples(tmp_path):
    train(tmp_path)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    losses = [e for e in events if "loss" in e]
    assert [e["step"] for e in losses] == [2, 4, 6, 8, 10, 12]
    assert losses[-1]["loss"] < losses[0]["loss"]
    assert losses[0]["extra"] == 0.5  # the mean over the steps since the line before
    assert [e["step"] for e in events if "quality" in e] == [6, 12]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    model = nn.Linear(1, 1)
    run = Run(tmp_path, seed=0)
    with run.handling_signals(), pytest.raises(FloatingPointError, match="not finite at step 0"):
        fit(run, "stage", model, lambda *_: (model.weight.sum() * float("nan"), {}), CONFIG, lambda _path: {})


def test_without_a_compiler_training_goes_on_uncompiled(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("distill.loop.shutil.which", lambda _name: None)
    monkeypatch.setattr("distill.loop.torch.cuda.is_available", lambda: False)
    run = Run(tmp_path, seed=0)
    with run.handling_signals():
        assert compiled(run, train) is train
    assert "no C++ compiler (g++) found: training goes on uncompiled" in capsys.readouterr().err
