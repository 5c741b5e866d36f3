"""What a run folder shows: plots, one self-contained page per run, and several runs side by side.

Everything is read from the run folder, so that it can be made at any time and on any machine: no model, no dataset.
"""
