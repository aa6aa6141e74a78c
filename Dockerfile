# `docker build -t simpledeco . && docker run simpledeco` sets up and runs every test, as `make test` does on a bare machine
FROM python:3.11-bookworm
RUN apt-get update && apt-get install -y --no-install-recommends chromium latexmk texlive-fonts-recommended texlive-latex-base \
    texlive-latex-extra texlive-latex-recommended && rm -rf /var/lib/apt/lists/*
WORKDIR /simpledeco
COPY . .
RUN make setup
CMD ["make", "test"]
