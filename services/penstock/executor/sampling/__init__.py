"""The one sampler for logits on the host, shared by all backends."""

from penstock.executor.sampling.adjust import Adjustment
from penstock.executor.sampling.parameters import SamplingParameters
from penstock.executor.sampling.sampler import NotFinite, Row, Sampled, Sampler, TokenLogprob
from penstock.executor.sampling.told import ToldRow

__all__ = ["Adjustment", "NotFinite", "Row", "Sampled", "Sampler", "SamplingParameters", "TokenLogprob", "ToldRow"]
