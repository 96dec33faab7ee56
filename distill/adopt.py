"""`python -m distill adopt FOLDER`: make a downloaded pipeline folder a teacher: check it and write `teacher.json`.

What the card says of the call are the stock pipeline's own defaults, where nothing else is asked for. No weight is
loaded: shapes are read from the files' headers.
"""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import Any

import diffusers

from distill import schedule, student
from distill.backbones import base, wan
from distill.config import AdoptConfig
from distill.loop import write_json
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
_BESIDE = {
    "HunyuanVideo15Pipeline": ("guidance_scale", "max_sequence_length"),
    "HunyuanVideo15ImageToVideoPipeline": ("guidance_scale", "max_sequence_length", "height", "width"),
}
"""What a card's call says too, though the stock pipeline takes it from elsewhere: its guider, its image."""


def adopt(folder: Path, config: AdoptConfig) -> Card:
    """Write the card. Nothing else in the folder is touched, but that the pipeline of Wan2.2-TI2V-5B, which is for two
    tasks, is named in `model_index.json` as the one for the task that is asked for.

    Raises:
        FolderError: it is no pipeline folder that is known, a component is missing, two do not fit each other, the call
            is none that they can make, or there is a card already.
    """
    parts = student.components(folder)
    if found := [name for name in student.CARD_NAMES if (folder / name).exists()]:
        raise FolderError(
            f"{folder / found[0]} is there: the folder is a model already. Students are bound to its card; move the "
            "card away to write another one"
        )
    index = json.loads((folder / "model_index.json").read_text())
    kind = _pipeline(folder, index, config)
    _check_parts(folder, kind, parts)
    student.check_layers(folder)
    backbone = _backbone(folder, kind, index)
    call = _call(folder, kind, config)
    _check_call(folder, call, index)
    scheduler = _scheduler(folder, parts["scheduler"])
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
            width=call["width"],
            height=call["height"],
            num_frames=base.BACKBONES[backbone].frames_of(call),
            fps=config.fps,
        ),
        stages=(),
        metrics={},
        files={},
    )
    if kind != index["_class_name"]:
        write_json(folder / "model_index.json", {**index, "_class_name": kind})
    return student.write_card(folder, card)


def _pipeline(folder: Path, index: dict[str, Any], config: AdoptConfig) -> str:
    """The class of the stock pipeline."""
    kind = index.get("_class_name")
    if kind not in _KNOWN:
        raise FolderError(f"{folder} is of class {kind}; known are {', '.join(_KNOWN)}")
    for_both = kind in ("WanPipeline", "WanImageToVideoPipeline") and index.get("expand_timesteps")
    if for_both and kind == "WanPipeline" and config.task is None:
        raise FolderError(f"{folder} makes videos from text, and from an image: give --set task=ti2v or task=t2v")
    if for_both and config.task is not None:
        return "WanImageToVideoPipeline" if config.task == "ti2v" else "WanPipeline"
    if config.task not in (None, _KNOWN[kind]):
        raise FolderError(f"{folder} is a {kind}, whose task is {_KNOWN[kind]}; leave task={config.task} out")
    return str(kind)


def _scheduler(folder: Path, kind: str) -> Any:
    path = folder / "scheduler" / "scheduler_config.json"
    try:
        return getattr(diffusers, kind).from_pretrained(path.parent)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise FolderError(f"{path} is no {kind} that diffusers can read: {error}") from None


def _check_call(folder: Path, call: dict[str, Any], index: dict[str, Any]) -> None:
    """The stock pipelines round a size that does not fit, or fail in the middle of a clip."""
    transformer, vae = _config(folder, "transformer"), _config(folder, "vae")
    patch = transformer["patch_size"]
    side = (vae.get("scale_factor_spatial") or vae.get("spatial_compression_ratio") or 8) * (
        patch if isinstance(patch, int) else patch[-1]
    )
    every = vae.get("scale_factor_temporal") or vae.get("temporal_compression_ratio") or 4
    for name in ("width", "height"):
        if call[name] % side:
            raise FolderError(f"{name}={call[name]}: {folder.name} makes multiples of {side}; give one")
    if call["num_frames"] % every != 1:
        raise FolderError(f"num_frames={call['num_frames']}: {folder.name} makes {every} n + 1 frames; give so many")
    experts = (folder / "transformer_2").is_dir()
    if "guidance_scale_2" in call and not experts:
        raise FolderError(f"guidance_scale_2={call['guidance_scale_2']}: {folder.name} has one expert; leave it out")
    if experts != (index.get("boundary_ratio") is not None):
        raise FolderError(
            f"{folder / 'model_index.json'} says boundary_ratio {index.get('boundary_ratio')}, and there is "
            f"{'a' if experts else 'no'} transformer_2: one belongs to the other"
        )
    if transformer.get("image_dim") and call["max_sequence_length"] != wan.TEXT_TOKENS:
        raise FolderError(
            f"max_sequence_length={call['max_sequence_length']}: with an image's tokens before them {wan.TEXT_TOKENS} "
            "are taken for the text; leave it out"
        )


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
        is_network = name in ("vae", "image_encoder") or name.startswith(("transformer", "text_encoder"))
        if is_network and not any(p.suffix in (".safetensors", ".bin") for p in (folder / name).iterdir()):
            raise FolderError(f"{folder / name} holds no weights; download the whole folder")
    transformer = _config(folder, "transformer")
    for setting, component, of in _JOINTS.get(str(transformer.get("_class_name")), ()):
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


_JOINTS: dict[str, tuple[tuple[str, str, str], ...]] = {
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


def _call(folder: Path, kind: str, config: AdoptConfig) -> dict[str, Any]:
    known = inspect.signature(getattr(diffusers, kind).__call__).parameters
    beside = {name: None for name in _BESIDE.get(kind, ()) if name not in known}
    call = beside | {name: known[name].default for name in _CALL if name in known}
    guider = folder / "guider" / "guider_config.json"
    if "guidance_scale" in beside and guider.exists():
        call["guidance_scale"] = json.loads(guider.read_text())["guidance_scale"]
    asked = config.model_dump(include={*_CALL, "guidance_scale_2", "negative_prompt"}, exclude_none=True)
    for name in asked:
        if name not in known and name not in beside:
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
    return sum(math.prod(shape) for shape in student.shapes_of(component).values())
