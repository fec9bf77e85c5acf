"""Products of the native backend, for every format, shape and instruction set, against the reference's.

The quantised formats are a definition (`reference.quantization`): weights and activations are rounded as
it says, and what is left of a difference is the order of float32 additions. Products with float formats
take float32 activations.
"""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from native import FORMATS, INSTRUCTION_SETS, backend, dense, has_avx2, normal, random_routing
from toptwo_kernels import cpu, reference
from toptwo_kernels.cpu.linear import unpack
from toptwo_kernels.ops import GROUP, QUANTIZED, Activation, ExpertWeights, Matrix, Routing, WeightFormat
from toptwo_kernels.reference.quantization import LEVELS, quantize_rows

TOKENS = (1, 2, 3, 4, 5, 7, 8, 31, 300)
TOLERANCE = 1e-5  # of the largest result
POISON = 0xFF  # NaN in every float format, and a NaN scale in the quantised ones

every_instruction_set = pytest.mark.parametrize("isa", INSTRUCTION_SETS)
every_format = pytest.mark.parametrize("weight_format", FORMATS)


def test_this_processors_instruction_sets_were_built() -> None:
    assert "scalar" in cpu.instruction_sets()
    assert ("avx2" in cpu.instruction_sets()) == has_avx2()


# --- Packing --------------------------------------------------------------------------------------

SHAPES = [(1, 1, 1), (1, 5, 7), (1, 8, 32), (3, 13, 33), (2, 16, 100), (1, 67, 96)]


@every_instruction_set
@every_format
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packing_is_the_references_rounding(
    isa: str, weight_format: WeightFormat, source: torch.dtype, shape: tuple[int, int, int]
) -> None:
    ops = backend(isa)
    weight = (normal(*shape) / 20).to(source)
    got = unpack(ops.tape, ops.pack(weight, weight_format))
    check_rounding(got, weight, weight_format)


def check_rounding(got: Tensor, weight: Tensor, weight_format: WeightFormat) -> None:
    expected = reference.pack(weight, weight_format).data.float()
    if weight_format not in QUANTIZED:
        assert torch.equal(got, expected)
        return
    # The quantised formats choose among scales by their squared error. Where two are equal but for the
    # order of addition either may win; the choice must then be as good.
    pad = -weight.shape[-1] % GROUP
    groups = [
        torch.nn.functional.pad(t.float(), (0, pad)).unflatten(-1, (-1, GROUP))
        for t in (got, expected, weight)
    ]
    differs = (groups[0] != groups[1]).any(-1)
    assert differs.sum() <= 0.001 * differs.numel()
    errors = [(group - groups[2]).square().sum(-1)[differs] for group in groups[:2]]
    torch.testing.assert_close(*errors, rtol=1e-4, atol=0)


@every_instruction_set
@pytest.mark.parametrize("weight_format", QUANTIZED)
def test_packing_many_groups_is_the_references_rounding(isa: str, weight_format: WeightFormat) -> None:
    """Enough groups to meet rare ties, of every scale, with outliers, of one sign, and of zeros."""
    weight = normal(64, 640) * torch.logspace(-4, 1, 64)[:, None]
    weight[:, 5::97] *= 12
    weight[8:16] = weight[8:16].abs()
    weight[16:24] = -weight[16:24].abs()
    weight[24, 32:64] = 0
    weight[25] = 0.125  # every value of a group the same
    check_rounding(
        unpack(backend(isa).tape, backend(isa).pack(weight, weight_format)), weight[None], weight_format
    )


@every_instruction_set
@pytest.mark.parametrize("zero_point", [0, 3, 8, 15])
def test_weights_on_a_grid_of_four_bits_come_back(isa: str, zero_point: int) -> None:
    """As other quantisers left them, with a float16 scale; a group may use any part of the grid."""
    generator = torch.Generator().manual_seed(zero_point)
    rows = []
    for low in range(16):
        for high in range(low, 16):
            q = torch.randint(low, high + 1, (6, GROUP), generator=generator)
            q[:, 4], q[:, 20] = low, high
            rows.append((q - zero_point) * (0.001 + torch.rand(6, 1, generator=generator) / 8).half().float())
    weight = torch.cat(rows)
    assert torch.equal(reference.pack(weight, "int4").data[0], weight)
    assert torch.equal(unpack(backend(isa).tape, backend(isa).pack(weight, "int4"))[0], weight)


@every_instruction_set
@pytest.mark.parametrize(
    ("weight_format", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)]
)
def test_conversion_of_any_float(isa: str, weight_format: WeightFormat, dtype: torch.dtype) -> None:
    """Subnormals, overflows, infinities, NaN, ties between two neighbours: as torch rounds them."""
    ops = backend(isa)
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (40_000,), generator=generator).to(torch.int32)
    near = (
        torch.arange(0, 65_536, dtype=torch.int32).to(torch.int16).view(dtype).float()
    )  # every value there is
    ties = near.view(torch.int32) + (0x8000 if dtype == torch.bfloat16 else 0x1000)
    for values in (bits.view(torch.float32), near, ties.view(torch.float32)):
        weight = values[: len(values) // 50 * 50].view(-1, 50)
        got = unpack(ops.tape, ops.pack(weight, weight_format))[0]
        torch.testing.assert_close(got, weight.to(dtype).float(), rtol=0, atol=0, equal_nan=True)
        again = unpack(ops.tape, ops.pack(weight.to(dtype), "float32"))[0]
        torch.testing.assert_close(again, weight.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


@every_instruction_set
@every_format
@pytest.mark.parametrize("ffn", [1, 4, 8, 12, 20])
def test_paired_rows_come_back_as_gates_then_ups(isa: str, weight_format: WeightFormat, ffn: int) -> None:
    ops = backend(isa)
    weight = normal(3, 2 * ffn, 36)
    matrix = ops.pack(weight, weight_format, paired=True)
    assert matrix == Matrix(matrix.data, weight_format, 3, 2 * ffn, 36, paired=True)
    check_rounding(unpack(ops.tape, matrix), weight, weight_format)


def test_packing_does_not_depend_on_threads() -> None:
    weight = normal(3, 130, 100)
    for weight_format in FORMATS:
        one, three = (backend(INSTRUCTION_SETS[-1], n).pack(weight, weight_format).data for n in (1, 3))
        assert torch.equal(one, three)


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ValueError, match="even number of rows, not 7"):
        backend("scalar").pack(normal(2, 7, 8), "float32", paired=True)


# --- Linear ---------------------------------------------------------------------------------------


def product(x: Tensor, weight_OI: Tensor, weight_format: WeightFormat) -> Tensor:
    """x @ weight.T in float64, of x as the format rounds it."""
    return (quantize_rows(x, weight_format) if weight_format in QUANTIZED else x).double() @ weight_OI.T


def check_close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))


@every_instruction_set
@every_format
@pytest.mark.parametrize(
    "shape", [(1, 1), (5, 7), (8, 32), (13, 33), (24, 31), (67, 100), (100, 64), (203, 96)], ids=str
)
def test_linear(isa: str, weight_format: WeightFormat, shape: tuple[int, int]) -> None:
    ops = backend(isa)
    matrix = ops.pack(normal(*shape) / 20, weight_format)
    weight = dense(ops, matrix)[0]
    for num_tokens in TOKENS:
        x = normal(num_tokens, shape[1], seed=num_tokens)
        expected = product(x, weight, weight_format)
        check_close(ops.linear(x, matrix), expected)
        bias = 5 * normal(shape[0], seed=1)
        check_close(ops.linear(x, matrix, bias), expected + bias)


@every_instruction_set
@every_format
@pytest.mark.parametrize("rest", [0, 5, 16])
@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 13, 33), (5, 140, 64)], ids=str)
def test_linear_per_head(
    isa: str, weight_format: WeightFormat, shape: tuple[int, int, int], rest: int
) -> None:
    heads, rows, cols = shape
    ops = backend(isa)
    matrix = ops.pack(normal(*shape) / 20, weight_format)
    weights = dense(ops, matrix)
    for num_tokens in TOKENS:
        x = normal(num_tokens, heads * (cols + rest), seed=num_tokens)
        got = ops.linear_per_head(x, matrix).unflatten(1, (heads, rows + rest))
        given = x.unflatten(1, (heads, cols + rest))
        parts = [product(given[:, n, :cols].contiguous(), weights[n], weight_format) for n in range(heads)]
        check_close(got[..., :rows], torch.stack(parts, 1))
        assert torch.equal(got[..., rows:], given[..., cols:])


@every_instruction_set
@every_format
def test_activations_of_any_size(isa: str, weight_format: WeightFormat) -> None:
    """Zeros, numbers without a finite inverse, and very large ones; also beside each other in a row."""
    ops = backend(isa)
    matrix = ops.pack(normal(16, 96), weight_format)
    x = normal(6, 96)
    x[0] = 0
    x[1] *= 1e-32
    x[2] *= 1e25
    x[3, :32], x[3, 32:64] = 0, 1e-38
    x[4, 7] = 1e6
    x[5] = 1.0
    got, expected = ops.linear(x, matrix), product(x, dense(ops, matrix)[0], weight_format)
    assert torch.equal(got[0], torch.zeros(16))
    for row in range(1, 6):
        # A row of the smallest numbers may be taken for zero, and is no larger in any case.
        floor = 1e-29 if row == 1 else 0.0
        torch.testing.assert_close(
            got[row].double(),
            expected[row],
            rtol=0,
            atol=floor + TOLERANCE * float(expected[row].abs().max()),
        )


# --- Experts --------------------------------------------------------------------------------------


def activate(gate: Tensor, up: Tensor, given: ExpertWeights) -> Tensor:
    """See `ops.Activation`."""
    if given.activation == "silu":
        return torch.nn.functional.silu(gate) * up
    if given.activation == "gelu_tanh":
        return torch.nn.functional.gelu(gate, approximate="tanh") * up
    gate, up = gate.clamp(max=given.limit), up.clamp(-given.limit, given.limit)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


def expected_experts(
    x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor, given: ExpertWeights
) -> tuple[Tensor, Tensor]:
    """The definition in float64, and which tokens have an intermediate value that may be rounded either way.

    Between the two products the quantised formats round once more. A value halfway between two steps goes
    the one way or the other by the last bit of what was computed before.
    """
    weight_format = given.down.format
    total = torch.zeros(len(x), down.shape[1], dtype=torch.float64)
    doubtful = torch.zeros(len(x), dtype=torch.bool)
    for expert in routing.ids_TK.unique().tolist():
        tokens, slots = (routing.ids_TK == expert).nonzero(as_tuple=True)
        both = product(x[tokens], gate_up[expert], weight_format)
        if given.gate_up_bias_EF is not None:
            both = both + given.gate_up_bias_EF[expert]
        hidden = activate(*both.chunk(2, -1), given)
        if weight_format in QUANTIZED:
            padded = torch.nn.functional.pad(hidden, (0, -hidden.shape[1] % GROUP)).unflatten(-1, (-1, GROUP))
            levels = LEVELS[weight_format]
            steps = levels * padded / padded.abs().amax(-1, keepdim=True).clamp(min=1e-30)
            doubtful[tokens] |= ((steps % 1 - 0.5).abs() < 3e-6 * levels).flatten(1).any(-1)
        result = product(hidden.float(), down[expert], weight_format)
        if given.down_bias_EH is not None:
            result = result + given.down_bias_EH[expert]
        total.index_add_(0, tokens, result * routing.weights_TK[tokens, slots].double()[:, None])
    return total, doubtful


def check_experts(
    isa: str,
    weight_format: WeightFormat,
    sizes: tuple[int, int, int],
    routing: Routing,
    *,
    poison: bool = True,
    **rule: Any,
) -> None:
    """rule: what else ExpertWeights have."""
    num_experts, hidden, ffn = sizes
    ops = backend(isa)
    gate_up = ops.pack(normal(num_experts, 2 * ffn, hidden, seed=1) / 4, weight_format, paired=True)
    down = ops.pack(normal(num_experts, hidden, ffn, seed=2) / 4, weight_format)
    weights = dense(ops, gate_up), dense(ops, down)
    if poison:
        for expert in set(range(num_experts)) - set(routing.ids_TK.unique().tolist()):
            for matrix in (gate_up, down):
                matrix.data.chunk(num_experts)[expert].fill_(POISON)
                assert dense(ops, matrix)[expert].isnan().any()
    x = normal(len(routing.ids_TK), hidden, seed=3)
    given = ExpertWeights(gate_up, down, **rule)
    got = ops.experts(x, routing, given)
    expected, doubtful = expected_experts(x, routing, *weights, given)
    most = float(expected.abs().max())
    sure = ~doubtful
    torch.testing.assert_close(got[sure].double(), expected[sure], rtol=0, atol=TOLERANCE * most)
    if weight_format in QUANTIZED:
        # One step of one value is a small part of the largest in its group.
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=2.5 / LEVELS[weight_format] * most)
    if weight_format == "int4":
        assert doubtful.sum() <= 1 + 0.2 * len(x)


@every_instruction_set
@every_format
@pytest.mark.parametrize(
    ("num_experts", "top_k", "hidden", "ffn"),
    [
        (1, 1, 8, 8),
        (3, 1, 40, 20),
        (5, 2, 64, 44),
        (8, 2, 33, 7),
        (5, 4, 24, 12),
        (40, 8, 36, 9),
        (4, 4, 72, 33),
    ],
)
def test_experts(
    isa: str, weight_format: WeightFormat, num_experts: int, top_k: int, hidden: int, ffn: int
) -> None:
    """Experts that no token chose hold NaN and must not be touched."""
    chosen = (
        [expert for expert in range(num_experts) if expert != 1]
        if num_experts > top_k
        else list(range(top_k))
    )
    for num_tokens in TOKENS:
        routing = random_routing(num_tokens, chosen, top_k, seed=num_tokens)
        check_experts(isa, weight_format, (num_experts, hidden, ffn), routing)


@every_instruction_set
@every_format
@pytest.mark.parametrize("activation", get_args(Activation))
@pytest.mark.parametrize("ffn", [8, 13, 20, 44])
def test_activations_and_biases(
    isa: str, weight_format: WeightFormat, activation: Activation, ffn: int
) -> None:
    """Biases of experts that no token chose are NaN, too."""
    hidden, biases = 33, [normal(5, size, seed=size) for size in (2 * ffn, 33)]
    for bias in biases:
        bias[[1, 4]] = torch.nan
    for num_tokens in TOKENS:
        routing = random_routing(num_tokens, [0, 2, 3], 2, seed=num_tokens)
        rule = {"activation": activation, "limit": 1.5}
        check_experts(isa, weight_format, (5, hidden, ffn), routing, **rule)
        rule.update(gate_up_bias_EF=biases[0], down_bias_EH=biases[1])
        check_experts(isa, weight_format, (5, hidden, ffn), routing, **rule)


@every_instruction_set
@every_format
@pytest.mark.parametrize("expert", [0, 3, 4])
def test_all_tokens_on_one_expert(isa: str, weight_format: WeightFormat, expert: int) -> None:
    for num_tokens in (1, 6, 65):
        check_experts(isa, weight_format, (5, 40, 20), random_routing(num_tokens, [expert], 1))


def test_an_expert_chosen_twice_by_a_token_counts_twice() -> None:
    ids = torch.tensor([[2, 2], [0, 2]])
    check_experts("scalar", "float32", (3, 16, 8), Routing(ids, torch.tensor([[0.3, 0.5], [0.25, 0.75]])))


def test_stacks_that_do_not_belong_together_are_refused() -> None:
    ops = backend("scalar")
    x, routing = normal(2, 8), random_routing(2, [0], 1)
    paired, plain = ops.pack(normal(1, 16, 8), "int8", paired=True), ops.pack(normal(1, 16, 8), "int8")
    down = ops.pack(normal(1, 8, 8), "int4")
    for gate_up, matrix in ((plain, plain), (paired, down)):
        with pytest.raises(ValueError, match="gate_up must be paired, and of down's format"):
            ops.experts(x, routing, ExpertWeights(gate_up, matrix))
    with pytest.raises(ValueError, match="unknown activation 'relu'"):
        ops.experts(x, routing, ExpertWeights(paired, paired, "relu"))
