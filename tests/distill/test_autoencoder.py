"""The autoencoder: how it begins, and that its two ways through a clip are one."""

import pytest
import torch

from distill import autoencoder, recipes
from distill.backbones import wan_autoencoder
from distill.config import override


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return autoencoder.make(override(recipes.teach_shapes(), ["vae.base_dim=8", "vae.dim_mult=[1,2,2]"]).vae).eval()


def test_an_inflated_autoencoder_treats_each_frame_alone(vae):
    video = torch.rand(1, 3, 9, 64, 64) * 2 - 1
    with torch.no_grad():
        clip = vae.decode(vae.encode(video).latent_dist.mean).sample
        for last, frames in {0: [0], 4: [1, 2, 3, 4], 8: [5, 6, 7, 8]}.items():
            alone = vae.decode(vae.encode(video[:, :, last : last + 1]).latent_dist.mean).sample[:, :, 0]
            for frame in frames:  # each latent frame keeps the last of its four frames, and repeats it
                assert torch.allclose(clip[:, :, frame], alone, atol=1e-5)


@pytest.mark.parametrize("frames", [1, 5, 17])
def test_in_one_pass_equals_the_stock_way(vae, frames):
    with torch.no_grad():
        for parameter in vae.parameters():  # as after training: no tap of the past is zero
            parameter.add_(0.05 * torch.randn_like(parameter))
        video = torch.rand(2, 3, frames, 64, 64) * 2 - 1
        latents = vae.encode(video).latent_dist
        decoded = vae.decode(latents.mean).sample
        in_pieces = list(wan_autoencoder.decode_in_pieces(vae, latents.mean))
        assert [piece.shape[2] for piece in in_pieces] == [1] + [4] * (frames // 4)
        assert torch.equal(torch.cat(in_pieces, dim=2), decoded)
        wan_autoencoder.in_one_pass(vae)
        mean, log_variance = wan_autoencoder.encode(vae, video)
        assert torch.allclose(mean, latents.mean, atol=1e-4)
        assert torch.allclose(log_variance.exp(), latents.var, rtol=1e-3)
        assert torch.allclose(wan_autoencoder.decode(vae, mean).clamp(-1, 1), decoded, atol=1e-4)
        # The stock way goes on as before, through the same modules.
        assert torch.allclose(vae.decode(vae.encode(video).latent_dist.mean).sample, decoded, atol=1e-4)
        assert decoded.std() > 0.01
