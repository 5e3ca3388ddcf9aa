# moa_serve on CPU, as a user without rights. Build: docker build -t moa_serve .
FROM python:3.11-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY moa_serve moa_serve
COPY docker/constraints.txt docker/constraints.txt
# On x86 the default index brings torch with gigabytes of CUDA; for a small image pass the index of torch's CPU wheels:
#   --build-arg PIP_ARGS="--extra-index-url URL"
ARG PIP_ARGS=""
RUN python -m venv /opt/moa && /opt/moa/bin/pip install --no-cache-dir $PIP_ARGS -c docker/constraints.txt .

FROM python:3.11-slim
RUN useradd --uid 10001 --create-home moa
COPY --from=build /opt/moa /opt/moa
COPY --chown=moa adapters /app/adapters
ENV PATH=/opt/moa/bin:$PATH MOA_CACHE_DIR=/home/moa/.cache/moa_serve PYTHONUNBUFFERED=1
USER moa
WORKDIR /app
ENTRYPOINT ["moa-serve"]
CMD ["--help"]
