# The engine, its launchers and Ray; for `docker run`, and as KubeRay's image for heads and workers.
#
#   docker build -t ssd .
#   docker build -t ssd:cuda --build-arg TORCH_INDEX=https://pypi.org/simple .
#   docker run --rm -p 8000:8000 -v "$PWD/keys:/keys:ro" ssd serve --host 0.0.0.0 --api-key-file /keys
ARG PYTHON=3.12
FROM python:${PYTHON}-slim-bookworm

# Compilers are used at run time: torch.compile writes C++ on CPUs, triton C on GPUs. KubeRay's probes use wget.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ wget \
    && rm -rf /var/lib/apt/lists/*

# torch comes from this index: CPU wheels by default, PyPI's own are the CUDA build. The driver is the host's
# (NVIDIA container toolkit), the CUDA libraries are in the wheels.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# hadolint ignore=DL3013
RUN pip install --no-cache-dir --index-url "${TORCH_INDEX}" --extra-index-url https://pypi.org/simple "torch>=2.11,<2.14"

WORKDIR /opt/ssd
COPY pyproject.toml README.md LICENSE ./
COPY ssd ssd
COPY configs configs
COPY launch launch
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[cluster]" && rm -rf build

RUN useradd --create-home --uid 1000 ssd
USER 1000
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
ENTRYPOINT ["ssd"]
CMD ["info"]
