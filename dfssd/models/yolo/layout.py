"""Layouts of networks (the `yaml` of a model, from a file or out of a .pt) are data, and must not be able to run code.

Ultralytics evaluates the word after `activation` as Python where its safe loading is not switched on, and calls whatever
its own module, `torch.nn` or torchvision know by the name of a layer. So a layout is read here first.
"""

from __future__ import annotations

import ast
from typing import Any

import torch
from torch import nn
from ultralytics.nn import tasks

from dfssd.errors import DfssdError

ROOMS = ("torch.nn.modules.", "ultralytics.nn.modules.", "torchvision.ops.")  # where layers come from
NETWORKS = {"TorchVision"}  # a layer that fetches a whole network by name
_TODO = "do not use this file: it holds code; take weights or a yaml from a source that you trust"


def require_safe_loader() -> None:
    """Raise a DfssdError where torch cannot load weights without running code: Ultralytics would do so silently."""
    if not hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):
        raise DfssdError(f"torch {torch.__version__} cannot load weights safely", todo="install torch 2.6 or newer")


def refuse_code(layout: Any, where: str) -> None:
    """Check that a layout names layers and an activation with literal arguments, and nothing else.

    Raises:
        DfssdError: it does not.
    """
    if not isinstance(layout, dict):
        raise DfssdError(f"its layout is a {type(layout).__name__}, not a table of layers", where=where, todo=_TODO)
    activation = layout.get("activation")
    if activation and not _is_activation(activation):
        raise DfssdError(f"its activation is no layer of torch.nn: {str(activation)[:200]!r}", where=where, todo=_TODO)
    backbone, head = layout.get("backbone"), layout.get("head")
    if not isinstance(backbone, list) or not isinstance(head, list):
        raise DfssdError(
            "its layout has no backbone or no head", where=where, todo="give an Ultralytics detection model"
        )
    for row in (*backbone, *head):
        name = row[2] if isinstance(row, list | tuple) and len(row) > 2 else row
        if not _is_layer(name):
            raise DfssdError(
                f"its layout names something that is no layer: {str(name)[:200]!r}", where=where, todo=_TODO
            )


def _is_activation(text: Any) -> bool:
    """Is it `nn.NAME(literals)` or `torch.nn.NAME(literals)` with the name of a layer?"""
    try:
        call = ast.parse(str(text).strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
        return False
    try:
        for value in (*call.args, *(k.value for k in call.keywords)):
            ast.literal_eval(value)
    except (ValueError, TypeError, RecursionError, MemoryError):
        return False
    room, name = ast.unparse(call.func.value), call.func.attr
    return room in ("nn", "torch.nn") and _is_layer(f"nn.{name}") and all(k.arg for k in call.keywords)


def _is_layer(name: Any) -> bool:
    """Does this name, as Ultralytics resolves it, stand for a layer?"""
    if not isinstance(name, str):
        return False
    if name.startswith("nn."):
        found = getattr(nn, name[3:], None)
    elif name.startswith("torchvision.ops."):
        import torchvision

        found = getattr(torchvision.ops, name[16:], None)
    else:
        found = getattr(tasks, name, None)
    known = isinstance(found, type) and issubclass(found, nn.Module) and found.__module__.startswith(ROOMS)
    return known and name not in NETWORKS
