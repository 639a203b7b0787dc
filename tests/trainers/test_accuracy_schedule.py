"""trainers/benchmark_schedule.py: the same length, seed and optimiser for any trainer."""

from __future__ import annotations

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_dsp.trainers.benchmark_schedule import BenchmarkSchedule, read_schedule
from nnunet_dsp.trainers.nnUNetTrainer_benchmark import nnUNetTrainer_benchmark
from nnunet_dsp.trainers.nnUNetTrainerDSP_benchmark import nnUNetTrainerDSP_benchmark

KEY = "nnunet_dsp_benchmark"
SCHEDULE = {"num_epochs": 7, "iterations_per_epoch": 3, "val_iterations": 2, "seed": 5}
BOTH = pytest.mark.parametrize("trainer_class", [nnUNetTrainer_benchmark, nnUNetTrainerDSP_benchmark])


def initialized(tiny, trainer_class, **schedule):
    trainer = tiny.trainer(trainer_class, "all", None, **{KEY: {**SCHEDULE, **schedule}})
    trainer.initialize()
    return trainer


@BOTH
def test_a_trainer_trains_as_long_as_the_plans_say(tiny, trainer_class):
    trainer = initialized(tiny, trainer_class)
    lengths = (trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch)
    assert lengths == (7, 3, 2)
    assert trainer.lr_scheduler.max_steps == 7
    assert trainer.save_every == 1, "short trainings save often enough to be taken up"


@BOTH
def test_the_initialisation_depends_on_the_seed_alone(tiny, trainer_class):
    def weights(seed):
        torch.manual_seed(99 + seed)
        return torch.cat([p.detach().ravel() for p in initialized(tiny, trainer_class, seed=seed).network.parameters()])

    first = weights(5)
    torch.rand(3)
    assert torch.equal(weights(5), first)
    assert not torch.equal(weights(6), first)


def test_the_optimiser_is_the_trainers_own_unless_the_plans_name_one(tiny):
    own = initialized(tiny, nnUNetTrainer_benchmark).optimizer
    assert type(own) is torch.optim.SGD
    assert own.param_groups[0]["lr"] == pytest.approx(0.01)
    assert own.param_groups[0]["momentum"] == 0.99
    other = initialized(tiny, nnUNetTrainer_benchmark, optimizer="adamw", initial_lr=0.003).optimizer
    assert type(other) is torch.optim.AdamW
    assert other.param_groups[0]["lr"] == pytest.approx(0.003)
    slower = initialized(tiny, nnUNetTrainer_benchmark, initial_lr=0.002).optimizer
    assert type(slower) is torch.optim.SGD and slower.param_groups[0]["lr"] == pytest.approx(0.002)


@pytest.mark.parametrize(("precision", "dtype"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_a_step_on_a_cpu_computes_in_the_precision_of_the_plans(tiny, monkeypatch, precision, dtype):
    trainer = initialized(tiny, nnUNetTrainer_benchmark, precision=precision)
    monkeypatch.setattr(nnUNetTrainer, "train_step", lambda self, batch: torch.mm(batch, batch).dtype)
    assert trainer.train_step(torch.ones(2, 2)) is dtype


def test_the_threads_are_bounded_where_the_environment_says_so(tiny, monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setenv("nnUNet_dsp_threads", "3")
    try:
        initialized(tiny, nnUNetTrainer_benchmark)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_nothing_is_predicted_at_the_end_of_the_training(tiny, monkeypatch):
    trainer = initialized(tiny, nnUNetTrainer_benchmark)
    monkeypatch.setattr(nnUNetTrainer, "perform_actual_validation", lambda *_: pytest.fail("predicted"))
    trainer.perform_actual_validation()


def test_a_schedule_fits_any_trainer(tiny):
    class Other(nnUNetTrainer):
        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.network.parameters(), self.initial_lr)
            return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)

    class Other_benchmark(BenchmarkSchedule, Other):
        pass

    assert type(initialized(tiny, Other_benchmark).optimizer) is torch.optim.Adam


@pytest.mark.parametrize(
    ("plans", "message"),
    [
        ({}, "carry no"),
        ({KEY: {**SCHEDULE, "epochs": 3}}, "Unknown entry `epochs`"),
        ({KEY: {**SCHEDULE, "num_epochs": 0}}, "`num_epochs` .* to be a whole number >= 1, got 0"),
        ({KEY: {**SCHEDULE, "seed": True}}, "`seed`"),
        ({KEY: {k: v for k, v in SCHEDULE.items() if k != "val_iterations"}}, "`val_iterations` .* got None"),
        ({KEY: {**SCHEDULE, "optimizer": "adam"}}, "`optimizer` .* one of sgd, adamw"),
        ({KEY: {**SCHEDULE, "initial_lr": 0}}, "`initial_lr`"),
        ({KEY: {**SCHEDULE, "precision": "half"}}, "`precision` .* one of float32, bfloat16"),
    ],
)
def test_a_schedule_that_cannot_be_meant_is_refused(plans, message):
    with pytest.raises(ValueError, match=message):
        read_schedule(plans)
