"""Closure variables that functions share, which cloudpickle would copy for each function."""

import types
from typing import Any

from torchrunx_ray.wire.by_value import code_first


def reduce_cell(cell: types.CellType, order: code_first.Order) -> Any:
    """Return a reduce tuple that creates a cell before its value, since the value may refer to the cell."""
    try:
        value = cell.cell_contents
    except ValueError:  # the cell is empty
        return types.CellType, ()
    if order.is_in_code and (rank := code_first.rank_of(value)) != code_first.CODE:
        order.put_off(rank, code_first.Step(_set_value, cell, (value,)))
        return types.CellType, ()
    return types.CellType, (), (value,), None, None, _set_value


def with_own_cells(function: Any, reduced: Any) -> Any:
    """Make the function with its own cells, while cloudpickle makes new cells and copies the values."""
    make, (code, there, name, defaults, _), (attributes, slots), *rest = reduced
    arguments = (code, there, name, defaults, function.__closure__)
    return make, arguments, (attributes, slots | {"__closure__": None}), *rest


def _set_value(cell: types.CellType, value: tuple[Any]) -> None:
    (cell.cell_contents,) = value
