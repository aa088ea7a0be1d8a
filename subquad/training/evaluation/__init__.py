"""What a finished run can do: text by position and length, synthetic tasks, tasks of lm-eval.

`evaluate.py` is the whole of the verb; `loaded_run.py` is what is judged; one file per kind of suite; `report.py`
turns the record into words and pictures.
"""
