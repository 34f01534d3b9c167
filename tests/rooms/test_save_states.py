"""A save's states: the table's arrows go, nothing else does, and times are set where it says."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncsave.pipeline.handle import SaveHandle
from asyncsave.pipeline.save import NEXT, Save, Snapshot, State
from asyncsave.pipeline.target import Target
from asyncsave.pipeline.watchdog import Watchdog
from asyncsave.snapshot.arena import Arena
from asyncsave.state.chunks import Plan
from asyncsave.state.flatten import flatten
from asyncsave.state.layout import Layouts
from asyncsave.storage.place import Place

ENDS: dict[type[Snapshot] | type[State], set[Any]] = {
    Snapshot: {Snapshot.STAGED, Snapshot.BROKEN},
    State: {State.DONE, State.FAILED, State.UNKNOWN},
}
PAIRS = [(one, other) for kind in ENDS for one in kind for other in kind]
ARROWS = [(one, other) for one, other in PAIRS if other in NEXT[one]]
NO_ARROWS = [(one, other) for one, other in PAIRS if other not in NEXT[one]]
FAILING = (State.UNDOING, State.FAILED)


def make() -> Save:
    """Return a save that has just been begun, and that no thread knows of."""
    flat = flatten({"w": torch.ones(3)})
    path = Path("/nowhere/at/all")
    return Save(
        Target(Place(path)),
        flat,
        Plan.cut(Layouts().of(flat), 1 << 16),
        SaveHandle(None, path),
        Watchdog(path, None),
        time.perf_counter(),
    )


def path_to(state: Snapshot | State) -> list[Snapshot | State]:
    """Return the shortest way through the table to a state, without where it begins."""
    paths: dict[Any, list[Any]] = {Snapshot.STAGING: [], State.CREATING: []}
    for _ in NEXT:
        for at, path in list(paths.items()):
            for then in NEXT[at]:
                paths.setdefault(then, [*path, then])
    return paths[state]


def at(state: Snapshot | State) -> Save:
    """Return a save in this state; of its two machines, the other one is as far as it must be."""
    save = make()
    if isinstance(state, State) and State.SEALING in path_to(state):
        save.to(Snapshot.STAGED)
    for each in path_to(state):
        save.to(each)
    return save


def seen(save: Save) -> tuple[Any, ...]:
    """Return all that an arrow may change."""
    times = save.blocked_seconds, save.staged_seconds, save.durable_seconds
    return save.snapshot, save.state, times, save.handle.wait_staged(0), save.has_failed()


def name(value: object) -> str:
    return str(value)


@pytest.mark.parametrize(("one", "other"), ARROWS, ids=name)
def test_every_arrow_goes_and_moves_one_machine(one: Any, other: Any) -> None:
    save = at(one)
    if other is State.SEALING:
        save.to(Snapshot.STAGED)
    snapshot, state = save.snapshot, save.state
    save.to(other)
    assert (save.snapshot, save.state) == (
        (other, state) if isinstance(other, Snapshot) else (snapshot, other)
    )


@pytest.mark.parametrize(("one", "other"), NO_ARROWS, ids=name)
def test_where_there_is_no_arrow_nothing_changes(one: Any, other: Any) -> None:
    save = at(one)
    before = seen(save)
    with pytest.raises(RuntimeError, match=f"{one}.*not to {other}"):
        save.to(other)
    assert seen(save) == before


@pytest.mark.parametrize("snapshot", Snapshot, ids=name)
def test_only_what_is_staged_is_sealed(snapshot: Snapshot) -> None:
    save = at(snapshot)
    save.to(State.WRITING)
    before = seen(save)
    if snapshot is Snapshot.STAGED:
        save.to(State.SEALING)
        return
    with pytest.raises(RuntimeError, match=f"whose snapshot is {snapshot} cannot be sealed"):
        save.to(State.SEALING)
    assert seen(save) == before
    save.to(State.UNDOING)


@pytest.mark.parametrize("kind", ENDS)
def test_every_state_is_reached_and_the_ends_have_no_way_out(
    kind: type[Snapshot] | type[State],
) -> None:
    for state in kind:
        assert path_to(state) or state in (Snapshot.STAGING, State.CREATING)
        assert all(type(then) is kind for then in NEXT[state]), "the machines are apart"
    assert {state for state in kind if not NEXT[state]} == ENDS[kind]


def test_the_table_is_the_drawing() -> None:
    """What is durable is never undone, and what is undone is never durable."""
    after: dict[Any, set[Any]] = {state: set(NEXT[state]) for state in NEXT}
    for _ in NEXT:
        for reached in after.values():
            reached |= {then for each in list(reached) for then in after[each]}
    assert after[State.DURABLE] == {State.DONE}
    assert after[State.UNDOING] == {State.FAILED}
    assert after[Snapshot.BROKEN] == after[Snapshot.STAGED] == set()
    assert all(state not in reached for state, reached in after.items()), "there is no circle"


# -- what is said with them -----------------------------------------------------------------------


def test_times_are_set_when_their_states_are_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    save = make()
    times = []
    for state in (
        *(State.WRITING, Snapshot.QUEUED, Snapshot.STAGED),
        *(State.SEALING, State.PUBLISHING, State.DURABLE, State.DONE),
    ):
        now += 1.0
        save.to(state)
        times.append((save.staged_seconds, save.durable_seconds))
    assert times == [(0, 0), (0, 0), (3, 0), (3, 0), (3, 0), (3, 6), (3, 6)]
    assert save.elapsed() == 7
    assert save.blocked_seconds == 0, "the thread that saves sets that"


@pytest.mark.parametrize("snapshot", Snapshot, ids=name)
def test_who_waits_for_the_snapshot_is_told_when_it_is_there(snapshot: Snapshot) -> None:
    assert at(snapshot).handle.wait_staged(0) == (snapshot is Snapshot.STAGED)


@pytest.mark.parametrize("state", [*Snapshot, *State], ids=name)
def test_who_works_for_it_may_give_up(state: Snapshot | State) -> None:
    assert at(state).has_failed() == (state in (Snapshot.BROKEN, *FAILING))


@pytest.mark.parametrize("state", State, ids=name)
def test_what_stands_still_is_said_by_its_state(state: State) -> None:
    told: list[str] = []

    class Listening(Watchdog):
        def writing(self, doing: str) -> None:
            told.append(doing)

    save = make()
    listening = Save(
        *(save.target, flatten({}), save.plan, save.handle),
        Listening(Path("/nowhere"), None),
        0.0,
    )
    if State.SEALING in path_to(state):
        listening.to(Snapshot.STAGED)
    for each in path_to(state):
        listening.to(each)
    assert told == [each.value for each in path_to(state)]


class Bell(Arena):
    """Counts how often those who wait in it are woken."""

    def __init__(self) -> None:
        super().__init__(4096, 1)
        self.rung = 0

    def wake(self) -> None:
        self.rung += 1
        super().wake()


@pytest.mark.parametrize("state", [State.CREATING, State.WRITING, State.SEALING, State.PUBLISHING])
def test_to_stop_is_to_undo_and_to_wake_once(state: State) -> None:
    save, bell = at(state), Bell()
    for _ in range(2):
        save.stop([bell])
        assert save.state is State.UNDOING
        assert save.has_failed()
        assert bell.rung == 1
    save.to(State.FAILED)
    bell.close()


@pytest.mark.parametrize("state", [State.DURABLE, State.DONE, State.UNKNOWN])
def test_what_is_in_place_cannot_be_stopped(state: State) -> None:
    save, bell = at(state), Bell()
    before = seen(save)
    with pytest.raises(RuntimeError):
        save.stop([bell])
    assert seen(save) == before
    assert bell.rung == 0
    bell.close()
