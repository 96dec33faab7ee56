"""Noise levels: what a stock scheduler visits when it is made to begin late or to end early."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from distill.backbones import wan
from distill.config import StudentConfig
from distill.schedule import few_step_scheduler, started_at

SCHEDULERS = {
    "student": few_step_scheduler(wan, StudentConfig(num_inference_steps=4, shift=2.5, shift_terminal=0.625)),
    "euler": FlowMatchEulerDiscreteScheduler(shift=5),
    "unipc": UniPCMultistepScheduler(  # without memory of the steps before
        use_flow_sigmas=True,
        flow_shift=5,
        prediction_type="flow_prediction",
        solver_order=1,
        disable_corrector=list(range(4)),
    ),
}
EVERY = pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)


@EVERY
@pytest.mark.parametrize("first", range(4))
def test_a_late_start_visits_the_same_numbers_as_the_whole_from_there_on(scheduler, first):
    scheduler.set_timesteps(4)
    before = scheduler.sigmas.clone()
    late = started_at(scheduler, first)
    late.set_timesteps(4)
    assert torch.equal(late.sigmas, before[first:])
    assert torch.equal(late.timesteps, scheduler.timesteps[first:])
    assert torch.equal(scheduler.sigmas, before)  # it is another one's to go on with


@EVERY
def test_the_late_steps_are_those_of_the_whole(scheduler):
    def walk(one, x: torch.Tensor, first: int = 0) -> list[torch.Tensor]:
        one.set_timesteps(4)
        seen = [x]
        for number, timestep in enumerate(one.timesteps, first):
            seen.append(one.step(0.3 * seen[-1] + number, timestep, seen[-1], return_dict=False)[0])
        return seen

    whole = walk(started_at(scheduler, 0), torch.ones(1, 2, 1, 2, 2))
    late = walk(started_at(scheduler, 2), whole[2], 2)
    for one, other in zip(late, whole[2:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_an_early_end_leaves_no_noise():
    early = started_at(SCHEDULERS["student"], 0, 1)
    early.set_timesteps(4)
    assert early.sigmas.tolist() == [1.0, 0.0]
    x, noise = torch.full((1, 1, 1, 2, 2), 3.0), torch.full((1, 1, 1, 2, 2), 5.0)
    assert torch.equal(early.step(noise - x, early.timesteps[0], noise, return_dict=False)[0], x)


def test_levels_that_a_pipeline_gives_itself_are_cut_too():
    late = started_at(SCHEDULERS["euler"], 2)
    late.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    assert late.sigmas.tolist() == pytest.approx([5 / 6, 0.625, 0], abs=1e-6)
