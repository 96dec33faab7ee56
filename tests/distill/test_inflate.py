"""The autoencoder begins its clips as what it was on frames."""

import torch

from distill import recipes, teach
from distill.config import override


def test_an_inflated_autoencoder_treats_each_frame_alone():
    torch.manual_seed(0)
    vae = teach.make_vae(override(recipes.teach_shapes(), ["vae.base_dim=8"]).vae).eval()
    video = torch.rand(1, 3, 9, 64, 64) * 2 - 1
    with torch.no_grad():
        clip = vae.decode(vae.encode(video).latent_dist.mean).sample
        for last, frames in {0: [0], 4: [1, 2, 3, 4], 8: [5, 6, 7, 8]}.items():
            alone = vae.decode(vae.encode(video[:, :, last : last + 1]).latent_dist.mean).sample[:, :, 0]
            for frame in frames:  # each latent frame keeps the last of its four frames, and repeats it
                assert torch.allclose(clip[:, :, frame], alone, atol=1e-5)
