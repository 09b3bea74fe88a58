"""What a converter could not lower, in words: target, graph and precision, and where they can be found the module and the operator.

Converters raise errors of any class, with reports of many lines and colours for a terminal; `--debug` shows those.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cluster.errors import EdgeFusionError, OutOfMemory, StageError

if TYPE_CHECKING:  # targets import this module, and a cold start must not bring PyTorch in
    from torch import fx, nn

_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@contextmanager
def refusals(target: str, graph: str, precision: str) -> Iterator[None]:
    """Raises StageError, or OutOfMemory, in place of what a converter raises. An error of ours without a remedy gets one; what the system
    says of files (OSError) is no refusal and passes."""
    remedy = f"Leave {precision} out of export.precisions or {target} out of export.targets; --debug shows the converter's report"
    try:
        yield
    except EdgeFusionError as error:
        if error.remedy:
            raise
        raise type(error)(error.what, where=error.where, remedy=remedy) from error
    except OSError:
        raise
    except MemoryError as error:
        raise OutOfMemory(
            f"{graph} at {precision} needs more memory than there is",
            where=target,
            remedy="Set export.calibration_prompts lower, or build on a machine with more memory",
        ) from error
    except Exception as error:
        raise StageError(
            f"{graph} does not lower at {precision}: {reason(error)}", where=target, remedy=remedy
        ) from error


def reason(error: BaseException) -> str:
    """The first line of the innermost error that says anything, without colours, and the class of an error that says nothing."""
    lines = [_first_line(one) for one in _chain(error)]
    return next((line for line in reversed(lines) if line), type(error).__name__)


def place_in(module: nn.Module, error: BaseException) -> str:
    """Where in `module` an exporter stopped, `mid.0 (Block), operator prims.bessel_j0`; empty where it does not tell."""
    from torch import fx, nn

    names = {id(part): name for name, part in module.named_modules() if name}
    found, operator = "", ""
    for one in _chain(error):
        step = one.__traceback__
        while step is not None:
            here, step = step.tb_frame.f_locals, step.tb_next
            part, node = here.get("self"), here.get("node")
            if isinstance(part, nn.Module) and id(part) in names:
                found = f"{names[id(part)]} ({type(part).__name__})"
            if isinstance(node, fx.Node) and node.op == "call_function":
                operator = _operator(node)
                found = _module_of(node) or found
    return ", ".join(filter(None, [found, operator and f"operator {operator}"]))


def _chain(error: BaseException) -> list[BaseException]:
    """An error and its causes, the outermost first; not what was only being handled meanwhile."""
    found: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in found:
        found.append(one)
        one = one.__cause__
    return found


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in _COLOUR.sub("", str(error)).splitlines() if line.strip()), "")


def _operator(node: fx.Node) -> str:
    return str(node.target).removesuffix(".default")


def _module_of(node: fx.Node) -> str:
    """The innermost module that torch.export says a node lies in."""
    stack: Any = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack or not stack[-1][0]:
        return ""
    path, kind = stack[-1]
    kind = kind if isinstance(kind, str) else kind.__name__
    name = str(path).removeprefix("L['self'].")
    return f"{name} ({kind.rpartition('.')[2]})"
