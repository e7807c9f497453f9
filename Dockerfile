# The GPU path: training with DeepSpeed, generation, Gaussians. Where this was written there was no container engine: it
# has not been built.
#
#   docker build -t fvgen .
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/data" fvgen doctor
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/data" fvgen generate photographs --device cuda --out walk
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/data" --entrypoint deepspeed fvgen /opt/fvgen/recipes/stage1_gan.py ...

# Its major version is that of the torch in constraints.txt. The compiler is needed: DeepSpeed's optimisers and gsplat
# build their kernels when they are first used.
ARG CUDA=13.0.1
FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04

RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-dev python3-venv build-essential git \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv && /opt/venv/bin/pip install --no-cache-dir uv
ENV PATH=/opt/venv/bin:$PATH

WORKDIR /opt/fvgen
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
COPY recipes recipes
RUN uv pip install --python /opt/venv/bin/python --no-cache --constraint constraints.txt --editable '.[train,photos,eval,scene]'

# Whoever runs it mounts a folder of theirs here; caches stay in it.
WORKDIR /data
ENV FVGEN_CACHE=/data/.cache/fvgen HF_HOME=/data/.cache/huggingface TORCH_HOME=/data/.cache/torch
ENTRYPOINT ["fvgen"]
CMD ["doctor"]
