"""asyncsave.numpy.load: the same values as with torch, where there is no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import asyncsave
import asyncsave.numpy
from asyncsave.format.dtypes import DTYPES
from asyncsave.state.values import TORCH_DTYPES
from tests.strategies import states
from tests.support import assert_same, bits
from tests.sweeps.attacks.forge import chunk, forge, padded, tensor

GOLDEN = Path(__file__).parents[1] / "golden"


def as_numpy(value: Any) -> Any:
    """Return what a value that torch loaded is without torch; a tensor as its bits and shape."""
    if isinstance(value, torch.Tensor):
        return ("bits", tuple(value.shape), bits(value))
    if isinstance(value, torch.Size):
        return tuple(value)
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    if isinstance(value, dict):
        return type(value)((as_numpy(key), as_numpy(item)) for key, item in value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(as_numpy, value))
    if isinstance(value, (list, tuple)):
        return type(value)(map(as_numpy, value))
    return value


def told(expected: Any, loaded: Any) -> Any:
    """Return ``loaded`` with arrays as bits where ``expected`` was a tensor."""
    if isinstance(expected, torch.Tensor):
        assert isinstance(loaded, np.ndarray)
        return ("bits", loaded.shape, loaded.tobytes())
    if isinstance(expected, dict):
        pairs = zip(expected.values(), loaded.items(), strict=True)
        return type(loaded)((key, told(value, item)) for value, (key, item) in pairs)
    if isinstance(expected, tuple) and hasattr(expected, "_fields"):
        return type(loaded)(*map(told, expected, loaded))
    if isinstance(expected, (list, tuple)) and not isinstance(expected, torch.Size):
        return type(loaded)(map(told, expected, loaded))
    return loaded


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state=states())
def test_any_state_is_the_same_without_torch(tmp_path_factory: Any, state: Any) -> None:
    path = tmp_path_factory.mktemp("numpy") / "a"
    asyncsave.save(state, path, compression=1).result()
    expected = asyncsave.load(path)
    loaded = asyncsave.numpy.load(path)
    assert_same(as_numpy(expected), told(expected, loaded))


def test_each_dtype(tmp_path: Path) -> None:
    """An array has the dtype that NumPy or ml_dtypes has for it, and its values."""
    for name, known in DTYPES.items():
        if name not in TORCH_DTYPES:
            continue
        path = tmp_path / name
        value = torch.arange(8 * known.nbytes, dtype=torch.uint8)
        if name == "bool":
            value = value % 2
        asyncsave.save({"x": value.view(TORCH_DTYPES[name])}, path).result()
        array = asyncsave.numpy.load(path)["x"]
        assert array.tobytes() == bytes(value.tolist())
        want = known.numpy or (getattr(ml_dtypes, known.ml_dtypes) if known.ml_dtypes else "")
        assert array.dtype == np.dtype(want or f"u{known.nbytes}")
        if known.ml_dtypes in ("bfloat16", "float8_e5m2", "float8_e4m3fn"):
            floats = value.view(TORCH_DTYPES[name]).float().numpy()
            np.testing.assert_array_equal(array.astype(np.float32), floats)


def test_ties_strides_and_parts(tmp_path: Path) -> None:
    base = torch.arange(100, dtype=torch.float32).reshape(10, 10)
    state = {"all": base, "row": base[3], "turned": base.t(), "other": {"x": torch.ones(2)}}
    asyncsave.save(state, tmp_path / "a").result()
    loaded = asyncsave.numpy.load(tmp_path / "a")
    np.testing.assert_array_equal(loaded["turned"], base.t().numpy())
    loaded["row"][0] = -1
    assert loaded["all"][3, 0] == loaded["turned"][0, 3] == -1
    part = asyncsave.numpy.load(tmp_path / "a", keys=["other.*"])
    assert list(part) == ["other"]
    part = asyncsave.numpy.load(tmp_path / "a", "row")
    np.testing.assert_array_equal(part["row"], base[3].numpy())
    with pytest.raises(asyncsave.MismatchError, match="row"):
        asyncsave.numpy.load(tmp_path / "a", keys="rows")


def test_every_dtype_with_strides(tmp_path: Path) -> None:
    for name, known in DTYPES.items():
        if name in TORCH_DTYPES:
            path = tmp_path / name
            value = torch.ones(8 * known.nbytes, dtype=torch.uint8).view(TORCH_DTYPES[name])
            asyncsave.save({"x": value, "y": value[::3]}, path).result()
            loaded = asyncsave.numpy.load(path)
            assert loaded["y"].shape == (3,)
            assert loaded["y"].tobytes() == bytes([1] * 3 * known.nbytes)


def test_arrays_that_share_memory_are_aligned(tmp_path: Path) -> None:
    base = torch.arange(64, dtype=torch.uint8)
    late = torch.empty(0, dtype=torch.int64).set_(base.untyped_storage(), 1, (4,), (1,))
    asyncsave.save({"u": base[4:60], "f": late}, tmp_path / "a").result()
    loaded = asyncsave.numpy.load(tmp_path / "a")
    assert loaded["f"].flags.aligned
    assert loaded["f"].tolist() == late.tolist()
    assert loaded["u"].tolist() == list(range(4, 60))


def test_bytes_that_many_records_have_are_one_object(tmp_path: Path) -> None:
    """Or a few bytes of records would become gigabytes."""
    text = bytes(range(256)) * 16
    record = tensor((len(text),), kind="bytes")
    tree = {"t": "list", "items": [{"t": "tensor", "i": i} for i in range(200)]}
    forge(tmp_path / "a", tree, tensors=[record] * 200, chunks=[chunk(text)], data=padded(text))
    for loaded in (asyncsave.numpy.load(tmp_path / "a"), asyncsave.load(tmp_path / "a")):
        assert loaded == [text] * 200
        assert len(set(map(id, loaded))) == 1


def test_keys_that_are_the_same_without_torch_are_refused(tmp_path: Path) -> None:
    """None is dropped without a word."""
    state = {torch.float32: 1, "torch.float32": 2}
    asyncsave.save(state, tmp_path / "a").result()
    assert asyncsave.load(tmp_path / "a") == state
    with pytest.raises(asyncsave.LoadError, match="keys that are the same"):
        asyncsave.numpy.load(tmp_path / "a")


def test_a_shape_that_numpy_cannot_have_is_a_load_error(tmp_path: Path) -> None:
    asyncsave.save(
        {"x": torch.empty(2**40, 2**20, 0, dtype=torch.float64)}, tmp_path / "a"
    ).result()
    with pytest.raises(asyncsave.LoadError, match="which NumPy cannot have"):
        asyncsave.numpy.load(tmp_path / "a")


def test_the_newest_sound_one_of_a_run(tmp_path: Path) -> None:
    with asyncsave.Checkpointer(tmp_path) as run:
        for step in (1, 2, 3):
            run.save(step, {"step": step, "x": torch.full((1000,), float(step))}, block=True)
    data = tmp_path / "step-000000003" / "rank-00000.data"
    flipped = bytearray(data.read_bytes())
    flipped[50] ^= 1
    data.write_bytes(flipped)
    assert asyncsave.numpy.load(tmp_path)["step"] == 2
    with pytest.raises(asyncsave.IntegrityError):
        asyncsave.numpy.load(tmp_path / "step-000000003")


WITHOUT_TORCH = """
import json, sys
sys.modules["torch"] = None
import asyncsave
for name in sys.argv[1:]:
    state = asyncsave.numpy.load(name)
    asyncsave.verify(name)
    asyncsave.checkpoints(name)
print(json.dumps([asyncsave.__version__, len(state)]))
try:
    asyncsave.Checkpointer
except ImportError as error:
    assert "pip install torch" in str(error)
else:
    raise SystemExit("it came from somewhere")
"""


def run_python(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_golden_file_without_torch() -> None:
    paths = [str(path) for path in sorted(GOLDEN.iterdir()) if path.is_dir()]
    version, count = json.loads(run_python(WITHOUT_TORCH, *paths))
    assert version == asyncsave.__version__
    assert count


def test_the_import_is_light() -> None:
    """Neither torch nor what takes long, until something needs it; yet every name is seen."""
    heavy = "torch numpy asyncio aiofiles zstandard msgspec psutil rich typer".split()  # noqa: SIM905
    seen = run_python(f"import sys, asyncsave; print([x for x in {heavy} if x in sys.modules])")
    assert seen == "[]\n"
    code = "import asyncsave.cli, asyncsave.numpy, sys; print('torch' in sys.modules)"
    assert run_python(code) == "False\n"
    assert {*asyncsave.__all__, "__doc__", "numpy", "errors"} <= set(dir(asyncsave))
    code = "import asyncsave; print(asyncsave.errors.SaveError, asyncsave.report.Stats)"
    assert "SaveError" in run_python(code)
    code = "import numpy; from asyncsave import *; print(numpy.__name__, save.__name__)"
    assert run_python(code) == "numpy save\n"
    shown = run_python("import asyncsave; help(asyncsave)")
    assert all(name in shown for name in ("class Checkpointer", "verify(path", "tune("))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"asyncsave.*'safe'"):
        _ = asyncsave.safe  # type: ignore[attr-defined]
