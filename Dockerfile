# relook serve in a container, on a CPU:
#
#     docker build -t relook .
#     docker run --rm -p 127.0.0.1:8000:8000 relook                         # receipts-tiny; its page: http://127.0.0.1:8000
#     docker run --rm -p 127.0.0.1:8000:8000 relook cards-tiny --rows 4     # arguments are those of `relook serve`
#
# For CUDA (any base with Python 3.11 or later, or with apt-get):
#
#     docker build -t relook:cuda --build-arg BASE=nvidia/cuda:13.0.1-base-ubuntu24.04 \
#         --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
#     docker run --rm --gpus all -p 127.0.0.1:8000:8000 relook:cuda rp-yu/Qwen2-VL-2b-VPT-CLIP --dtype bfloat16
ARG BASE=python:3.11-slim-bookworm
# hadolint ignore=DL3006
FROM ${BASE}

# The distribution's Python, whichever version it has, where the base has none.
# hadolint ignore=DL3008
RUN if ! command -v python3 >/dev/null; then \
        apt-get update && apt-get install -y --no-install-recommends python3 python3-venv && rm -rf /var/lib/apt/lists/*; \
    fi && python3 -m venv /opt/relook && useradd --create-home --uid 10001 relook
ENV PATH=/opt/relook/bin:$PATH PYTHONUNBUFFERED=1

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /build
# Before the sources: the layer of packages, most of the image, stays when only they change.
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt --extra-index-url "${TORCH_INDEX}" torch
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir -c constraints.txt --extra-index-url "${TORCH_INDEX}" ".[serve]"

USER 10001
WORKDIR /home/relook
# Models of the hub are kept here; mount a volume.
RUN mkdir -p .cache/huggingface
VOLUME /home/relook/.cache/huggingface
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health/ready', timeout=4)"]
ENTRYPOINT ["relook", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["receipts-tiny"]
