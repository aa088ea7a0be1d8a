"""Where samples come from: one file per data source, none of which imports torch.

A source is a pure function from (split, index) to a sample (`source.py`). Text sources hand their documents
(`documents.py`) to `packed_text.py`, which tokenises them once into a cache (`token_cache.py`) and cuts rows out of
the concatenated stream; `rows.py` reads files of many documents, `mixture.py` mixes sources by weight; synthetic
sources draw each sample from a seed. Configuration is in `configs.py`.
"""
