# moa_serve as a user without rights, on a read-only root if you like. The last target computes on the CPU, `cuda` on an NVIDIA GPU.
#   docker build -t moa_serve .                       the default base is fetched at the first start
#   docker build -t moa_serve --build-arg BAKE=bake . the default base is in the image
#   docker run -p 8000:8000 -e MOA_API_KEY=... -v ./adapters:/app/adapters:ro moa_serve
#   docker build --target cuda -t moa_serve:cuda .
#   docker run --gpus 1 -p 8000:8000 -e MOA_API_KEY=... -v ./adapters:/app/adapters:ro -v moa-triton:/opt/moa/share/moa_serve/triton moa_serve:cuda
FROM python:3.11-slim AS build
# The native step is compiled here; without a compiler the image would serve by torch.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE ./
COPY docker/constraints.txt docker/install.sh docker/
COPY moa_serve moa_serve
# On x86 the default index brings torch with gigabytes of CUDA, which the target `cuda` needs; for a small CPU image pass torch's CPU wheels:
#   --build-arg PIP_ARGS="--extra-index-url URL"
ARG PIP_ARGS=""
ARG BAKE=""
RUN PIP_ARGS="$PIP_ARGS" docker/install.sh /opt/moa "$BAKE" && mkdir -p /opt/moa/share/moa_serve

FROM python:3.11-slim AS server
RUN useradd --uid 10001 --create-home moa
COPY --from=build --chown=10001 /opt/moa /opt/moa
COPY --chown=10001 adapters /app/adapters
ENV PATH=/opt/moa/bin:$PATH MOA_CACHE_DIR=/opt/moa/share/moa_serve MOA_HOST=0.0.0.0 PYTHONUNBUFFERED=1
USER 10001
WORKDIR /app
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health/live', timeout=2)"]
ENTRYPOINT ["moa-serve"]
CMD ["serve"]

# CUDA's libraries and Triton come with torch, the driver's from the NVIDIA container toolkit of the host: no CUDA base image is needed.
FROM server AS cuda
USER 0
RUN python -c "import torch, triton; assert torch.version.cuda, f'torch {torch.__version__} has no CUDA; build without PIP_ARGS'"
# Triton compiles what launches its kernels with a C compiler at the first start. What it made is kept in the folder: mount a volume there
# to keep it longer than the container, one from which code may be run (no noexec).
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/* && \
    install -d -o 10001 /opt/moa/share/moa_serve/triton
# Without a GPU the server says so and ends, rather than be slow.
ENV MOA_DEVICE=cuda TRITON_CACHE_DIR=/opt/moa/share/moa_serve/triton NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001

FROM server AS cpu
