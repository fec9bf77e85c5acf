"""toptwo_kernels: how the operations of a Mixture-of-Experts model are computed.

`ops` is the contract, `registry` loads a backend, `reference` is the truth that every other backend
is tested against. This package imports nothing of `toptwo`.
"""
