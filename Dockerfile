# syntax=docker/dockerfile:1
#
#   docker build --tag to-finetune .
#   docker run --rm --init --gpus all --ipc=host -v to-finetune-cache:/cache -v to-finetune-runs:/workspace/runs \
#       --entrypoint accelerate to-finetune launch finetune.py --optim diagonal_to ...
#
# It takes any base with Python 3.11 or newer, pip, apt and torch: torch stays the base's, to the build. This one has
# Python 3.12, torch 2.13, CUDA 13.0 (driver 580 or newer; 2.13.0-cuda12.6-cudnn9-runtime for older ones) and no nvcc.
# Without a daemon or a GPU: python scripts/build_image.py
ARG BASE_IMAGE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime

# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS build
WORKDIR /src
COPY pyproject.toml ./
ARG EXTRAS=hf,quantized,sweep,deepspeed
# A file of its own: what the big layer below is made from changes with the dependencies alone, not with the source.
RUN python3 -c "import sys, tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    print(*project['dependencies'], *(name for extra in sys.argv[1].split(',') \
    for name in project['optional-dependencies'][extra]), sep='\n')" "${EXTRAS}" > /requirements.txt
COPY README.md LICENSE ./
COPY to_finetune ./to_finetune
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip,target=/etc/pip.conf \
    python3 -m pip wheel --no-deps --wheel-dir /dist .

# hadolint ignore=DL3006
FROM ${BASE_IMAGE}
# The optimizers' CPU kernel is compiled where it runs, and so is what launches Triton's kernels, against Python's headers.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends g++ python3-dev \
    && rm -rf /var/lib/apt/lists/*

# An environment over the base's own packages. The constraint keeps torch what it is, here and in every later pip install.
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:${PATH} PIP_CONSTRAINT=/opt/constraints.txt
RUN python3 -m venv --system-site-packages --without-pip /opt/venv \
    && python -c "from importlib.metadata import version; print('torch==' + version('torch'))" > /opt/constraints.txt
COPY --from=build /requirements.txt /opt/requirements.txt
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip,target=/etc/pip.conf \
    DS_BUILD_OPS=0 python -m pip install --requirement /opt/requirements.txt
RUN --mount=type=bind,from=build,source=/dist,target=/dist \
    python -m pip install --no-cache-dir --no-deps /dist/*.whl \
    && python -c "import torch; assert not torch.__file__.startswith('/opt/venv'), 'torch was replaced'"

WORKDIR /workspace
COPY scripts/finetune.py ./
COPY scripts/finetune.py scripts/tiny_llama.py ./scripts/
COPY configs ./configs
# Writable for everybody, so that --user "$(id -u):$(id -g)" works with mounted folders.
RUN useradd --uid 10001 --no-create-home --home-dir /cache finetune \
    && mkdir --parents /cache runs \
    && chmod 1777 /cache runs
ENV HOME=/cache USER=finetune XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface TRITON_CACHE_DIR=/cache/triton
VOLUME ["/cache"]
USER 10001

ARG VERSION
ARG SOURCE
LABEL org.opencontainers.image.title="to_finetune" \
      org.opencontainers.image.description="Fine-tunes large language models with the Trainable Optimizer" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.source="${SOURCE}"
# A step of the optimizer, on the CPU: nothing is taken from a run's GPU.
HEALTHCHECK --interval=10m --timeout=2m --start-period=2m CMD ["python", "-c", "\
import torch, to_finetune; torch.set_num_threads(1); weight = torch.nn.Parameter(torch.ones(64)); \
optimizer = to_finetune.DiagonalTO([weight], lr=0.1, alpha=0.1, beta=0.1); \
weight.sum().backward(); optimizer.step(); assert (weight < 1).all()"]
ENTRYPOINT ["to-finetune"]
CMD ["--help"]
