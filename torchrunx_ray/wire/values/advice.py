"""Reason and advice for a value that cannot be pickled."""

import sys

from torchrunx_ray.wire.by_value.unfit import UnfitError
from torchrunx_ray.wire.values.culprit import Culprit, is_of_a_library, module_of
from torchrunx_ray.wire.values.exceptions import text_of

_TORCHS_FORMAT = "{} cannot be pickled"
"""Text of a NotImplementedError that torch raises without filling in the name."""


def reason_of(error: Exception) -> str:
    """Return an error's type and text."""
    if isinstance(error, UnfitError):
        return str(error)
    match error.args:
        case (str(format_), name) if format_ == _TORCHS_FORMAT:
            text = f"{name} cannot be pickled"
        case _:
            text = text_of(error)
    return f"{type(error).__name__}: {text}"


def advice_on(culprit: Culprit, *, is_returned: bool) -> str:
    """Return a sentence of advice; empty if the reason already has advice."""
    if isinstance(culprit.error, UnfitError):
        return ""
    for part in reversed(culprit.chain):
        if isinstance(part, type):
            return (
                f"Put the class {part.__qualname__} into a module beside the script, and import it: the class of "
                "a module is sent only by its name."
            )
    if is_returned and culprit.chain and _is_of_torch_distributed(type(culprit.chain[-1])):
        return "Return tensors or a state_dict instead: process groups end with the workers."
    instead = (
        "Return something that can be pickled" if is_returned else "Create it inside the function"
    )
    return f"{instead} instead{_what_a_class_could_do(culprit)}."


def _what_a_class_could_do(culprit: Culprit) -> str:
    """Advise on the innermost class that the user can change: nobody can give a lock a __reduce__."""
    for part in reversed(culprit.chain):
        if _is_users(type(part)):
            name = type(part).__qualname__
            if part is culprit.chain[-1]:
                return f", or give {name} a __reduce__ or __getstate__ that works"
            return f", or give {name} a __getstate__ that leaves it out"
    return ""


def _is_of_torch_distributed(kind: type) -> bool:
    return module_of(kind).startswith(("torch.distributed", "torch._C._distributed"))


def _is_users(kind: type) -> bool:
    root = module_of(kind).partition(".")[0]
    return root not in sys.stdlib_module_names and not is_of_a_library(kind)
