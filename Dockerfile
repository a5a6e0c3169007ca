# syntax=docker/dockerfile:1
# An image with the commands and configs of this repository, for a CPU, NVIDIA GPUs or TPUs:
#   docker build -t sso_jax --build-arg DEVICE=cpu .           (or cuda, or tpu)
#   docker run --rm -v "$PWD/runs:/sso_jax/runs" sso_jax       (the toy run; the folder must be writable for user 1000)
#   docker run --rm --gpus all -v "$PWD/runs:/sso_jax/runs" sso_jax python train.py --config configs/gpu_24gb.yaml
#   docker stop --time 120 NAME                                (a clean stop, exit status 75: run it again to go on)
# CUDA comes with jax's packages: the host needs a driver for CUDA 13 and the NVIDIA container toolkit. gcsfs reads and writes gs://.
# How far this was checked: linted by hadolint; built for a CPU at commit 72172cb by buildah 1.28 (chroot isolation, PYTHON=3.13), with a
# Debian 13 made by debootstrap, Python 3.13.5, in place of python:3.13-slim, which could not be fetched. In that image, as its user:
# the toy run to its end, sample.py on what it left, and SIGTERM to the command as process 1 (status 75). Not run: Docker itself, the
# real base image, GPUs and TPUs; for CUDA and TPU pip resolved the requirements in that image, and installed nothing.
# tests/deploy/test_dockerfile.py replays the steps without a container.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

ARG DEVICE=cpu
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
RUN useradd --create-home --uid 1000 sso
WORKDIR /sso_jax

# The requirements alone, so that a change of the code installs nothing anew.
COPY requirements.txt requirements-cuda.txt requirements-tpu.txt ./
# hadolint ignore=DL3042
RUN --mount=type=cache,target=/var/cache/pip \
    case "$DEVICE" in \
        cpu) set -- ;; \
        cuda | tpu) set -- -r "requirements-$DEVICE.txt" ;; \
        *) echo "DEVICE is $DEVICE; give cpu, cuda or tpu" >&2; exit 2 ;; \
    esac && \
    pip install --cache-dir /var/cache/pip --root-user-action=ignore -r requirements.txt "$@" "gcsfs>=2026.2"

COPY . .
RUN install --directory --owner=sso runs
USER 1000
CMD ["python", "train.py", "--config", "configs/tiny.yaml"]
