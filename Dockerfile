# toptwo in a container: no compiler, no root, everything that must outlive it in /data.
#
#   docker build -t toptwo .
#   docker run -p 127.0.0.1:8000:8000 -v toptwo-data:/data toptwo
#
# For an image without CUDA, give the package index with PyTorch's CPU builds:
#   docker build --build-arg PIP_EXTRA_INDEX_URL=... -t toptwo .
#
# Every package that gets in is named by its hash; `make lock` writes the lists.

FROM python:3.11-slim-bookworm AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
ARG PIP_EXTRA_INDEX_URL=
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
COPY requirements.lock requirements-cuda.lock requirements-build.lock ./
RUN python -m venv /opt/build && /opt/build/bin/pip install --require-hashes -r requirements-build.lock
RUN python -m venv /opt/toptwo && /opt/toptwo/bin/pip install --require-hashes \
    -r "$([ -n "$PIP_EXTRA_INDEX_URL" ] && echo requirements.lock || echo requirements-cuda.lock)"
COPY pyproject.toml README.md LICENSE ./
COPY kernels kernels
COPY server server
RUN PATH=/opt/build/bin:$PATH pip wheel --no-deps --no-index --no-build-isolation --wheel-dir /wheels . \
    && /opt/toptwo/bin/pip install --no-deps --no-index /wheels/*.whl

FROM python:3.11-slim-bookworm
RUN useradd --uid 10001 --create-home toptwo \
    && install --directory --owner toptwo /data
COPY --from=build /opt/toptwo /opt/toptwo
USER toptwo
ENV PATH=/opt/toptwo/bin:$PATH \
    TOPTWO_HOST=0.0.0.0 \
    TOPTWO_PORT=8000 \
    TOPTWO_CACHE_DIR=/data \
    TOPTWO_DATA_DIR=/data \
    HF_HOME=/data/hub
VOLUME /data
EXPOSE 8000
# The first start fetches and prepares the default model before it is ready.
HEALTHCHECK --interval=10s --timeout=3s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"TOPTWO_PORT\"]}/health/ready', timeout=2)"]
ENTRYPOINT ["toptwo"]
CMD ["serve"]
