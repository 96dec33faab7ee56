# The images: `--target service` has no torch, `--target worker` runs the model, `--target trainer` makes new ones, `--target
# board` looks into the queues. Torch comes from TORCH_INDEX_URL, by default the CPU builds; with an empty one pip's usual torch
# comes, which brings CUDA: no image of NVIDIA's is needed below it, only the driver that the container runtime mounts.
# Full versions: such a tag may be built anew, but does not move to another release. `make pin-images` adds digests.

FROM python:3.11.15-slim-bookworm AS base
ENV PATH=/opt/venv/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOST=0.0.0.0 STORAGE_URL=/storage
# A new volume mounted at /storage takes this owner over.
RUN useradd --uid 10001 --no-create-home app && install --directory --owner app --group app /storage
WORKDIR /app

# torch.compile calls a C++ compiler: for the blocks on a GPU (Triton) and for training, twice as fast with it.
FROM base AS base-torch
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

FROM base AS build
RUN python -m venv /opt/venv
COPY pyproject.toml constraints.txt README.md LICENSE ./

FROM build AS build-service
COPY service service
COPY worker worker
COPY distill distill
RUN --mount=type=cache,target=/root/.cache/pip \
    HOME=/root pip install --constraint constraints.txt --editable '.[service,s3,otel]'

FROM build AS build-board
RUN --mount=type=cache,target=/root/.cache/pip \
    HOME=/root pip install --constraint constraints.txt '.[board]'

FROM build AS build-worker
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
# With a GPU also "gpu", TensorRT.
ARG EXTRAS=worker,s3,otel
RUN --mount=type=cache,target=/root/.cache/pip \
    HOME=/root pip install ${TORCH_INDEX_URL:+--no-deps --index-url "$TORCH_INDEX_URL"} \
    --constraint constraints.txt "$(grep '^torch==' constraints.txt)"
COPY worker worker
COPY distill distill
RUN --mount=type=cache,target=/root/.cache/pip \
    HOME=/root pip install --constraint constraints.txt --editable ".[$EXTRAS]"

FROM build-worker AS build-trainer
RUN --mount=type=cache,target=/root/.cache/pip \
    HOME=/root pip install --constraint constraints.txt --editable '.[worker,distill]'

FROM base AS service
COPY --from=build-service /opt/venv /opt/venv
COPY --from=build-service /app /app
COPY --chown=10001 models/examples models/examples
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8000, timeout=4); c.request('GET', '/livez'); raise SystemExit(c.getresponse().status != 200)"]
CMD ["python", "-m", "service"]

FROM base-torch AS worker
# What is compiled is loaded as code, which /tmp may not hold in a container.
ENV HF_HUB_OFFLINE=1 ENGINES=/engines STUDENTS=/engines/students \
    TORCHINDUCTOR_CACHE_DIR=/engines/compiled TRITON_CACHE_DIR=/engines/compiled/triton
RUN install --directory --owner app --group app /engines
COPY --from=build-worker /opt/venv /opt/venv
COPY --from=build-worker /app /app
COPY --chown=10001 models models
USER 10001
CMD ["python", "-m", "worker"]

FROM base-torch AS trainer
ENV HF_HUB_OFFLINE=1 RUNS=/runs STUDENTS=/runs/students \
    TORCHINDUCTOR_CACHE_DIR=/runs/compiled TRITON_CACHE_DIR=/runs/compiled/triton
RUN install --directory --owner app --group app /runs
COPY --from=build-trainer /opt/venv /opt/venv
COPY --from=build-trainer /app /app
COPY --chown=10001 models models
USER 10001
CMD ["python", "-m", "worker.trainer"]

FROM base AS board
COPY --from=build-board /opt/venv /opt/venv
USER 10001
EXPOSE 9181
CMD ["rq-dashboard"]
