# motet with exactly the versions that its tests run with. On a CPU:
#   docker build -t motet .
#   docker run --rm -v "$PWD:/data" --user "$(id -u):$(id -g)" motet demo --out runs/demo
# On NVIDIA GPUs:
#   docker build -t motet --build-arg TORCH=cu130 .
#   docker run --rm --gpus all motet doctor

# The compiler is in the final image too: Triton on a GPU and torch.compile call it at run time.
FROM python:3.11-slim AS base
RUN apt-get update && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /motet
ENV PIP_NO_CACHE_DIR=1

FROM base AS build
COPY . .
RUN MOTET_REQUIRE_NATIVE=1 pip wheel --no-deps --wheel-dir dist .

FROM base
# torch first, in a layer of its own: it is by far the largest, and rarely changes.
ARG TORCH=cpu
COPY constraints.txt .
RUN pip install --constraint constraints.txt torch \
    --extra-index-url https://download.pytorch.org/whl/${TORCH}
COPY --from=build /motet/dist dist
RUN pip install --constraint constraints.txt "$(echo dist/motet-*.whl)[ot,wsi]"

# The image runs as any user: matplotlib, Triton and torch write their caches to $HOME.
RUN mkdir --mode 1777 /home/any
ENV HOME=/home/any
WORKDIR /data
ENTRYPOINT ["motet"]
CMD ["doctor"]
