"""Linear layers and attention in bfloat16 in calibration: near float32's, and nothing of a block stays behind."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from qtoolkit.calibration import halves, processor, products, twin
from qtoolkit.calibration.hessian import NARROW, Hessian
from qtoolkit.kernels.cpu.rounding import library as native
from qtoolkit.stages import Block, QuantizedWeight


def block() -> Block:
    torch.manual_seed(0)
    module = nn.Module()
    module.wide = nn.Linear(256, 192)
    module.router = nn.Linear(256, 8, bias=False)
    return Block("layers.0", module, ("wide",), ())


@torch.inference_mode()
def test_outputs_are_those_of_float32_but_for_bfloat16s_rounding() -> None:
    x, given = torch.randn(50, 256), block()
    wanted = given.layer("wide")(x), given.layer("router")(x)
    halves.halve(given)
    wide = given.layer("wide")(x)
    assert wide.dtype == torch.float32
    assert 0 < float((wide - wanted[0]).norm() / wanted[0].norm()) < 2**-8
    assert torch.equal(given.layer("router")(x), wanted[1])  # small differences decide there


@pytest.mark.skipif(next(iter(native.sums()), "") != "avx512", reason="whole numbers are for AVX512-VNNI without AMX")
@pytest.mark.parametrize("shape", [(512, 256), (2, 256, 256)])
def test_whole_numbers_multiply_forwards_and_backwards(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halves, "pays", lambda device: False)
    given = block()
    given.module.requires_grad_(False)
    x, behind = torch.randn(shape, requires_grad=True), torch.randn(*shape[:-1], 192)
    layer = given.linear("wide")
    weight, bias = layer.weight.double(), layer.bias.double()
    halves.hasten(given, torch.device("cpu"))
    with products.fast(torch.device("cpu"), 256):
        out = layer(x)
        (gradient,) = torch.autograd.grad(out, x, behind)
        with torch.no_grad():
            assert torch.equal(layer(x), out)
    for found, wanted in ((out, x.double() @ weight.T + bias), (gradient, behind.double() @ weight)):
        assert found.shape == wanted.shape
        assert 1e-6 < float((found - wanted).norm() / wanted.norm()) < 2e-3


@torch.inference_mode()
def test_a_layer_given_another_weight_computes_with_it() -> None:
    given = halves.halve(block())
    layer = given.linear("wide")
    layer.weight.data = torch.zeros(192, 256)
    assert torch.equal(layer(torch.randn(3, 256)), layer.bias.expand(3, -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@torch.inference_mode()
def test_a_packed_layer_computes_as_its_float32_weight_does_and_holds_half_of_it(dtype: torch.dtype) -> None:
    given, x = halves.halve(block()), torch.randn(50, 256)
    layer = given.linear("wide")
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (192, 256), generator=draw, dtype=torch.int8)
    weight = QuantizedWeight(codes, (torch.rand(192, 2, generator=draw) / 50).to(dtype))
    layer.weight.data = weight.dequantize()
    wanted = layer(x)
    with twin.packed(layer, weight):
        assert not layer.weight.numel()
        assert torch.equal(layer(x), wanted)
        assert not layer.weight.numel()
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer(x), wanted)
    router = given.linear("router")
    assert halves.dtype(router) == torch.float32


def attending(config: LlamaConfig) -> tuple[Block, Callable[[Tensor], Tensor]]:
    """Return a block with one attention, and its output for hidden states [1, tokens, 256]."""
    module = nn.Module()
    module.self_attn = LlamaAttention(config, 0).eval()
    rotary = LlamaRotaryEmbedding(config)

    def run(x: Tensor) -> Tensor:
        return module.self_attn(x, rotary(x, torch.arange(x.shape[1])[None]), None)[0]

    return Block("layers.0", module, (), ()), run


def test_attention_is_that_of_float32_but_for_bfloat16s_rounding() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, num_key_value_heads=2, attn_implementation="sdpa")
    given, run = attending(config)
    x = torch.randn(1, 40, 256)
    with torch.inference_mode():
        wanted = run(x)
    for layer in given.module.self_attn.children():  # not linear ones, so that only attention changes
        layer.__class__ = type("Same", (nn.Linear,), {})
    halves.halve(given)
    with torch.inference_mode():
        got = run(x)
    assert got.dtype == torch.float32
    assert 0 < float((got - wanted).norm() / wanted.norm()) < 2**-7
    x.requires_grad_()
    assert torch.equal(run(x), wanted)  # gradients come from float32


def test_attention_of_another_kind_stays() -> None:
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, attn_implementation="eager")
    halves.halve(attending(config)[0])
    assert config._attn_implementation == "eager"


@pytest.mark.parametrize("length", [129, 200, 512, 513])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_a_token_attends_to_itself_and_those_before_it(length: int, heads: tuple[int, int]) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, count, length, 32) for count in (heads[0], heads[1], heads[1]))
    wanted = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3, enable_gqa=True)
    module = nn.Module()
    module.num_key_value_groups = heads[0] // heads[1]
    got, _ = halves._attend(module, query, key, value, None, scaling=0.3)
    assert got.shape == (2, length, 4, 32)
    assert float((got - wanted.transpose(1, 2)).norm() / wanted.norm()) < 2**-7


@pytest.mark.parametrize("length", [129, 200, 512, 513])
def test_float32_in_parts_is_float32(length: int) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, length, 32) for heads in (4, 2, 2))
    wanted = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3, enable_gqa=True)
    module = nn.Module()
    module.num_key_value_groups = 2
    got, _ = halves._attend_in_parts(module, query, key, value, None, scaling=0.3)
    torch.testing.assert_close(got, wanted.transpose(1, 2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "amx", "pays"), [
    ("Intel Xeon", True, True), ("Intel Xeon", False, False), ("AMD EPYC 9B45", False, True), ("", None, True),
])  # fmt: skip
def test_bfloat16_pays_where_its_units_are_faster(
    name: str, amx: bool | None, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, attn_implementation="sdpa")
    known = {} if amx is None else {"cpu_name": name, "amx_bf16": amx}
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    given = halves.hasten(attending(config)[0], torch.device("cpu"))
    assert halves.pays(torch.device("cpu")) == pays
    assert config._attn_implementation == (halves.ATTENTION if pays else halves.PARTED)
    assert halves.dtype(given.module.self_attn.q_proj) == (torch.bfloat16 if pays else torch.float32)
    assert not halves.pays(torch.device("meta"))


@pytest.mark.parametrize(("text", "pays"), [
    ("vendor_id : GenuineIntel\nflags : avx512_bf16", False),
    ("vendor_id : GenuineIntel\nflags : avx512_bf16 amx_bf16", True),
    ("vendor_id : AuthenticAMD\nflags : avx512_bf16", True),
    (None, True),
])  # fmt: skip
def test_where_pytorch_is_too_old_to_tell_linux_does(
    text: str | None, pays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    if text is not None:
        processor.CPUINFO.write_text(text)
    assert halves.pays(torch.device("cpu")) == pays


def test_a_bias_by_position_is_not_lost() -> None:
    query, key, value = torch.randn(3, 1, 2, 200, 32)
    module, bias = nn.Module(), torch.randn(1, 2, 200, 200)
    plain, _ = halves._attend_in_parts(module, query, key, value, None)
    found, _ = halves._attend_in_parts(module, query, key, value, None, position_bias=bias)
    wanted = F.scaled_dot_product_attention(query, key, value, bias + torch.full((200, 200), -torch.inf).triu(1))
    torch.testing.assert_close(found, wanted.transpose(1, 2), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-2)


def test_a_block_on_another_device_stays_as_it_is() -> None:
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, attn_implementation="sdpa")
    given = halves.hasten(attending(config)[0], torch.device("meta"))
    assert config._attn_implementation == "sdpa"
    assert halves.dtype(given.module.self_attn.q_proj) == torch.float32


def test_without_an_order_a_token_attends_to_all() -> None:
    query, key, value = torch.randn(3, 1, 2, 200, 32)
    wanted = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    module = nn.Module()
    module.is_causal = False
    got, _ = halves._attend(module, query, key, value, None)
    assert float((got - wanted).norm() / wanted.norm()) < 2**-7


@pytest.mark.parametrize("lowest", [-torch.inf, torch.finfo(torch.float32).min])
def test_a_mask_that_leaves_a_token_nothing_makes_no_nan(lowest: float) -> None:
    module = nn.Module()
    query, key, value = torch.randn(3, 1, 2, 5, 32)
    mask = torch.full((1, 1, 5, 5), lowest).triu(1)
    mask[..., 2, :] = torch.finfo(torch.float32).min
    got, _ = halves._attend(module, query, key, value, mask)
    assert got.dtype == torch.float32
    assert got.isfinite().all()


def test_gradients_pass() -> None:
    x, given = torch.randn(5, 256, requires_grad=True), block()
    (wanted,) = torch.autograd.grad(given.layer("wide")(x).square().sum(), x)
    (found,) = torch.autograd.grad(halves.halve(given).layer("wide")(x).square().sum(), x)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.02 * float(wanted.abs().max()))


def test_a_block_is_freed_as_soon_as_nobody_has_it() -> None:
    given = halves.halve(block())
    layer = weakref.ref(given.layer("wide"))
    del given
    assert layer() is None  # without a run of the garbage collector: a block of a large model is gigabytes


@pytest.mark.parametrize("pays", [True, False])
def test_products_of_samples_are_float32(pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halves, "pays", lambda device: pays)
    left, right = torch.randn(40, 300), torch.randn(300, 20).bfloat16()
    found, wanted = halves.product(left, right), left.double() @ right.double()
    assert found.dtype == torch.float32
    assert float((found - wanted).norm() / wanted.norm()) < (2**-8 if pays else 1e-6)


@pytest.mark.parametrize("k", [1, 100, 300, NARROW - 1, NARROW + 3])
def test_a_hessian_summed_in_parts_is_whole(k: int) -> None:
    torch.manual_seed(k)
    batches = [torch.randn(rows, k) for rows in (30, 1, 17)]
    hessian = Hessian(k)
    for number, batch in enumerate(batches):
        with torch.inference_mode(number == 1):
            hessian.update(batch)
        assert torch.equal(hessian.matrix, hessian.matrix.T)  # looked at in between, it goes on
    x = torch.cat(batches).double()
    torch.testing.assert_close(hessian.matrix.double(), 2 / len(x) * x.T @ x, rtol=1e-5, atol=1e-5)
    assert not hessian.dead.any()


def test_a_hessian_made_in_inference_mode_is_read_outside() -> None:
    with torch.inference_mode():
        hessian = Hessian(200)
        hessian.update(torch.randn(50, 200))
    assert torch.equal(hessian.matrix, hessian.matrix.T)


def test_weights_are_held_as_they_are_multiplied_and_given_back() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.Linear(128, 128), torch.nn.Linear(128, 2))
    for layer in module[:2]:
        layer.__class__ = halves._Halved
    before = [layer.weight.data for layer in module]
    x = torch.randn(3, 128)
    expected = module(x)
    with halves.narrowed(module, but=[module[1]]):
        assert [layer.weight.dtype for layer in module] == [torch.bfloat16, torch.float32, torch.float32]
        assert torch.equal(module(x), expected)
    assert all(layer.weight.data.data_ptr() == weight.data_ptr() for layer, weight in zip(module, before, strict=True))


@pytest.mark.parametrize("shape", [(0, 256), (2, 0, 256), (256,)])
def test_a_layer_takes_no_tokens_and_one_without_a_dimension(shape: tuple[int, ...]) -> None:
    given = halves.hasten(block(), torch.device("cpu"))
    with torch.inference_mode():
        assert given.layer("wide")(torch.zeros(shape)).shape == (*shape[:-1], given.layer("wide").out_features)


def test_gradients_of_keys_and_values_pass() -> None:
    query, key, value = torch.randn(3, 1, 2, 200, 32)
    key.requires_grad_()
    found, _ = halves._attend_in_parts(nn.Module(), query, key, value, None)
    assert found.requires_grad
