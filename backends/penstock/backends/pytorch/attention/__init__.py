"""Attention over a paged cache: the step's layout, the ways of computing it, and which of them a device is quickest with."""
