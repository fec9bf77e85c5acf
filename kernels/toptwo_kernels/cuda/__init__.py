"""The CUDA backend: fused Triton kernels, and decode steps that are replayed as CUDA graphs.

A row's result does not depend on the step's other rows: products walk their inputs in one order, attention
adds up fixed splits of a context in order, and no float is added atomically. Under Triton's interpreter
(`TRITON_INTERPRET=1`) the same kernels run on tensors in main memory, slowly.

`backend.create` makes it; `support` says without Triton whether it can be made.
"""
