"""What is quantized by default, per class: at real sizes on the meta device, and small models run."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from qandc import (
    ConfigError,
    ModelError,
    QuantConfig,
    QuantLinear,
    quantization_plan,
    quantization_report,
    quantize_model,
)
from qandc.quantization import plan as planning
from qandc.quantization.conversion import quant_layers
from qandc.quantization.plan import CONDITIONING, OUTSIDE, SENSITIVE, assign, conditioning_of, resolved, roles_of
from tests.conftest import make_dit
from tests.real_models import REAL, make_real
from tests.tiny_models import TINY, each_class, inputs_of, make_tiny, output_of

STREAMS = ("transformer_blocks.*.norm1.linear", "transformer_blocks.*.norm1_context.linear")
SINGLE = "single_transformer_blocks.*.norm.linear"
ROLES = {
    # quantized, conditioning, staying layers; groups of conditioning
    "DiTTransformer2DModel": (170, 28, 56, ("transformer_blocks.*.norm1.linear",)),
    "PixArtTransformer2DModel": (280, 0, 6, ()),
    "SD3Transformer2DModel": (453, 76, 7, STREAMS),
    "FluxTransformer2DModel": (418, 75, 11, (*STREAMS, SINGLE)),
    "Flux2Transformer2DModel": (192, 0, 11, ()),
    "ChromaTransformer2DModel": (418, 0, 15, ()),
    "QwenImageTransformer2DModel": (720, 118, 8, ("transformer_blocks.*.img_mod.1", "transformer_blocks.*.txt_mod.1")),
    "ZImageTransformer2DModel": (238, 31, 7, ("noise_refiner.*.adaLN_modulation.0", "layers.*.adaLN_modulation.0")),
    "Lumina2Transformer2DModel": (210, 27, 7, ("noise_refiner.*.norm1.linear", "layers.*.norm1.linear")),
    "SanaTransformer2DModel": (160, 0, 6, ()),
    "AuraFlowTransformer2DModel": (
        280, 40, 6, (*(f"joint_{name}" for name in STREAMS), "single_transformer_blocks.*.norm1.linear"),
    ),
    "CogView4Transformer2DModel": (180, 30, 8, STREAMS[:1]),
    "HiDreamImageTransformer2DModel": (
        1024, 48, 56, tuple(f"{kind}_stream_blocks.*.block.adaLN_modulation.1" for kind in ("double", "single")),
    ),
    "HunyuanDiT2DModel": (419, 40, 12, ("blocks.*.norm1.linear",)),
    "WanTransformer3DModel": (400, 0, 6, ()),
    "HunyuanVideoTransformer3DModel": (440, 80, 27, (*STREAMS, SINGLE)),
    "HunyuanVideo15Transformer3DModel": (648, 108, 28, STREAMS),
    "CogVideoXTransformer3DModel": (252, 84, 5, (STREAMS[0], "transformer_blocks.*.norm2.linear")),
    "LTXVideoTransformer3DModel": (280, 0, 7, ()),
    "StableAudioDiTModel": (240, 0, 8, ()),
    "UNet2DConditionModel": (
        700, 17, 26, tuple(f"{part}.resnets.*.time_emb_proj" for part in ("down_blocks.*", "up_blocks.*", "mid_block")),
    ),
}  # fmt: skip
IN_BLOCKS = re.compile(r"(blocks|layers|refiner)\.\d+\.")  # the names that all these classes give to their blocks
SEE_NO_TOKENS = re.compile(r"embed|adaln|\b\w*mod\b|norm|time|guidance|caption|pool|modulation", re.IGNORECASE)


def test_the_tables_name_the_same_classes():
    assert ROLES.keys() == REAL.keys() == TINY.keys() == {*planning.BLOCKS, "DiTTransformer2DModel"}
    assert planning.SENSITIVE_LAYERS.keys() < planning.BLOCKS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_roles_at_real_size(name):
    model = make_real(name)
    plan = quantization_plan(model)
    conditioning = [layer for layer in plan.layers if layer.reason == CONDITIONING]
    groups = tuple(group for group, layers in plan.groups.items() if layers[0].reason == CONDITIONING)
    quantized, waiting, staying, expected = ROLES[name]
    assert (len(plan.quantized), len(conditioning), groups) == (quantized, waiting, expected)
    assert len(plan.layers) == quantized + waiting + staying == sum(type(m) is nn.Linear for m in model.modules())
    outside = {"proj_out_1", "proj_out_2"} if name.startswith("DiT") else set()
    for layer in plan.quantized:
        assert IN_BLOCKS.search(layer.name) or layer.name in outside
        assert not SEE_NO_TOKENS.search(layer.name)
    if not waiting:
        return
    with_all = quantization_plan(model, conditioning="W4A8")
    assert len(with_all.quantized) == quantized + waiting
    schemes = {layer.name: layer.scheme for layer in with_all.layers}
    assert {schemes[layer.name].split()[0] for layer in conditioning} == {"W4A8"}
    assert all(schemes[layer.name] == layer.scheme for layer in plan.layers if layer not in conditioning)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in REAL if not name.startswith(("DiT", "UNet"))])
def test_unknown_classes_are_treated_as_known_ones(name, monkeypatch):
    """Whose blocks are found by looking at the lists of modules, with which the table must agree."""
    model, config = make_real(name), QuantConfig(conditioning="W4A8")
    monkeypatch.setattr(planning, "SENSITIVE_LAYERS", {})
    known = assign(model, config)
    monkeypatch.setattr(planning, "BLOCKS", {})
    assert assign(model, config) == known


@pytest.mark.parametrize(
    ("name", "w_bits", "conditioning", "gigabytes"),
    [
        ("FluxTransformer2DModel", 8, "W8A16", 12.4),
        ("FluxTransformer2DModel", 4, "W4A16", 7.0),
        ("QwenImageTransformer2DModel", 4, "W4A16", 11.0),
    ],
)
def test_bytes_of_whole_models(name, w_bits, conditioning, gigabytes):
    """All parameters and buffers count."""
    model = make_real(name)
    plan = quantization_plan(model, w_bits, conditioning=conditioning)
    before, after = plan.total_bytes
    assert before == 2 * sum(p.numel() for p in model.parameters()) + sum(
        b.numel() * b.element_size() for b in model.buffers()
    )
    assert after <= gigabytes * 1e9


@pytest.mark.parametrize("w_bits", [8, 4])
def test_planned_bytes_are_those_of_the_tensors(w_bits):
    model = make_tiny("FluxTransformer2DModel")
    _, after = quantization_plan(model, w_bits, conditioning="W8A16").total_bytes
    quantize_model(model, w_bits, conditioning="W8A16")
    tensors = [*model.parameters(), *model.buffers()]
    bits = 2 * len(quant_layers(model))  # a buffer of each layer beside its weight: two bytes
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) == after + bits


@each_class(TINY)
def test_a_plan_comes_true(name):
    model = make_tiny(name)
    plan = quantization_plan(model, 4, conditioning="W8A16")
    text = str(plan)
    assert {type(module) for module in model.modules() if isinstance(module, nn.Linear)} == {nn.Linear}  # as it was
    quantize_model(model, 4, conditioning="W8A16")
    report = quantization_report(model)
    assert report.other_bytes == plan.other_bytes
    assert report.quantized == plan.quantized
    assert [layer.name for layer in report.layers] == [layer.name for layer in plan.layers]
    assert len(text.splitlines()) == len(plan.groups) + 2
    assert sum(map(len, plan.groups.values())) == len(plan.layers)


def test_what_is_saved_of_flux():
    """Patterns that say alone what stays, without the table of this version."""
    model = quantize_model(make_tiny("FluxTransformer2DModel"))
    saved = model.config.quantization_config
    assert saved == {
        "quant_method": "qandc",
        "w_bits": 8,
        "a_bits": 8,
        "skip_patterns": [
            r"re:^(?!(single_)?transformer_blocks\.\d+\.)",
            rf"re:(?i)^(single_)?transformer_blocks\.\d+\.(.+\.)?{planning.MODULATION}(\.|$)",
        ],
        "weight_clip": "max",
    }
    by_hand = quantize_model(make_tiny("FluxTransformer2DModel"), skip_patterns=saved["skip_patterns"])
    assert quant_layers(by_hand).keys() == quant_layers(model).keys()


class Block(nn.Module):
    def __init__(self, size=8):
        super().__init__()
        self.proj, self.time_mod = nn.Linear(size, size), nn.Linear(size, size)
        self.step_embedder, self.router = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, x):
        return self.proj(x) * self.time_mod(x)


class Stacked(nn.Module):
    """A class that nobody knows."""

    def __init__(self, blocks=2):
        super().__init__()
        self.stem, self.head = nn.Linear(8, 8), nn.Linear(8, 8)
        self.stages = nn.ModuleList(Block() for _ in range(blocks))
        self.embedder = nn.Module()
        self.embedder.layers = nn.ModuleList(Block() for _ in range(2))
        self.text_proj = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))


def test_an_unknown_class_with_blocks():
    plan = quantization_plan(Stacked())
    reasons = {group: layers[0].reason for group, layers in plan.groups.items() if not layers[0].quantized}
    assert {layer.name for layer in plan.quantized} == {"stages.0.proj", "stages.1.proj"}
    assert reasons.pop("stages.*.time_mod") == CONDITIONING
    assert {reasons.pop("stages.*.step_embedder"), reasons.pop("stages.*.router")} == {"an embedder or a router"}
    assert {*reasons.values()} == {OUTSIDE}
    plan = quantization_plan(Stacked(), 4, conditioning="W8A8")
    assert {layer.name for layer in plan.quantized if layer.scheme.startswith("W8A8")} == {
        "stages.0.time_mod", "stages.1.time_mod"
    }  # fmt: skip


def test_a_class_without_blocks_is_quantized_whole():
    for model in (nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), Stacked(blocks=1)):
        assert len(quantization_plan(model).quantized) == sum(
            type(m) is nn.Linear and "pos_embed" not in name for name, m in model.named_modules()
        )
    model = nn.Sequential()
    model.norm_out, model.pos_embed, model.proj = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
    assert [layer.name for layer in quantization_plan(model).quantized] == ["proj"]


def test_patterns_by_hand_mean_what_they_say():
    """Modulation is a role of its own only where it gets a scheme of its own."""
    name = "FluxTransformer2DModel"
    layers = {layer.name: layer for layer in quantization_plan(make_tiny(name), skip_patterns=[".proj_out"]).layers}
    assert [name for name, layer in layers.items() if not layer.quantized] == ["proj_out"]
    assert layers["proj_out"].reason == "skip pattern '.proj_out'"
    plan = quantization_plan(make_tiny(name), skip_patterns=["transformer_blocks.0."], conditioning="W4A8")
    schemes = {layer.name: layer.scheme.split()[0] for layer in plan.layers}
    assert schemes["transformer_blocks.1.norm1.linear"] == schemes["single_transformer_blocks.1.norm.linear"] == "W4A8"
    assert (
        schemes["transformer_blocks.0.norm1.linear"] == schemes["single_transformer_blocks.0.norm.linear"] == "float32"
    )
    assert schemes["x_embedder"] == schemes["norm_out.linear"] == "W8A8"


def test_first_modulation_stays():
    plan = quantization_plan(make_tiny("QwenImageTransformer2DModel"), conditioning="W8A8")
    staying = {layer.name for layer in plan.layers if layer.reason == SENSITIVE}
    assert staying == {"transformer_blocks.0.img_mod.1", "transformer_blocks.0.txt_mod.1"}


def test_a_second_call_takes_what_the_first_left():
    model = quantize_model(make_tiny("FluxTransformer2DModel"))
    quantize_model(model, 4, skip_patterns=["norm", ".proj_out"])
    schemes = {name: layer.scheme.split()[0] for name, layer in quant_layers(model).items()}
    assert schemes["x_embedder"] == "W4A8"
    assert schemes["transformer_blocks.0.attn.to_q"] == "W8A8"
    plan = quantization_plan(model, skip_patterns=["norm_out"])
    assert [layer.name for layer in plan.layers if layer.reason == "skip pattern 'norm_out'"] == ["norm_out.linear"]


def test_roles_survive_a_subclass():
    """Caches and fusion make a model an instance of a subclass of its class."""
    model = make_dit()
    expected = roles_of(model)
    model.__class__ = type("Cached", (type(model),), {})
    assert roles_of(model) == expected == planning.DIT


def test_a_compiled_model_is_planned_as_the_model(tmp_path):
    name = "FluxTransformer2DModel"
    model = make_tiny(name)
    compiled = torch.compile(model, backend="eager")
    given = {"conditioning": "W4A8"}
    rows = quantization_plan(compiled, **given).layers
    assert [(row.name.removeprefix("_orig_mod."), row.scheme, row.reason) for row in rows] == [
        (row.name, row.scheme, row.reason) for row in quantization_plan(model, **given).layers
    ]
    quantize_model(compiled, **given)
    compiled.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(output_of(again, inputs_of(name)), output_of(model, inputs_of(name)))


@pytest.mark.parametrize(
    ("model", "given", "error", "message"),
    [
        (
            make_dit,
            {"skip_patterns": ["norm", "adaln"]},
            ConfigError,
            "skip pattern 'adaln' matches no module of DiTTr",
        ),
        (
            make_dit,
            {"skip_patterns": [".attn1"]},
            ConfigError,
            r"skip pattern '.attn1' .* are pos_embed, transformer_b",
        ),
        (make_dit, {"skip_patterns": [r"re:^norm$"]}, ConfigError, r"skip pattern 're:\^norm\$' matches no module"),
        (make_dit, {"conditioning": "int8"}, ConfigError, "'int8' is no scheme"),
        (nn.ReLU, {}, ModelError, "nothing to quantize in ReLU: it has no nn.Linear layer"),
        (
            lambda: nn.ModuleList(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Embedding(2, 2)) for _ in range(2)),
            {"conditioning": "W8A8"},
            ModelError,
            "it has no nn.Linear layer",
        ),
        (lambda: quantize_model(nn.Sequential(nn.Linear(8, 8))), {}, ModelError, "are quantized already"),
        (
            lambda: nn.ModuleDict(
                {"a": nn.ModuleList(nn.Sequential(nn.ModuleDict({"mod": nn.Linear(8, 8)})) for _ in "ab")}
            ),
            {},
            ModelError,
            r"of its 2 linear layers none is part of a repeated block and sees tokens \(a.0.0.mod: modulation",
        ),
        (make_dit, {"skip_patterns": ["re:."]}, ModelError, r"skip_patterns \['re:.'\] exclude all \d+ of its linear"),
    ],
)
def test_what_is_refused(model, given, error, message):
    model = model()
    before = dict(model.named_modules())
    for function in (quantization_plan, quantize_model):
        with pytest.raises(error, match=message):
            function(model, **given)
    assert dict(model.named_modules()) == before


def test_an_old_checkpoint_with_patterns_of_dit_loads(tmp_path):
    """Wan has no pos_embed; saved models hold that pattern all the same, since it was the default."""
    model = make_tiny("WanTransformer3DModel")
    quantize_model(model, skip_patterns=["norm"])
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"norm"', '"pos_embed", "norm"'))
    again = type(model).from_pretrained(tmp_path)
    inputs = inputs_of("WanTransformer3DModel")
    assert quant_layers(again).keys() == quant_layers(model).keys()
    assert torch.equal(output_of(again, inputs), output_of(model, inputs))


def test_no_modulation_is_a_warning(caplog):
    quantize_model(make_tiny("WanTransformer3DModel"), conditioning="W8A8")
    assert "conditioning='W8A8' changes nothing: no modulation layer is left for it" in caplog.text
    caplog.clear()
    quantize_model(make_tiny("FluxTransformer2DModel"), skip_patterns=["norm"], conditioning="W8A8")
    assert "changes nothing" in caplog.text
    caplog.clear()
    quantize_model(make_tiny("FluxTransformer2DModel"), conditioning="W8A8")
    assert not caplog.text


@pytest.mark.parametrize("conditioning", [None, "W8A16"])
@pytest.mark.parametrize("name", TINY)
def test_resolved_settings_choose_the_same_layers(name, conditioning):
    model = make_tiny(name)
    config = QuantConfig(conditioning=conditioning_of(model, conditioning))
    assert assign(model, resolved(model, config), saved=True).bits == assign(model, config).bits


def test_the_usual_layer_is_one_of_the_most():
    plan = quantization_plan(make_tiny("FluxTransformer2DModel"), conditioning="W8A16")
    assert plan.quantized[0].scheme == "W8A16 weight-only"  # modulation comes first in a block
    assert plan.usual.scheme.startswith("W8A8")
    assert plan.usual in plan.quantized


def test_a_scheme_of_modulation_is_left_out_where_there_is_none(caplog):
    assert conditioning_of(make_tiny("FluxTransformer2DModel"), "W8A16") == "W8A16"
    for name in ("WanTransformer3DModel", "PixArtTransformer2DModel"):
        with caplog.at_level("INFO"):
            assert conditioning_of(make_tiny(name), "W8A16") is None
        assert f"'W8A16': {name} has no modulation layers of its own" in caplog.text
    with pytest.raises(ConfigError, match="'int8' is no scheme"):
        conditioning_of(make_tiny("WanTransformer3DModel"), "int8")


def test_a_table_of_groups():
    text = str(quantization_plan(make_tiny("DiTTransformer2DModel"), 4, conditioning="W8A8"))
    rows = {line.split()[0]: line for line in text.splitlines()}
    assert re.search(r"\.\*\.ff\.net\.2 +x2  W4A8 dynamic per-token +32,768 +4,608  reference int4_linear \(", text)
    assert re.search(r"W8A8 .*reference int8_linear", rows["transformer_blocks.*.norm1.linear"])
    assert "an embedder" in rows["transformer_blocks.*.norm1.emb.timestep_embedder.linear_1"]
    assert re.search(r"16 of 20 linear layers quantized; weights [\d,]+ -> [\d,]+ bytes; whole model [\d,]+ -> ", text)


def test_a_model_on_the_meta_device_says_which_kernels_would_run():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8))
    (row,) = quantization_plan(model).layers
    assert row.kernel in ("reference int8_linear", "triton int8_linear")
    (row,) = quantization_report(quantize_model(model)).layers
    assert (row.kernel, row.reason) == ("none", "on the meta device")
    assert isinstance(model[0], QuantLinear)
