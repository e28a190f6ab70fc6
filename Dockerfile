# The serving image: no compilers, no torch, a numeric user without rights, nothing written outside
# /data and /tmp, so that it runs with a read-only root (`--read-only --tmpfs /tmp -v …:/data`).
FROM python:3.11-slim AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/hedged
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY posthoc ./posthoc
COPY calibration ./calibration
COPY service ./service
COPY hedged ./hedged
RUN /opt/hedged/bin/pip install --constraint constraints.txt .

FROM python:3.11-slim
COPY --from=build /opt/hedged /opt/hedged
RUN install -d -o 10001 -g 10001 /data
# BENTOML_CONTAINERIZED stays unset: with it BentoML does not restart a worker that was killed.
ENV PATH=/opt/hedged/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    BENTOML_DO_NOT_TRACK=True \
    BENTOML_HOME=/tmp/bentoml \
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
