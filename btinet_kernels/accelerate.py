"""Finds modules in somebody else's model whose mathematics a fused operator computes, and lets the operator do it.

    import btinet_kernels
    print(btinet_kernels.accelerate(model))   # in place; names, parameters, hooks and state_dict stay
    btinet_kernels.restore(model)

Squeeze-and-excitation of timm and torchvision, batch normalisation of images and depthwise convolutions are known;
``accelerates`` registers other modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from btinet_kernels import known_modules
from btinet_kernels.accelerated import Recipe, Refused, build, has_hooks, install, original_class, uninstall
from btinet_kernels.acceleration_check import Inputs, check
from btinet_kernels.known_modules import Known

Outcome = Literal["replaced", "already", "left"]


@dataclass(frozen=True)
class ModuleReport:
    """What became of one module. ``also``: other places where the same object is."""

    path: str
    class_name: str
    outcome: Outcome
    detail: str  # by what it is replaced, or why it is left
    also: tuple[str, ...] = ()

    def __str__(self) -> str:
        verb = {"replaced": "replaced by", "already": "already", "left": "left because"}[self.outcome]
        where = f" (also at {', '.join(self.also)})" if self.also else ""
        return f"{verb} {self.detail}{where}"


@dataclass(frozen=True)
class AccelerationReport:
    """What ``accelerate`` did. ``print(report)`` shows it as a table."""

    modules: list[ModuleReport] = field(default_factory=list)  # in the order of ``model.named_modules()``
    unknown: int = 0  # modules of classes that nobody registered

    @property
    def replaced(self) -> list[str]:
        """The paths of the modules that were replaced just now."""
        return [module.path for module in self.modules if module.outcome == "replaced"]

    def __str__(self) -> str:
        rows = [(m.path or "(the model)", m.class_name, str(m)) for m in self.modules]
        widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
        lines = [f"{path:<{widths[0]}}  {name:<{widths[1]}}  {what}" for path, name, what in rows]
        counts = {outcome: sum(m.outcome == outcome for m in self.modules) for outcome in ("already", "left")}
        summary = f"{len(self.replaced)} replaced, {counts['already']} already, {counts['left']} left"
        return "\n".join([*lines, f"{summary}; {self.unknown} modules of classes that nobody registered"])


_registered: dict[str, Known] = dict(known_modules.KNOWN)
_passed: set[tuple[Any, ...]] = set()  # what is known of modules like which all others are


def accelerates(cls: type[nn.Module] | str, *, inputs: Inputs, by: str | None = None) -> Callable[[Recipe], Recipe]:
    """Register how modules of exactly the class ``cls`` are accelerated; decorates a function of such a module.

    The function returns one of

    - a callable that takes what the module's ``forward`` takes and returns what it returns. It should read parameters
      from the module when it is called, not keep them. For a call it does not serve it returns ``NotImplemented``;
      the original forward then takes that call;
    - a ``nn.Module`` that holds the same ``Parameter`` objects and buffers;
    - a sentence that says why this module must stay as it is.

    Args:
        cls: the class, or its full name, so that its package need not be imported.
        inputs: function of the module that returns random arguments for its ``forward``, a few numbers each; the
            replacement is compared with the original on them.
        by: what a report calls the replacement; default: the name of the function.

    Example::

        @btinet_kernels.accelerates(TheirTIM, inputs=lambda m: (torch.randn(3, m.channels, 9, 8), torch.randn(3, 7)))
        def fused_tim_of_theirs(module):
            def forward(seg, clf):
                return btinet_kernels.fused_tim(seg, clf, weights_of(module), training=module.training)

            return forward
    """
    if not isinstance(cls, str) and not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"accelerates takes a class of modules or its full name, got {cls!r}.")
    if not callable(inputs):
        raise TypeError(f"accelerates needs inputs=, a function of the module, got {inputs!r}.")

    def register(recipe: Recipe) -> Recipe:
        label = by or str(getattr(recipe, "__name__", type(recipe).__name__))
        _registered[cls if isinstance(cls, str) else known_modules.full_name(cls)] = Known(recipe, inputs, label)
        return recipe

    return register


def recipe_of(cls: type[nn.Module]) -> Known:
    """What is registered for exactly this class; raises ``KeyError``."""
    return _registered[known_modules.full_name(cls)]


def accelerate(model: nn.Module) -> AccelerationReport:
    """Replace the forward of every module of ``model`` that a fused operator computes, in place.

    Parameters, buffers, names, hooks and flags stay the same objects; so do the module's class for ``isinstance`` and
    its place. Each replacement is first compared with the original in float32 (outputs, gradients, buffers; to 1e-4 of
    the largest magnitude), one for all layers that are built alike; one that differs leaves the module alone. Double
    backward and exporting plain operations need ``use_backend("reference")`` or ``restore``; so does scripting.

    Raises:
        TypeError: ``model`` is not a module, or a compiled, scripted or traced one.
    """
    _require_plain(model, "accelerate")
    places: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(path)
    rows, unknown = [], 0
    for module in _outermost(model):
        if (found := _treat(module)) is None:
            unknown += 1
        else:
            path, *also = places[module]
            name = (original_class(module) or type(module)).__name__
            rows.append(ModuleReport(path, name, *found, also=tuple(also)))
    return AccelerationReport(rows, unknown)


def restore(model: nn.Module) -> nn.Module:
    """Undo ``accelerate`` everywhere in ``model``, in place, and return it; without effect where nothing was done."""
    _require_plain(model, "restore")
    for module in model.modules():
        if original_class(module) is not None:
            uninstall(module)
    return model


def _outermost(model: nn.Module) -> Iterator[nn.Module]:
    """Every module once, without the parts of accelerated ones and of those that are no plain Python any more."""
    seen: set[nn.Module] = set()

    def visit(module: nn.Module) -> Iterator[nn.Module]:
        if module in seen:
            return
        seen.add(module)
        yield module
        if original_class(module) is None and _frozen(module) is None:
            for child in module.children():
                yield from visit(child)

    yield from visit(model)


def _treat(module: nn.Module) -> tuple[Outcome, str] | None:
    """Accelerate one module if there is a way; None: nobody knows its class."""
    if (frozen := _frozen(module)) is not None:
        return "left", f"it is a {frozen} module"
    original = original_class(module)
    cls = original or type(module)
    if known_modules.full_name(cls) in known_modules.OURS:
        return "already", "computed by btinet_kernels"
    known = _registered.get(known_modules.full_name(cls))
    if original is not None:
        return "already", "replaced" if known is None else f"replaced by {known.name}"
    if known is None:
        for base in cls.__mro__[1:]:
            of_base = _registered.get(known_modules.full_name(base))
            if of_base is not None and (of_base.where is None or of_base.where(module)):
                return "left", f"it is a subclass of {base.__name__}, which may compute something else"
        return None
    if known.where is not None and not known.where(module):
        return None
    try:
        _require_replaceable(module)
        replacement = build(module, known.build)
        _check_once(module, known)
    except Refused as error:
        return "left", str(error)
    except Exception as error:  # of a recipe or of the module itself: whatever it is, the module stays
        return "left", f"the check failed with {type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
    install(module, replacement)
    return "replaced", known.name


def _check_once(module: nn.Module, known: Known) -> None:
    tensors = (*module.parameters(), *module.buffers())
    like = (known, repr(module), *((t.shape, t.dtype, t.device) for t in tensors))
    if not known.alike or like not in _passed:
        check(module, known.build, known.inputs)
        _passed.add(like)


def _require_replaceable(module: nn.Module) -> None:
    if "forward" in module.__dict__:
        raise Refused("somebody has set another forward on this instance")
    cls = type(module)
    if cls.__reduce__ is not object.__reduce__ or cls.__reduce_ex__ is not object.__reduce_ex__:
        raise Refused("its class has its own way of being copied")
    hooked = [name for name, part in module.named_modules() if name and has_hooks(part)]
    if hooked:
        raise Refused(f"its part {hooked[0]!r} has hooks, which would not run")
    tensors = [*module.parameters(), *module.buffers()]
    if any(nn.parameter.is_lazy(t) for t in tensors):
        raise Refused("it has not been initialised")
    if any(t.is_meta for t in tensors):
        raise Refused("its tensors are on the meta device")


def _frozen(module: nn.Module) -> str | None:
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted"
    if isinstance(module, torch._dynamo.OptimizedModule):
        return "compiled"
    return "traced" if isinstance(module, torch.fx.GraphModule) else None


def _require_plain(model: Any, name: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} takes a torch.nn.Module, got {type(model).__name__}.")
    if (frozen := _frozen(model)) is not None:
        raise TypeError(f"{name} takes a plain module, got a {frozen} one; call it before the model is {frozen}.")
