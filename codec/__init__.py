"""Compressed files: tokens as bytes, and images as files."""
