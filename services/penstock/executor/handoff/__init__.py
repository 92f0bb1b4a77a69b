"""KV handed from the executor that prefills a sequence to the one that decodes it."""
