# The image of the ranks: docker build -t megapromoe . in a checkout. Versions are those of constraints.txt.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim-bookworm

# Triton and DeepSpeed compile kernels at run time.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/megapromoe
COPY constraints.txt ./
# torch comes first: DeepSpeed, built from source, looks for it. A layer of its own: it changes least often.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir --constraint constraints.txt torch

COPY setup.py pyproject.toml README.md LICENSE ./
COPY megapromoe megapromoe
COPY launchers launchers
COPY ds_configs ds_configs
RUN pip install --no-cache-dir --constraint constraints.txt '.[images,data,text]' \
    && useradd --create-home --uid 1000 megapromoe

USER 1000
CMD ["megapromoe", "--help"]
