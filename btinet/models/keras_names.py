"""How Keras names and stores a variable, and how to recognise it however Keras numbered the layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

# The axes of a Keras array in the order in which PyTorch has them.
CONV = (3, 2, 0, 1)  # [kh, kw, in, out]; transposed: [kh, kw, out, in], which PyTorch keeps as [in, out, kh, kw]
DEPTHWISE = (2, 3, 0, 1)  # [kh, kw, in, 1]
DENSE = (1, 0)  # [in, out]
VECTOR = (0,)
SCALAR = ()

_AUTOMATIC = re.compile(
    r"(dense|conv2d|conv2d_transpose|separable_conv2d|batch_normalization|normalization)(?:_(\d+))?"
)


@dataclass(frozen=True)
class KerasVariable:
    """One variable of the official network.

    Attributes:
        name: its path in Keras, e.g. ``bti_res_s4/bti_res_s4_conv1/bias``; automatic numbers as in a fresh process.
        layer_class: class of the outermost layer, as HDF5 groups spell it.
        place: where that layer's HDF5 group holds it: attributes, then the position among the variables: ``conv1/2``.
        ours: key in our ``state_dict``; empty for the normalisation of the input, which with us is preprocessing.
        axes: the axes of the Keras array in the order of ours.
    """

    name: str
    layer_class: str
    place: str
    ours: str
    axes: tuple[int, ...]

    @property
    def layer(self) -> str:
        """Name of the outermost layer."""
        return self.name.partition("/")[0]

    def keras_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape in Keras of what has ``shape`` with us, where a 1×1 convolution may be a linear layer."""
        padded = (*shape, *[1] * (len(self.axes) - len(shape)))
        return tuple(padded[self.axes.index(axis)] for axis in range(len(padded)))

    def to_ours(self, value: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """The Keras array in our layout."""
        return np.ascontiguousarray(value.transpose(self.axes).reshape(shape))

    def to_keras(self, value: np.ndarray) -> np.ndarray:
        """The inverse of ``to_ours``."""
        padded = value.reshape(*value.shape, *[1] * (len(self.axes) - value.ndim))
        return np.ascontiguousarray(padded.transpose(np.argsort(self.axes)))


def identities(names: Iterable[str]) -> dict[str, str]:
    """Variable paths → what they are called however Keras numbered the layers.

    Only the outermost layer, the innermost one and the variable count: Keras 2 leaves out some of what lies between.
    Automatic numbers become the order of creation: of outermost layers in the network, of innermost ones in their
    outermost layer.
    """
    split = {name: _split(name) for name in names}
    inside: dict[str, set[str]] = {}
    for outer, inner, _ in split.values():
        inside.setdefault(outer, set()).add(inner)
    of_outer = layer_identities(inside)
    of_inner = {outer: layer_identities(inners) for outer, inners in inside.items()}
    return {
        name: f"{of_outer[outer]}/{of_inner[outer][inner]}/{variable}"
        for name, (outer, inner, variable) in split.items()
    }


def layer_identities(names: Iterable[str]) -> dict[str, str]:
    """Names of sibling layers → the same without automatic numbers, which become ``#`` and the order of creation."""
    result = {}
    automatic: dict[str, list[tuple[int, str]]] = {}
    for name in set(names):
        match = _AUTOMATIC.fullmatch(name)
        if match:
            automatic.setdefault(match[1], []).append((int(match[2] or 0), name))
        else:
            result[name] = re.sub(r"^srg_(?=d\d)", "upa_", name)  # the authors' later release renames the gate
    for layer_class, found in automatic.items():
        result |= {name: f"{layer_class}#{i}" for i, (_, name) in enumerate(sorted(found))}
    return result


def _split(path: str) -> tuple[str, str, str]:
    """Outermost layer, innermost layer and variable, as Keras 3 would call it."""
    *layers, variable = path.removesuffix(":0").split("/")
    if layers and layers[-1].endswith("_dwconv"):
        variable = variable.removeprefix("depthwise_")
    return (layers[0], layers[-1], variable) if layers else ("", "", variable)
