"""The parts that architectures are made of. A layer owns its weights and calls `toptwo_kernels.ops`."""
