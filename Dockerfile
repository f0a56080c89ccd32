# The GPU image, and a smaller one for CPUs:
#   docker build -t finetune .
#   docker build -t finetune --build-arg DEVICE=cpu .
# Your photos, a run that is kept outside, and enough shared memory for data workers:
#   docker run --rm --gpus all --shm-size 8g --stop-timeout 120 -v ~/photos:/photos:ro -v "$PWD/runs:/work/runs" \
#     --user "$(id -u):$(id -g)" finetune --config_file accelerate_configs/gpu.yaml train.py \
#     --data /photos --model resnet50 --output runs/photos --resume auto
# A command for the run:  docker run ... --entrypoint python finetune -m trainer report runs/photos
FROM python:3.13-slim

# torch.compile and Triton call a compiler.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

WORKDIR /work

# cu130, cu126, cpu, ...: a folder of https://download.pytorch.org/whl
ARG DEVICE=cu130
RUN pip install --no-cache-dir --index-url "https://download.pytorch.org/whl/${DEVICE}" "torch>=2.11" "torchvision>=0.26"

COPY pyproject.toml README.md LICENSE ./
COPY trainer trainer
RUN pip install --no-cache-dir --editable .
COPY train.py ./
COPY accelerate_configs accelerate_configs
COPY deploy deploy

# Any --user may write here; caches of weights and of compiled code are in /work/.cache, a volume that may be kept.
RUN useradd --uid 1000 trainer && mkdir runs data .cache && chmod 777 . runs data .cache
ENV PYTHONUNBUFFERED=1 USER=trainer HOME=/work TORCH_HOME=/work/.cache/torch TORCHINDUCTOR_CACHE_DIR=/work/.cache/inductor
USER 1000

# Process 1 is the launcher: it hands SIGTERM to the run, which saves, and ends with the run's exit code.
ENTRYPOINT ["python", "deploy/launch.py"]
CMD ["--config_file", "accelerate_configs/cpu.yaml", "train.py", "--output", "runs/digits", "--resume", "auto"]
