"""Optimizers come back to the bit, or the restore says why not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import asyncsave
from tests.support import assert_same

THIRD = 1 / 3  # no two dtypes have the same


def parameter(dtype: torch.dtype = torch.float32) -> nn.Parameter:
    param = nn.Parameter(torch.zeros(2, dtype=dtype))
    param.grad = torch.ones(2, dtype=dtype)
    return param


class Careful(torch.optim.Optimizer):
    """Keeps its state in float32, whatever the parameters are in."""

    def __init__(self, param: nn.Parameter, fill: float) -> None:
        super().__init__([param], {"lr": 0.1})
        self.param = param
        self.state[param] = {
            "step": torch.tensor(3.0),
            "exp_avg": torch.full((2,), fill),
            "count": torch.tensor(2**30 + 1),
            "history": [torch.full((3,), fill), (torch.full((1,), fill), 1)],
            "inner": {"shift": torch.full((2,), fill, dtype=torch.float64)},
            "kind": "careful",
        }

    def kept(self) -> Any:
        return self.state_dict()["state"]


class Loading(Careful):
    """Loads in its own way."""

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)


class Refusing:
    def state_dict(self) -> dict[str, int]:
        return {"a": 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        raise ValueError("never")


def test_state_is_not_rounded_to_the_dtype_of_the_parameter(tmp_path: Path) -> None:
    theirs = Careful(parameter(torch.bfloat16), THIRD)
    asyncsave.save({"o": theirs}, tmp_path / "a").result()
    for cast in (False, True):
        fresh, stepped = (
            Careful(parameter(torch.bfloat16), 0),
            Careful(parameter(torch.bfloat16), 0),
        )
        fresh.state.clear()
        reports: list[asyncsave.RestoreReport] = []
        asyncsave.restore(tmp_path / "a", {"o": stepped}, cast=cast, report=reports.append)
        assert_same(stepped.kept(), theirs.kept())
        assert reports[0].cast == ()
        asyncsave.restore(tmp_path / "a", {"o": fresh}, cast=cast, report=reports.append)
        if cast:  # what the optimizer would have is not known, so this is what torch makes of it
            assert reports[1].cast == ("o.state.0.exp_avg",)
            assert fresh.state[fresh.param]["exp_avg"].dtype is torch.bfloat16
        else:
            assert_same(fresh.kept(), theirs.kept())


@pytest.mark.parametrize("name", ["NAdam", "ASGD"])
def test_scalars_that_torchs_optimizers_keep_in_float32(tmp_path: Path, name: str) -> None:
    def make() -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = getattr(torch.optim, name)([parameter(torch.bfloat16)])
        return made

    theirs = make()
    for _ in range(3):
        theirs.step()
    asyncsave.save({"o": theirs}, tmp_path / "a").result()
    mine = make()
    asyncsave.restore(tmp_path / "a", {"o": mine})
    assert_same(mine.state_dict()["state"], theirs.state_dict()["state"])
    mine.step()


@pytest.mark.parametrize("kind", [Careful, Loading])
def test_an_optimizer_is_put_back_to_the_bit(tmp_path: Path, kind: type[Careful]) -> None:
    asyncsave.save(
        {"o": kind(parameter(torch.bfloat16), 1), "z": Refusing()}, tmp_path / "a"
    ).result()
    mine, same = (kind(parameter(torch.bfloat16), THIRD) for _ in range(2))
    mine.param_groups[0]["lr"] = 7
    with pytest.raises(asyncsave.MismatchError, match="never"):
        asyncsave.restore(tmp_path / "a", {"o": mine, "z": Refusing()})
    tensors = {key: value for key, value in same.state[same.param].items() if key != "kind"}
    assert_same({key: mine.state[mine.param][key] for key in tensors}, tensors)
    assert mine.param_groups[0]["lr"] == 7
    assert mine.param_groups[0]["params"][0] is mine.param


def test_an_optimizer_with_hooks_is_put_back_by_them_too(tmp_path: Path) -> None:
    mine = Careful(parameter(torch.bfloat16), THIRD)
    asyncsave.save({"o": mine, "z": Refusing()}, tmp_path / "a").result()
    before = mine.kept()
    seen: list[Any] = []
    mine.register_load_state_dict_post_hook(lambda o: seen.append(o.state[mine.param]["exp_avg"]))
    with pytest.raises(asyncsave.MismatchError, match="never"):
        asyncsave.restore(tmp_path / "a", {"o": mine, "z": Refusing()})
    assert len(seen) == 2
    assert_same(mine.kept(), before)


@pytest.mark.parametrize("hooked", [False, True])
def test_what_another_way_to_load_converts_is_reported(tmp_path: Path, hooked: bool) -> None:
    theirs = Loading(parameter(torch.bfloat16), THIRD)
    asyncsave.save({"o": theirs}, tmp_path / "a").result()
    mine = (Careful if hooked else Loading)(parameter(torch.bfloat16), 0)
    if hooked:
        mine.register_load_state_dict_post_hook(lambda _: None)
    reports: list[asyncsave.RestoreReport] = []
    asyncsave.restore(tmp_path / "a", {"o": mine}, report=reports.append)
    assert mine.state[mine.param]["exp_avg"].dtype is torch.bfloat16
    assert "o.state.0.exp_avg" in reports[0].cast


@pytest.mark.parametrize("stepped", [False, True])
def test_moments_of_another_dtype_are_converted_only_when_asked_for(
    tmp_path: Path, stepped: bool
) -> None:
    theirs = torch.optim.AdamW([parameter()])
    theirs.step()
    asyncsave.save({"o": theirs}, tmp_path / "a").result()
    mine = torch.optim.AdamW([parameter(torch.bfloat16)])
    if stepped:
        mine.step()
    with pytest.raises(
        asyncsave.MismatchError,
        match=r"o\.state\.0\.exp_avg_sq: saved with dtype float32, the state has bfloat16 \(cast=",
    ):
        asyncsave.restore(tmp_path / "a", {"o": mine})
    reports: list[asyncsave.RestoreReport] = []
    asyncsave.restore(tmp_path / "a", {"o": mine}, cast=True, report=reports.append)
    assert reports[0].cast == ("o.state.0.exp_avg", "o.state.0.exp_avg_sq")
    moment = mine.state_dict()["state"][0]["exp_avg"]
    assert_same(moment, theirs.state_dict()["state"][0]["exp_avg"].bfloat16())
    mine.step()


def test_a_momentum_that_somebody_keeps_in_float32_stays_so(tmp_path: Path) -> None:
    def make(fill: float) -> torch.optim.Optimizer:
        param = parameter(torch.bfloat16)
        optimizer = torch.optim.SGD([param], momentum=0.9)
        optimizer.state[param]["momentum_buffer"] = torch.full((2,), fill)
        return optimizer

    theirs, mine = make(THIRD), make(0)
    asyncsave.save({"o": theirs}, tmp_path / "a").result()
    asyncsave.restore(tmp_path / "a", {"o": mine}, cast=True)
    assert_same(mine.state_dict()["state"], theirs.state_dict()["state"])


@pytest.mark.parametrize("name", ["Adam", "RMSprop"])
@pytest.mark.parametrize("momentum", [0, 0.9])
def test_an_optimizer_of_another_kind_is_refused(
    tmp_path: Path, name: str, momentum: float
) -> None:
    theirs = torch.optim.SGD([parameter()], momentum=momentum)
    theirs.step()
    asyncsave.save({"o": theirs}, tmp_path / "a").result()
    mine = getattr(torch.optim, name)([parameter()])
    mine.step()
    before = copy.deepcopy(mine.state_dict())
    with pytest.raises(
        asyncsave.MismatchError, match=r"o: .*would go without .*'eps'.*leave it out"
    ):
        asyncsave.restore(tmp_path / "a", {"o": mine})
    assert_same(mine.state_dict(), before)
    mine.step()


def test_options_that_an_older_torch_did_not_have_are_set_by_loading(tmp_path: Path) -> None:
    theirs = torch.optim.AdamW([parameter()])
    theirs.step()
    saved = theirs.state_dict()
    for option in ("foreach", "maximize", "capturable", "differentiable", "fused"):
        del saved["param_groups"][0][option]
    asyncsave.save({"o": saved}, tmp_path / "a").result()
    mine = torch.optim.AdamW([parameter()])
    torch.optim.lr_scheduler.OneCycleLR(mine, 0.1, total_steps=9)  # adds options of its own
    asyncsave.restore(tmp_path / "a", {"o": mine})
    mine.step()
