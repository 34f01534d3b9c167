"""Classes: values of the program's own classes, as plain data and back.

An enum member, a subclass of a plain type, a dataclass or a namespace is saved as plain data under
the name of its class. `register` says it for any other class. A name in a checkpoint is never
imported: what a program has not registered comes back plain, and where a live value has the class,
`as_live` makes it of that.
"""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import enum
import functools
import types
from collections.abc import Callable, MutableMapping
from typing import Any, NamedTuple

from ..errors import ConfigError, LoadError


class Registered(NamedTuple):
    """How a class is saved: see `register`."""

    type: type
    name: str
    to_plain: Callable[[Any], Any]
    from_plain: Callable[[Any], Any]


BY_TYPE: dict[type, Registered] = {}
_BY_NAME: dict[str, Registered] = {}


def register(
    type: type,
    *,
    to_plain: Callable[[Any], Any],
    from_plain: Callable[[Any], Any],
    name: str | None = None,
) -> None:
    """Say how values of a class of your own are saved and loaded, in this process.

    They are found anywhere in a state, but not those of its subclasses. Register a class wherever
    it is saved or loaded, at import say. Where it is not, its plain value is loaded.

    Args:
        type: the class.
        to_plain: takes a value; returns anything that can be saved, and has no side effect. It runs
            in each save, in the thread that called it.
        from_plain: takes what ``to_plain`` had returned, with new tensors; returns a value.
        name: what the class is called in checkpoints; its module and name, if it is not given. Give
            one if the class may move: checkpoints are found by it.

    Raises:
        ConfigError: this is no class, or one that asyncsave knows; another has the name.
    """
    if not isinstance(type, _TYPE):
        raise ConfigError(f"register: {type!r} is no class")
    if type.__module__.partition(".")[0] in ("builtins", "torch", "numpy", "collections"):
        raise ConfigError(
            f"register: {type.__qualname__} is not a class of your own; wrap it in one that is"
        )
    if any(each.__module__.startswith("torch.nn.") for each in type.__mro__):
        raise ConfigError(f"register: {type.__qualname__} is a module, which has state_dict()")
    if not callable(to_plain) or not callable(from_plain):
        raise ConfigError("register: to_plain and from_plain must be functions")
    name = class_name(type) if name is None else name
    if not isinstance(name, str) or not 0 < len(name) <= 200:
        raise ConfigError(f"register: name={name!r:.80} must be a text of at most 200 characters")
    other = _BY_NAME.get(name)
    if other is not None and class_name(other.type) != class_name(type):
        raise ConfigError(
            f"register: {name!r} is the name of {class_name(other.type)} already; give another one"
        )
    if old := BY_TYPE.get(type):
        _BY_NAME.pop(old.name, None)
    if other is not None:  # a module that was reloaded, or a cell that was run again
        BY_TYPE.pop(other.type, None)
    BY_TYPE[type] = _BY_NAME[name] = Registered(type, name, to_plain, from_plain)


_TYPE = type


def class_name(kind: Any) -> str:
    """Return the name that a class has in a checkpoint, if it was not registered under another."""
    return f"{kind.__module__}.{kind.__qualname__}"


def typed(name: str, plain: Any) -> Any:
    """Return the value of a registered class, or the plain one that was given.

    Raises:
        LoadError: ``from_plain`` raised.
    """
    known = _BY_NAME.get(name)
    return plain if known is None else _from_plain(known, plain)


def _from_plain(known: Registered, plain: Any) -> Any:
    try:
        return known.from_plain(plain)
    except Exception as cause:
        raise LoadError(
            f"from_plain of {known.name}, which is registered, raised {cause!r:.200} for what was "
            "saved; register another one, or none to get the plain value"
        ) from cause


# -- plain data of classes that nobody has registered --------------------------------------------


def _items(value: Any) -> Any:
    kind: Any = collections.OrderedDict if isinstance(value, collections.OrderedDict) else dict
    return kind.items(value)


_EXACT: dict[type, Callable[[Any], Any]] = {
    str: str.__str__,
    int: int.__int__,
    float: float.__float__,
    # what is in them, whatever their own methods say
    dict: lambda value: dict(_items(value)),
    list: lambda value: list(list.__iter__(value)),
    tuple: lambda value: tuple(tuple.__iter__(value)),
}

_SEQUENCES = (list, tuple, collections.deque)

NAMESPACES = (types.SimpleNamespace, argparse.Namespace)


def has_plain_form(value: Any) -> bool:
    """Whether a value is of a class of which the plain data is known without registering it."""
    return isinstance(value, (enum.Enum, *_EXACT, *NAMESPACES)) or is_record(value)


def is_frozen(value: Any) -> bool:
    """Whether the fields of a dataclass cannot be set."""
    return bool(type(value).__dataclass_params__.frozen)


def is_record(value: Any) -> bool:
    """Whether a value is of a dataclass, and no class itself."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def plain_form(value: Any) -> Any:
    """Return the plain data of such a value.

    Raises:
        ValueError: it has attributes beside it, which would be lost; or lacks one.
    """
    if isinstance(value, enum.Enum):
        return value.value
    for base, exact in _EXACT.items():
        if isinstance(value, base):
            _refuse_attributes(value)
            return exact(value)
    if isinstance(value, NAMESPACES):
        return dict(vars(value))
    names = [field.name for field in dataclasses.fields(value)]
    for name, beside in vars_of(value).items():
        if name not in names and hasattr(beside, "__array__"):
            raise ValueError(
                f"its attribute {name!r} is no field, and would be lost; make it one, or say with "
                "asyncsave.register() how it is saved"
            )
    if lacking := [name for name in names if not hasattr(value, name)]:
        raise ValueError(f"its field {lacking[0]!r} has no value")
    return {name: getattr(value, name) for name in names}


def _refuse_attributes(value: Any) -> None:
    own = vars_of(value)
    items = value if isinstance(value, dict) else {}
    beside = [name for name in own if name not in items or items[name] is not own[name]]
    if beside:
        raise ValueError(
            f"it has attributes, as {beside[0]!r}, which would be lost; say with "
            "asyncsave.register() how it is saved, or save them beside it"
        )


# -- as the live value is -------------------------------------------------------------------------


class Fields(MutableMapping[str, Any]):
    """The fields of a dataclass as a dict, to be filled."""

    def __init__(self, value: Any) -> None:
        self._value = value
        names = [field.name for field in dataclasses.fields(value)]
        self._names = [name for name in names if hasattr(value, name)]

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        return getattr(self._value, name)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self._value, name, value)

    def __delitem__(self, name: str) -> None:
        raise TypeError("a field cannot be removed")

    def __iter__(self) -> Any:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def vars_of(value: Any) -> dict[str, Any]:
    """Return the attributes of an object that its class did not make, slots included."""
    own = dict(getattr(value, "__dict__", {}))
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                own[name] = getattr(value, name)
    return own


def has_method(value: Any, name: str) -> bool:
    """Whether a value, which is no class, has a method; of a dict, items are none."""
    if isinstance(value, type):
        return False
    try:
        return callable(getattr(type(value) if isinstance(value, dict) else value, name, None))
    except Exception:  # of a class that makes attributes
        return False


def plain_key(key: Any) -> Any:
    """Return what a key of a live dict is in a checkpoint, where that is another value."""
    if isinstance(key, enum.Enum):
        return plain_key(key.value)
    if isinstance(key, tuple):
        made: Any = type(key) if hasattr(key, "_fields") else None
        items = [plain_key(item) for item in key]
        return made(*items) if made else tuple(items)
    if isinstance(key, frozenset):
        return frozenset(map(plain_key, key))
    return key


def as_live(live: Any, new: Any) -> Any:
    """Return plain data as values of the classes that a live value has in the same places.

    Raises:
        ValueError, TypeError and whatever else the classes raise.
    """
    known = BY_TYPE.get(type(live))
    if known is not None:
        return new if isinstance(new, known.type) else _from_plain(known, new)
    for kinds, plain, make in _AS_LIVE:
        if isinstance(live, kinds) and isinstance(new, plain):
            return make(live, new)
    if is_record(live) and isinstance(new, dict):
        own = Fields(live)
        return remade(live, {**own, **_dict_as_live(dict(own), new)})
    return new


def remade(live: Any, fields: dict[str, Any]) -> Any:
    """Return a dataclass like ``live`` with other values in these fields.

    Made without its ``__init__``, which may take others.
    """
    made = object.__new__(type(live))
    own = {
        name: value
        for name, value in vars_of(live).items()
        if not isinstance(getattr(type(live), name, None), functools.cached_property)
    }
    for name, value in {**own, **fields}.items():
        object.__setattr__(made, name, value)
    return made


def _dict_as_live(live: dict[Any, Any], new: dict[Any, Any]) -> dict[Any, Any]:
    keys = {plain_key(key): key for key in live}
    items = {
        keys.get(key, key): as_live(live[keys[key]], value) if key in keys else value
        for key, value in new.items()
    }
    # a copy of a live one has its attributes, and a new one its own: _metadata, say
    is_plain = type(live) in (dict, collections.OrderedDict, type(new))
    made = new if is_plain else copy.copy(live)
    made.clear()
    made.update(items)
    if isinstance(live, collections.defaultdict) and isinstance(made, collections.defaultdict):
        made.default_factory = live.default_factory  # code, of which no more than a name is saved
    return made


def _sequence_as_live(live: Any, new: Any) -> Any:
    items = [as_live(*pair) for pair in zip(live, new, strict=False)]
    one = _only_enum(live)
    items += [item if one is None else _enum_as_live(one, item) for item in list(new)[len(items) :]]
    if isinstance(new, collections.deque):
        return collections.deque(items, new.maxlen)
    kind: Any = type(live) if type(new) in (list, tuple) else type(new)
    return kind(*items) if hasattr(kind, "_fields") else kind(items)


def _set_as_live(live: Any, new: Any) -> Any:
    own = {plain_key(item): item for item in live}
    one = _only_enum(live)
    return type(new)(
        own[item] if item in own else item if one is None else _enum_as_live(one, item)
        for item in new
    )


def _only_enum(live: Any) -> Any:
    """Return a member of the enum that all items are of; None: there is none."""
    kinds = set(map(type, live))
    return next(iter(live)) if len(kinds) == 1 and issubclass(kinds.pop(), enum.Enum) else None


def _enum_as_live(live: Any, new: Any) -> Any:
    kind: Any = type(live)
    if type(new) is kind:
        return new
    try:
        return kind(new)
    except Exception:
        for member in kind:  # values that are not plain themselves, or not equal to themselves
            if repr(_plainly(member.value)) == repr(new):
                return member
        if new is None:
            return None
        raise


def _plainly(value: Any) -> Any:
    """Return a value as it is loaded where no class is registered."""
    if type(value) not in _EXACT and has_plain_form(value):
        return _plainly(plain_form(value))
    if isinstance(value, dict):
        return {plain_key(key): _plainly(item) for key, item in value.items()}
    return type(value)(map(_plainly, value)) if type(value) in (list, tuple) else value


def _plain_as_live(live: Any, new: Any) -> Any:
    """Return a number or a text as one of a subclass; a bool is none that anybody has made."""
    kind: Any = type(live)
    if kind in (str, int, float, bool) or type(new) not in kind.__mro__:
        return new
    base: Any = type(new)
    return base.__new__(kind, new)  # whatever the class would make of it


def _namespace_as_live(live: Any, new: Any) -> Any:
    return type(live)(**_dict_as_live(vars(live), new))


_SETS = (set, frozenset)

_AS_LIVE: tuple[tuple[Any, Any, Callable[[Any, Any], Any]], ...] = (
    (enum.Enum, object, _enum_as_live),
    (dict, dict, _dict_as_live),
    (_SEQUENCES, _SEQUENCES, _sequence_as_live),
    (_SETS, _SETS, _set_as_live),
    ((str, int, float), (str, int, float), _plain_as_live),
    (NAMESPACES, dict, _namespace_as_live),
)
"""What is live, what was saved, and how that becomes the same; the first one that fits."""
