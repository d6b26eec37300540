"""The norm layers of a model under torch.compile, each by itself."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import exc
from torch.fx import Proxy
from torch.fx.experimental import _config as shapes

from rethinking_bn.distributed import get_world_size
from rethinking_bn.layers.cycle import CycleBatchNorm2d
from rethinking_bn.layers.mabn import MABN2d
from rethinking_bn.layers.population_layer import PopulationLayer
from rethinking_bn.layers.split import SplitBatchNorm2d
from rethinking_bn.randomness import is_recomputing

logger = logging.getLogger(__name__)

# compiled versions of one kind of layer: training and inference, types, layouts, sizes of 0 and 1
_VERSIONS = 64
# Where the rest of a call depends on numbers that change, such as which level it is: the method
# that does the numeric work.
_WITHIN: dict[type, str] = {CycleBatchNorm2d: "_normalize_level", SplitBatchNorm2d: "_run"}

_FAILURES = (exc.TorchDynamoException, getattr(exc, "FailOnRecompileLimitHit", RecursionError))


def compile_norms(model: nn.Module, **options: Any) -> list[str]:
    """Compile every norm layer of this package in a model, in place.

    What calls a layer then runs compiled code, whose passes over memory are fused; parameters,
    buffers and keys of the state dict stay. Nothing is compiled before the first forwards: the
    first ones take some seconds for each kind of layer. Every layer is one graph, for any image
    size: another size of 0 or 1, the mode and the type each compile once more. Layers that only
    differ in their weights share their code.

    A layer runs as before, not compiled, while population training or hooks look at it, and under
    transforms and exporters; MABN2d also where activation checkpointing may recompute it. A layer
    that torch cannot compile does so for good, and a warning names it. Copies of a compiled layer
    are not compiled. Layers that pool over ranks have a break in their graph at the collective.

    Args:
        model: already on its device; may be wrapped.
        options: those of torch.compile; ``dynamic`` is True unless said otherwise.

    Returns:
        the names of the layers.

    Raises:
        ValueError: where nothing can be compiled, with what torch says is missing.
    """
    layers: list[tuple[str, Any]] = [
        (name, layer) for name, layer in model.named_modules() if isinstance(layer, PopulationLayer)
    ]
    _try_compiler({buffer.device for _, layer in layers for buffer in layer.buffers()}, options)
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options = {"recompile_limit": _VERSIONS, **options}
    codes: dict[str, Callable[..., Any]] = {}
    for name, layer in layers:
        kind = f"{type(layer).__name__}({layer.extra_repr()})"
        method = next((m for cls, m in _WITHIN.items() if isinstance(layer, cls)), "_call_impl")
        if kind not in codes:
            pools = getattr(layer, "sync", False) and get_world_size(layer.process_group) > 1
            # Dynamo counts versions by code object: each kind of layer has one of its own.
            code = _call.__code__.replace(co_name=f"norm_{len(codes)}")
            chosen = {"dynamic": True, "fullgraph": not pools, **options}
            codes[kind] = torch.compile(FunctionType(code, globals()), **chosen)
        plain = getattr(type(layer), method)
        compiled = _Compiled(name or kind, layer, plain, codes[kind])
        # as nn.Module.compile does
        vars(layer)["_compiled_call_impl" if method == "_call_impl" else method] = compiled
    return [name for name, _ in layers]


def _call(plain: Callable[..., Any], layer: Any, *args: Any, **kwargs: Any) -> Any:
    return plain(layer, *args, **kwargs)


def _try_compiler(devices: set[torch.device], options: dict[str, Any]) -> None:
    """Compile a trifle on each device; a ValueError in one line where that fails."""
    if not hasattr(shapes, "use_duck_shape"):
        raise ValueError(f"torch {torch.__version__} is too old for compiled norm layers")
    chosen = {key: options[key] for key in ("backend", "mode", "options") if key in options}
    for device in devices:
        trifle = FunctionType(_call.__code__.replace(), globals())
        try:
            torch.compile(trifle, **chosen)(torch.neg, torch.zeros(2, device=device))
        except Exception as error:
            said = _first_line(error)
            raise ValueError(f"norm layers cannot be compiled for {device}: {said}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class _Compiled:
    """What calls one layer: the compiled code, or the layer's own where that cannot run."""

    def __init__(
        self, name: str, layer: Any, plain: Callable[..., Any], run: Callable[..., Any]
    ) -> None:
        self.name, self.layer, self.plain, self.run = name, layer, plain, run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layer = self.layer
        if torch.compiler.is_compiling() or _is_looked_at(layer, args):
            return self.plain(layer, *args, **kwargs)
        # undone below is what a recomputed forward writes: a graph cannot ask whether it is one
        again = layer.training and is_recomputing()
        kept = [(b, b.detach().clone()) for b in layer.buffers()] if again else []
        before = shapes.use_duck_shape
        shapes.use_duck_shape = False  # sizes that happen to be equal now may differ later
        try:
            return self.run(self.plain, layer, *args, **kwargs)
        except _FAILURES as error:
            result = self.plain(layer, *args, **kwargs)  # raises where the input is wrong
            logger.warning("%s is not compiled from now on: %s", self.name, _first_line(error))
            self.run = _call
            return result
        finally:
            shapes.use_duck_shape = before
            with torch.no_grad():
                for buffer, value in kept:
                    buffer.copy_(value)


def _is_looked_at(layer: Any, args: tuple[Any, ...]) -> bool:
    """Return whether somebody looks at how the layer computes, whom compiled code would escape."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    changed = "forward" in vars(layer) or any(getattr(layer, name) for name in hooks)
    if changed or layer._observer is not None:
        return True
    if isinstance(layer, MABN2d) and layer.training:
        # it remembers by what it normalised, for activation checkpointing that may run it again
        saving = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        if saving or is_recomputing() or not torch.is_grad_enabled():
            return True
    xs = args[:1] if args and isinstance(args[0], (Tensor, Proxy)) else args[0] if args else ()
    return (
        any(isinstance(x, Proxy) for x in xs)
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
    )
