"""The method, in plain tensors: the unmasking chain that training and sampling share (arXiv 2602.10314).

Read ``step.py`` first: it is the step that both sides take. ``policies.py`` and ``reveal.py`` are its two halves,
``chains.py`` and ``stages.py`` its state. ``teacher/`` moves chains with the tokens of the data, for training
(``puma.py`` is the paper's algorithm); ``student/`` moves them with the model's own, for sampling.
"""
