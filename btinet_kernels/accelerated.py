"""How one module of somebody else's model gets another forward, and gives it back.

The module becomes an instance of a subclass of its own class. Unlike a forward set on the instance, that survives
deepcopy, pickle, DataParallel's replicas and the host's isinstance checks, and it is undone by setting the class back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[..., Any]
Recipe = Callable[[Any], "Forward | nn.Module | str"]

_MARK = "_btinet_original"  # on the subclass: the class it replaces
_STATE = "_btinet_replacement"  # on the instance; not part of what is copied, pickled or in the state_dict


class Refused(Exception):
    """The module stays as it is; the message says why."""


class Replacement:
    """Another forward of one module, and what the module was made of when it was written."""

    def __init__(self, forward: Forward, inside: list[nn.Module]) -> None:
        self.forward, self.inside = forward, inside


def original_class(module: nn.Module) -> type[nn.Module] | None:
    """The class an accelerated module had, or None if it is not accelerated."""
    return getattr(type(module), _MARK, None)


def build(module: nn.Module, recipe: Recipe) -> Replacement:
    """Ask the recipe for another forward of ``module``; raises ``Refused``."""
    made = recipe(module)
    if isinstance(made, str):
        raise Refused(made)
    if isinstance(made, nn.Module):
        made = _through(module, made)
    if not callable(made):
        raise Refused(f"its recipe returned {type(made).__name__}, but a callable, a module or a sentence is expected")
    return Replacement(made, list(module.modules()))


def install(module: nn.Module, replacement: Replacement) -> None:
    """Let ``module`` use another forward from now on."""
    module.__class__ = _subclass(type(module))
    module.__dict__[_STATE] = replacement


def uninstall(module: nn.Module) -> None:
    """The inverse of ``install``."""
    original = original_class(module)
    module.__dict__.pop(_STATE, None)
    if original is not None and type(module) is _subclass(original):
        module.__class__ = original


_subclasses: dict[type[nn.Module], type[nn.Module]] = {}


def _subclass(original: type[nn.Module]) -> type[nn.Module]:
    if original not in _subclasses:
        _subclasses[original] = _new_subclass(original)
    return _subclasses[original]


def _new_subclass(original: type[nn.Module]) -> type[nn.Module]:
    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        replacement = getattr(self, _STATE, None)
        if replacement is not None and not _needs_original(self, replacement, args):
            result = replacement.forward(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return original.forward(self, *args, **kwargs)

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        state = original.__reduce_ex__(self, protocol)[2]
        assert isinstance(state, dict)
        return _blank, (original,), {name: value for name, value in state.items() if name != _STATE}

    def set_state(self: nn.Module, state: dict[str, Any]) -> None:
        original.__setstate__(self, state)
        _rebuild(self)

    def replicate(self: Any) -> Any:
        replica = original._replicate_for_data_parallel(self)
        replica.__dict__.pop(_STATE, None)
        _rebuild(replica)
        return replica

    body = {
        _MARK: original,
        "forward": forward,
        "__reduce_ex__": reduce,
        "__setstate__": set_state,
        "_replicate_for_data_parallel": replicate,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    return type(original.__name__, (original,), body)


def _blank(original: type[nn.Module]) -> nn.Module:
    return _subclass(original).__new__(_subclass(original))


def _rebuild(copied: nn.Module) -> None:
    """Write the forward of a copy; where its recipe is not registered (any more) the copy is an ordinary module."""
    from btinet_kernels.accelerate import recipe_of

    original = original_class(copied)
    assert original is not None
    try:
        copied.__dict__[_STATE] = build(copied, recipe_of(original).build)
    except (Refused, KeyError):
        uninstall(copied)


def _needs_original(module: nn.Module, replacement: Replacement, args: tuple[Any, ...]) -> bool:
    """Whether somebody would notice that the module's parts are not called, or they are not the same any more."""
    inside = list(module.modules())
    if len(inside) != len(replacement.inside):
        return True
    for now, then in zip(inside, replacement.inside, strict=True):
        if now is not then or (now is not module and has_hooks(now)):
            return True
    if torch.compiler.is_compiling():
        return False
    return torch.jit.is_tracing() or any(isinstance(arg, torch.fx.Proxy) for arg in args)


def has_hooks(module: nn.Module) -> bool:
    """Whether something runs when ``module`` is called, besides its forward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _through(module: nn.Module, replacement: nn.Module) -> Forward:
    """Call a module that holds the tensors of ``module``, with those that ``module`` holds at that moment."""
    own = {id(t): name for name, t in _tensors(module)}
    names = {name: own.get(id(t)) for name, t in _tensors(replacement)}
    foreign = [name for name, found in names.items() if found is None]
    if foreign:
        raise Refused(f"the module its recipe returned holds a tensor that is not the original's own: {foreign[0]!r}")

    def forward(*args: Any, **kwargs: Any) -> Any:
        if replacement.training != module.training:
            replacement.train(module.training)
        current = {name: _tensor(module, path) for name, path in names.items() if path is not None}
        return torch.func.functional_call(replacement, current, args, kwargs)

    return forward


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]


def _tensor(module: nn.Module, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)
