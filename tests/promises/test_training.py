"""Whatever torch trains with goes on from a checkpoint as if nothing had happened."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler, swa_utils

import asyncsave

OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    **{
        each.__name__: each
        for each in vars(torch.optim).values()
        if isinstance(each, type)
        and issubclass(each, torch.optim.Optimizer)
        and each.__name__ not in ("Optimizer", "SparseAdam", "Muon", "SGD")
    },
    "SGD": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9, nesterov=True),
    "AdamW, amsgrad": lambda params: torch.optim.AdamW(params, amsgrad=True, foreach=True),
    "Adam, fused": lambda params: torch.optim.Adam(params, fused=True),
    "Adam, tensor lr": lambda params: torch.optim.Adam(params, lr=torch.tensor(0.01)),
    "RMSprop, all": lambda params: torch.optim.RMSprop(params, momentum=0.9, centered=True),
    "LBFGS, strong Wolfe": lambda params: torch.optim.LBFGS(
        params, max_iter=4, line_search_fn="strong_wolfe"
    ),
}

Optimizer = torch.optim.Optimizer


def _chained(optimizer: Optimizer) -> Any:
    parts = [lr_scheduler.ConstantLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return lr_scheduler.ChainedScheduler(parts, optimizer)


def _sequential(optimizer: Optimizer) -> Any:
    parts = [
        lr_scheduler.LinearLR(optimizer, total_iters=3),
        lr_scheduler.MultiStepLR(optimizer, [2, 2, 4]),
        lr_scheduler.CosineAnnealingLR(optimizer, 5),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[3, 7])


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "ChainedScheduler": _chained,
    "ConstantLR": lr_scheduler.ConstantLR,
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 7),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, 3, mode="exp_range", gamma=0.9),
    "CyclicLR, own scale": lambda o: lr_scheduler.CyclicLR(
        o, 0.001, 0.1, 3, scale_fn=_halving, scale_mode="iterations"
    ),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "LambdaLR, callable object": lambda o: lr_scheduler.LambdaLR(o, Decay(0.8)),
    "LinearLR": lr_scheduler.LinearLR,
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5, 5, 8]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.95),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=30),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8, 2.0),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=0.5),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.05, anneal_epochs=4),
    "SequentialLR": _sequential,
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
}


def _halving(step: int) -> float:
    return 1 / 2**step


class Decay:
    """A function with a state, which LambdaLR saves with its own."""

    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, step: int) -> float:
        return self.by**step


class Trainer:
    """A little training: a model, an optimizer, a scheduler, an average, a scaler."""

    def __init__(
        self,
        optimizer: Callable[[Any], Any] = torch.optim.AdamW,
        scheduler: Callable[[Optimizer], Any] = lr_scheduler.ConstantLR,
        average: Callable[[torch.nn.Module], Any] = swa_utils.AveragedModel,
    ) -> None:
        torch.manual_seed(0)
        norm = torch.nn.BatchNorm1d(5)
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 5), norm, torch.nn.Linear(5, 1))
        self.optimizer = optimizer(self.model.parameters())
        self.scheduler = scheduler(self.optimizer)
        self.average = average(self.model)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
        self.data = torch.Generator().manual_seed(7)

    @property
    def state(self) -> dict[str, Any]:
        names = ("model", "optimizer", "scheduler", "average", "scaler", "data")
        return {name: getattr(self, name) for name in names}

    def steps(self, count: int) -> list[float]:
        """Train, and return what shows the slightest difference."""
        seen = []
        for _ in range(count):
            x = torch.randn(8, 4, generator=self.data)

            def closure(x: torch.Tensor = x) -> torch.Tensor:
                self.optimizer.zero_grad()
                loss = self.model(x).square().mean()
                loss.backward()
                return loss

            if isinstance(self.optimizer, torch.optim.LBFGS):
                loss = self.optimizer.step(closure)
            else:
                self.optimizer.zero_grad()
                loss = self.model(x).square().mean()
                self.scaler.scale(loss).backward()
                self.scaler.step(self.optimizer)
                self.scaler.update()
            self.average.update_parameters(self.model)
            plateau = isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau)
            self.scheduler.step(*([float(loss.detach())] if plateau else []))
            seen += [
                float(loss.detach()),
                float(self.optimizer.param_groups[0]["lr"]),
                sum(float(p.detach().double().sum()) for p in self.average.parameters()),
                self.scaler.get_scale(),
            ]
        return seen


def goes_on_exactly(make: Callable[[], Any], path: Path, level: Any = "off") -> Any:
    """Save in mid-training, restore into fresh objects, and train both on."""
    one, other = make(), make()
    one.steps(4)
    asyncsave.save(one.state, path, compression=level).result()
    expected = one.steps(6)
    other.steps(2)  # it has a past of its own, which must not show
    asyncsave.restore(path, other.state)
    assert other.steps(6) == expected
    assert all(map(math.isfinite, expected))
    return other


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(tmp_path: Path, name: str) -> None:
    goes_on_exactly(lambda: Trainer(optimizer=OPTIMIZERS[name]), tmp_path / "a", 1)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon(tmp_path: Path) -> None:
    class Matrices(Trainer):
        def __init__(self) -> None:
            super().__init__()
            weights = [p for p in self.model.parameters() if p.dim() == 2]
            self.optimizer = torch.optim.Muon(weights, lr=0.01)
            self.scheduler = lr_scheduler.StepLR(self.optimizer, 2)

    goes_on_exactly(Matrices, tmp_path / "a")


def test_sparse_adam(tmp_path: Path) -> None:
    class Sparse(Trainer):
        def __init__(self) -> None:
            torch.manual_seed(0)
            self.model: Any = torch.nn.Embedding(20, 3, sparse=True)
            self.optimizer = torch.optim.SparseAdam(list(self.model.parameters()), lr=0.01)
            self.gradient = torch.eye(3).to_sparse()

        @property
        def state(self) -> dict[str, Any]:
            return {"model": self.model, "optimizer": self.optimizer, "gradient": self.gradient}

        def steps(self, count: int) -> list[float]:
            seen = []
            for i in range(count):
                self.optimizer.zero_grad()
                loss = self.model(torch.tensor([i, 3])).square().sum()
                loss.backward()
                self.optimizer.step()
                seen.append(float(loss.detach()))
            return seen

    goes_on_exactly(Sparse, tmp_path / "a")


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler(tmp_path: Path, name: str) -> None:
    def sgd(params: Any) -> Optimizer:
        return torch.optim.SGD(params, lr=0.02, momentum=0.9)

    goes_on_exactly(lambda: Trainer(sgd, SCHEDULERS[name]), tmp_path / "a")


def test_no_scheduler_of_this_torch_is_left_out() -> None:
    names = {
        name
        for name, each in vars(lr_scheduler).items()
        if isinstance(each, type) and issubclass(each, lr_scheduler.LRScheduler)
    } - {"LRScheduler", "_LRScheduler"}
    assert names <= SCHEDULERS.keys()


@pytest.mark.parametrize(
    "average",
    [
        lambda model: swa_utils.AveragedModel(model, use_buffers=True),
        lambda model: swa_utils.AveragedModel(model, avg_fn=swa_utils.get_swa_avg_fn()),
        lambda model: swa_utils.AveragedModel(
            model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9)
        ),
    ],
)
def test_averaged_models(tmp_path: Path, average: Any) -> None:
    goes_on_exactly(lambda: Trainer(average=average), tmp_path / "a")


def test_a_dict_of_all_that_a_script_keeps(tmp_path: Path) -> None:
    """The state dicts themselves, as scripts of `torch.save` have them, load as they are."""
    one = Trainer(scheduler=SCHEDULERS["MultiStepLR"])
    one.steps(3)
    state = {
        name: value.state_dict() if hasattr(value, "state_dict") else value
        for name, value in one.state.items()
    }
    asyncsave.save(state, tmp_path / "a").result()
    expected = one.steps(4)
    loaded = asyncsave.load(tmp_path / "a")
    other = Trainer(scheduler=SCHEDULERS["MultiStepLR"])
    for name, value in other.state.items():
        if name == "data":
            other.data = loaded[name]
        else:
            value.load_state_dict(loaded[name])
    assert other.steps(4) == expected
