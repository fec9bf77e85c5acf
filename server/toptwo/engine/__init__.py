"""Who runs next and in which KV blocks. Free of torch: it plans steps and never computes them."""
