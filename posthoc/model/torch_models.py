"""Torch models as they lie about: a factory with its weights, or a ``torch.export`` archive.

Weights come from safetensors, or from a checkpoint that ``torch.load(weights_only=True)`` takes.
Nothing here unpickles objects except `load_program`, whose caller has to say that it may.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import itertools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from posthoc.contract import Array, ModelError, TensorSpec
from posthoc.model.quiet import quiet

_CHECKPOINTS = (".pt", ".pth", ".bin", ".ckpt", ".tar")
_NESTED = ("state_dict", "model")
_SHOWN = 5
_DTYPES = {
    *("float16", "float32", "float64", "bool"),
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
}


@contextlib.contextmanager
def working_directory() -> Iterator[None]:
    """Modules of the working directory can be imported, as in ``python -m``."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)


def make_module(spec: str) -> Any:
    """The ``torch.nn.Module`` that ``module:factory`` names: what the factory, called without an
    argument, returns, or the module itself. On the CPU. Raises ModelError, naming the fault."""
    import torch

    place, _, name = spec.partition(":")
    try:
        found = importlib.import_module(place)
    except Exception as e:  # the user's code raises what it likes
        raise ModelError(
            f"{spec}: {place} cannot be imported from {Path.cwd()} ({_said(e)})"
        ) from e
    try:
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError as e:
        raise ModelError(f"{spec}: {place} has no {name!r}") from e
    if not callable(found):
        raise ModelError(f"{spec} is {type(found).__name__}, not a function that makes a module")
    try:
        made = found if isinstance(found, torch.nn.Module) else found()
        if isinstance(made, torch.nn.Module):
            made = made.cpu()
    except Exception as e:  # as above
        raise ModelError(
            f"{spec}: the factory, called without an argument, failed ({_said(e)})"
        ) from e
    if not isinstance(made, torch.nn.Module):
        raise ModelError(f"{spec} returned {type(made).__name__}, not a torch.nn.Module")
    return made


def load_weights(module: Any, path: str | Path) -> None:
    """Put the tensors of a file into a module, every one where it belongs.

    A tensor that the file leaves out because it shares memory with another (tied weights) is
    filled with it. Raises ModelError for a file that is damaged or would need unpickling, and for
    names or shapes that are not the module's, naming them.
    """
    path = Path(path)
    given = _tensors(path)
    own: dict[str, Any] = module.state_dict()
    places: dict[Any, list[str]] = {}
    for name, tensor in own.items():
        if hasattr(tensor, "data_ptr") and tensor.numel():
            key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
            places.setdefault(key, []).append(name)
    for names in places.values():
        present = next((given[n] for n in names if n in given), None)
        if present is not None:
            given |= {n: present for n in names if n not in given}
    missing = [n for n in own if n not in given]
    unexpected = [n for n in given if n not in own]
    if missing or unexpected:
        faults = [
            f"{what} {_listed(names)}"
            for what, names in (("it lacks", missing), ("the module has no", unexpected))
            if names
        ]
        raise ModelError(f"{path} is not of this module: {'; '.join(faults)}")
    for name, tensor in given.items():
        want = getattr(own[name], "shape", None)
        if want is not None and tuple(tensor.shape) != tuple(want):
            raise ModelError(
                f"{path}: {name!r} has shape {tuple(tensor.shape)}, the module's has {tuple(want)}"
            )
    try:
        module.load_state_dict(given)
    except Exception as e:  # hooks of the module raise what they like
        raise ModelError(f"{path} cannot be loaded into the module ({_said(e)})") from e


def _tensors(path: Path) -> dict[str, Any]:
    """The tensors of a file by name, on the CPU."""
    import torch

    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except Exception as e:  # SafetensorError is no Exception that the package exports
            raise ModelError(f"{path} is not a whole safetensors file ({_said(e)})") from e
    if suffix not in _CHECKPOINTS:
        raise ModelError(
            f"{path}: weights are read from .safetensors, or from {', '.join(_CHECKPOINTS)} "
            "by torch.load(weights_only=True)"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # UnpicklingError, RuntimeError, EOFError, zip errors, …
        raise ModelError(
            f"{path} is damaged or holds more than tensors, and is not unpickled ({_said(e)}); "
            "save the module's state_dict() with safetensors.torch.save_file"
        ) from e
    for key in _NESTED:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    if not isinstance(found, Mapping) or not all(torch.is_tensor(v) for v in found.values()):
        what = f"keys {_listed(list(map(str, found)))}" if isinstance(found, Mapping) else "one"
        raise ModelError(
            f"{path} holds a {type(found).__name__} ({what}) and not a state_dict: tensors by "
            f"name, or those under {' or '.join(map(repr, _NESTED))}"
        )
    return dict(found)


def load_program(path: str | Path) -> Any:
    """The ``torch.export.ExportedProgram`` of a ``.pt2`` archive. **This unpickles**: whoever made
    the file can run code here, so the caller must have been told to trust it. Raises ModelError
    for a file that is damaged or of another kind."""
    import torch

    if not Path(path).is_file():
        raise ModelError(f"{path}: no such file")
    try:
        with quiet("torch._export"):
            program = torch.export.load(str(path))
    except Exception as e:  # whatever a damaged archive makes it raise
        raise ModelError(f"{path} is not a whole torch.export archive ({_said(e)})") from e
    return program


def program_inputs(program: Any) -> tuple[TensorSpec, ...]:
    """Names, types and shapes of a program's inputs, -1 where dynamic. Raises ModelError for
    an input that is not a tensor, or is one inside a list or dictionary."""
    names = tuple(program.graph_signature.user_inputs)
    args, kwargs = program.call_spec.in_spec.unflatten(list(names))
    if [*args, *kwargs.values()] != list(names) or not all(isinstance(n, str) for n in names):
        raise ModelError("the program takes other things than tensors, or tensors inside lists")
    values = {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"}
    specs = []
    for name in names:
        value = values[name]
        dtype = str(getattr(value, "dtype", type(value).__name__)).removeprefix("torch.")
        if dtype not in _DTYPES:
            raise ModelError(f"input {name!r} of the program is {dtype}, not a tensor of numbers")
        shape = tuple(d if isinstance(d, int) else -1 for d in value.shape)
        specs.append(TensorSpec(name=name, dtype=dtype, shape=(-1, *shape[1:])))
    return tuple(specs)


def input_names(module: Any, wanted: Callable[[str], bool]) -> list[str]:
    """The tensors that ``forward`` takes: parameters without a default, and those that are
    ``wanted``. Raises ModelError for a forward that names none."""
    parameters = inspect.signature(module.forward).parameters.values()
    names = [
        p.name
        for p in parameters
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and (p.default is p.empty or wanted(p.name))
    ]
    if not names or any(p.kind is p.POSITIONAL_ONLY for p in parameters):
        raise ModelError(
            f"forward{inspect.signature(module.forward)} does not name its inputs; give the module "
            "a forward with a parameter for each input"
        )
    return names


def float_type(module: Any) -> str:
    """The float type of a module's parameters, as numpy names it; float32 where there is none."""
    found = (str(p.dtype).removeprefix("torch.") for p in module.parameters())
    return next((d for d in found if d in ("float16", "float32", "float64")), "float32")


def first_accepted(module: Any, feeds: Iterable[Mapping[str, Array]]) -> dict[str, Array]:
    """The first of several readings of the same rows on which the module runs.

    Raises ModelError with what the module said of the first when there is none.
    """
    import torch

    if isinstance(module, torch.export.ExportedProgram):
        return dict(next(iter(feeds)))  # its inputs are known
    problem = ""
    module.eval()
    for feed in feeds:
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module(**as_tensors(feed))
        except Exception as e:  # as above
            rows = ", ".join(f"{k} {v.dtype} {v.shape}" for k, v in feed.items())
            problem = problem or (
                f"the module does not run on rows {rows} ({_said(e)}); name the columns of an "
                "input with --inputs, or give rows of the right shape and type with --example"
            )
            continue
        return dict(feed)
    raise ModelError(problem)


def as_tensors(feed: Mapping[str, Array]) -> dict[str, Any]:
    """The arrays as tensors of their own memory."""
    import torch

    return {k: torch.from_numpy(np.array(v)) for k, v in feed.items()}


def _said(error: BaseException) -> str:
    """The first line of what an error says, with its type."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, itertools.islice(names, _SHOWN)))
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
