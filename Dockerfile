# syntax=docker/dockerfile:1
# The project in NVIDIA's NeMo container, for GPUs:   docker build -t llm-builder .
# What the image has stays as it is: only packages that it lacks are added, and the build fails where they do not fit.
ARG BASE=nvcr.io/nvidia/nemo:26.02.01
FROM ${BASE}

ARG REVISION=unknown
LABEL org.opencontainers.image.title="LLM Builder" \
      org.opencontainers.image.description="Pre-training, tuning, conversion and evaluation of language models on NeMo and Megatron-Core" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="nvcr.io/nvidia/nemo:26.02.01"

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/llm-builder

# NVIDIA's images number their own user 1000; that number is what volumes are written with.
RUN groupadd --gid 1000 --non-unique builder \
 && useradd --uid 1000 --gid 1000 --non-unique --create-home builder \
 && install --directory --owner=1000 --group=1000 runs

COPY requirements/ requirements/
RUN python requirements/into_image.py

COPY . .
RUN python launchers/doctor.py && python launchers/run.py

ENV HOME=/home/builder PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 LLM_BUILDER_REVISION=${REVISION}
USER 1000:1000
HEALTHCHECK --interval=60s --timeout=20s --start-period=120s --retries=3 CMD ["python", "launchers/health.py"]
CMD ["python", "launchers/run.py"]
