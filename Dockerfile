# toptwo in a container: no compiler, no root, everything that must outlive it in /data.
#
#   docker build -t toptwo .
#   docker run -p 127.0.0.1:8000:8000 -v toptwo-data:/data toptwo
#
# For an image without CUDA, give the package index with PyTorch's CPU builds:
#   docker build --build-arg PIP_EXTRA_INDEX_URL=... -t toptwo .

FROM python:3.11-slim-bookworm AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY kernels kernels
COPY server server
ARG PIP_EXTRA_INDEX_URL=
ENV PIP_CONSTRAINT=/src/constraints.txt \
    PIP_BUILD_CONSTRAINT=/src/constraints.txt \
    PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/toptwo && /opt/toptwo/bin/pip install '.[hub]'

FROM python:3.11-slim-bookworm
RUN useradd --uid 10001 --create-home toptwo \
    && install --directory --owner toptwo /data
COPY --from=build /opt/toptwo /opt/toptwo
USER toptwo
ENV PATH=/opt/toptwo/bin:$PATH \
    TOPTWO_HOST=0.0.0.0 \
    TOPTWO_PORT=8000 \
    TOPTWO_CACHE_DIR=/data \
    HF_HOME=/data/hub
VOLUME /data
EXPOSE 8000
# The first start fetches and prepares the default model before it is ready.
HEALTHCHECK --interval=10s --timeout=3s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"TOPTWO_PORT\"]}/health/ready', timeout=2)"]
ENTRYPOINT ["toptwo"]
CMD ["serve"]
