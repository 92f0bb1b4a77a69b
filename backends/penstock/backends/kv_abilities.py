"""What a model can do with its KV beside the contract's `GenerativeModel`, as its `KvSpec` says."""

from __future__ import annotations

from penstock.backends.contract import GenerativeModel, NativeKv, PrefixCopies

__all__ = ["native_kv", "prefix_copies"]


def native_kv(model: GenerativeModel) -> NativeKv | None:
    """The model, if its blocks can go to another one as they are.

    Raises:
        TypeError: its cache says so, and the methods are not there.
    """
    if not model.kv.native_layout:
        return None
    if not isinstance(model, NativeKv):
        raise TypeError("kv.native_layout: names a form, and export_blocks and import_blocks are not there")
    return model


def prefix_copies(model: GenerativeModel) -> PrefixCopies | None:
    """The model, if its sequences have copies of cached prefixes; None: they share them.

    Raises:
        TypeError: its cache says so, and the method is not there.
    """
    if not model.kv.copies_prefixes:
        return None
    if not isinstance(model, PrefixCopies):
        raise TypeError("kv.copies_prefixes: says that prefixes are copied, and copy_prefix is not there")
    return model
