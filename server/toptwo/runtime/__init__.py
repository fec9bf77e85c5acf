"""What a step computes: loading weights, the KV cache, batches, the runner, sampling."""
