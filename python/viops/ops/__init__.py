"""One folder an op family: README.md, reference.py, op.py, module.py, cases.py."""
