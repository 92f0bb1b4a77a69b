# One image per service: docker build --target gateway|tokenizer|scheduler|executor|executor-cuda|executor-rocm .
# `compose.yaml` builds and runs all of them.
ARG PYTHON=python:3.11-slim

FROM ${PYTHON} AS wheel
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

# What gateway, tokenizer and scheduler share: no backend's libraries.
FROM ${PYTHON} AS services
COPY pyproject.toml /tmp/
COPY tools/service_requirements.py /tmp/
RUN python -m venv /opt/penstock \
 && python /tmp/service_requirements.py /tmp/pyproject.toml > /tmp/requirements.txt \
 && /opt/penstock/bin/pip install --no-cache-dir -r /tmp/requirements.txt
COPY --from=wheel /wheel /wheel
RUN /opt/penstock/bin/pip install --no-cache-dir --no-deps /wheel/*.whl

FROM ${PYTHON} AS backends
COPY pyproject.toml /tmp/
COPY tools/service_requirements.py /tmp/
RUN python -m venv /opt/penstock \
 && python /tmp/service_requirements.py /tmp/pyproject.toml --backends > /tmp/requirements.txt \
 && /opt/penstock/bin/pip install --no-cache-dir -r /tmp/requirements.txt
COPY --from=wheel /wheel /wheel
RUN /opt/penstock/bin/pip install --no-cache-dir --no-deps /wheel/*.whl

FROM ${PYTHON} AS base
RUN groupadd --gid 10001 penstock && useradd --uid 10001 --gid penstock --create-home penstock \
 && install --directory --owner penstock --group penstock /home/penstock/.cache
ENV PATH=/opt/penstock/bin:$PATH PYTHONUNBUFFERED=1 PENSTOCK_LOG_FORMAT=json
USER penstock
WORKDIR /home/penstock

FROM base AS scheduler
COPY --from=services /opt/penstock /opt/penstock
ENV PENSTOCK_SCHEDULER_LISTEN=0.0.0.0:8012 PENSTOCK_SCHEDULER_METRICS=0.0.0.0:9012
EXPOSE 8012 9012
HEALTHCHECK --interval=10s --timeout=10s --start-period=20s CMD ["python", "-m", "penstock.cli.health", "127.0.0.1:8012"]
ENTRYPOINT ["penstock", "scheduler"]

FROM base AS tokenizer
COPY --from=services /opt/penstock /opt/penstock
ENV PENSTOCK_TOKENIZER_LISTEN=0.0.0.0:8011 PENSTOCK_TOKENIZER_METRICS=0.0.0.0:9011
EXPOSE 8011 9011
HEALTHCHECK --interval=10s --timeout=10s --start-period=20s CMD ["python", "-m", "penstock.cli.health", "127.0.0.1:8011"]
ENTRYPOINT ["penstock", "tokenizer"]

FROM base AS gateway
COPY --from=services /opt/penstock /opt/penstock
ENV PENSTOCK_GATEWAY_HTTP=0.0.0.0:8000 PENSTOCK_GATEWAY_GRPC=0.0.0.0:8001
EXPOSE 8000 8001
HEALTHCHECK --interval=10s --timeout=10s --start-period=20s CMD ["python", "-m", "penstock.cli.health", "127.0.0.1:8001"]
ENTRYPOINT ["penstock", "gateway"]

FROM base AS executor-base
ENV PENSTOCK_EXECUTOR_LISTEN=0.0.0.0:8013 PENSTOCK_EXECUTOR_METRICS=0.0.0.0:9013
EXPOSE 8013 9013
HEALTHCHECK --interval=10s --timeout=10s --start-period=60s CMD ["python", "-m", "penstock.cli.health", "127.0.0.1:8013"]
ENTRYPOINT ["penstock", "executor"]

FROM executor-base AS executor
COPY --from=backends /opt/penstock /opt/penstock

# Last, since builders without BuildKit make every stage before the one that is asked for.
# The same with PyTorch for NVIDIA's or AMD's devices: its wheels bring the libraries, the host only the driver.
FROM backends AS backends-cuda
ARG TORCH_CUDA_INDEX=https://download.pytorch.org/whl/cu130
RUN /opt/penstock/bin/pip install --no-cache-dir --extra-index-url ${TORCH_CUDA_INDEX} "$(echo /wheel/*.whl)[torch]"

FROM backends AS backends-rocm
ARG TORCH_ROCM_INDEX=https://download.pytorch.org/whl/rocm7.1
RUN /opt/penstock/bin/pip install --no-cache-dir --extra-index-url ${TORCH_ROCM_INDEX} "$(echo /wheel/*.whl)[torch]"

# Triton compiles the launcher of a kernel where it runs.
FROM executor-base AS executor-triton
USER root
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
USER penstock

FROM executor-triton AS executor-cuda
COPY --from=backends-cuda /opt/penstock /opt/penstock

FROM executor-triton AS executor-rocm
COPY --from=backends-rocm /opt/penstock /opt/penstock
