# The tasks of this repository, in the words that CI runs them in: `just TASK`, in a virtual environment.
# The program is `pip install rust-just`, and part of `just install-all`. `just --list` lists the tasks.

set shell := ["bash", "-euo", "pipefail", "-c"]

# What the tests need
install:
    pip install -c constraints.txt -e ".[test]"

# What every task here needs
install-all:
    pip install -c constraints.txt -e ".[test,lint,notebooks]"

# torch and numpy alone are enough to import flexjag and attend
bare:
    python tests/bare.py

# The tests, as README runs them: minutes
test:
    pytest -n 2 --dist loadfile

# What `test` leaves out: slow tests, and more examples of every property
test-rest:
    HYPOTHESIS_PROFILE=ci pytest -n 2 --dist loadfile -m "slow or hypothesis"

# Property tests with ten times the examples, and random ones: hours
test-nightly:
    HYPOTHESIS_PROFILE=nightly pytest -n 2 --dist loadfile -m hypothesis

# Format the code, and mend what ruff can mend
format:
    ruff format .
    ruff check --fix .

# Format and lint
lint:
    ruff format --check .
    ruff check .

# Types of the package
types:
    pyright

# Who may import whom
imports:
    lint-imports

# Types of what users write: README, docs, notebooks
types-of-pages:
    #!/usr/bin/env bash
    set -euo pipefail
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    python .ci/snippets.py "$work/pages"
    mypy --cache-dir "$work/mypy" "$work"/pages/*.py tests/test_types.py
    pyright "$work"/pages/*.py tests/test_types.py

# The wheel has the marker of typed packages, and the headers of CPU kernels
wheel:
    #!/usr/bin/env bash
    set -euo pipefail
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    pip wheel -q --no-deps -w "$work" .
    python -m zipfile -l "$work"/flexjag-*.whl > "$work/files"
    grep flexjag/py.typed "$work/files"
    for folder in kernels/cpp backends/cpp/kernels ops/cpp; do grep "flexjag/$folder/.*\.h" "$work/files"; done

# Run the notebooks
notebooks:
    #!/usr/bin/env bash
    set -euo pipefail
    for notebook in notebooks/*.ipynb; do
      echo "$notebook"
      jupyter nbconvert --to notebook --execute --stdout --ExecutePreprocessor.timeout=240 "$notebook" > /dev/null
    done
