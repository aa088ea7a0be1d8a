"""Synthetic tasks with exact answers: one file per task, none of which imports torch.

A task (`task.py`) draws a row of tokens and the answers it asks for from a random generator, at a length and a size
(how many pairs, symbols, needles, hops, bits or numbers). The same draws are trained on (`sources/synthetic.py`) and
judged by (`evaluation/synthetic.py`), from seeds that never meet. `catalogue.py` lists them.
"""
