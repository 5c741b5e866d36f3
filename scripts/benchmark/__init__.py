"""Speed and memory against diffusers in the same run: see ``__main__.py``."""
