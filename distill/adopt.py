"""`python -m distill adopt FOLDER`: make a downloaded pipeline folder a teacher: check it and write `teacher.json`.

What the card says of the call are the stock pipeline's own defaults, where nothing else is asked for. No weight is
loaded: shapes are read from the files' headers.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers

from distill import schedule, student
from distill.backbones import base
from distill.config import AdoptConfig
from distill.prompt import Prompt
from distill.student import Card, FolderError

_KNOWN = {
    "WanImageToVideoPipeline": "ti2v",
    "WanPipeline": "t2v",
    "HunyuanVideoImageToVideoPipeline": "ti2v",
    "HunyuanVideoPipeline": "t2v",
    "HunyuanVideo15ImageToVideoPipeline": "ti2v",
    "HunyuanVideo15Pipeline": "t2v",
}
"""Stock pipelines with the task of each."""
_CALL = ("num_inference_steps", "guidance_scale", "true_cfg_scale", "height", "width", "num_frames",
         "max_sequence_length")  # fmt: skip
"""Of a pipeline's defaults, what the card says. A model folder has to say all that its clips depend on."""


def adopt(folder: Path, config: AdoptConfig) -> Card:
    """Write the card. Nothing else in the folder is touched.

    Raises:
        FolderError: it is no pipeline folder that is known, a component is missing, or two do not fit each other.
    """
    parts = student.components(folder)
    index = json.loads((folder / "model_index.json").read_text())
    kind = index["_class_name"]
    if kind not in _KNOWN:
        raise FolderError(f"{folder} is of class {kind}; known are {', '.join(_KNOWN)}")
    _check_parts(folder, kind, parts)
    student.check_layers(folder)
    backbone = _backbone(folder, kind, index)
    call = _call(kind, config)
    scheduler = getattr(diffusers, parts["scheduler"]).from_pretrained(folder / "scheduler")
    card = Card(
        kind="teacher",
        name=config.name or folder.resolve().name,
        created_at=student.now(),
        backbone=backbone,
        task=_KNOWN[kind],
        parameters={name: _parameters(folder / name) for name in ("transformer", "transformer_2") if name in parts},
        call=call,
        sigmas=schedule.visited(base.BACKBONES[backbone], scheduler, call["num_inference_steps"]),
        prompt=Prompt(kind="free", help=config.help, examples=config.examples),
        video=student.Video(
            width=call["width"], height=call["height"], num_frames=call["num_frames"], fps=config.fps
        ),
        stages=(),
        metrics={},
        files={},
    )  # fmt: skip
    return student.write_card(folder, card)


def _check_parts(folder: Path, kind: str, parts: dict[str, str]) -> None:
    """Every component of the class is there, and what is joined has one width."""
    wanted = inspect.signature(getattr(diffusers, kind).__init__).parameters
    optional = {*getattr(diffusers, kind)._optional_components, "transformer"}
    for name in ("transformer", *wanted):
        is_part = name == "transformer" or (name not in optional and wanted[name].default is inspect.Parameter.empty)
        if is_part and name != "self" and name not in parts:
            raise FolderError(f"{folder} has no {name}, which {kind} needs; download the whole folder")
    for name in parts:
        if not (folder / name).is_dir():
            raise FolderError(f"{folder / name} is missing, and model_index.json lists it; download the whole folder")
    transformer = _config(folder, "transformer")
    for setting, component, of in _JOINTS.get(transformer["_class_name"], ()):
        if transformer.get(setting) is None:
            continue
        if component not in parts:
            raise FolderError(f"{folder} has no {component}, which its transformer needs; download the whole folder")
        got = _config(folder, component)
        width = got.get(of) or got.get("text_config", {}).get(of)
        if width is not None and width != transformer[setting]:
            raise FolderError(
                f"{folder / 'transformer/config.json'} says {setting} {transformer[setting]}, and the {component} "
                f"beside it has {of} {width}: they are parts of different models"
            )


_JOINTS = {
    "WanTransformer3DModel": (
        ("text_dim", "text_encoder", "d_model"), ("image_dim", "image_encoder", "hidden_size"),
        ("out_channels", "vae", "z_dim"),
    ),
    "HunyuanVideoTransformer3DModel": (
        ("text_embed_dim", "text_encoder", "hidden_size"), ("pooled_projection_dim", "text_encoder_2", "hidden_size"),
        ("out_channels", "vae", "latent_channels"),
    ),
    "HunyuanVideo15Transformer3DModel": (
        ("text_embed_dim", "text_encoder", "hidden_size"), ("text_embed_2_dim", "text_encoder_2", "d_model"),
        ("out_channels", "vae", "latent_channels"),
    ),
}  # fmt: skip
"""By class of the transformer: a width in its configuration, and the component and setting that has to be as wide."""


def _backbone(folder: Path, kind: str, index: dict[str, Any]) -> str:
    transformer = _config(folder, "transformer")
    if kind == "WanImageToVideoPipeline":
        return "wan" if index.get("expand_timesteps") else "wan-i2v"
    if kind == "HunyuanVideoImageToVideoPipeline" and transformer.get("image_condition_type") == "latent_concat":
        return "hunyuan-i2v-concat"
    return {
        "WanPipeline": "wan-t2v",
        "HunyuanVideoImageToVideoPipeline": "hunyuan-i2v",
        "HunyuanVideoPipeline": "hunyuan-t2v",
        "HunyuanVideo15ImageToVideoPipeline": "hunyuan15-i2v",
        "HunyuanVideo15Pipeline": "hunyuan15-t2v",
    }[kind]


def _call(kind: str, config: AdoptConfig) -> dict[str, Any]:
    known = inspect.signature(getattr(diffusers, kind).__call__).parameters
    call = {name: known[name].default for name in _CALL if name in known}
    asked = config.model_dump(include={*_CALL, "guidance_scale_2", "negative_prompt"}, exclude_none=True)
    for name in asked:
        if name not in known:
            raise FolderError(f"{kind} has no {name.replace('_', ' ')}; leave it out")
    call |= asked
    if missing := [name for name, value in call.items() if value is None]:
        raise FolderError(f"{kind} has no default of its own for {' and '.join(missing)}; give it")
    return call


def _config(folder: Path, component: str) -> dict[str, Any]:
    path = folder / component / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise FolderError(f"{path} cannot be read ({error}); download the whole folder") from None
    return config


def _parameters(component: Path) -> int:
    count = 0
    for shape in student.shapes_of(component).values():
        size = 1
        for length in shape:
            size *= length
        count += size
    return count
