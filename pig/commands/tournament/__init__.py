"""`tournament`: every method on one base, one data set and one benchmark, as commands that a user could give.

`config.py` says what takes part, `plan.py` which commands that means, `checks.py` whether they can work, `estimate.py`
what they take; `run.py` gives them, `standings.py` reads what they have written, `page.py` shows it.
"""
