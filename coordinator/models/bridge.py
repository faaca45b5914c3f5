"""Lets a synchronous forward pass await: transformers' model runs in a greenlet and hands awaitables to a coroutine.

The experts' function deep inside the model cannot be a coroutine. It switches to the greenlet that started the
forward pass with an awaitable; the coroutine there awaits it on the event loop, while other sequences run, and
switches back with the result (SQLAlchemy's way). What belongs to one forward pass is an attribute of its greenlet,
never a global, so that passes may take turns on one thread.
"""

import contextvars
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast

import torch
from greenlet import getcurrent, greenlet

from .base import ExpertBackend

T = TypeVar("T")


class Forward(greenlet):
    """The greenlet of one forward pass; knows who computes its experts."""

    def __init__(self, function: Callable[[], Any], experts: ExpertBackend) -> None:
        super().__init__(function)
        self.experts = experts
        # transformers keeps per-call state in context variables (output capturing): each pass has its own.
        self.gr_context = contextvars.copy_context()


async def run(function: Callable[[], T], experts: ExpertBackend) -> T:
    """Calls `function` in a greenlet in which `await_in_forward` works; returns or raises what it does.

    Cancellation is raised inside `function`, at the place where it waits.
    """
    forward = Forward(function, experts)
    result = forward.switch()
    while not forward.dead:
        try:
            value = await result
        except BaseException as error:  # cancellation too: the forward pass unwinds and re-raises it
            result = forward.throw(error)
        else:
            result = forward.switch(value)
    return cast(T, result)


def current() -> Forward:
    """The forward pass that is running. Raises RuntimeError outside of one."""
    forward = getcurrent()
    if not isinstance(forward, Forward):
        raise RuntimeError("Routed experts are computed only inside a trunk's forward pass.")
    return forward


def await_in_forward(awaitable: Awaitable[torch.Tensor]) -> torch.Tensor:
    """Waits for `awaitable` without blocking the event loop; only inside `run`."""
    parent = getcurrent().parent
    assert parent is not None
    return cast(torch.Tensor, parent.switch(awaitable))
