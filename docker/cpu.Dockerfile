# syntax=docker/dockerfile:1
# Penchant for CPUs. Build from the repository's root:  docker build -f docker/cpu.Dockerfile -t penchant:cpu .
# The base is pinned by tag. If builds must be reproducible, pin its digest too: FROM python:3.11-slim-bookworm@sha256:...
FROM python:3.11-slim-bookworm

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    VIRTUAL_ENV=/opt/penchant \
    PATH=/opt/penchant/bin:$PATH

# an unprivileged user, and the folders that it can write to
RUN useradd --create-home --uid 1000 penchant && mkdir -p /workspace /home/penchant/.cache && chown -R penchant:penchant /workspace /home/penchant

# dependencies first, so that this layer is reused when only the source changes
WORKDIR /src
COPY constraints.txt ./
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python -m venv /opt/penchant
RUN --mount=type=cache,target=/root/.cache/pip pip install -c constraints.txt --index-url ${TORCH_INDEX} torch
COPY pyproject.toml README.md LICENSE ./
COPY docker/dependencies.py docker/
RUN python docker/dependencies.py pyproject.toml eval > requirements.txt
RUN --mount=type=cache,target=/root/.cache/pip pip install -c constraints.txt -r requirements.txt

COPY src src
RUN --mount=type=cache,target=/root/.cache/pip pip install --no-deps .

USER 1000:1000
WORKDIR /workspace
VOLUME ["/workspace", "/home/penchant/.cache"]
ENTRYPOINT ["penchant"]
CMD ["--help"]
