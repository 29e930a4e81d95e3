"""A quantised base: codes by the formula, products and gradients against plain matrices, exact through chunks."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import infctx
from infctx.adapters import quantized_base
from infctx.adapters.base_weight import base_weight
from infctx.adapters.peft_adapters import attach_lora, attach_peft
from infctx.adapters.peft_kinds import PeftSettings
from infctx.adapters.quantized_base import QUANTIZED, dequantize_, quantize_, stored_bytes
from infctx.adapters.state_tuning import attach_state
from infctx.checkpoint.model_file import official_tensors, tensors_of
from infctx.data.chunking import Chunk, RowSlice, chunk_rows
from infctx.errors import CheckpointError, RecipeError
from infctx.export.verify import merge_difference
from infctx.model.finch import Finch
from infctx.model.linear import Linear
from infctx.model.quantized_linear import Int8Linear, QuantizedLinear
from infctx.model.state import ModelState
from infctx.training.bptt import ChunkObjective, backward_through_windows
from infctx.training.fabric_run import open_engine
from infctx.training.precision import apply_precision_

TARGETS = ["receptance", "key", "value", "gate", "output"]
TOKENS = torch.arange(40)[None] * 7 % 50
KINDS = list(QUANTIZED)
# Whose product is that with the dequantised matrix; bnb-int8 rounds the inputs, too.
OF_WEIGHTS_ALONE = ["int8", "nf4"]


def attach(model: Finch) -> object:
    """LoRA on everything and two kinds of raw parameters, with values that matter."""
    torch.manual_seed(9)
    adapter = attach_lora(model, rank=4, alpha=8, targets=TARGETS, train_also=["*.bonus", "*.decay_base"])
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapter


def matrices(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


@pytest.mark.parametrize("num_inputs", [1, 63, 64, 65, 128, 200])
def test_int8_codes_are_those_of_the_formula(num_inputs: int) -> None:
    matrix = torch.randn(600, num_inputs) * torch.rand(600, 1) * 5
    matrix[3, :64] = 0
    layer = Int8Linear.from_matrix(matrix)
    assert layer.weight.dtype == torch.int8
    assert layer.weight.shape == matrix.shape
    assert layer.scale.shape == (600, -(-num_inputs // 64))
    found = layer.dequantized()
    for first in range(0, num_inputs, 64):
        group = matrix[:, first : first + 64].double()
        step = group.abs().amax(1, keepdim=True) / 127
        expected = torch.where(step > 0, torch.round(group / step.clamp(min=1e-300)) * step, 0.0)
        # A quotient within float32 rounding of a half may go either way: half a step is what no code may exceed.
        difference = (found[:, first : first + 64] - group).abs()
        assert bool((difference <= 0.5001 * step).all())
        equal = (found[:, first : first + 64] - expected).abs() <= 1e-6 * step * 127
        assert float(equal.float().mean()) > 0.999
    # The largest of each group keeps its value.
    assert torch.equal(layer.weight.abs().amax(1) == 127, matrix.abs().amax(1) > 0)


# Rows of whole blocks, and others: of some, bitsandbytes reads wrong values back when it is told of rows.
@pytest.mark.parametrize("shape", [(96, 64), (33, 100), (7, 101), (64, 96), (32, 32), (64, 224), (5, 3)])
def test_nf4_codes_are_the_nearest_levels(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape)
    layer = QUANTIZED["nf4"].from_matrix(matrix)
    # Two codes to a byte, the first in the upper half, blocks of 64 in row order.
    codes = torch.stack([layer.weight.flatten() >> 4, layer.weight.flatten() & 15], 1).flatten()[: matrix.numel()]
    largest = torch.stack([block.abs().amax() for block in matrix.flatten().split(64)])
    scales = largest.repeat_interleave(64)[: matrix.numel()]
    nearest = (matrix.flatten() / scales)[:, None].sub(layer.levels).abs().argmin(1)
    assert float((nearest == codes).float().mean()) > 0.999
    expected = (layer.levels[codes.long()] * scales).view(shape)
    torch.testing.assert_close(layer.dequantized(), expected)
    torch.testing.assert_close(layer.dequantized(torch.bfloat16), expected.bfloat16(), rtol=1e-2, atol=0)
    assert layer.weight.numel() + 4 * layer.largest.numel() <= (matrix.numel() + 63) * 4.5 / 8


def test_bnb_int8_rounds_each_row_and_each_token() -> None:
    matrix, x = torch.randn(96, 64), torch.randn(2, 5, 64)
    x[1, 2] = 0
    layer = QUANTIZED["bnb-int8"].from_matrix(matrix)
    found = layer(x)

    def rounded(rows: Tensor) -> Tensor:
        step = rows.half().double().abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
        return torch.round(rows.half().double() / step) * step

    expected = rounded(x) @ rounded(matrix).t()
    # Codes that lie within rounding of a half may go either way: one step of one input.
    assert float((layer.dequantized() - rounded(matrix)).norm() / matrix.norm()) < 1e-3
    assert float((found - expected).norm() / expected.norm()) < 1e-3
    assert float((found - x @ matrix.t()).norm() / expected.norm()) > 5e-3


@pytest.mark.parametrize("kind", KINDS)
def test_product_and_gradient_are_those_of_the_dequantised_matrix(kind: str) -> None:
    layer = QUANTIZED[kind].from_matrix(torch.randn(70, 101)).double()
    x = torch.randn(3, 9, 101, dtype=torch.float64, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda t: t):
        found = layer(x)
    # Nothing is kept for the backward pass, the input of the product least of all.
    assert saved == []
    out_gradient = torch.randn_like(found)
    matrix = layer.dequantized(torch.float64)
    (gradient,) = torch.autograd.grad(found, x, out_gradient)
    torch.testing.assert_close(gradient, out_gradient @ matrix, rtol=1e-12, atol=1e-12)
    if kind in OF_WEIGHTS_ALONE:
        torch.testing.assert_close(found, F.linear(x, matrix), rtol=1e-12, atol=1e-12)
    assert layer(x[0, 0]).shape == (70,)
    for rows in (x.float(), x.float().flatten(0, 1)):
        torch.testing.assert_close(layer(rows).mul_(2).flatten(), 2 * layer(rows).flatten())
    for dtype in (torch.float32, torch.bfloat16):
        assert layer.float()(x.to(dtype)).dtype == dtype
        assert layer.dequantized(dtype).dtype == dtype


@pytest.mark.parametrize("version", ["6", "5.2", "goldfinch"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_through_chunks_is_exact(make_finch: Callable[..., Finch], kind: str, version: str) -> None:
    """Against autograd over the whole sequence, in float64, of the model with plain matrices of the same values."""
    model = make_finch(version, dtype=torch.float64, front="6" if version == "goldfinch" else None)
    quantize_(model, kind)
    plain = copy.deepcopy(model)
    if kind in OF_WEIGHTS_ALONE:
        dequantize_(plain)
        assert not matrices(plain)
    for one in (model, plain):
        attach(one)
        one.double()
    fresh = plain.fresh_state(1)
    state = ModelState(*(torch.randn(part.shape, dtype=torch.float64) for part in fresh.recurrent), *fresh.cache)
    leaves = state.leaves()
    logits, after = plain(TOKENS, leaves)
    loss = F.cross_entropy(logits[0, :-1], TOKENS[0, 1:])
    loss.backward()
    step = infctx.chunked_step(model, TOKENS, state=state, chunk_tokens=7)
    torch.testing.assert_close(step.loss.double(), loss.detach(), rtol=1e-6, atol=0)
    for found, expected in zip(step.state, after, strict=True):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-10, atol=1e-12)
    expected_gradients = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    found_gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert found_gradients.keys() == expected_gradients.keys()
    expected_gradients |= {f"state {i}": leaf.grad for i, leaf in enumerate(leaves.recurrent)}
    found_gradients |= {f"state {i}": gradient for i, gradient in enumerate(step.initial_state_gradient)}
    for name, expected in expected_gradients.items():
        assert float((found_gradients[name] - expected).norm() / expected.norm()) < 1e-10, name
    assert all(module.weight.grad is None for module in matrices(model).values())


def make_chunks() -> list[Chunk]:
    tokens = torch.randint(0, 50, (51,), generator=torch.Generator().manual_seed(3)).numpy()
    row = RowSlice(
        tokens=tokens[:-1],
        targets=tokens[1:],
        weights=torch.ones(50).numpy(),
        starts=torch.zeros(50, dtype=torch.bool).numpy(),
    )
    return list(chunk_rows([row, row], chunk_tokens=16).chunks)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_both_sweeps_and_recomputed_layers_compute_the_same(
    make_finch: Callable[..., Finch], kind: str, precision: str
) -> None:
    """Also behind a validation, which is where a layer of bitsandbytes becomes another function."""
    model = make_finch("6")
    quantize_(model, kind)
    attach(model)
    before = {name: module.weight.clone() for name, module in matrices(model).items()}
    engine = open_engine(devices=1, strategy="single", precision=precision)
    apply_precision_(model, engine.precision)
    wrapped = engine.setup(
        ChunkObjective(model), lambda: torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    )
    gradients, losses = [], []
    for recomputed in (False, True, False):
        model.train()
        model.recompute_layers(recomputed)
        model.zero_grad()
        state = ModelState.zeros(model.config, 2, dtype=torch.float32, device=engine.device)
        result = backward_through_windows(
            wrapped, make_chunks(), state, window="document", weight_total=100.0, backward=engine.backward
        )
        if engine.device.type == "cpu":
            assert float(result.largest_difference) == 0
        losses.append(result.loss_sum)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
        model.eval()
        with torch.no_grad():
            model(TOKENS.to(engine.device))
    for other in (1, 2):
        assert torch.equal(losses[0], losses[other])
        assert all(torch.equal(gradients[0][name], gradients[other][name]) for name in gradients[0])
    assert all(bool(gradient.any()) for gradient in gradients[0].values())
    for name, module in matrices(model).items():
        assert torch.equal(module.weight.cpu(), before[name])
        assert {buffer.dtype for buffer in module.buffers()} == {torch.float32}


@pytest.mark.parametrize("kind", OF_WEIGHTS_ALONE)
def test_merged_is_what_was_trained(make_finch: Callable[..., Finch], kind: str) -> None:
    model, original = make_finch("6"), make_finch("6")
    names = {name: (p.shape, p.dtype) for name, p in model.named_parameters()}
    error = quantize_(model, kind)
    adapter = attach(model)
    layer = model.blocks[1].time_mix.key
    delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 2
    expected_weight = (base_weight(layer.base_layer) + delta).detach()
    expected, _ = model(TOKENS)
    adapter.merge_()
    torch.testing.assert_close(model(TOKENS)[0], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.blocks[1].time_mix.key.weight, expected_weight)
    assert {name: (p.shape, p.dtype) for name, p in model.named_parameters()} == names
    assert all(type(m) is Linear for m in model.modules() if isinstance(m, nn.Linear))
    # The other merge: the same addition on the weights of the file.
    attach(original).merge_()
    difference = merge_difference(tensors_of(model), tensors_of(original))
    found = {name: p.detach() for name, p in model.named_parameters()}
    expected = {name: p.detach() for name, p in original.named_parameters()}
    by_hand = {name: float((found[name] - p).norm() / p.norm()) for name, p in expected.items()}
    assert difference.weight == pytest.approx(max(by_hand.values()), rel=1e-5)
    assert by_hand["embedding.weight"] == by_hand["head.weight"] == 0
    low, high = {"int8": (0.003, 0.01), "nf4": (0.06, 0.12)}[kind]
    assert low < difference.weight < high
    # Of these matrices, most of which the addition makes a little larger.
    assert low < error < high
    assert difference.logit > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_blocks_matrices_are_quantised_and_nothing_else(make_finch: Callable[..., Finch], kind: str) -> None:
    model = make_finch("6", n_embd=64, head_size=16, dim_ffn=224)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    num_weights = sum(module.weight.numel() for module in model.blocks.modules() if isinstance(module, nn.Linear))
    bytes_before = stored_bytes(model)
    quantize_(model, kind)
    changed = {name for name, p in model.named_parameters() if p.dtype != torch.float32}
    assert changed == {f"{name}.weight" for name in matrices(model)}
    assert len(changed) == 3 * 8
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name not in changed)
    bits = (bytes_before - stored_bytes(model)) * 8 / num_weights
    # Of bnb-int8, a row has one scale, here for 64 or 224 inputs; the levels of nf4 are 64 bytes a matrix.
    assert bits == pytest.approx({"int8": 32 - 8.5, "nf4": 32 - 4.5, "bnb-int8": 32 - 8.4}[kind], abs=0.25)
    # What is saved is what is computed, never codes.
    saved = official_tensors(model)["blocks.0.att.key.weight"]
    assert torch.equal(saved, base_weight(model.blocks[0].time_mix.key))
    assert saved.dtype == torch.float32


def test_the_same_codes_from_every_dtype_that_holds_the_values(make_finch: Callable[..., Finch]) -> None:
    stored = make_finch("6").bfloat16()
    for kind in KINDS:
        models = [copy.deepcopy(stored), copy.deepcopy(stored).float()]
        for model in models:
            quantize_(model, kind)
        for first, second in zip(*(matrices(model).values() for model in models), strict=True):
            assert torch.equal(first.weight, second.weight)
            assert all(torch.equal(a, b) for a, b in zip(first.buffers(), second.buffers(), strict=True))


def test_what_is_stored_quantised_is_not_trained(make_finch: Callable[..., Finch]) -> None:
    model = make_finch("6")
    quantize_(model, "int8")
    with pytest.raises(
        RecipeError, match=r"adapter\.train_also: blocks\.0\.channel_mix\.key\.weight is stored quantised"
    ):
        attach_lora(model, rank=4, alpha=8, targets=["value"], train_also=["*.key.weight"])
    attach_lora(model, rank=4, alpha=8, targets=["head"], train_also=["embedding.weight"])


def test_weights_that_cannot_be_quantised_are_refused(make_finch: Callable[..., Finch]) -> None:
    for value, kinds in ((float("nan"), KINDS), (float("-inf"), KINDS)):
        for kind in kinds:
            model = make_finch("6")
            model.blocks[1].channel_mix.value.weight.data[3, 5] = value
            with pytest.raises(CheckpointError, match=r"blocks\.1\.channel_mix\.value\.weight: .* not finite"):
                quantize_(model, kind)
    model.blocks[1].channel_mix.value.weight.data[3, 5] = 1e5
    with pytest.raises(RecipeError, match=r"bnb-int8 holds weights up to 65,504, and this model has one of 100,000"):
        quantize_(model, "bnb-int8")


def test_without_bitsandbytes_its_kinds_are_refused(
    make_finch: Callable[..., Finch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for kind in ("nf4", "bnb-int8"):
        with pytest.raises(RecipeError, match=r"pip install 'infctx\[bitsandbytes\]'"):
            quantize_(make_finch("6"), kind)
    quantize_(make_finch("6"), "int8")


def test_int8_imports_neither_bitsandbytes_nor_peft() -> None:
    code = (
        "import sys, torch; from infctx.adapters import quantized_base, base_weight; "
        "from infctx.model.quantized_linear import Int8Linear; Int8Linear.from_matrix(torch.randn(3, 5)); "
        "sys.exit('bitsandbytes' in sys.modules or 'peft' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


def test_a_library_that_does_not_run_here_or_is_wrong_is_refused(
    make_finch: Callable[..., Finch], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = quantized_base.Nf4Linear

    def without_kernel(self: QuantizedLinear, x: Tensor) -> Tensor:
        raise NotImplementedError("no kernel")

    product, dequantized = layer.product, layer.dequantized
    monkeypatch.setattr(layer, "product", without_kernel)
    with pytest.raises(RecipeError, match=r"nf4 does not run on cpu: no kernel\. Use int8"):
        quantize_(make_finch("6"), "nf4")
    wrong = {
        "products": ("product", lambda self, x: product(self, x).flip(1)),
        "matrices": ("dequantized", lambda self, dtype=torch.float32: dequantized(self, dtype).flip(0)),
    }
    for what, (method, broken) in wrong.items():
        with monkeypatch.context() as patch:
            patch.setattr(layer, "product", product)
            patch.setattr(layer, method, broken)
            with pytest.raises(RecipeError, match=rf"nf4 computes wrong {what} on cpu: a relative error of 1\.\d"):
                quantize_(make_finch("6"), "nf4")


@pytest.mark.parametrize("kind", ["rslora", "state"])
def test_other_kinds_on_codes(make_finch: Callable[..., Finch], kind: str) -> None:
    model = make_finch("6")
    quantize_(model, "int8")
    before, _ = model(TOKENS)
    if kind == "state":
        adapter: object = attach_state(model)
    else:
        adapter = attach_peft(model, PeftSettings(kind=kind, rank=4, alpha=8.0, dropout=0.0, targets=TARGETS))
    assert torch.equal(model(TOKENS)[0], before)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    attached, _ = model(TOKENS)
    assert float((attached - before).detach().abs().max()) > 0.01
    names = ["blocks.1.time_mix.key.weight", "blocks.1.time_mix.bonus"]
    values = {name: adapter.merged_parameter(name).detach() for name in names}  # type: ignore[attr-defined]
    adapter.merge_()  # type: ignore[attr-defined]
    torch.testing.assert_close(model(TOKENS)[0], attached, rtol=0, atol=1e-5)
    if kind == "state":  # The matrices stay as they are stored, and are read as the numbers they stand for.
        layer = model.blocks[1].time_mix.key
        assert torch.equal(values["blocks.1.time_mix.key.weight"], layer.dequantized())
        assert adapter.merged_parameter("blocks.1.time_mix.initial_state").any()  # type: ignore[attr-defined]
    else:
        for name, value in values.items():
            torch.testing.assert_close(model.get_parameter(name).detach(), value)


@pytest.mark.parametrize("kind", ["dora", "pissa", "olora", "miss"])
def test_kinds_that_need_the_values_are_refused(make_finch: Callable[..., Finch], kind: str) -> None:
    model = make_finch("6")
    quantize_(model, "int8")
    with pytest.raises(RecipeError, match=f"adapter.kind: {kind}.*quantised"):
        attach_peft(model, PeftSettings(kind=kind, rank=4, alpha=8.0, dropout=0.0, targets=TARGETS))
