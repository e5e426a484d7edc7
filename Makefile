PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install demo check docs test test-slow format clean-demo faults chaos reliability

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@# OpenCV's usual wheel needs libGL, which servers lack; the headless one does not.
	@$(BIN)/python -c "import cv2" 2>/dev/null || ( $(BIN)/python -m pip uninstall --quiet --yes opencv-python \
	  && $(BIN)/python -m pip install --quiet --constraint constraints.txt opencv-python-headless )
	@touch $(STAMP)

demo: install
	@test -f demo/data/data.yaml || $(BIN)/python -m dfssd.data.synthetic --out demo/data --images 800 --side 128
	@$(BIN)/python jobs/pipeline.py --data demo/data --label-fraction 0.08 --imgsz 128 \
	  --steps 220 --teacher-steps 600 --mean-teacher-steps 40 --storage-path demo/runs --run-name demo

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy dfssd
	$(MAKE) --no-print-directory docs

docs: install
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

test: install
	$(BIN)/pytest -m "not slow"

test-slow: install
	$(BIN)/pytest -m "slow and not faults and not chaos"

faults: install
	$(BIN)/pytest -m "not chaos" tests/faults tests/test_tracking.py tests/test_properties.py tests/distributed

chaos: install
	$(BIN)/pytest -s -m chaos tests/faults

reliability: install
	$(BIN)/python benchmarks/reliability.py --folder build/reliability --minutes 14 --write docs/reliability.md

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean-demo:
	rm -rf demo
