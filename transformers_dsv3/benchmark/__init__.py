"""How fast a model runs here, side by side with other implementations on the same weights, and how fast it could run.

`benchmark.py` puts together what the other files do: the models and processes that are timed (`presets`, `contenders`,
`training_memory`, `loading`, `serving`, `peers`), what is timed (`workloads`), in which order (`rounds`), what the
machine could do at best (`ceilings`, `floors`), and what is printed and drawn (`report`).
"""
