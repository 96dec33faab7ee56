"""`fit`: a run that is interrupted and resumed is the run that was not."""

import json
import signal

import pytest
import torch
from torch import nn

from distill.config import ConfigError, FitConfig
from distill.loop import Diverged, Interrupted, Rival, Run, compiled, fit

CONFIG = FitConfig(
    steps=12,
    batch=4,
    optimiser="adamw",
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


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8)])
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        return self.head(self.blocks[0](self.embed(x).tanh()).tanh())


def train(folder, stop_after: int | None = None, config: FitConfig = CONFIG) -> dict[str, torch.Tensor]:
    """A small regression whose batches come from the step's own generator."""
    torch.manual_seed(0)
    model = Net()

    def loss(step, generator):
        x = torch.randn(CONFIG.batch, 3, generator=generator)
        if stop_after is not None and step + 1 == stop_after:
            signal.raise_signal(signal.SIGTERM)
        return (model(x) - x.sum(1, keepdim=True)).square().mean(), {"extra": float(step)}

    run = Run(folder, seed=3)
    with run.handling_signals():
        fit(run, "stage", model, loss, config, lambda _path: {"quality": 1.0})
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
@pytest.mark.parametrize("stop_after", [1, 5, 7])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, stop_after, optimiser):
    config = CONFIG.model_copy(update={"optimiser": optimiser})
    whole = train(tmp_path / "whole", config=config)
    with pytest.raises(Interrupted):
        train(tmp_path / "broken", stop_after, config)
    resumed = train(tmp_path / "broken", config=config)
    assert whole.keys() == resumed.keys()
    for name in whole:
        assert torch.equal(whole[name], resumed[name])


def test_muon_moves_the_matrices_of_blocks_and_adamw_the_rest(tmp_path):
    """Each alone moves a weight by about the learning rate a step; only Muon's update of a matrix is orthogonal."""
    one = CONFIG.model_copy(update={"steps": 1, "warmup_steps": 0, "ema_decay": 0.0, "weight_decay": 0.0})
    adamw = train(tmp_path / "adamw", config=one)
    muon = train(tmp_path / "muon", config=one.model_copy(update={"optimiser": "muon"}))
    torch.manual_seed(0)
    before = Net().state_dict()
    different = {name for name in before if not torch.equal(adamw[name], muon[name])}
    assert different == {"blocks.0.weight"}
    values = torch.linalg.svdvals(muon["blocks.0.weight"] - before["blocks.0.weight"])
    assert values[3] > 0.3 * values[0]  # a batch of 4 makes a gradient of rank 4
    assert values[4] < 0.3 * values[0]
    assert not torch.equal(muon["head.weight"], before["head.weight"])


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
    assert all(e["steps_per_s"] > 0 and 10 < e["memory_mb"] < 1e6 for e in losses)
    checkpoints = [(e["step"], e["checkpoint"]) for e in events if "checkpoint" in e]
    assert checkpoints == [
        (step, "stage.checkpoint") for step in range(CONFIG.checkpoint_every, 13, CONFIG.checkpoint_every)
    ]
    assert [e["step"] for e in events if "quality" in e] == [6, 12]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    model = nn.Linear(1, 1)
    run = Run(tmp_path, seed=0)
    with run.handling_signals(), pytest.raises(FloatingPointError, match="not finite at step 0"):
        fit(run, "stage", model, lambda *_: (model.weight.sum() * float("nan"), {}), CONFIG, lambda _path: {})


def test_two_processes_cannot_be_at_work_in_one_folder(tmp_path):
    one, other = Run(tmp_path, seed=0), Run(tmp_path, seed=0)
    with one.handling_signals(), pytest.raises(ConfigError, match="another process is at work in"):
        with other.handling_signals():
            pytest.fail("it went on")
    again = Run(tmp_path, seed=0)
    with again.handling_signals():
        pass


def test_without_a_compiler_training_goes_on_uncompiled(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("distill.loop.shutil.which", lambda _name: None)
    monkeypatch.setattr("distill.loop.torch.cuda.is_available", lambda: False)
    run = Run(tmp_path, seed=0)
    with run.handling_signals():
        assert compiled(run, train) is train
    assert "no C++ compiler (g++) found: training goes on uncompiled" in capsys.readouterr().err


def fit_scalar(folder, alarms: dict[int, str], patience: int = 1) -> tuple[float, list[dict]]:
    """A weight that grows by about the learning rate a step, looked at every two steps."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    config = CONFIG.model_copy(update={"ema_decay": 0.0, "sample_every": 2, "weight_decay": 0.0})
    looks: list[int] = []

    def sample(_path):
        looks.append(len(looks))
        return {"look": float(len(looks))}

    run = Run(folder, seed=0)
    with run.handling_signals():
        fit(
            run, "stage", model, lambda *_: (-model.weight.sum(), {}), config, sample,
            alarm=lambda values: alarms.get(int(values["look"])), patience=patience,
        )  # fmt: skip
    return model.weight.item(), [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_alarms_in_a_row_end_the_stage_with_the_last_good_weights(tmp_path):
    whole, _ = fit_scalar(tmp_path / "whole", {})
    kept, events = fit_scalar(tmp_path / "ended", {3: "it flickers", 4: "it flickers"}, patience=2)
    assert [event["alarm"] for event in events if "alarm" in event] == ["it flickers"] * 2
    assert events[-1]["ended"] == "last good weights"
    assert events[-1]["step"] == 4  # that of the weights that are kept
    good, _ = fit_scalar(tmp_path / "at the second look", {3: "", 4: ""})
    assert 0 < kept < whole == good
    single, _ = fit_scalar(tmp_path / "single", {3: "it flickers"}, patience=2)
    assert single == whole  # one alarm among good looks ends nothing


def test_an_alarm_at_the_last_look_keeps_the_weights_of_the_one_before(tmp_path):
    whole, _ = fit_scalar(tmp_path / "whole", {})
    kept, events = fit_scalar(tmp_path / "last", {6: "it flickers"}, patience=3)
    assert 0 < kept < whole
    assert events[-1]["ended"] == "last good weights"


def test_without_good_weights_the_stage_fails(tmp_path):
    with pytest.raises(Diverged, match=r"stage: it flickers; lower the learning rate"):
        fit_scalar(tmp_path, {1: "it flickers"})
    assert not (tmp_path / "stage.safetensors").exists()


def test_rivals_are_updated_so_often_before_each_step_and_keep_out_of_each_other(tmp_path):
    one, other = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    order: list[tuple[str, int]] = []

    def step(number, _generator):
        order.append(("step", number))
        # Its gradient reaches the rival's weight too, and must not move it.
        return (one.weight * 1e-3 + other.weight).sum(), {}

    def critic(number, _generator):
        order.append(("critic", number))
        return other.weight.square().sum(), {"gap": 2.0}

    config = CONFIG.model_copy(update={"steps": 2, "ema_decay": 0.0, "weight_decay": 0.0, "learning_rate": 1e-4})
    frozen = config.model_copy(update={"learning_rate": 1e-30})
    before = other.weight.item()
    run = Run(tmp_path, seed=0)
    with run.handling_signals():
        fit(run, "s", one, step, config, lambda _: {}, rivals=[Rival("critic", other, critic, frozen, updates=3)])
    calls = [("critic", 0), ("critic", 1), ("critic", 2), ("step", 0), ("critic", 3), ("critic", 4), ("critic", 5)]
    assert order == [*calls, ("step", 1)]
    assert other.weight.item() == pytest.approx(before, abs=1e-12)
    last = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines() if '"loss"' in line][-1]
    assert last["critic_gap"] == 2.0
    assert last["critic_loss"] == pytest.approx(before**2, rel=1e-5)


def test_accumulated_batches_make_the_update_of_their_mean(tmp_path):
    def trained(folder, accumulate, batches):
        model = nn.Linear(1, 1, bias=False)
        nn.init.ones_(model.weight)
        config = CONFIG.model_copy(update={"steps": 2, "ema_decay": 0.0, "accumulate": accumulate})
        seen = []

        def loss(number, _generator):
            seen.append(number)
            return sum((model.weight.sum() - target) ** 2 for target in batches(number)) / len(batches(number)), {}

        run = Run(folder, seed=0)
        with run.handling_signals():
            fit(run, "s", model, loss, config, lambda _: {})
        return model.weight.item(), seen

    targets = [1.0, 2.0, 5.0, 7.0]
    split, numbers = trained(tmp_path / "split", 2, lambda n: [targets[n]])
    joint, _ = trained(tmp_path / "joint", 1, lambda n: targets[2 * n : 2 * n + 2])
    assert numbers == [0, 1, 2, 3]
    assert split == pytest.approx(joint, rel=1e-6)
