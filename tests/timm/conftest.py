"""Tiny timm models with random weights: no network, no download."""

import warnings

import pytest

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4)}
CONFIGS = {
    "vit_tiny_patch16_224": VIT,
    "vit_base_patch16_siglip_224": VIT,
    "vit_small_patch16_dinov3": VIT,
    "deit_tiny_distilled_patch16_224": VIT,
    "beit_base_patch16_224": VIT,
    "eva02_tiny_patch14_224": VIT,
    "eva02_base_patch14_224": VIT,
    "swin_tiny_patch4_window7_224": SWIN,
    "swinv2_tiny_window8_256": SWIN,
    "mixer_s16_224": {"img_size": 32},
    "convnext_tiny": {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 32)},
    "cait_xxs24_224": VIT,
    "pvt_v2_b0": {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 20, 32), "num_heads": (1, 2, 5, 8)},
    "tnt_s_patch16_224": {"img_size": 32, "embed_dim": 32, "depth": 1, "num_heads_outer": 2},
    "maxvit_tiny_rw_224": {"img_size": 64, "depths": (1,), "embed_dim": (32,), "stem_width": 16},
    "gcvit_xxtiny": {"img_size": 64},
    "tiny_vit_5m_224": {"depths": (1, 1, 1, 1), "embed_dims": (32, 32, 64, 64), "num_heads": (1, 1, 2, 2)},
    "resnet18": {},
}


def pytest_collect_file():
    """Skips the folder; a conftest that skips itself is an error where the folder is named on the command line."""
    for name in ("torch", "timm"):
        pytest.importorskip(name, reason=f"the tests of the timm integration need {name}")


@pytest.fixture(autouse=True)
def _quiet_and_seeded():
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny():
    """tiny(name, **changes): a model of three classes, the same random weights at each call, in eval mode."""
    import timm
    import torch

    def make(name="vit_tiny_patch16_224", num_classes=3, **changes):
        torch.manual_seed(0)
        config = CONFIGS.get(name, {}) | changes
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # timm's own, about names that moved
            model = timm.create_model(name, pretrained=False, num_classes=num_classes, **config).eval()
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):  # Swin v2 starts with zeros: no gradient passes such a block
                torch.nn.init.ones_(module.weight)
        return model

    return make


@pytest.fixture(scope="session")
def images():
    import torch

    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def move():
    """move(adapter): as if it had been trained; the same change for the same adapter."""
    import torch

    def change(adapter):
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            adapter.theta_d.add_(torch.randn(adapter.spec.d, generator=generator), alpha=0.4)
        return adapter

    return change
