# The serving image: no torch, no compilers, no pip, a numeric user without rights, nothing written
# outside /data and /tmp, so that it runs with a read-only root. All that is installed is pinned by
# version and hash in deploy/locks (`make locks`), the base image by tag. Two targets:
#
#   docker build -t hedged .                                   # the CPU; the default, `cpu`
#   docker build -t hedged:cuda --target cuda .                # NVIDIA GPUs
#   docker run --read-only --tmpfs /tmp -p 3000:3000 -v "$PWD/bundle:/bundles:ro" -v hedged-data:/data …
#
# The tag's digest pins the base to the byte: `docker buildx imagetools inspect` prints it, then
# --build-arg PYTHON_IMAGE=python:3.11.15-slim-trixie@sha256:…
ARG PYTHON_IMAGE=python:3.11.15-slim-trixie

FROM ${PYTHON_IMAGE} AS tools
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY deploy/locks/build.txt ./deploy/locks/build.txt
RUN pip install --require-hashes --no-deps --only-binary=:all: -r deploy/locks/build.txt
RUN python -m venv --without-pip /opt/hedged

FROM tools AS wheel
COPY pyproject.toml README.md LICENSE ./
COPY posthoc ./posthoc
COPY calibration ./calibration
COPY service ./service
COPY hedged ./hedged
RUN pip wheel --no-deps --no-build-isolation --no-index --wheel-dir /wheels .

# Libraries before the wheel: a change of the code leaves their layer as it was.
FROM tools AS installed-cpu
COPY deploy/locks/serve-cpu.txt ./deploy/locks/serve-cpu.txt
RUN pip --python /opt/hedged/bin/python install --require-hashes --no-deps --only-binary=:all: \
    -r deploy/locks/serve-cpu.txt
COPY --from=wheel /wheels /wheels
RUN pip --python /opt/hedged/bin/python install --no-deps --no-index /wheels/*.whl

# CUDA and cuDNN come as locked wheels, too: only the libraries that ONNX Runtime loads, of the
# release that it was built with. The driver (580 or newer) is the host's.
FROM tools AS installed-cuda
COPY deploy/locks/serve-cuda.txt ./deploy/locks/serve-cuda.txt
RUN pip --python /opt/hedged/bin/python install --require-hashes --no-deps --only-binary=:all: \
    -r deploy/locks/serve-cuda.txt
COPY --from=wheel /wheels /wheels
RUN pip --python /opt/hedged/bin/python install --no-deps --no-index /wheels/*.whl

FROM ${PYTHON_IMAGE} AS runtime
ARG PYTHON_IMAGE
ARG REVISION=unknown
LABEL org.opencontainers.image.title="hedged" \
      org.opencontainers.image.description="Honest error bars for a model that is already deployed" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="docker.io/library/${PYTHON_IMAGE}"
RUN pip uninstall --yes --root-user-action=ignore pip setuptools wheel \
    && install -d -o 10001 -g 10001 /data
# BENTOML_CONTAINERIZED stays unset: with it BentoML does not restart a worker that was killed.
# ONNX Runtime, from 1.29 on, tells its maker of each model that it opens, unless it is told not to.
ENV PATH=/opt/hedged/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    BENTOML_DO_NOT_TRACK=True \
    BENTOML_HOME=/tmp/bentoml \
    ORT_DISABLE_TELEMETRY=1 \
    HEDGED_HOST=0.0.0.0 \
    HEDGED_PORT=3000 \
    HEDGED_DATA_DIR=/data
WORKDIR /data
VOLUME /data
EXPOSE 3000
USER 10001:10001
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"HEDGED_PORT\"]}/readyz', timeout=2)"]
# Mount a bundle, or a folder of bundles, at /bundles.
ENTRYPOINT ["hedged", "serve"]
CMD ["/bundles"]

FROM runtime AS cuda
# What the host's container runtime adds: the driver's own libraries, of the visible GPUs.
ENV HEDGED_DEVICE=cuda \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=installed-cuda /opt/hedged /opt/hedged

FROM runtime AS cpu
ENV HEDGED_DEVICE=cpu
COPY --from=installed-cpu /opt/hedged /opt/hedged
