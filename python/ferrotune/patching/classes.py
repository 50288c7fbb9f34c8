"""Subclasses that keep everything of a stock layer but its forward.

A layer is replaced by giving the instance such a class, and restored by giving it back its own:
parameters, hooks, names, state dicts and all other methods stay the layer's.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

_SUBCLASSES: dict[tuple[type, type], type[nn.Module]] = {}


class Replaced(nn.Module):
    """Base of the classes that bring a forward; a replaced layer is an instance of it."""

    ferrotune_stock: ClassVar[type[nn.Module]]
    ferrotune_block: ClassVar[bool] = False  # whether it stands around linear layers

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The subclass is made at run time, so that copies and pickles name what it is made of.
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        made_of = (mixin_of(type(self)), self.ferrotune_stock)
        return (_new, made_of, *reduced[2:])


def subclass(stock: type[nn.Module], mixin: type[Replaced]) -> type[nn.Module]:
    """``stock`` with ``mixin`` before it; one class for each pair."""
    found = _SUBCLASSES.get((mixin, stock))
    if found is None:
        # PEFT and others ask for classes by their short name, and repr shows it.
        names = {
            "__module__": mixin.__module__,
            "__qualname__": stock.__qualname__,
            "__doc__": stock.__doc__,
            "ferrotune_stock": stock,
        }
        found = type(stock.__name__, (mixin, stock), names)
        _SUBCLASSES[mixin, stock] = found
    return found


def without(cls: type[nn.Module], stock: type[nn.Module]) -> type[nn.Module]:
    """``stock`` for a class that `subclass` made of it; for what another library derived from such
    a class (FSDP2's ``fully_shard``), the same derived from ``stock``."""
    if "ferrotune_stock" in cls.__dict__:
        return stock
    bases = tuple(
        stock if getattr(base, "ferrotune_stock", None) is stock else base for base in cls.__bases__
    )
    names = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    return type(cls.__name__, bases, names)


def mixin_of(cls: type) -> type[Replaced]:
    """The class that a subclass got its forward from."""
    return next(base for base in cls.__mro__ if Replaced in base.__bases__)


def stock_of(module: nn.Module) -> type[nn.Module]:
    """The class of ``module`` before it was replaced; its class if it was not."""
    return module.ferrotune_stock if isinstance(module, Replaced) else type(module)


def defined_in(cls: type, module: str, name: str) -> bool:
    """Whether the forward of ``cls`` is that of class ``name`` in ``module``; imports nothing."""
    forward = cls.forward  # type: ignore[attr-defined]
    return bool(forward.__module__ == module and forward.__qualname__ == f"{name}.forward")


def _new(mixin: type[Replaced], stock: type[nn.Module]) -> nn.Module:
    made = subclass(stock, mixin)
    return made.__new__(made)
