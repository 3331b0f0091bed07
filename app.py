"""The page with a slider as a Space of the Hugging Face hub; elsewhere: python3 scripts/demo.py. See docs/demo.md."""

import runpy

runpy.run_module("scripts.demo", run_name="__main__")
