# The front end: no torch, no model. From the repository's root:
#   docker build -f docker/service.Dockerfile -t wan-service .
# BASE needs Python 3.11 or newer with venv; pin it by digest for builds that can be repeated.
ARG BASE=docker.io/library/python:3.12-slim-bookworm

FROM ${BASE} AS build
RUN python3 -m venv /opt/wan
COPY requirements/service.txt requirements/tracing.txt /src/requirements/
RUN /opt/wan/bin/python -m pip install --no-cache-dir --require-hashes --only-binary=:all: \
        -r /src/requirements/service.txt -r /src/requirements/tracing.txt
COPY pyproject.toml README.md /src/
COPY jobs /src/jobs
COPY service /src/service
# What is installed is what the front end imports; pip and setuptools are not.
RUN /opt/wan/bin/python -m pip install --no-cache-dir --no-deps --no-build-isolation /src \
    && /opt/wan/bin/python -m pip check \
    && /opt/wan/bin/python -m pip uninstall --yes setuptools pip

FROM ${BASE}
# A new volume at /artifacts gets this folder's owner.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin wan \
    && install -d -o 10001 -g 10001 /artifacts
COPY --from=build /opt/wan /opt/wan
WORKDIR /app
# The root may be read-only: only /tmp is written to. A container forgets that there were keys, so they are required.
ENV PATH=/opt/wan/bin:${PATH} \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    LOG_FORMAT=json \
    SERVICE_HOST=0.0.0.0 \
    SERVICE_PORT=8000 \
    SERVICE_KEYS=required \
    SERVICE_STATE_DIR=/tmp/wan-hif8
USER 10001:10001
EXPOSE 8000
# Not /readyz: that is 503 without a worker, and restarting the front end would not bring one.
HEALTHCHECK --interval=15s --timeout=5s --start-period=30s CMD ["python", "-c", "import os, urllib.request as web; web.urlopen(f'http://127.0.0.1:{os.environ[\"SERVICE_PORT\"]}/healthz', timeout=4)"]
CMD ["python", "-m", "service"]
