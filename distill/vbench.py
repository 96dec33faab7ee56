"""`python -m distill vbench VIDEOS`: what the VBench benchmark says of a folder of videos, where it is installed.

VBench wants versions of its own (numpy 1, transformers 4.33), so it is called in another Python, ``--python``. Before
that everything it would otherwise begin to download is looked for: weights are fetched by a person, not by this.
What it is called with is that of vbench 0.1.5 on PyPI, and of `vbench2_beta_i2v` in its repository.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from distill.config import ConfigError
from distill.loop import write_json
from distill.report import write

QUALITY = ("motion_smoothness", "dynamic_degree", "aesthetic_quality", "imaging_quality")
"""Judged from a video alone: those of the paper's table."""
FIDELITY = ("i2v_subject", "i2v_background")
"""How far subject and background are those of the given picture."""
_DINO = ("dino_model/facebookresearch_dino_main", "dino_model/dino_vitbase16_pretrain.pth")
WEIGHTS = {
    "motion_smoothness": ("amt_model/amt-s.pth",),
    "dynamic_degree": ("raft_model/models/raft-things.pth",),
    "aesthetic_quality": ("clip_model/ViT-L-14.pt", "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth"),
    "imaging_quality": ("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",),
    "i2v_subject": _DINO,
    "i2v_background": ("models",),  # DreamSim's, which it keeps in the folder that it is run in
}
"""In the cache folder, by what they are for."""

_FIND = "import importlib.util as u, json, sys; print(json.dumps([n for n in sys.argv[1:] if u.find_spec(n) is None]))"
_CALL = """
import importlib, json, sys
import torch
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
for call in json.loads(sys.argv[1]):
    judge = getattr(importlib.import_module(call["module"]), call["name"])(device, call["info"], call["out"])
    judge.evaluate(**call["arguments"])
"""


def vbench(videos: Path, out: Path, python: str, images: Path | None, say: Callable[[str], None]) -> Path:
    """Judge the videos of a folder, write `vbench.json` and `vbench.md` into ``out`` and return the latter.

    Args:
        videos: folder of `.mp4` files.
        out: beside what `distill evaluate` writes, for example.
        python: of the environment that VBench is installed in.
        images: for each video the picture that it was made from, of the same name (NAME-0.mp4, NAME-1.mp4: NAME.png).
        say: told what is going on.

    Raises:
        ConfigError: VBench or weights of it are missing, a video or a picture is, or VBench itself failed.
    """
    found = sorted(path for path in videos.glob("*") if path.suffix.lower() in (".mp4", ".gif"))
    if not found:
        raise ConfigError(f"{videos} holds no .mp4; name the folder that the videos were made into")
    if images is not None:
        _check_images(found, images)
    dimensions = (*QUALITY, *(FIDELITY if images else ()))
    cache = Path(os.environ.get("VBENCH_CACHE_DIR") or Path.home() / ".cache" / "vbench").resolve()
    _check_installed(python, with_images=images is not None)
    _check_weights(cache, dimensions)
    out.mkdir(parents=True, exist_ok=True)
    say(f"VBench: {len(found)} videos, {', '.join(dimensions)}; what it says goes to {out / 'vbench.log'}")
    judged = _judge(videos, out, python, images, cache)
    write_json(out / "vbench.json", judged)
    write(out / "vbench.md", _table(judged, len(found)))
    return out / "vbench.md"


def _check_images(found: Sequence[Path], images: Path) -> None:
    pictures = {path.stem for path in images.glob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg")}
    for video in found:
        wanted = re.sub(r"-\d+$", "", video.stem)  # as VBench looks for it
        if wanted not in pictures:
            raise ConfigError(
                f"{images} has no {wanted}.png or .jpg for {video.name}; put it there, or do without --images"
            )


def _check_installed(python: str, with_images: bool) -> None:
    names = ["vbench", "torch", *(["vbench2_beta_i2v", "dreamsim"] if with_images else [])]
    try:
        ran = subprocess.run([python, "-c", _FIND, *names], capture_output=True, text=True, check=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(f"--python {python} does not run: {error}; name the Python of VBench's environment") from None
    missing: list[str] = json.loads(ran.stdout)
    if missing:
        raise ConfigError(
            f"{python} has no {', '.join(missing)}: make an environment of its own with `pip install vbench` "
            "(for --images also dreamsim, and a checkout of github.com/Vchitect/VBench on PYTHONPATH), and name its "
            "interpreter with --python"
        )


def _check_weights(cache: Path, dimensions: Sequence[str]) -> None:
    missing = [file for dimension in dimensions for file in WEIGHTS[dimension] if not (cache / file).exists()]
    if missing:
        raise ConfigError(
            f"VBench's weights are not on this machine: {cache} has no {', '.join(dict.fromkeys(missing))}; let VBench "
            "download them where it may (`vbench evaluate --load_ckpt_from_local True` does), copy the folder here, "
            "and name it in VBENCH_CACHE_DIR"
        )


def _judge(videos: Path, out: Path, python: str, images: Path | None, cache: Path) -> dict[str, Any]:
    """Means by dimension, and of each video."""
    calls: list[tuple[str, str, str, Sequence[str], dict[str, str]]] = [("vbench", "VBench", "quality", QUALITY, {})]
    if images is not None:
        calls += [("vbench2_beta_i2v", "VBenchI2V", "i2v", FIDELITY, {"custom_image_folder": str(images.resolve())})]
    given = [
        {
            "module": module,
            "name": name,
            "info": "",  # of the benchmark's own prompts, which these videos are not of
            "out": str(out.resolve()),
            "arguments": {
                "videos_path": str(videos.resolve()),
                "name": f"vbench-{kind}",
                "dimension_list": list(dimensions),
                "local": True,
                "mode": "custom_input",
                **more,
            },
        }
        for module, name, kind, dimensions, more in calls
    ]
    environment = {**os.environ, "VBENCH_CACHE_DIR": str(cache)}
    with (out / "vbench.log").open("w") as log:
        command = [python, "-c", _CALL, json.dumps(given)]
        ran = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=cache, env=environment)  # noqa: S603
    if ran.returncode != 0:
        last = (out / "vbench.log").read_text().strip().splitlines()[-1:]
        raise ConfigError(f"VBench ended with {ran.returncode}: {' '.join(last)}; {out / 'vbench.log'} has all of it")
    results: dict[str, Any] = {}
    for _, _, kind, _, _ in calls:
        results.update(json.loads((out / f"vbench-{kind}_eval_results.json").read_text()))
    return {
        "means": {dimension: float(mean) for dimension, (mean, _) in results.items()},
        "videos": {
            dimension: {Path(one["video_path"]).name: float(one["video_results"]) for one in each}
            for dimension, (_, each) in results.items()
        },
    }


def _table(judged: dict[str, Any], count: int) -> str:
    means = judged["means"]
    lines = [f"# VBench, {count} videos of our own prompts", "", "| dimension | mean |", "|---|---:|"]
    lines += [f"| {dimension} | {mean:.4f} |" for dimension, mean in means.items()]
    quality = [means[dimension] for dimension in QUALITY]
    lines += [f"| average of {', '.join(QUALITY)} | {sum(quality) / len(quality):.4f} |", ""]
    lines += ["Its average rewards jitter: look at dynamic_degree, and at the flicker that `distill evaluate` reports."]
    return "\n".join(lines) + "\n"
