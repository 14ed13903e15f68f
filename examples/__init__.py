"""Small programs to start from: ``python -m examples.demo``, ``python -m examples.patch_pipeline``."""
