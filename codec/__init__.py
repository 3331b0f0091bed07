"""Compressed files: tokens as bytes, and images as files."""

import data  # noqa: F401  # says so where another project's packages are found instead of ours
