# A worker on an NVIDIA GPU. From the repository's root:
#   docker build -f docker/worker.cuda.Dockerfile -t wan-worker:cuda .
# torch brings its CUDA libraries, so the base needs none; the host needs a driver for CUDA 13 and NVIDIA's container
# toolkit. Mount the models at /app/models, read-only.
ARG BASE=docker.io/library/python:3.12-slim-bookworm

FROM ${BASE} AS build
RUN python3 -m venv /opt/wan
COPY requirements/worker.txt requirements/tracing.txt /src/requirements/
RUN /opt/wan/bin/python -m pip install --no-cache-dir --require-hashes --no-deps --only-binary=:all: \
        -r /src/requirements/worker.txt -r /src/requirements/tracing.txt
COPY pyproject.toml README.md /src/
COPY jobs /src/jobs
COPY worker /src/worker
COPY quant /src/quant
RUN /opt/wan/bin/python -m pip install --no-cache-dir --no-deps --no-build-isolation /src \
    && /opt/wan/bin/python -m pip check \
    && /opt/wan/bin/python -m pip uninstall --yes pip

FROM ${BASE}
# gcc: Triton compiles a small launcher for each kernel when it first runs. The official images have Python.h.
# tini: as process 1 a worker that still loads would ignore SIGTERM.
# A new volume at /artifacts gets this folder's owner.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin wan \
    && install -d -o 10001 -g 10001 /artifacts /var/cache/wan
COPY --from=build /opt/wan /opt/wan
WORKDIR /app
COPY deploy/wan-14b.toml deploy/wan-mini.toml /app/deploy/
# The root may be read-only: /tmp and /var/cache/wan are written to. The second keeps compiled kernels between starts.
ENV PATH=/opt/wan/bin:${PATH} \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    LOG_FORMAT=json \
    TRITON_CACHE_DIR=/var/cache/wan/triton \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    WORKER_DEVICE=cuda \
    WORKER_CONFIG=/app/deploy/wan-14b.toml
USER 10001:10001
HEALTHCHECK --interval=30s --timeout=15s --start-period=45m CMD ["python", "-m", "worker", "doctor", "--ready"]
ENTRYPOINT ["tini", "--"]
CMD ["python", "-m", "worker"]
