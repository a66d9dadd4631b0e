"""Quantizing whole models, and the report."""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch
from torch import nn

from qandc import (
    ConfigError,
    DataError,
    ModelError,
    QuantLinear,
    input_hessians,
    quantization_plan,
    quantization_report,
    quantize_model,
)
from tests.conftest import make_dit


def test_dit_xl_2_has_170_layers():
    """diffusers' default configuration is DiT-XL/2; on the meta device it costs no memory."""
    from diffusers import DiTTransformer2DModel

    with torch.device("meta"):
        model = DiTTransformer2DModel(out_channels=8)
    linears = sum(isinstance(m, nn.Linear) for m in model.modules())
    by_default = quantization_plan(model).quantized
    quantize_model(model, w_bits=8, a_bits=8, skip_patterns=["pos_embed", "norm"])
    names = {name for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert (linears, len(names)) == (254, 170)
    per_block = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
    expected = {f"transformer_blocks.{i}.{layer}" for i in range(28) for layer in per_block}
    assert names == expected | {"proj_out_1", "proj_out_2"} == {layer.name for layer in by_default}


def test_what_dit_saves_is_what_it_always_saved():
    """Check that DiT's saved settings are those of older versions, so that either loads the other's checkpoints."""
    for given in ({}, {"skip_patterns": ["pos_embed", "norm"]}):
        model = quantize_model(make_dit(), **given)
        assert json.dumps(model.config.quantization_config) == (
            '{"quant_method": "qandc", "w_bits": 8, "a_bits": 8, "skip_patterns": ["pos_embed", "norm"], '
            '"weight_clip": "max"}'
        )


@pytest.mark.parametrize("w_bits", [8, 4])
def test_output_stays_close(dit, dit_inputs, w_bits):
    expected = dit(**dit_inputs).sample
    assert quantize_model(dit, w_bits=w_bits) is dit
    actual = dit(**dit_inputs).sample
    error = ((actual - expected).norm() / expected.norm()).item()
    assert 0 < error < {8: 0.02, 4: 0.25}[w_bits]


def test_full_precision_weights_are_freed(dit):
    weights = [weakref.ref(m.weight) for n, m in dit.named_modules() if isinstance(m, nn.Linear) and "norm" not in n]
    quantize_model(dit)
    gc.collect()
    assert weights
    assert all(w() is None for w in weights)


def test_report(dit):
    before = sum(m.weight.numel() * 4 for m in dit.modules() if isinstance(m, nn.Linear))
    quantize_model(dit)
    report = quantization_report(dit)
    assert report.bytes_before == before
    assert len(report.quantized) == 3 * 6 + 2
    for layer in report.quantized:
        module = dit.get_submodule(layer.name)
        assert layer.scheme == "W8A8 dynamic per-token"
        assert layer.bytes_after == module.in_features * module.out_features + 8 * module.out_features
        assert layer.bytes_before == 4 * module.in_features * module.out_features
        assert layer.kernel == "reference int8_linear"
        assert "CUDA" in layer.reason
    skipped = [layer for layer in report.layers if layer not in report.quantized]
    assert skipped
    assert all("norm" in layer.name and layer.bytes_before == layer.bytes_after for layer in skipped)
    assert f"20 of {len(report.layers)} linear layers quantized" in str(report)


def test_report_tells_int4_and_half_precision(dit):
    quantize_model(dit.half(), w_bits=4)
    layer = quantization_report(dit).quantized[0]
    k = n = 32
    assert layer.bytes_before == 2 * n * k
    assert layer.bytes_after == n * k // 2 + 8 * n
    assert layer.kernel == "reference int4_linear"


@pytest.mark.parametrize("w_bits", [8, 4])
def test_weight_only(dit, dit_inputs, w_bits):
    expected = dit(**dit_inputs).sample
    quantize_model(dit, w_bits, a_bits=16)
    assert 0 < ((dit(**dit_inputs).sample - expected).norm() / expected.norm()).item() < {8: 0.01, 4: 0.2}[w_bits]
    for layer in quantization_report(dit).quantized:
        assert (layer.scheme, layer.kernel) == (f"W{w_bits}A16 weight-only", "reference weight_only_linear")


def test_skip_patterns_are_substrings_of_names(dit):
    quantize_model(dit, skip_patterns=["norm", "ff", "proj_out"])
    assert {layer.name.split(".")[2] for layer in quantization_report(dit).quantized} == {"attn1"}


def test_subclasses_of_linear_stay():
    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model = quantize_model(nn.Sequential(Doubled(4, 4), nn.Linear(4, 4), nn.MultiheadAttention(4, 1)))
    assert type(model[0]) is Doubled
    assert isinstance(model[1], QuantLinear)
    model[2](*[torch.zeros(2, 4)] * 3)


def test_hooks_are_not_lost_silently():
    model = nn.Sequential(nn.Linear(4, 4))
    handle = model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ModelError, match="0 has hooks or a replaced forward"):
        quantize_model(model)
    handle.remove()
    quantize_model(model)


@pytest.mark.parametrize(
    ("linear", "message"),
    [
        (nn.Linear(4, 4, dtype=torch.float64), "1 is float64; allowed are float16, bfloat16, float32"),
        (nn.Linear(65536, 1), "1 has in_features 65536; int32 accumulators are exact up to 65535"),
        (nn.Linear(5, 4), "even in_features; 1 has 5"),
    ],
)
def test_layers_that_no_kernel_can_run_are_refused_before_any_change(linear, message):
    model = nn.Sequential(nn.Linear(4, 4), linear)
    with pytest.raises(ConfigError, match=message):
        quantize_model(model, w_bits=4)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    ("what", "tensor", "message"),
    [
        ("weight", torch.zeros(3, 4), r"1\.weight is \[3, 4\]; .* needs a dense tensor \[4, 4\]"),
        ("weight", torch.zeros(4), r"1\.weight is \[4\]"),
        ("weight", torch.eye(4).to_sparse(), r"1\.weight is sparse_coo"),
        ("weight", nn.UninitializedParameter(), r"1\.weight is not initialized"),
        ("weight", None, r"1\.weight is NoneType"),
        ("bias", torch.zeros(1), r"1\.bias is \[1\]; .* needs a dense tensor \[4\]"),
        ("bias", torch.zeros(4, dtype=torch.float64), r"1\.bias is float64; allowed are float16, bfloat16, float32"),
    ],
)
@pytest.mark.parametrize("given", [{}, {"hessians": {"0": torch.eye(4)}}, {"smoothing": {"0": torch.ones(4)}}])
def test_parameters_that_do_not_fit_their_layer_are_refused_before_any_change(what, tensor, message, given):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    is_parameter = tensor is None or isinstance(tensor, nn.Parameter)
    setattr(model[1], what, tensor if is_parameter else nn.Parameter(tensor))
    with pytest.raises((ConfigError, DataError), match=message):
        quantize_model(model, **given)
    assert all(type(layer) is nn.Linear for layer in model)


def test_changed_sizes_are_refused_before_any_change():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].in_features = 6
    with pytest.raises(DataError, match=r"1\.weight is \[4, 4\]; a layer with in_features 6"):
        quantize_model(model)
    assert type(model[0]) is nn.Linear


def test_scripted_parts_stay():
    model = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.ReLU()))
    quantize_model(model)
    assert type(model[0]) is QuantLinear


@pytest.mark.parametrize("what", ["bias", "weight"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_parameter_is_named_and_nothing_changes(dit, bad, what):
    with torch.no_grad():
        getattr(dit.proj_out_2, what)[3, ...] = bad
    with pytest.raises(DataError, match=rf"proj_out_2\.{what} holds \d+ values"):
        quantize_model(dit)
    assert not any(isinstance(m, QuantLinear) for m in dit.modules())


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (nn.Sequential(nn.ReLU()), {}, "it has no nn.Linear layer"),
        (nn.Sequential(nn.Linear(2, 2)), {"skip_patterns": ["0"]}, r"skip_patterns \['0'\] exclude all 1"),
        (nn.Linear(2, 2), {}, "QuantLinear.from_linear"),
        (nn.Sequential(QuantLinear(2, 2)), {}, "quantized already"),
    ],
)
def test_models_with_nothing_to_quantize(model, arguments, message):
    with pytest.raises(ModelError, match=message):
        quantize_model(model, **arguments)


@pytest.mark.parametrize("what", ["smoothing", "hessians"])
@pytest.mark.parametrize(
    "bad",
    [
        lambda good: good * float("nan"),
        lambda good: -good,
        lambda good: good[..., :3],
        lambda good: good * float("inf"),
    ],
    ids=["nan", "negative", "shape", "inf"],
)
def test_what_is_wrong_with_a_later_layer_is_named_and_nothing_changes(what, bad):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    before = list(model)
    good = torch.ones(4) if what == "smoothing" else torch.eye(4)
    with pytest.raises(DataError, match=r"^2: "):
        quantize_model(model, **{what: {"0": good, "2": bad(good)}})
    assert all(layer is old for layer, old in zip(model, before, strict=True))
    assert all(type(layer) is nn.Linear for layer in model)


def test_smoothing_too_large_for_a_weight_changes_nothing():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight.data.fill_(9)
    with pytest.raises(DataError, match=r"^1: weight times smoothing holds 16 values that are NaN or inf"):
        quantize_model(model, smoothing={"1": torch.full((4,), 8e37)})
    assert type(model[0]) is nn.Linear


def test_factors_of_a_shared_layer_may_have_either_name():
    model = nn.Module()
    model.a = nn.Linear(4, 4)
    model.b = model.a
    factors = torch.tensor([1.0, 2.0, 3.0, 4.0])
    quantize_model(model, smoothing={"b": factors})
    assert torch.equal(model.a.smoothing, factors)
    assert model.a is model.b


class Reads(nn.Module):
    """Layers that are read past their forward, in the ways that are found, and layers that are not."""

    def __init__(self):
        super().__init__()
        self.functional, self.inherited, self.helped, self.called = (nn.Linear(4, 4) for _ in range(4))
        self.looked_at, self.fused_elsewhere = nn.Linear(4, 4), nn.Linear(4, 4)
        self.seq = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def fuse_projections(self):
        return torch.cat([self.fused_elsewhere.weight.data, self.called.weight.data])

    def helper(self, x):
        return x @ self.helped.weight.data.t()

    def forward(self, x):
        return nn.functional.linear(x, self.inherited.weight, self.inherited.bias)


class ReadsMore(Reads):
    def forward(self, x):
        if isinstance(self.looked_at.weight, torch.Tensor) and self.looked_at.weight is not None:
            x = x.to(self.looked_at.weight.dtype).to(self.looked_at.weight.data.device)
        x = self.helper(super().forward(x)) + self.called(self.looked_at(x)) + self.fused_elsewhere(x)
        return nn.functional.linear(x, weight=self.functional.weight) + x @ self.seq[1].weight + self.seq[0](x)


def test_layers_that_are_read_past_their_forward_stay(caplog):
    model = nn.Sequential(ReadsMore())
    x = torch.randn(3, 4)
    expected = model(x)
    quantize_model(model)
    kept = {"0.functional", "0.inherited", "0.helped", "0.seq.1"}
    assert {name for name, module in model.named_modules() if type(module) is nn.Linear} == kept
    report = {layer.name: layer for layer in quantization_report(model).layers}
    assert {name for name, layer in report.items() if not layer.quantized} == kept
    assert all(report[name].reason == "ReadsMore reads its weight past its forward" for name in kept)
    assert "4 linear layers stay in full precision" in caplog.text
    assert "ReadsMore reads its weight past its forward" in caplog.text
    assert (model(x) - expected).norm() < 0.05 * expected.norm()


def test_processors_read_the_layers_of_their_attention():
    class Processor:
        def __call__(self, attn, x):
            return nn.functional.linear(x, attn.qkv.weight) + attn.out(x)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out, self.processor = nn.Linear(4, 4), nn.Linear(4, 4), Processor()

        def forward(self, x):
            return self.processor(self, x)

    model = quantize_model(nn.Sequential(Attention()))
    assert type(model[0].qkv) is nn.Linear
    assert isinstance(model[0].out, QuantLinear)


def test_the_pooler_of_hunyuan_dit(tmp_path):
    """A module of diffusers that hands the weights of its layers to torch; what is saved comes back."""
    from diffusers import HunyuanDiT2DModel

    torch.manual_seed(0)
    sizes = dict.fromkeys(("hidden_size", "cross_attention_dim", "cross_attention_dim_t5", "pooled_projection_dim"), 16)
    sizes |= {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "patch_size": 2, "sample_size": 8}
    model = HunyuanDiT2DModel(num_layers=2, text_len=4, text_len_t5=4, **sizes)
    pooler = model.time_extra_emb.pooler
    x = torch.randn(2, 4, 16)
    expected = pooler(x)
    quantize_model(model, skip_patterns=["norm"])
    assert all(type(module) is nn.Linear for module in pooler.children())
    assert torch.equal(pooler(x), expected)
    reasons = {layer.reason for layer in quantization_report(model).layers if "pooler" in layer.name}
    assert reasons == {"HunyuanDiTAttentionPool reads its weight past its forward"}
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) > 20
    model.save_pretrained(tmp_path)
    assert not [name for name in model.config.quantization_config["layers"] if "pooler" in name]
    again = HunyuanDiT2DModel.from_pretrained(tmp_path)
    assert torch.equal(again.time_extra_emb.pooler(x), expected)


def test_a_model_of_which_every_layer_is_read_past_its_forward():
    model = Reads()
    with pytest.raises(ModelError, match=r"inherited and others stay as they are \(Reads reads its weight"):
        quantize_model(model, skip_patterns=["functional", "helped", "called", "looked", "fused", "seq"])


def test_adapters_beside_a_layer_stay_in_full_precision():
    """As PEFT builds them: what is not under base_layer belongs to the adapter; it neither merges nor unmerges."""

    class Tuner(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer = nn.Linear(8, 8)
            self.lora_A, self.lora_B = nn.ModuleDict({"a": nn.Linear(8, 2)}), nn.ModuleDict({"a": nn.Linear(2, 8)})

        def forward(self, x):
            return self.base_layer(x) + self.lora_B["a"](self.lora_A["a"](x))

        def merge(self):
            self.base_layer.weight.data += self.lora_B["a"].weight @ self.lora_A["a"].weight

        unmerge = merge

    model = quantize_model(nn.Sequential(Tuner(), nn.Linear(8, 8)))
    reasons = {layer.name: layer.reason for layer in quantization_report(model).layers if not layer.quantized}
    assert reasons == {"0.lora_A.a": "an adapter of PEFT", "0.lora_B.a": "an adapter of PEFT"}
    assert isinstance(model[0].base_layer, QuantLinear)
    for change in (model[0].merge, model[0].unmerge):
        with pytest.raises(ModelError, match="quantized weights take no adapter in"):
            change()


def test_hessians_are_of_the_layers_that_are_quantized():
    model = nn.Sequential(ReadsMore())
    hessians = input_hessians(model, [torch.randn(3, 4)])
    quantize_model(model, hessians=hessians)
    assert "0.called" in hessians
    assert "0.functional" not in hessians


def test_layer_shared_under_two_names_stays_shared():
    model = nn.Module()
    model.a = nn.Linear(4, 4)
    model.b = model.a
    quantize_model(model)
    assert isinstance(model.a, QuantLinear)
    assert model.b is model.a


def test_a_shared_layer_stays_if_one_of_its_names_is_skipped():
    model = nn.Module()
    model.norm_a = nn.Linear(4, 4)
    model.b = model.norm_a
    model.c = nn.Linear(4, 4)
    quantize_model(model)
    assert type(model.b) is nn.Linear
    assert model.b is model.norm_a
    assert isinstance(model.c, QuantLinear)


@pytest.mark.slow
def test_whole_quantized_model_compiles_without_graph_break(dit, dit_inputs):
    quantize_model(dit)
    compiled = torch.compile(dit, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**dit_inputs).sample, dit(**dit_inputs).sample, atol=1e-5, rtol=1e-5)


def test_whole_quantized_model_round_trips_through_state_dict(dit, dit_inputs):
    quantize_model(dit)
    expected = dit(**dit_inputs).sample
    other = quantize_model(make_dit())
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.zero_()
    other.load_state_dict(dit.state_dict())
    other.pos_embed.pos_embed.copy_(dit.pos_embed.pos_embed)  # a constant that diffusers does not save
    assert torch.equal(other(**dit_inputs).sample, expected)
