"""The parity kit: whether a cluster that runs prefill and decoding apart answers as one that runs them together does."""
