"""The page with a slider: what its parts do, without Gradio, which playground/page.py alone imports."""
