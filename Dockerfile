# moa_serve on CPU, as a user without rights, on a read-only root if you like.
#   docker build -t moa_serve .                       the default base is fetched at the first start
#   docker build -t moa_serve --build-arg BAKE=bake . the default base is in the image
#   docker run -p 8000:8000 -e MOA_API_KEY=... -v ./adapters:/app/adapters:ro moa_serve
FROM python:3.11-slim AS build
# The native step is compiled here; without a compiler the image would serve by torch.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE ./
COPY docker/constraints.txt docker/install.sh docker/
COPY moa_serve moa_serve
# On x86 the default index brings torch with gigabytes of CUDA; for a small image pass torch's CPU wheels:
#   --build-arg PIP_ARGS="--extra-index-url URL"
ARG PIP_ARGS=""
ARG BAKE=""
RUN PIP_ARGS="$PIP_ARGS" docker/install.sh /opt/moa "$BAKE" && mkdir -p /opt/moa/share/moa_serve

FROM python:3.11-slim
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
