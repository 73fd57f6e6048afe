"""What other libraries do to a model: put modules in the place of its layers, build it without memory, ask for maps."""

import json

import pytest
import timm
import torch
from test_features import distinct
from test_timm_ways import ON_HOST, SMALL, TINY_SWIN, TINY_VIT
from timm.models import save_for_hf
from torch import nn

import linsight


class Adapter(nn.Module):
    """In the place of a layer, as LoRA and quantised layers are: it calls it, and has no attribute of it."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer

    def forward(self, x):
        return self.base_layer(x)


def adapted(model):
    """Puts adapters in the place of all linear layers and plain convolutions."""
    for module in list(model.modules()):
        for name, part in list(module.named_children()):
            if type(part) in (nn.Linear, nn.Conv2d):
                setattr(module, name, Adapter(part))
    return model


@pytest.mark.parametrize("name", [name for name in SMALL if name != ON_HOST])
def test_adapters_in_the_place_of_layers(name):
    model = distinct(linsight.create_model(name, **SMALL[name]))
    x = torch.randn(1, model.in_chans, 64, 64)
    with torch.no_grad():
        wanted = model(x)
        found = adapted(model)(x)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
    model.train()


# -- transformers ------------------------------------------------------------------------------------------------------

SAVED = {
    "a class token": ("inline_deit_tiny", TINY_VIT),
    "windows": ("swin_tiny", {"attention": "inline,inline,softmax,softmax", **TINY_SWIN}),
    "buffers": ("vit_tiny", {"attention": "performer", **TINY_VIT}),
    "a name of timm": ("deit_tiny_patch16_224", {"attention": "inline", **TINY_VIT}),
}


@pytest.fixture
def transformers(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = pytest.importorskip("transformers")
    found.logging.disable_progress_bar()
    return found


def saved(model, folder):
    """In timm's layout, with the number of classes where transformers looks for it, and nowhere else."""
    save_for_hf(model, folder, safe_serialization=True, model_config={"label_names": list("abcde")})
    config = json.loads((folder / "config.json").read_text())
    del config["model_args"]["num_classes"]
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", SAVED)
def test_a_saved_model_is_one_of_transformers(kind, transformers, tmp_path):
    """There and back: logits, classes and images are those of the model."""
    name, arguments = SAVED[kind]
    model = distinct(linsight.create_model(name, num_classes=5, **arguments))
    folder = saved(model, tmp_path / "saved")
    x = torch.randn(2, 3, 64, 64)
    theirs = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        wanted = model(x)
        torch.testing.assert_close(theirs(x).logits, wanted)
        theirs.save_pretrained(tmp_path / "again")
        again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "again").eval()
        torch.testing.assert_close(again(x).logits, wanted)
        back = timm.create_model(f"local-dir:{tmp_path / 'again'}", pretrained=True).eval()
        torch.testing.assert_close(back(x), wanted)
        found = transformers.AutoModel.from_pretrained(folder).eval()(x, output_hidden_states=True)
    assert theirs.config.id2label[1] == "b"
    torch.testing.assert_close(found.last_hidden_state, model.forward_features(x))
    assert len(found.hidden_states) == len(model.feature_info)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["inline_swin_tiny", "inline_deit_tiny", "mlla_tiny"])
def test_all_maps_of_a_backbone(name, transformers):
    """`hidden_states` are the maps up to the last one asked for, and `feature_maps` those asked for."""
    config = transformers.TimmBackboneConfig(backbone=name, out_indices=(1, 2))
    backbone = transformers.TimmBackbone(config, **SMALL[name]).eval()
    x = torch.randn(1, 3, 64, 64)
    plain = backbone(x).feature_maps
    found = backbone(x, output_hidden_states=True)
    assert len(found.hidden_states) == 3
    for one, other, third in zip(plain, found.feature_maps, found.hidden_states[1:], strict=True):
        assert torch.equal(one, other) and torch.equal(one, third)
    assert len(backbone(x).feature_maps) == 2
    whole = distinct(linsight.create_model(name, **SMALL[name]))
    linsight.load_published(backbone, whole.state_dict())
    for one, other in zip(backbone(x).feature_maps, whole.forward_intermediates(x, (1, 2))[1], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore")
def test_a_detector_comes_back(transformers, tmp_path):
    """Built without memory, with a part that is timm's, which nobody fills but with the weights."""
    backbone = transformers.TimmBackboneConfig(backbone="inline_swin_tiny", out_indices=(3,))
    small = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 3, "num_labels": 2}
    small |= {f"{part}_{key}": 2 for part in ("encoder", "decoder") for key in ("attention_heads", "ffn_dim")}
    config = transformers.DetrConfig(backbone_config=backbone, **small)
    model = transformers.DetrForObjectDetection(config)
    label = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}
    model(torch.randn(1, 3, 64, 96), labels=[label]).loss.backward()
    assert not [key for key, p in model.named_parameters() if p.grad is None and "backbone" in key]
    model.save_pretrained(tmp_path)
    again = transformers.DetrForObjectDetection.from_pretrained(tmp_path).eval()
    for size in ((64, 64), (96, 70)):
        x = torch.randn(1, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(again(x).logits, model.eval()(x).logits)


def test_models_without_memory_are_filled_by_their_weights():
    """As transformers builds them, on the meta device: there is nothing that only a constructor could fill."""
    for name in ("swin_tiny", "inline_deit_tiny", "agent_cswin_tiny", "h_vittt_tiny"):
        model = distinct(linsight.create_model(name, **SMALL.get(name, TINY_SWIN)))
        empty = linsight.create_model(name, **SMALL.get(name, TINY_SWIN), device="meta").to_empty(device="cpu")
        for tensor in empty.state_dict().values():
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
        empty.load_state_dict(model.state_dict())
        x = torch.randn(1, 3, 64, 64)
        assert torch.equal(empty.eval()(x), model(x))
