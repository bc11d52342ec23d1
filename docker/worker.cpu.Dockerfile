# A worker on CPUs, for the miniature and for trials. From the repository's root:
#   docker build -f docker/worker.cpu.Dockerfile -t wan-worker:cpu .
# Mount the models at /app/models, read-only: models/wan-mini, or another with its configuration in WORKER_CONFIG.
ARG BASE=docker.io/library/python:3.12-slim-bookworm

FROM ${BASE} AS build
RUN python3 -m venv /opt/wan
COPY requirements/worker-without-torch.txt requirements/tracing.txt /src/requirements/
RUN /opt/wan/bin/python -m pip install --no-cache-dir --require-hashes --no-deps --only-binary=:all: \
        -r /src/requirements/worker-without-torch.txt -r /src/requirements/tracing.txt
ARG TORCH_VERSION=2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG TORCH_SHA256=
COPY docker/install-torch.sh /src/docker/
RUN sh /src/docker/install-torch.sh /opt/wan/bin/python "${TORCH_VERSION}"
COPY pyproject.toml README.md /src/
COPY jobs /src/jobs
COPY worker /src/worker
COPY quant /src/quant
RUN /opt/wan/bin/python -m pip install --no-cache-dir --no-deps --no-build-isolation /src \
    && /opt/wan/bin/python -m pip check \
    && /opt/wan/bin/python -m pip uninstall --yes pip

FROM ${BASE}
# tini: as process 1 a worker that still loads would ignore SIGTERM.
# A new volume at /artifacts gets this folder's owner.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin wan \
    && install -d -o 10001 -g 10001 /artifacts
COPY --from=build /opt/wan /opt/wan
WORKDIR /app
COPY deploy/wan-14b.toml deploy/wan-mini.toml /app/deploy/
# The root may be read-only: only /tmp is written to, with the unfinished MP4 of the job in hand.
ENV PATH=/opt/wan/bin:${PATH} \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    LOG_FORMAT=json \
    WORKER_DEVICE=cpu \
    WORKER_CONFIG=/app/deploy/wan-mini.toml
USER 10001:10001
HEALTHCHECK --interval=30s --timeout=15s --start-period=15m CMD ["python", "-m", "worker", "doctor", "--ready"]
ENTRYPOINT ["tini", "--"]
CMD ["python", "-m", "worker"]
