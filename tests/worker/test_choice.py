"""Which engine runs a model: each gives PyTorch's video, and what does not work says why."""

import copy
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import pytest
import torch
from PIL import Image

from distill import student
from worker.engine import choice, decoders
from worker.engine.eager import EagerEngine
from worker.engine.errors import EngineError
from worker.pipeline import Options, VideoPipeline
from worker.settings import MODELS_DIR, Settings

PROMPT = "a red circle moves right quickly, static camera"


@pytest.fixture(scope="module")
def pipelines(engines):
    """The bundled student, once for each engine that a CPU has."""
    return {kind: load(engines, engine=kind) for kind in ("eager", "ort")}


def load(engines, folder=MODELS_DIR / "shapes-4step", **settings):
    return VideoPipeline(folder, Options.of(Settings(device="cpu", torch_threads=1, engines=engines, **settings)))


@pytest.fixture(scope="module")
def image():
    return Image.open(MODELS_DIR / "examples" / "red-circle.png").convert("RGB")


def frames(pipeline, image, seed=1):
    return pipeline(image, PROMPT, seed=seed).frames_THWC


def psnr_db(got, wanted):
    error = np.mean((got.astype(float) - wanted.astype(float)) ** 2)
    return 10 * np.log10(255**2 / max(error, 1e-9))


def test_the_engines_agree(pipelines, image):
    made = {kind: frames(pipeline, image) for kind, pipeline in pipelines.items()}
    assert made["eager"].shape == (17, 64, 64, 3)
    assert psnr_db(made["ort"], made["eager"]) >= 45
    assert psnr_db(frames(pipelines["ort"], image, seed=2), made["eager"]) < 40  # or anything would agree
    assert {kind: p.engine for kind, p in pipelines.items()} == {"eager": "eager-cpu", "ort": "ort-cpu"}
    assert [p.choice.decoder.name for p in pipelines.values()] == ["whole-eager", "whole-ort"]


def test_auto_takes_onnxruntime_on_a_cpu_and_repeats_its_bytes(pipelines, image, engines):
    auto = load(engines)
    assert (auto.engine, auto.choice.reason) == ("ort-cpu", None)
    assert np.array_equal(frames(auto, image), frames(pipelines["ort"], image))


def test_auto_falls_back_and_says_why(engines, monkeypatch):
    monkeypatch.setattr(choice, "_PARITY", 1e-12)
    monkeypatch.setattr(choice._compare, "__defaults__", (1e-12,))
    monkeypatch.setattr(choice.check_parity, "__defaults__", (1e-12,))
    auto = load(engines)
    assert auto.engine == "eager-cpu"
    assert auto.choice.reason.startswith("ort: ort-cpu differs from PyTorch by ")
    with pytest.raises(EngineError, match="differs from PyTorch"):
        load(engines, engine="ort")


def test_a_gpu_engine_on_a_cpu_is_refused(engines):
    with pytest.raises(EngineError, match="CUDA graphs need a GPU, and eager-cpu is not on one"):
        load(engines, engine="eager", cuda_graphs=True)
    with pytest.raises(EngineError, match="TensorRT needs an NVIDIA GPU"):
        load(engines, engine="trt")


def test_another_students_weights_are_put_into_the_graph_that_is_there(
    pipelines, image, engines, tmp_path, monkeypatch
):
    """No export: the same graph, other weights by name."""
    from worker.engine import export

    folder = tmp_path / "other"
    shutil.copytree(MODELS_DIR / "shapes-4step", folder)
    pipe = student.load_pipeline(folder, "cpu")
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.mul_(1.02)
    pipe.transformer.save_pretrained(folder / "transformer")
    card = student.read_card(MODELS_DIR / "shapes-4step")
    (folder / "student.json").unlink()
    student.write_card(folder, card.model_copy(update={"name": "other"}))

    def refuse(*_):
        raise AssertionError("exported anew")

    monkeypatch.setattr(export, "export", refuse)
    other = load(engines, folder, engine="ort")
    made = frames(other, image)
    assert psnr_db(made, frames(load(engines, folder, engine="eager"), image)) >= 45
    assert psnr_db(made, frames(pipelines["ort"], image)) < 45
    # What `python -m distill lineage` finds the student's engines by.
    registry = json.loads((engines / "registry.json").read_text())
    own = student.read_card(folder)
    [build] = [build["about"] for build in registry.values() if build["about"]["model_sha256"] == own.sha256]
    assert build["weights_sha256"] == student.weights_sha256(own.files, "transformer")
    assert build["versions"]["torch"] == version("torch")


@pytest.mark.parametrize(("memory_mb", "name"), [(16, "whole-eager"), (3, "pieces"), (1, "tiles")])
def test_the_decoder_keeps_to_the_memory(pipelines, memory_mb, name):
    pipeline = pipelines["eager"]
    wanted = replace(Options.of(Settings(device="cpu")).engine, decode_memory_bytes=memory_mb * 2**20)
    model = pipeline._model()
    decoder = choice._decoder(model, wanted)
    assert decoder.name == name
    with torch.no_grad():
        pieces = list(decoder(model.latents_BCTHW))
    assert [piece.shape[2] for piece in pieces] == ([1, 4, 4, 4, 4] if name == "pieces" else [17])
    whole = torch.cat(pieces, dim=2)
    reference = torch.cat(list(pipeline.choice.decoder(model.latents_BCTHW)), dim=2)
    assert torch.allclose(whole, reference, atol=1e-4)


def test_decoding_in_pieces_is_not_disturbed_by_encoding(pipelines):
    """The autoencoder keeps what it needs of the past on itself, and the next clip is encoded meanwhile."""
    pipeline = pipelines["eager"]
    vae, latents = pipeline._pipe.vae, torch.randn(1, 24, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        decoder = decoders.PieceDecoder(pipeline._model().backbone, vae)
        wanted = torch.cat(list(decoder(latents)), dim=2)
        pieces = []
        for piece in decoder(latents):
            pieces.append(piece)
            vae.encode(torch.zeros(1, 3, 1, 64, 64))
    assert torch.equal(torch.cat(pieces, dim=2), wanted)


def test_sentences_are_encoded_once(pipelines, image):
    pipeline, calls = pipelines["eager"], []
    hook = pipeline._pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    sentences = ("a red star spins, static camera", "a blue star spins, static camera")
    made = [pipeline(image, sentences[i], seed=1).frames_THWC for i in (0, 1, 0)]
    hook.remove()
    assert len(calls) == 2
    assert np.array_equal(made[0], made[2])
    assert not np.array_equal(made[0], made[1])


def test_the_text_cache_is_bounded(engines):
    pipeline = load(engines, engine="eager", text_cache_mb=1)
    one = pipeline._texts.currsize
    pipeline._texts = type(pipeline._texts)(2 * one + 1, getsizeof=pipeline._texts.getsizeof)
    for colour in ("red", "green", "blue", "white"):
        pipeline._encode_text(f"a {colour} circle moves right quickly, static camera", None)
    assert (len(pipeline._texts), pipeline._texts.currsize) == (2, 2 * one)
    assert load(engines, engine="eager", text_cache_mb=0)._texts.currsize == 0


def test_an_engine_says_what_it_is_not_given(pipelines):
    engine = pipelines["ort"].choice.engine
    with pytest.raises(TypeError, match="return_dict=False"):
        engine(hidden_states=torch.zeros(1))
    with pytest.raises(TypeError, match="timestep is float"):
        engine(timestep=1.0, return_dict=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
def test_a_compiled_engine_is_the_same(pipelines):
    eager = pipelines["eager"].choice.engine
    with torch.no_grad():
        compiled = EagerEngine(copy.deepcopy(eager.transformer), compile_blocks=True)
        choice.check_parity(compiled, eager, pipelines["eager"]._model().inputs)
    assert compiled.name == "compiled-cpu"


def test_clips_that_are_denoised_together_are_the_same(pipelines, image, engines):
    alone = [frames(pipelines["ort"], image, seed=seed) for seed in (1, 2)]
    batched = load(engines, engine="ort", max_batch=2)
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda seed: frames(batched, image, seed), (1, 2)))
    for one, other in zip(alone, together, strict=True):
        assert psnr_db(other, one) >= 45
    by_itself = frames(batched, image)
    assert psnr_db(by_itself, alone[0]) >= 45
    assert np.array_equal(frames(batched, image), by_itself)


def test_fp8_is_the_eager_engines_and_auto_says_so(pipelines, image, engines):
    cast = load(engines, casting="fp8")
    assert (cast.engine, cast.choice.reason) == ("eager-cpu", "CASTING=fp8 is for the eager engine")
    assert 35 <= psnr_db(frames(cast, image), frames(pipelines["eager"], image)) < 90
    with pytest.raises(EngineError, match="ENGINE=ort and CASTING=fp8 cannot be had together"):
        load(engines, engine="ort", casting="fp8")
    with pytest.raises(EngineError, match="OFFLOAD"):
        load(engines, offload="group")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"compile": "on", "casting": "fp8"}, "COMPILE=on and CASTING=fp8"),
        ({"cuda_graphs": True, "devices": 2}, "CUDA_GRAPHS=on and DEVICES=2"),
        ({"max_batch": 2, "offload": "group"}, "MAX_BATCH=2 and OFFLOAD=group"),
    ],
)
def test_settings_that_cannot_be_had_together(engines, settings, said):
    with pytest.raises(EngineError, match=said):
        load(engines, **settings)


def test_two_processes_share_a_video(pipelines, image, engines):
    shared = load(engines, devices=2)
    try:
        assert (shared.engine, shared.choice.reason) == ("eager-cpu-x2", "DEVICES=2 is for the eager engine")
        assert psnr_db(frames(shared, image), frames(pipelines["eager"], image)) >= 45
    finally:
        shared.choice.engine.close()
