# A worker on an Ascend 910B. From the repository's root, on a machine of the server's architecture:
#   docker build -f docker/worker.npu.Dockerfile -t wan-worker:npu .
# The base has CANN and Python. CANN, torch and torch_npu go together: PAIR names the file of requirements/npu/ that says
# what was proven of a pair. The host needs the driver and Ascend Docker Runtime. Mount the models at /app/models.
ARG CANN_VERSION=9.1.0
ARG CANN_CHIP=910b
ARG CANN_SYSTEM=ubuntu22.04-py3.12
ARG BASE=quay.io/ascend/cann:${CANN_VERSION}-${CANN_CHIP}-${CANN_SYSTEM}

FROM ${BASE} AS build
RUN python3 -m venv /opt/wan
COPY requirements/worker-without-torch.txt requirements/tracing.txt /src/requirements/
RUN /opt/wan/bin/python -m pip install --no-cache-dir --require-hashes --no-deps --only-binary=:all: \
        -r /src/requirements/worker-without-torch.txt -r /src/requirements/tracing.txt
ARG PAIR=torch-2.10-cann-9.1
ARG TORCH_VERSION=2.10.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG TORCH_SHA256=
COPY docker/install-torch.sh /src/docker/
RUN sh /src/docker/install-torch.sh /opt/wan/bin/python "${TORCH_VERSION}"
COPY requirements/npu/ /src/requirements/npu/
# The pair's file pins torch, too: another TORCH_VERSION than its own ends the build here.
# hadolint ignore=DL3013
RUN /opt/wan/bin/python -m pip install --no-cache-dir --only-binary=:all: \
        torch_npu -c "/src/requirements/npu/${PAIR}.txt"
# Triton's kernels for the card (docs/ascend.md) are there if this names a version, like 3.2.0. The wheel names nothing
# that it needs: pybind11 and a C++ compiler for the launcher of each kernel, CANN's compiler for the kernel.
ARG TRITON_ASCEND=
RUN [ -z "${TRITON_ASCEND}" ] || /opt/wan/bin/python -m pip install --no-cache-dir --only-binary=:all: \
        "triton-ascend==${TRITON_ASCEND}" pybind11==3.1.0
COPY pyproject.toml README.md /src/
COPY jobs /src/jobs
COPY worker /src/worker
COPY quant /src/quant
RUN /opt/wan/bin/python -m pip install --no-cache-dir --no-deps --no-build-isolation /src \
    && /opt/wan/bin/python -m pip check \
    && /opt/wan/bin/python -m pip uninstall --yes pip

FROM ${BASE}
# The base may leave another user. tini: as process 1 a worker that still loads would ignore SIGTERM.
# A new volume at /artifacts gets this folder's owner.
USER 0
ARG TRITON_ASCEND=
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini ${TRITON_ASCEND:+g++} \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin wan \
    && install -d -o 10001 -g 10001 /artifacts /var/cache/wan
COPY --from=build /opt/wan /opt/wan
COPY docker/with-cann.sh /usr/local/bin/with-cann
WORKDIR /app
COPY deploy/wan-14b.toml deploy/wan-mini.toml /app/deploy/
# The root may be read-only: /tmp and /var/cache/wan are written to. CANN's logs and caches would go to the home.
ENV PATH=/opt/wan/bin:${PATH} \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    LOG_FORMAT=json \
    TRITON_CACHE_DIR=/var/cache/wan/triton \
    ASCEND_CACHE_PATH=/var/cache/wan/ascend \
    ASCEND_PROCESS_LOG_PATH=/tmp/ascend-log \
    WORKER_DEVICE=npu \
    WORKER_CONFIG=/app/deploy/wan-14b.toml
USER 10001:10001
HEALTHCHECK --interval=30s --timeout=15s --start-period=45m CMD ["python", "-m", "worker", "doctor", "--ready"]
ENTRYPOINT ["tini", "--", "sh", "/usr/local/bin/with-cann"]
CMD ["python", "-m", "worker"]
