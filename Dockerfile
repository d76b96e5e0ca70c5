# motet with exactly the versions that its tests run with. On a CPU:
#   docker build -t motet .
#   docker run --rm -v "$PWD:/data" --user "$(id -u):$(id -g)" motet demo --out runs/demo
# On NVIDIA GPUs:
#   docker build -t motet --build-arg TORCH=cu130 .
#   docker run --rm --gpus all motet doctor
FROM python:3.11-slim

# The compiler stays in the image: Triton on a GPU and torch.compile call it at run time.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

# torch first, in a layer of its own: it is by far the largest, and rarely changes.
ARG TORCH=cpu
COPY constraints.txt /tmp/
ENV PIP_NO_CACHE_DIR=1 PIP_CONSTRAINT=/tmp/constraints.txt
RUN pip install torch --extra-index-url https://download.pytorch.org/whl/${TORCH}
COPY . /tmp/motet
RUN MOTET_REQUIRE_NATIVE=1 pip wheel --no-deps --wheel-dir /tmp/wheels /tmp/motet \
    && pip install "$(echo /tmp/wheels/motet-*.whl)[ot,wsi]" \
    && rm -rf /tmp/motet /tmp/wheels

# The image runs as any user: matplotlib, Triton and torch write their caches to $HOME, and every
# user may write to /tmp.
ENV HOME=/tmp
WORKDIR /data
ENTRYPOINT ["motet"]
CMD ["doctor"]
