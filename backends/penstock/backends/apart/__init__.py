"""Backends of other packages in a process of their own: one that hangs or dies there takes nothing with it."""
