"""Compute in the last layer of a converted model only what its first token needs.

Most encoders classify a window by its first token. The last layer then needs the keys and values of all tokens, and all
else only for the first one: queries, attention and the feed-forward part are computed in vain for the others. They are
five sixths of the layer's linear operations.

The rule for each operation says: for position 0 on one axis of the result, which inputs are needed, and on which of
their axes is it enough to have position 0? So the result is exact for every model, whatever the axes mean.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from pipelines.model.openvino_model import openvino

ELEMENTWISE = frozenset(
    {"Add", "Subtract", "Multiply", "Divide", "Power", "Sqrt", "SquaredDifference", "Negative", "Convert", "Select",
     "Gelu", "Relu", "Elu", "Tanh", "Sigmoid", "Swish", "HSwish", "Mish", "SoftPlus", "Erf", "Clamp", "Exp",
     "FakeQuantize"}
)  # fmt: skip
OVER_AXES = frozenset({"MVN", "ReduceMean", "ReduceSum", "Split", "VariadicSplit"})
"""Operations over the axes in their second input. They keep these axes (`keep_dims`)."""
Needed = dict[int, int]
"""By number of an input: the axis on which only position 0 is needed. The other inputs are needed as they are."""


def keep_first_token(model: Any) -> int:
    """Change a model of OpenVINO: compute only what position 0 needs, where only position 0 is used.

    Returns:
        The number of places at which the other positions are cut off. 0: the model is unchanged.
    """
    needed: dict[str, Needed] = {}
    for node in reversed(model.get_ordered_ops()):  # consumers come first
        axis = _axis_of_consumers(node, needed)
        found = _first_taken(node) if axis is None else _inputs_of_first(node, axis)
        if found is not None:
            needed[node.get_name()] = found
    ops = importlib.import_module(f"{openvino().__name__}.opset13")
    cuts: dict[tuple[str, int, int], Any] = {}
    for node in model.get_ordered_ops():
        for number, axis in needed.get(node.get_name(), {}).items():
            source = node.input(number).get_source_output()
            name = source.get_node().get_name()
            if name in needed and _first_taken(source.get_node()) is None:
                continue  # it has position 0 only, too
            place = (name, source.get_index(), axis)
            if place not in cuts:
                cuts[place] = ops.slice(source, *(np.array([value], np.int64) for value in (0, 1, 1, axis))).output(0)
            node.input(number).replace_source_output(cuts[place])
    model.validate_nodes_and_infer_types()
    return len(cuts)


def _first_taken(node: Any) -> Needed | None:
    """Return what a node needs that takes position 0 of its input. None if it is another node."""
    if node.get_type_name() != "Gather":
        return None
    index, axis = _constant(node, 1), _constant(node, 2)
    if (
        index is None
        or axis is None
        or index.size != 1
        or int(index.ravel()[0]) != 0
        or node.get_input_partial_shape(0).rank.is_dynamic
    ):
        return None
    return {0: int(axis.ravel()[0]) % len(node.get_input_partial_shape(0))}


def _axis_of_consumers(node: Any, needed: dict[str, Needed]) -> int | None:
    """Return the axis on which all consumers of a node need only position 0. None if there is none."""
    axes = {
        needed.get(target.get_node().get_name(), {}).get(target.get_index())
        for output in node.outputs()
        for target in output.get_target_inputs()
    }
    return axes.pop() if len(axes) == 1 else None


def _inputs_of_first(node: Any, axis: int) -> Needed | None:
    """Return what a node needs for position 0 on an axis of its result. None: all of its inputs, or it is unknown."""
    kind = node.get_type_name()
    shapes = [put.get_partial_shape() for put in node.inputs()]
    is_unknown = any(put.get_partial_shape().rank.is_dynamic for put in [*node.inputs(), *node.outputs()])
    if is_unknown or not shapes or (kind == "MatMul" and min(map(len, shapes)) < 2):
        return None
    rank = len(node.get_output_partial_shape(0))
    if kind in ELEMENTWISE or (kind == "MatMul" and axis < rank - 2):
        aligned = {number: axis - rank + len(shape) for number, shape in enumerate(shapes)}
        return _without_repeated(shapes, {number: own for number, own in aligned.items() if own >= 0})
    if kind == "MatMul" and axis == rank - 2:
        return {0: len(shapes[0]) - (1 if node.get_attributes()["transpose_a"] else 2)}
    if kind == "ScaledDotProductAttention" and axis == rank - 2 and not node.get_attributes()["causal"]:
        mask = {3: len(shapes[3]) - 2} if len(shapes) > 3 and len(shapes[3]) >= 2 else {}
        return {0: len(shapes[0]) - 2, **_without_repeated(shapes, mask)}
    return {0: own} if (own := _axis_before(node, axis, len(shapes[0]))) is not None else None


def _axis_before(node: Any, axis: int, rank: int) -> int | None:
    """Return the axis of the first input that becomes an axis of the result. None if it does not stay apart."""
    kind, attributes = node.get_type_name(), node.get_attributes()
    if kind == "Softmax":
        return axis if axis != attributes["axis"] % rank else None
    value = _constant(node, 1) if node.get_input_size() > 1 else None
    if value is None:
        return None
    values = [int(each) for each in value.ravel()]
    if kind in OVER_AXES:
        return axis if attributes.get("keep_dims", True) and axis not in {each % rank for each in values} else None
    if kind == "Transpose":
        return values[axis]
    if kind == "Reshape" and attributes["special_zero"] and axis < min(rank, len(values)):
        before = list(node.get_input_partial_shape(0))[:axis]
        kept = (
            new == 0 or (old.is_static and new == old.get_length()) for new, old in zip(values, before, strict=False)
        )
        return axis if all(kept) and values[axis] == 0 else None  # a length would be that of all positions
    return None


def _without_repeated(shapes: list[Any], axes: Needed) -> Needed:
    """Leave out the inputs that have one position, which is the same for all positions of the result."""
    return {
        number: axis
        for number, axis in axes.items()
        if shapes[number][axis].is_dynamic or shapes[number][axis].get_length() != 1
    }


def _constant(node: Any, number: int) -> Any:
    """Return the value of an input that is a constant, or None."""
    source = node.input(number).get_source_output().get_node()
    return source.get_data() if source.get_type_name() == "Constant" else None
