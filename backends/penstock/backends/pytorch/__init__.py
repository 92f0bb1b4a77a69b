"""PyTorch: the readable reference, on the CPU and, through the same code, on CUDA and ROCm."""

from penstock.backends.pytorch.registration import REGISTRATION

__all__ = ["REGISTRATION"]
